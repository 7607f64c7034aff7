"""``append``, ``inputs`` and ``generate``: one user and many, beams and samples, kept turns, and files."""

import inspect
import json

import pytest
import torch
from dataopt.core.tensor_file import save_tensors
from dataopt.integrations.hf import CCMCache
from dataopt.integrations.hf.ccm import cache as cache_module
from safetensors.torch import load_file

from ..kvzip.conftest import tiny
from .conftest import CONTEXTS, GREEDY, QUERY, answered, batch, ccm, exact, row

MODES = [
    dict(mode=mode, positions=positions, sink=sink)
    for mode, positions, sink in (
        ("concat", "cache", False), ("concat", "cache", True), ("concat", "abs", False), ("concat", "abs", True),
        ("merge", "cache", False), ("merge", "cache", True), ("merge", "abs", False), ("merge", "abs", True),
    )
]  # fmt: skip


def memory_of(model, tokenizer, contexts=CONTEXTS):
    memory = CCMCache(model, tokenizer)
    for context in contexts:
        memory.append(input_ids=context)
    return memory


def by_hand(model, memory, query, new):
    """Greedy tokens, one whole forward pass over memory, question and answer for each."""
    out = list(query)
    for _ in range(new):
        logits = answered(model, memory, out)[0, -1].clone()
        logits[model.comp_ids] = -torch.inf
        out.append(int(logits.argmax()))
    return out


def ids(options):
    return "-".join(str(v) for v in options.values())


@pytest.mark.parametrize("options", MODES, ids=ids)
def test_greedy_equals_manual_decoding_twice_and_leaves_the_memory(options, tokenizer):
    model = ccm(**options)
    memory = memory_of(model, tokenizer)
    stored = [(k.clone(), v.clone()) for k, v in memory._memory.layers]
    for _ in range(2):
        out = model.generate(**memory.inputs(input_ids=QUERY), past_key_values=memory, **GREEDY)
        assert out[0].tolist() == by_hand(model, memory, QUERY, 6)
    inputs = memory.inputs(input_ids=QUERY)  # the user's literal line, twice in a row
    first = model.generate(**inputs, past_key_values=memory, **GREEDY)
    assert torch.equal(first, model.generate(**inputs, past_key_values=memory, **GREEDY))
    if "cache" in inspect.signature(model.language_model.forward).parameters:  # its name since transformers 5.24
        assert torch.equal(first, model.generate(**inputs, cache=memory, **GREEDY))
    memory.restore()
    for (k, v), layer, (a, b) in zip(memory._memory.layers, memory.layers, stored, strict=True):
        assert torch.equal(k, a) and torch.equal(v, b)
        assert torch.equal(layer.keys, a) and torch.equal(layer.values, b)


@pytest.mark.parametrize("options", MODES, ids=ids)
def test_users_of_different_length_in_one_batch(options, tokenizer):
    model = ccm(**options)
    users = [memory_of(model, tokenizer, (CONTEXTS * 2)[:t]) for t in (1, 3, 5)]
    questions = [QUERY, QUERY[:2], [7] * 9]
    stacked = CCMCache.stack(users)
    assert stacked.steps == (1, 3, 5)
    for _ in range(2):
        out = model.generate(**stacked.inputs(input_ids=questions), past_key_values=stacked, **GREEDY)
        for i, (memory, question) in enumerate(zip(users, questions, strict=True)):
            alone = model.generate(**memory.inputs(input_ids=question), past_key_values=memory, **GREEDY)
            assert out[i, 9:].tolist() == alone[0, len(question) :].tolist()
    stacked.append(input_ids=[CONTEXTS[0], CONTEXTS[1], CONTEXTS[2]])
    for memory, context, both in zip(users, CONTEXTS, stacked.unstack(), strict=False):
        memory.append(input_ids=context)
        assert both.steps == memory.steps and both.slots == memory.slots
        for (k, v), (a, b) in zip(both._memory.layers, memory._memory.layers, strict=True):
            torch.testing.assert_close(k, a, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(v, b, rtol=1e-4, atol=1e-5)


def test_a_user_without_contexts_may_join(tokenizer):
    for options in MODES:
        model = ccm(**options)
        users = [memory_of(model, tokenizer, CONTEXTS[:2]), CCMCache(model, tokenizer)]
        stacked = CCMCache.stack(users)
        stacked.append(input_ids=CONTEXTS[:2])
        for memory, context, both in zip(users, CONTEXTS, stacked.unstack(), strict=False):
            memory.append(input_ids=context)
            torch.testing.assert_close(both._memory.layers[-1], memory._memory.layers[-1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", MODES, ids=ids)
def test_beams_samples_and_several_questions(options, tokenizer):
    model = ccm(**options)
    memory = memory_of(model, tokenizer)
    inputs = memory.inputs(input_ids=QUERY)
    beams = model.generate(**inputs, past_key_values=memory, num_beams=3, num_return_sequences=2, **GREEDY)
    # The same beams from the base model with the memory copied for each.
    wide = CCMCache.stack([memory, memory])
    twice = model.generate(**wide.inputs(input_ids=QUERY), past_key_values=wide, num_beams=3, **GREEDY)
    assert twice[0].tolist() == twice[1].tolist() == beams[0].tolist()
    torch.manual_seed(0)
    sampled = dict(do_sample=True, num_return_sequences=4, max_new_tokens=6)
    samples = model.generate(**inputs, past_key_values=memory, **sampled)
    assert len({tuple(s) for s in samples.tolist()}) > 1
    questions = [QUERY, [5, 4, 3], [9] * 7]
    out = model.generate(**memory.inputs(input_ids=questions), past_key_values=memory, **GREEDY)
    for i, question in enumerate(questions):
        alone = model.generate(**memory.inputs(input_ids=question), past_key_values=memory, **GREEDY)
        assert out[i, 7:].tolist() == alone[0, len(question) :].tolist()


def test_bytes_follow_the_formula_and_merging_is_constant(tokenizer):
    for mode in ("concat", "merge"):
        model = ccm(mode=mode, comp_tokens=3)
        memory = CCMCache(model)
        for t in range(1, 9):
            memory.append(input_ids=CONTEXTS[t % 4])
            config = model.get_base_model().config
            slots = 3 * (t if mode == "concat" else 1)
            assert memory.nbytes == slots * 2 * 4 * config.num_key_value_heads * config.head_dim * 4
            assert memory.slots == (slots,) and memory.steps == (t,)


def test_peak_of_an_online_step_is_memory_context_and_slots():
    model = ccm(mode="concat", comp_tokens=2)
    memory, peaks = CCMCache(model), []
    update = memory.layers[0].update

    def watched(*args, **kwargs):
        out = update(*args, **kwargs)
        peaks.append(out[0].shape[2])
        return out

    memory.layers[0].update = watched
    for context in CONTEXTS:
        memory.append(input_ids=context)
    assert peaks == [2 * t + len(c) + 2 for t, c in enumerate(CONTEXTS)]


@pytest.mark.parametrize("ema", [None, 0.2])
def test_merged_memory_is_the_average_of_its_contexts(ema):
    """Non-recurrent, so every h(t) can be computed alone."""
    model = exact(ccm(dtype=torch.float64, mode="merge", recurrent=False, ema=ema))
    memory, alone = CCMCache(model), []
    contexts = [torch.randint(0, 256, (5,)).tolist() for _ in range(24)]
    for context in contexts:
        memory.append(input_ids=context)
        single = CCMCache(model)
        single.append(input_ids=context)
        alone.append(single._memory.layers)
    shares = [1 / 24] * 24 if ema is None else [0.8**23] + [0.2 * 0.8 ** (23 - j) for j in range(1, 24)]
    for i, (keys, values) in enumerate(memory._memory.layers):
        assert (keys - sum(s * a[i][0] for s, a in zip(shares, alone, strict=True))).abs().max() < 1e-12
        assert (values - sum(s * a[i][1] for s, a in zip(shares, alone, strict=True))).abs().max() < 1e-12


def test_positions_stay_small_for_a_thousand_steps():
    model = ccm(mode="merge", comp_tokens=1, changes={"max_position_embeddings": 16, "num_hidden_layers": 1})
    memory, largest = CCMCache(model), []
    model.get_base_model().model.rotary_emb.register_forward_hook(
        lambda m, args, kwargs, out: largest.append(int((kwargs.get("position_ids", args[-1])).max())), with_kwargs=True
    )
    for _ in range(1000):
        memory.append(input_ids=[5, 6, 7])
    assert memory.steps == (1000,) and max(largest) == 1 + 3 + 1 - 1


def test_a_kept_turn_is_the_next_context(tokenizer):
    model = ccm()
    memory, other = (memory_of(model, tokenizer, CONTEXTS[:2]) for _ in range(2))
    out = model.generate(**memory.inputs(input_ids=QUERY), past_key_values=memory, **GREEDY)
    memory.keep(out)
    other.append(input_ids=out)
    assert memory.steps == (3,)
    for a, b in zip(memory._memory.layers, other._memory.layers, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    with pytest.raises(ValueError, match="2 rows for 1 users"):
        memory.keep(torch.cat([out, out]))


@pytest.mark.parametrize(("ends", "pad"), [(3, 3), (3, None), ([4, 3], None), (3, 5), ([4, 3], 5)])
def test_kept_turns_of_users_who_ended_early_are_those_of_each_alone(tokenizer, ends, pad):
    model = ccm()
    settings = model.language_model.generation_config
    settings.eos_token_id, settings.pad_token_id = ends, pad
    users = [memory_of(model, tokenizer, CONTEXTS[:t]) for t in (1, 2)]
    stacked = CCMCache.stack(users)
    filled = pad if pad is not None else ends[0] if isinstance(ends, list) else ends
    turns = [[*QUERY, 30, 31, 3], [*QUERY[:2], 30, 31, 32, 33, 34, 35]]
    before = stacked.inputs(input_ids=[QUERY, QUERY[:2]])["input_ids"][:, : len(QUERY)].tolist()
    assert before[0] == QUERY and before[1][-2:] == QUERY[:2]
    stacked.keep(torch.tensor([[*before[0], 30, 31, 3, *[filled] * 3], [*before[1], 30, 31, 32, 33, 34, 35]]))
    for user, turn, both in zip(users, turns, stacked.unstack(), strict=True):
        user.keep(torch.tensor([turn]))
        torch.testing.assert_close(both._memory.layers[-1], user._memory.layers[-1], rtol=1e-3, atol=1e-4)
        assert user.steps == both.steps


def test_a_stacked_user_without_contexts_is_asked_as_alone(tokenizer, monkeypatch):
    monkeypatch.setattr(cache_module, "first_ids", lambda tokenizer: [1])
    model = ccm()
    users = [memory_of(model, tokenizer, CONTEXTS[:1]), CCMCache(model, tokenizer)]
    both = CCMCache.stack(users).inputs(["abc", "abc"])
    for user, ids, mask in zip(users, both["input_ids"], both["attention_mask"], strict=True):
        alone = user.inputs("abc")["input_ids"][0].tolist()
        assert ids[mask[-len(ids) :] == 1].tolist() == alone
        assert (alone[0] == 1) == (user is users[1])
    assert users[1].inputs(["a", "b"])["input_ids"][:, 0].tolist() == [1, 1]


def test_texts_are_tokens_and_the_first_begins_with_the_first_token(tokenizer):
    model = ccm()
    said, given = CCMCache(model, tokenizer), CCMCache(model, tokenizer)
    said.append("I am Ada.")
    said.append("I keep bees.")
    first = tokenizer("").input_ids  # a tokenizer that adds none
    given.append(input_ids=[*first, *tokenizer("I am Ada.", add_special_tokens=False).input_ids])
    given.append(input_ids=tokenizer("I keep bees.", add_special_tokens=False).input_ids)
    torch.testing.assert_close(said._memory.layers, given._memory.layers, rtol=0, atol=0)
    out = model.generate(**said.inputs("Who am I?"), past_key_values=said, **GREEDY)
    assert out.shape[1] == len("Who am I?") + 6


def test_a_fork_shares_the_memory(tokenizer):
    memory = memory_of(ccm(), tokenizer)
    other = memory.fork()
    assert other._memory is memory._memory
    other.append(input_ids=QUERY)
    assert memory.steps == (4,) and other.steps == (5,)


def test_after_an_exception_the_memory_is_whole(tokenizer):
    model = ccm()
    memory = memory_of(model, tokenizer)
    inputs = memory.inputs(input_ids=QUERY)
    expected = model.generate(**inputs, past_key_values=memory, **GREEDY)

    def stop(ids, scores, **kwargs):
        if ids.shape[1] > len(QUERY) + 2:
            raise KeyboardInterrupt
        return scores

    with pytest.raises(KeyboardInterrupt):
        model.generate(**inputs, past_key_values=memory, logits_processor=[stop], **GREEDY)
    assert torch.equal(model.generate(**inputs, past_key_values=memory, **GREEDY), expected)


# Files


@pytest.mark.parametrize("options", MODES, ids=ids)
def test_saved_in_the_middle_of_a_conversation(options, tokenizer, tmp_path):
    model = ccm(**options)
    memory = memory_of(model, tokenizer, CONTEXTS[:2])
    memory.save_pretrained(tmp_path)
    memory.save_pretrained(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    again = CCMCache.from_pretrained(tmp_path, model, tokenizer)
    for m in (memory, again):
        m.append(input_ids=CONTEXTS[2])
    torch.testing.assert_close(memory._memory.layers, again._memory.layers, rtol=0, atol=0)
    a, b = (model.generate(**m.inputs(input_ids=QUERY), past_key_values=m, **GREEDY) for m in (memory, again))
    assert torch.equal(a, b)


def test_the_file_is_hardly_larger_than_the_pairs(tokenizer, tmp_path):
    memory = memory_of(ccm(comp_tokens=8), tokenizer, CONTEXTS * 4)
    memory.save_pretrained(tmp_path)
    file = next(tmp_path.glob("*.safetensors"))
    assert memory.nbytes < file.stat().st_size < 1.05 * memory.nbytes


def test_foreign_and_damaged_memories_are_refused(tokenizer, tmp_path):
    model = ccm()
    memory = memory_of(model, tokenizer)
    memory.save_pretrained(tmp_path)
    record, tensors = tmp_path / "ccm_memory.json", next(tmp_path.glob("*.safetensors"))
    with pytest.raises(ValueError, match="another model: its weights"):
        CCMCache.from_pretrained(tmp_path, ccm(seed=2))
    with pytest.raises(ValueError, match="another model: config"):
        CCMCache.from_pretrained(tmp_path, ccm(changes={"intermediate_size": 80}))
    with pytest.raises(ValueError, match="another adapter: recurrent was True and is False"):
        CCMCache.from_pretrained(tmp_path, ccm(recurrent=False))
    with pytest.raises(ValueError, match="is no folder"):
        CCMCache.from_pretrained(tmp_path / "nowhere", model)
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="is damaged"):
        CCMCache.from_pretrained(tmp_path, model)
    tensors.write_bytes(whole)
    values = load_file(tensors)
    save_tensors(tensors, values | {"0.keys": values["0.keys"][:, :, :-1]}, {})
    with pytest.raises(ValueError, match=r"0.keys is \(1, 2, 7, 32\)"):
        CCMCache.from_pretrained(tmp_path, model)
    save_tensors(tensors, values | {"0.keys": values["0.keys"] * torch.nan}, {})
    with pytest.raises(ValueError, match="non-finite"):
        CCMCache.from_pretrained(tmp_path, model)
    tensors.unlink()
    with pytest.raises(ValueError, match="is missing"):
        CCMCache.from_pretrained(tmp_path, model)
    text = record.read_text()
    record.write_text(text.replace('"steps": 4', '"steps": 5'))
    with pytest.raises(ValueError, match="was changed"):
        CCMCache.from_pretrained(tmp_path, model)
    record.write_text(json.dumps(json.loads(text) | {"format_version": 9}))
    with pytest.raises(ValueError, match="newer format 9"):
        CCMCache.from_pretrained(tmp_path, model)


# Refusals


def test_a_missing_or_short_mask_is_refused(tokenizer):
    model = ccm()
    memory = memory_of(model, tokenizer)
    question = torch.tensor([QUERY])
    with pytest.raises(ValueError, match=r"the memory has 8 .* pass \*\*memory.inputs"):
        model.generate(question, past_key_values=memory, **GREEDY)
    with pytest.raises(ValueError, match=r"the memory has 8 .* pass \*\*memory.inputs"):
        model.generate(question, attention_mask=torch.ones_like(question), past_key_values=memory, **GREEDY)
    far = ccm(positions="abs")
    memory = memory_of(far, tokenizer)
    inputs = memory.inputs(input_ids=QUERY)
    inputs.pop("position_ids")
    with pytest.raises(ValueError, match="needs position_ids"):
        far.generate(**inputs, past_key_values=memory, **GREEDY)


def test_bad_contexts_and_questions_are_refused(tokenizer):
    model = ccm(comp_ids=[60, 61])
    memory = memory_of(model, tokenizer)
    for call in (memory.append, memory.inputs):
        with pytest.raises(ValueError, match="empty"):
            call(input_ids=[])
        with pytest.raises(ValueError, match="empty"):
            call("")
        with pytest.raises(ValueError, match="either"):
            call()
        with pytest.raises(ValueError, match="holds COMP tokens"):
            call(input_ids=[5, 60])
        with pytest.raises(ValueError, match="must be a text"):
            call([1, 2])
    with pytest.raises(ValueError, match="needs a tokenizer"):
        CCMCache(model).append("text")
    with pytest.raises(ValueError, match="2 contexts for 1 users"):
        memory.append(["a", "b"])
    stacked = CCMCache.stack([memory, memory])
    with pytest.raises(ValueError, match="3 questions for 2 users"):
        stacked.inputs(["a", "b", "c"])
    with pytest.raises(ValueError, match="needs the memory of one user"):
        stacked.save_pretrained("nowhere")
    with pytest.raises(ValueError, match="different models"):
        CCMCache.stack([memory, memory_of(ccm(), tokenizer)])
    with pytest.raises(ValueError, match="caches is empty"):
        CCMCache.stack([])
    with pytest.raises(TypeError, match="not a CCMModel"):
        CCMCache(tiny())
    with pytest.raises(ValueError, match="bos_token"):
        CCMCache(ccm(sink=True))
    with pytest.raises(ValueError, match="reaches into the memory"):
        memory.crop(2)
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        memory.append("text")


def test_a_context_beyond_the_models_positions_is_refused(tokenizer):
    small = {"max_position_embeddings": 16}
    memory = memory_of(ccm(changes=small), tokenizer, CONTEXTS[:1])
    with pytest.raises(ValueError, match="would reach position 24 and the model has 16"):
        memory.append(input_ids=[5] * 20)
    assert memory.steps == (1,)
    with pytest.raises(ValueError, match="would reach position 22 and the model has 16; shorten it"):
        memory.inputs(input_ids=[5] * 20)
    far = memory_of(ccm(changes=small, positions="abs"), tokenizer, CONTEXTS[:2])
    with pytest.raises(ValueError, match="positions='abs' counts all text"):
        far.append(input_ids=[5] * 4)


def test_the_row_of_the_memory_is_the_row_of_the_training(tokenizer):
    """A batch of users against their parallel rows."""
    model = exact(ccm(dtype=torch.float64, mode="concat"))
    stacked = CCMCache.stack([memory_of(model, tokenizer, CONTEXTS[:t]) for t in (1, 4)])
    logits = answered(model, stacked, QUERY)
    for i, t in enumerate((1, 4)):
        expected = model(**batch([row(model, CONTEXTS[:t], QUERY)])).logits[0, -5:]
        assert (logits[i] - expected).abs().max() < 1e-10
