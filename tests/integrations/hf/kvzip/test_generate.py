"""The cache in ``generate``: again and again, after failures, in batches, beams, samples and threads."""

import copy
import threading

import pytest
import torch
import transformers
from dataopt.integrations.hf import KVzipCache
from packaging import version
from transformers import LogitsProcessorList, StoppingCriteriaList, TextStreamer, pipeline

from .conftest import CONTEXT, GREEDY, full_ids, generate, tiny
from .reference import masked_logits

QUESTION = "Who sold the boat?"
OTHERS = ["When?", "Who keeps the blue key, and where is it kept by now?", "Whose?"]


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture
def cache(model, tokenizer) -> KVzipCache:
    return KVzipCache(model, tokenizer, CONTEXT, ratio=0.3)


@pytest.fixture
def answer(cache, model) -> torch.Tensor:
    """(1, L): what the question is answered at first."""
    return model.generate(**cache.inputs(QUESTION), past_key_values=cache, **GREEDY)


def stored(cache) -> list[torch.Tensor]:
    return [t for p in cache._states[0].packed for t in (p.keys, p.values)]


def same(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Again and again


def test_the_line_twice_in_a_row(model, tokenizer):
    """Nothing between the two calls: generate itself starts the cache anew."""
    cache = KVzipCache(model, tokenizer, CONTEXT, ratio=0.3)
    inputs = cache.inputs(QUESTION)
    first = model.generate(**inputs, past_key_values=cache, **GREEDY)
    assert cache.get_seq_length() > cache.seen_tokens
    second = model.generate(**inputs, past_key_values=cache, **GREEDY)
    assert torch.equal(first, second) and first.shape[1] == inputs["input_ids"].shape[1] + 12
    other = model.generate(**cache.inputs(OTHERS[0]), past_key_values=cache, **GREEDY)
    assert not torch.equal(other[:, -12:], first[:, -12:])


def test_the_line_with_the_ids_of_everything(model, cache, answer):
    """Context and question, as without a cache; with and without a mask."""
    ids = full_ids(cache, QUESTION)
    for extra in ({}, {"attention_mask": torch.ones_like(ids)}):
        got = model.generate(ids, past_key_values=cache, **extra, **GREEDY)
        assert torch.equal(got[:, ids.shape[1] :], answer[:, -12:])
    inputs = cache.inputs(input_ids=ids)
    assert torch.equal(model.generate(**inputs, past_key_values=cache, **GREEDY), answer)
    own = cache.inputs(QUESTION)["input_ids"][0]
    assert torch.equal(model.generate(**cache.inputs(input_ids=own), past_key_values=cache, **GREEDY), answer)


class Stop(Exception):
    pass


class StopAt:
    """A logits processor that fails after some tokens."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def __call__(self, ids, scores):
        self.calls -= 1
        if self.calls < 0:
            raise Stop
        return scores


@pytest.mark.parametrize("calls", [0, 3])
def test_after_an_exception_inside_generate(model, cache, answer, calls):
    before = [t.clone() for t in stored(cache)]
    inputs = cache.inputs(QUESTION)
    with pytest.raises(Stop):
        model.generate(**inputs, past_key_values=cache, logits_processor=LogitsProcessorList([StopAt(calls)]), **GREEDY)
    assert cache.get_seq_length() > cache.seen_tokens  # the failed call left a tail
    assert torch.equal(model.generate(**inputs, past_key_values=cache, **GREEDY), answer)
    assert same(stored(cache), before)


@pytest.mark.parametrize("layer", [0, 2])
def test_after_an_exception_inside_the_model(model, cache, answer, layer):
    """Some layers hold the question, others do not."""

    def fail(*args):
        raise Stop

    handle = model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(fail)
    with pytest.raises(Stop):
        model.generate(**cache.inputs(QUESTION), past_key_values=cache, **GREEDY)
    handle.remove()
    assert torch.equal(model.generate(**cache.inputs(QUESTION), past_key_values=cache, **GREEDY), answer)


def test_the_context_never_changes(model, tokenizer):
    cache = KVzipCache(model, tokenizer, CONTEXT, ratio=0.3)
    before = [t.clone() for t in stored(cache)]
    for options in (
        {"do_sample": False},
        {"do_sample": True},
        {"num_beams": 3, "do_sample": False},
        {"do_sample": True, "num_return_sequences": 3},
    ):
        model.generate(**cache.inputs(QUESTION), past_key_values=cache, max_new_tokens=8, **options)
        assert same(stored(cache), before)
        assert cache.seen_tokens == len(cache._states[0].ids)
    cache.reset()
    assert cache.get_seq_length() == cache.seen_tokens and same(stored(cache), before)


# Positions


def test_the_question_goes_on_where_the_context_ended(model, cache):
    """At the position behind all tokens seen, not behind those stored; the latter gives other logits."""
    positions = []
    handle = model.model.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: positions.append(args[1] if len(args) > 1 else kwargs["position_ids"]),
        with_kwargs=True,
    )
    inputs = cache.inputs(QUESTION)
    model.generate(**inputs, past_key_values=cache, **{**GREEDY, "max_new_tokens": 3})
    handle.remove()
    n = inputs["input_ids"].shape[1]
    seen = cache.seen_tokens
    assert [p.flatten().tolist() for p in positions] == [[*range(seen, seen + n)], [seen + n], [seen + n + 1]]
    cache.restore()
    right = model(inputs["input_ids"], past_key_values=cache).logits
    cache.restore()
    restarted = torch.arange(n).unsqueeze(0) + int(cache.lengths.float().mean())
    wrong = model(inputs["input_ids"], past_key_values=cache, position_ids=restarted).logits
    assert (right - wrong).abs().max() > 0.5


# Batches


@pytest.mark.parametrize("ratio", [1.0, 0.3])
def test_questions_of_different_length_in_one_batch(model, tokenizer, ratio):
    cache = KVzipCache(model, tokenizer, CONTEXT, ratio=ratio)
    inputs = cache.inputs(OTHERS)
    bytes_before = cache.nbytes
    tokens, logits = generate(model, inputs, cache)
    assert inputs["attention_mask"].shape == (3, cache.seen_tokens + inputs["input_ids"].shape[1])
    assert cache.nbytes == bytes_before
    for i, question in enumerate(OTHERS):
        alone, alone_logits = generate(model, cache.inputs(question), cache)
        assert torch.equal(tokens[i], alone[0])
        torch.testing.assert_close(logits[i], alone_logits[0], rtol=1e-5, atol=1e-5)


def test_an_answer_that_was_begun(model, tokenizer, cache):
    inputs = cache.inputs(QUESTION, answer_prefix="It was")
    plain = cache.inputs(QUESTION)["input_ids"]
    begun = torch.tensor([tokenizer("It was", add_special_tokens=False).input_ids])
    assert torch.equal(inputs["input_ids"], torch.cat([plain, begun], 1))
    assert tokenizer.decode(plain[0]) == f"\n\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("beams", [2, 3])
def test_beams_at_ratio_1_are_those_of_transformers(model, tokenizer, beams):
    cache = KVzipCache(model, tokenizer, CONTEXT, ratio=1.0)
    ids = full_ids(cache, QUESTION)
    options = {"num_beams": beams, "num_return_sequences": beams, **GREEDY}
    expected = tiny().generate(ids, attention_mask=torch.ones_like(ids), **options)[:, ids.shape[1] :]
    assert len(expected.unique(dim=0)) == beams
    for _ in range(2):
        inputs = cache.inputs(QUESTION)
        got = model.generate(**inputs, past_key_values=cache, **options)
        assert torch.equal(got[:, inputs["input_ids"].shape[1] :], expected)


def test_beams_on_several_questions(model, cache):
    inputs = cache.inputs(OTHERS)
    got = model.generate(**inputs, past_key_values=cache, num_beams=3, **GREEDY)
    for i, question in enumerate(OTHERS):
        alone = model.generate(**cache.inputs(question), past_key_values=cache, num_beams=3, **GREEDY)
        assert torch.equal(got[i, -12:], alone[0, -12:])


def test_several_samples(model, cache):
    """Rows of equal draws agree with single runs of the same seed; the first token's chances are the greedy run's."""
    options = {"do_sample": True, "max_new_tokens": 12, "top_k": 0, "temperature": 2.0}
    torch.manual_seed(3)
    inputs = cache.inputs(QUESTION)
    got, logits = generate(model, inputs, cache, num_return_sequences=3, **options)
    assert got.shape == (3, 12) and len(got.unique(dim=0)) == 3
    greedy = generate(model, cache.inputs(QUESTION), cache)[1]
    torch.testing.assert_close(logits[:, 0], greedy[:, 0].expand(3, -1), rtol=1e-5, atol=1e-5)
    ids = full_ids(cache, QUESTION)
    for row, row_logits in zip(got, logits, strict=True):
        expected = masked_logits(tiny(), cache, ids, row.unsqueeze(0))
        torch.testing.assert_close(row_logits, expected[0], rtol=1e-5, atol=1e-5)
    torch.manual_seed(3)
    again = generate(model, cache.inputs(QUESTION), cache, num_return_sequences=3, **options)[0]
    assert torch.equal(got, again)


# Other ways to decode


def assisted(model, cache, answer, **options) -> None:
    """The greedy text, or a refusal where transformers cuts the mask or feeds the context again."""
    inputs, ids = cache.inputs(QUESTION), full_ids(cache, QUESTION)
    before = [t.clone() for t in stored(cache)]
    if version.parse(transformers.__version__) < version.parse("5.23"):
        with pytest.raises(ValueError, match=r"attention_mask hides the newest token.*update, or decode without it"):
            model.generate(**inputs, past_key_values=cache, **options, **GREEDY)
    else:
        assert torch.equal(model.generate(**inputs, past_key_values=cache, **options, **GREEDY), answer)
    with pytest.raises(ValueError, match=r"fed the cached context again, as assisted decoding does.*cache.inputs"):
        model.generate(ids, past_key_values=cache, **options, **GREEDY)
    assert torch.equal(model.generate(**inputs, past_key_values=cache, **GREEDY), answer)
    assert same(stored(cache), before)


def test_prompt_lookup_gives_the_greedy_text(model, cache, answer):
    assisted(model, cache, answer, prompt_lookup_num_tokens=3)


@pytest.mark.parametrize("seed", [0, 1])
def test_an_assistant_model_gives_the_greedy_text(model, cache, answer, seed):
    """The model's own twin, whose drafts are taken or cropped, and another model."""
    assisted(model, cache, answer, assistant_model=tiny(seed=seed, num_hidden_layers=4 if seed == 0 else 2))


def test_a_streamer(model, tokenizer, cache, answer, capsys):
    got = model.generate(
        **cache.inputs(QUESTION), past_key_values=cache, streamer=TextStreamer(tokenizer, skip_prompt=True), **GREEDY
    )
    assert torch.equal(got, answer)
    assert capsys.readouterr().out.strip() == tokenizer.decode(answer[0, -12:]).strip()


def test_a_stopping_criterion(model, cache, answer):
    stop = StoppingCriteriaList([lambda ids, scores, **kwargs: torch.tensor([ids.shape[1] >= answer.shape[1] - 7])])
    got = model.generate(**cache.inputs(QUESTION), past_key_values=cache, stopping_criteria=stop, **GREEDY)
    assert torch.equal(got, answer[:, :-7])


def test_a_pipeline(model, tokenizer, cache, answer):
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    for _ in range(2):
        out = pipe(cache.messages(QUESTION), past_key_values=cache, return_full_text=False, **GREEDY)
        assert out[0]["generated_text"] == tokenizer.decode(answer[0, -12:], skip_special_tokens=True)


def test_messages_carry_the_instruction(model, tokenizer):
    cache = KVzipCache(model, tokenizer, CONTEXT, ratio=0.5, instruction="Answer in one word.")
    text = cache.messages(QUESTION)[0]["content"]
    assert text == f"Answer in one word.\n\n{CONTEXT}\n\n{QUESTION}"
    assert tokenizer.decode(cache._states[0].ids) == "<|im_start|>user\n" + text.removesuffix(f"\n\n{QUESTION}")
    prefix = len("user\nAnswer in one word.\n\n") + 1
    assert cache._states[0].prefix == prefix and cache.lengths.min() >= prefix


def test_without_a_chat_template(model):
    from .conftest import byte_tokenizer

    plain = byte_tokenizer(chat_template=None)
    cache = KVzipCache(model, plain, CONTEXT, ratio=1.0)
    ids = full_ids(cache, QUESTION)
    assert plain.decode(ids[0]) == f"{CONTEXT}\n\n{QUESTION}\n"
    expected = tiny().generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
    got = model.generate(**cache.inputs(QUESTION), past_key_values=cache, **GREEDY)
    assert torch.equal(got[:, -12:], expected[:, -12:])


# Conversations


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_kept_conversation_is_the_whole_text(kind, tokenizer):
    """Three turns at ratio 1 against one long prompt without a cache; then back to the first state."""
    from .conftest import HYBRIDS

    changes = HYBRIDS.get(kind, {})
    plain, model = tiny(kind, **changes), tiny(kind, **changes)
    cache = KVzipCache(model, tokenizer, CONTEXT, ratio=1.0)
    text = list(cache._states[0].ids)
    first_answer = None
    for question in (QUESTION, *OTHERS[:2]):
        inputs = cache.inputs(question)
        text += inputs["input_ids"][0].tolist()
        ids = torch.tensor([text])
        if first_answer is not None:  # the turn before is closed as the template closes it
            rendered = tokenizer.decode(ids[0])
            assert f"<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" in rendered
        out = model.generate(**inputs, past_key_values=cache, **GREEDY)
        expected = plain.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)[0, len(text) :]
        new = out[0, inputs["input_ids"].shape[1] :]
        assert torch.equal(new, expected)
        first_answer = new if first_answer is None else first_answer
        # The last token was never fed; keep() hands it to the next question.
        text += new[:-1].tolist()
        again = model.generate(**inputs, past_key_values=cache, **GREEDY)
        assert torch.equal(again, out)
        cache.keep(out)
    cache.reset()
    assert cache.get_seq_length() == cache.seen_tokens
    out = model.generate(**cache.inputs(QUESTION), past_key_values=cache, **GREEDY)
    assert torch.equal(out[0, -len(first_answer) :], first_answer)


def test_beams_and_samples_behind_a_kept_conversation(model, tokenizer):
    cache = KVzipCache(model, tokenizer, CONTEXT, ratio=1.0)
    out = model.generate(**cache.inputs(QUESTION), past_key_values=cache, **GREEDY)
    ids = full_ids(cache, QUESTION)
    out = model.generate(**cache.inputs(QUESTION), past_key_values=cache, **GREEDY)
    cache.keep(out)
    inputs = cache.inputs(OTHERS[0])
    whole = torch.cat([ids, out[:, -12:-1], inputs["input_ids"]], 1)
    expected = tiny().generate(whole, attention_mask=torch.ones_like(whole), num_beams=3, **GREEDY)[:, whole.shape[1] :]
    for _ in range(2):
        got = model.generate(**inputs, past_key_values=cache, num_beams=3, **GREEDY)
        assert torch.equal(got[:, inputs["input_ids"].shape[1] :], expected)
    two = model.generate(
        **inputs, past_key_values=cache, do_sample=True, num_return_sequences=2, max_new_tokens=3, temperature=0.01
    )
    greedy = model.generate(**inputs, past_key_values=cache, **{**GREEDY, "max_new_tokens": 3})
    assert torch.equal(two, greedy.expand(2, -1))


# Sharing


def test_forks_in_two_threads_at_once(model, cache):
    """The same storage; answers as if each were asked alone."""
    questions = [QUESTION, *OTHERS]
    expected = [model.generate(**cache.inputs(q), past_key_values=cache, **GREEDY) for q in questions]
    forks = [cache.fork() for _ in questions]
    assert all(a is b for f in forks for a, b in zip(stored(f), stored(cache), strict=True))
    got: dict[int, torch.Tensor] = {}
    barrier = threading.Barrier(len(questions))

    def ask(i: int) -> None:
        barrier.wait()
        for _ in range(3):
            got[i] = model.generate(**forks[i].inputs(questions[i]), past_key_values=forks[i], **GREEDY)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(questions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == len(questions)
    assert all(torch.equal(got[i], e) for i, e in enumerate(expected))


def test_a_copy_shares_the_context(model, cache, answer):
    twin = copy.deepcopy(cache)
    assert twin is not cache and all(a is b for a, b in zip(stored(twin), stored(cache), strict=True))
    model.generate(**cache.inputs(OTHERS[1]), past_key_values=cache, **GREEDY)
    assert twin.get_seq_length() == twin.seen_tokens
    assert torch.equal(model.generate(**twin.inputs(QUESTION), past_key_values=twin, **GREEDY), answer)


def test_a_fork_takes_the_kept_conversation_along(model, cache):
    out = model.generate(**cache.inputs(QUESTION), past_key_values=cache, **GREEDY)
    cache.keep(out)
    fork = cache.fork()
    cache_answer = model.generate(**cache.inputs(OTHERS[0]), past_key_values=cache, **GREEDY)
    assert torch.equal(model.generate(**fork.inputs(OTHERS[0]), past_key_values=fork, **GREEDY), cache_answer)
    cache.reset()
    assert fork.get_seq_length() > fork.seen_tokens


@pytest.mark.parametrize("ratio", [1.0, 0.3])
def test_stacked_contexts_answer_as_single_ones(model, tokenizer, ratio):
    """Contexts of different length; one question for all, one for each, and beams."""
    texts = [CONTEXT, CONTEXT[: len(CONTEXT) // 2], "Ben is the baker. Ada is not."]
    caches = [KVzipCache(model, tokenizer, t, ratio=ratio) for t in texts]
    together = KVzipCache.stack(caches)
    assert together.nbytes == sum(c.nbytes for c in caches) and together.seen_tokens == caches[0].seen_tokens
    for questions in ([QUESTION] * 3, OTHERS):
        tokens, logits = generate(model, together.inputs(questions), together)
        for i, (c, question) in enumerate(zip(caches, questions, strict=True)):
            alone, alone_logits = generate(model, c.inputs(question), c)
            assert torch.equal(tokens[i], alone[0])
            torch.testing.assert_close(logits[i], alone_logits[0], rtol=1e-5, atol=1e-5)
    one = together.inputs(QUESTION)
    assert torch.equal(one["input_ids"], together.inputs([QUESTION] * 3)["input_ids"])
    beams = model.generate(**together.inputs(OTHERS), past_key_values=together, num_beams=2, **GREEDY)
    for i, (c, question) in enumerate(zip(caches, OTHERS, strict=True)):
        alone = model.generate(**c.inputs(question), past_key_values=c, num_beams=2, **GREEDY)
        assert torch.equal(beams[i, -12:], alone[0, -12:])


def test_stacked_contexts_on_sliding_layers(tokenizer):
    """Windows that are full, and one that is not yet: its padding must not be seen."""
    from .conftest import HYBRIDS

    model = tiny("gemma3_text", **HYBRIDS["gemma3_text"])
    texts = [CONTEXT, CONTEXT[:100], "Ada did."]
    caches = [KVzipCache(model, tokenizer, t, ratio=0.5) for t in texts]
    assert caches[2].seen_tokens < 32
    together = KVzipCache.stack(caches)
    tokens, logits = generate(model, together.inputs(QUESTION), together)
    for i, c in enumerate(caches):
        alone, alone_logits = generate(model, c.inputs(QUESTION), c)
        assert torch.equal(tokens[i], alone[0])
        torch.testing.assert_close(logits[i], alone_logits[0], rtol=1e-5, atol=1e-5)
