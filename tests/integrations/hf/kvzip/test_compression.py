"""What stays of a context: scores, counts, bytes, and the ways to change them later."""

import pytest
import torch
from dataopt.integrations.hf import KVzipCache
from hypothesis import given, settings
from hypothesis import strategies as st

from .conftest import CONTEXT, GREEDY, HYBRIDS, byte_tokenizer, full_ids, generate, tiny
from .reference import kept_pairs, masked_logits

LAYERS, HEADS, SIZE = 4, 2, 32
QUESTION = "Who sold the boat?"


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def scored(model, tokenizer) -> KVzipCache:
    """Everything, with its scores; tests take forks."""
    return KVzipCache(model, tokenizer, CONTEXT, ratio=1.0, keep_scores=True)


class Passes:
    """Counts what the layers of a model are run on."""

    def __init__(self, model) -> None:
        self.lengths: list[int] = []
        self._handle = model.model.register_forward_pre_hook(
            lambda module, args, kwargs: self.lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )

    def __enter__(self) -> list[int]:
        return self.lengths

    def __exit__(self, *args) -> None:
        self._handle.remove()


def counts(cache) -> tuple[int, int, int]:
    """Tokens of the context, of the prefix, and pairs of the context that are stored."""
    state = cache._states[0]
    n = len(state.ids) - state.prefix
    return n, state.prefix, int(cache.lengths.sum()) - cache.lengths.numel() * state.prefix


# Scores


@pytest.mark.parametrize("norm", ["full", "subset"])
@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "granite", "gemma2", "gpt_oss"])
def test_scores_are_the_largest_attention_of_a_repetition(kind, norm, tokenizer):
    """Eq. 8.2 from the weights that eager attention returns, chunk by chunk; the last chunk is ragged."""
    cache = KVzipCache(tiny(kind), tokenizer, CONTEXT, ratio=1.0, keep_scores=True, chunk=90, norm=norm)
    state, plain = cache._states[0], tiny(kind)
    plain.set_attn_implementation("eager")
    ids, prefix = list(state.ids), state.prefix
    suffix = "<|im_end|>\n<|im_start|>assistant\n"
    for start in range(prefix, len(ids), 90):
        part = ids[start : start + 90]
        if start == prefix:
            ask = "\n\nRepeat the previous context exactly."
        else:
            last = tokenizer.decode(ids[start - 8 : start])
            ask = "\n\nRepeat the part of the previous context exactly, starting with " + last
        given = [*tokenizer(ask + suffix, add_special_tokens=False).input_ids, *part]
        weights = plain(torch.tensor([[*ids, *given]]), output_attentions=True).attentions
        chunk = slice(start, start + len(part))
        for w, stored in zip(weights, state.packed, strict=True):
            w = w[0, :, len(ids) :]  # what the repetition attends to; sinks are what the rows lack to one
            if norm == "subset":
                sink = 1 - w.sum(-1, keepdim=True)
                near = w[..., :prefix].sum(-1) + w[..., chunk].sum(-1) + w[..., len(ids) :].sum(-1)
                w = w / (near.unsqueeze(-1) + sink)
            expected = w[..., chunk].unflatten(0, (len(stored.lengths), -1)).amax((1, 2))
            got = stored.scores.view(len(stored.lengths), -1)
            torch.testing.assert_close(got[:, chunk].exp(), expected, rtol=2e-5, atol=2e-5)
            assert (got[:, :prefix] == torch.inf).all()


def test_one_pass_reads_and_one_scores(model, tokenizer):
    suffix, n = 2 + len("\nassistant\n"), len(CONTEXT)
    first = len("\n\nRepeat the previous context exactly.") + suffix
    later = len("\n\nRepeat the part of the previous context exactly, starting with ") + 8 + suffix
    with Passes(model) as passes:
        cache = KVzipCache(model, tokenizer, CONTEXT, ratio=0.3, chunk=100, prefill_chunk=150)
    seen = cache.seen_tokens
    assert 200 < n < 300
    assert passes == [150, seen - 150, first + 100, later + 100, later + n - 200]
    with Passes(model) as passes:
        KVzipCache(model, tokenizer, CONTEXT, ratio=1.0)
    assert passes == [seen]


def test_reading_in_pieces_changes_nothing(model, tokenizer, scored):
    cache = KVzipCache(model, tokenizer, CONTEXT, ratio=1.0, keep_scores=True, prefill_chunk=37)
    for mine, whole in zip(cache._states[0].packed, scored._states[0].packed, strict=True):
        torch.testing.assert_close(mine.keys, whole.keys, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mine.scores, whole.scores, rtol=1e-4, atol=1e-4)


# Counts and bytes


@pytest.mark.parametrize("budget", ["global", "layer", "uniform"])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.77])
def test_counts_are_exact(model, tokenizer, budget, ratio):
    cache = KVzipCache(model, tokenizer, CONTEXT, ratio=ratio, budget=budget)
    n, prefix, kept = counts(cache)
    assert n == len(CONTEXT) and prefix == len("user\n") + 1
    above = cache.lengths - prefix
    if budget == "global":
        assert kept == round(ratio * LAYERS * HEADS * n)
        assert above.sum(1).unique().numel() > 1  # the layers differ
    elif budget == "layer":
        assert above.sum(1).tolist() == [round(ratio * HEADS * n)] * LAYERS
        assert above.unique().numel() > 1
    else:
        assert (above == round(ratio * n)).all()
    assert all(mask[:, :prefix].all() for mask in kept_pairs(tiny(), cache))


@settings(max_examples=25, deadline=None)
@given(length=st.integers(1, 60), ratio=st.floats(0.02, 1), chunk=st.integers(1, 40))
def test_counts_on_any_length(model, tokenizer, length, ratio, chunk):
    cache = KVzipCache(model, tokenizer, CONTEXT[:length], ratio=ratio, chunk=chunk)
    n, prefix, kept = counts(cache)
    assert n == length and kept == round(ratio * LAYERS * HEADS * n)
    assert cache.nbytes == 2 * SIZE * 4 * (kept + LAYERS * HEADS * prefix)
    assert cache.full_nbytes == 2 * SIZE * 4 * LAYERS * HEADS * (n + prefix)


def test_max_tokens_is_the_mean_of_the_heads(model, tokenizer):
    cache = KVzipCache(model, tokenizer, CONTEXT, max_tokens=50)
    assert counts(cache)[2] == 50 * LAYERS * HEADS
    n = len(CONTEXT)
    assert torch.equal(cache.lengths, KVzipCache(model, tokenizer, CONTEXT, ratio=50 / n).lengths)
    with Passes(model) as passes:
        whole = KVzipCache(model, tokenizer, CONTEXT, max_tokens=10_000)
    assert counts(whole)[2] == LAYERS * HEADS * n and len(passes) == 1


@pytest.mark.parametrize(("bits", "per_row"), [(None, 4 * SIZE), (8, SIZE + 4), (4, SIZE // 2 + 4)])
@pytest.mark.parametrize("keep_scores", [False, True])
def test_bytes_are_those_of_the_formula(model, tokenizer, bits, per_row, keep_scores):
    cache = KVzipCache(model, tokenizer, CONTEXT, ratio=0.3, bits=bits, keep_scores=keep_scores)
    stored = int(cache.lengths.sum())
    expected = stored * (2 * per_row + 4 * keep_scores)
    assert cache.nbytes == expected
    generate(model, cache.inputs([QUESTION] * 5), cache)
    assert cache.nbytes == expected  # whatever was asked
    assert f"{expected:,} of {cache.full_nbytes:,} bytes" in repr(cache) and "ratio=0.3" in repr(cache)


@pytest.mark.parametrize(("bits", "most"), [(8, 0.1), (4, 1.5)])
def test_quantised_logits(model, tokenizer, bits, most):
    """The same pairs, a little rounded."""
    exact = KVzipCache(model, tokenizer, CONTEXT, ratio=0.3)
    small = KVzipCache(model, tokenizer, CONTEXT, ratio=0.3, bits=bits)
    assert torch.equal(exact.lengths, small.lengths)
    logits = [generate(model, c.inputs(QUESTION), c, max_new_tokens=1)[1] for c in (exact, small)]
    assert 0 < (logits[0] - logits[1]).abs().max() < most


def test_the_best_scores_stay(scored, tokenizer):
    cache = KVzipCache(scored.model, tokenizer, CONTEXT, ratio=0.3)
    kept = torch.stack(kept_pairs(tiny(), cache))
    scores = torch.stack([p.scores.view(HEADS, -1) for p in scored._states[0].packed])
    assert scores[kept].min() >= scores[~kept].max()


@pytest.mark.parametrize("budget", ["global", "layer", "uniform"])
def test_a_lower_ratio_keeps_a_subset(model, tokenizer, budget):
    few, more = (
        torch.stack(kept_pairs(tiny(), KVzipCache(model, tokenizer, CONTEXT, ratio=r, budget=budget)))
        for r in (0.2, 0.3)
    )
    assert (few <= more).all() and (few < more).any()


def test_instructions_and_prefix_are_never_evicted(model, tokenizer):
    plain = KVzipCache(model, tokenizer, CONTEXT, ratio=0.1)
    told = KVzipCache(model, tokenizer, CONTEXT, ratio=0.1, instruction="Be brief.")
    assert counts(told) == (counts(plain)[0], counts(plain)[1] + len("Be brief.\n\n"), counts(plain)[2])


# Pruning later


@pytest.mark.parametrize("options", [{}, {"budget": "layer"}, {"budget": "uniform"}, {"bits": 8}])
@pytest.mark.parametrize("ratio", [0.5, 0.2])
def test_prune_is_compressing_at_that_ratio(model, tokenizer, options, ratio):
    once = KVzipCache(model, tokenizer, CONTEXT, ratio=ratio, keep_scores=True, **options)
    later = KVzipCache(model, tokenizer, CONTEXT, ratio=1.0, keep_scores=True, **options)
    fork = later.fork()
    later.prune(0.7)
    later.prune(ratio)
    assert later.options == once.options and torch.equal(later.lengths, once.lengths)
    for a, b in zip(later._states[0].packed, once._states[0].packed, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.tensors(torch.float32), b.tensors(torch.float32), strict=True))
        assert torch.equal(a.scores, b.scores) and a.prefix == b.prefix
    assert later.nbytes == once.nbytes
    answers = [generate(model, c.inputs(QUESTION), c)[0] for c in (later, once)]
    assert torch.equal(*answers)
    assert int(fork.lengths.sum()) == LAYERS * HEADS * fork.seen_tokens  # the fork is as it was


def test_prune_of_heads(model, tokenizer):
    once = KVzipCache(model, tokenizer, CONTEXT, ratio=0.4, level="head", recent=20)
    later = KVzipCache(model, tokenizer, CONTEXT, ratio=0.8, level="head", recent=20)
    later.prune(0.4)
    assert torch.equal(later.lengths, once.lengths)
    for a, b in zip(later._states[0].packed, once._states[0].packed, strict=True):
        assert torch.equal(a.keys, b.keys)


# Heads


@pytest.mark.parametrize("recent", [0, 20, 1000])
def test_head_level(model, tokenizer, scored, recent):
    cache = KVzipCache(model, tokenizer, CONTEXT, ratio=0.6, level="head", recent=recent)
    n, prefix, _ = counts(cache)
    whole = scored.head_scores() >= scored.head_scores().flatten().topk(5).values[-1]  # 5 = round(.6 * 8)
    expected = torch.where(whole, prefix + n, prefix + min(recent, n))
    assert torch.equal(cache.lengths, expected)
    for mask, stays in zip(kept_pairs(tiny(), cache), whole.flatten().view(LAYERS, HEADS), strict=True):
        assert mask[stays].all()
        window = torch.arange(prefix + n) >= prefix + n - min(recent, n)
        window[:prefix] = True
        assert (mask[~stays] == window).all()
    ids = full_ids(cache, QUESTION)
    answer, logits = generate(model, cache.inputs(QUESTION), cache)
    torch.testing.assert_close(logits, masked_logits(tiny(), cache, ids, answer), rtol=1e-5, atol=1e-5)


def test_head_scores_of_another_context_need_no_scoring(model, tokenizer, scored):
    scores = scored.head_scores()
    assert scores.shape == (LAYERS, HEADS) and scores.dtype == torch.float32 and (scores <= 1e-5).all()
    other = CONTEXT[::-1]
    with Passes(model) as passes:
        cache = KVzipCache(model, tokenizer, other, ratio=0.5, level="head", recent=10, head_scores=scores)
    assert passes == [cache.seen_tokens]
    own = KVzipCache(model, tokenizer, CONTEXT, ratio=0.5, level="head", recent=10)
    assert torch.equal(cache.lengths, own.lengths)  # the contexts are equally long
    assert torch.equal(cache.head_scores(), scores)
    scores.zero_()
    assert not torch.equal(cache.head_scores(), scores)  # a copy went out


# Extending


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt_oss"])
def test_extended_at_ratio_1_is_the_whole_text(kind, tokenizer):
    changes = HYBRIDS.get(kind, {})
    model = tiny(kind, **changes)
    whole = KVzipCache(model, tokenizer, CONTEXT, ratio=1.0)
    grown = KVzipCache(model, tokenizer, CONTEXT[:90], ratio=1.0)
    generate(model, grown.inputs(QUESTION), grown)  # what was asked before must not matter
    for part in (CONTEXT[90:91], CONTEXT[91:]):
        grown.extend(part)
    assert grown._states[0].ids == whole._states[0].ids and grown.nbytes == whole.nbytes
    results = [generate(model, c.inputs(QUESTION), c) for c in (whole, grown)]
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"budget": "uniform"}, {"bits": 8}, {"keep_scores": True}, {"norm": "subset"}])
def test_extend_keeps_the_share_of_each_part(model, tokenizer, options):
    cache = KVzipCache(model, tokenizer, CONTEXT[:100], ratio=0.3, **options)
    first = cache.fork()
    with Passes(model) as passes:
        cache.extend(CONTEXT[100:])
    new = len(CONTEXT) - 100
    assert passes[0] == new and len(passes) == 2  # the old text is not read again
    n, _, kept = counts(cache)
    assert n == len(CONTEXT)
    parts = [round(0.3 * LAYERS * HEADS * 100), round(0.3 * LAYERS * HEADS * new)]
    if options.get("budget") == "uniform":
        parts = [LAYERS * HEADS * round(0.3 * 100), LAYERS * HEADS * round(0.3 * new)]
    assert kept == sum(parts) and counts(first)[2] == parts[0]
    whole = KVzipCache(model, tokenizer, CONTEXT, ratio=0.3, **options)
    assert abs(cache.nbytes / whole.nbytes - 1) <= 0.01
    # The old pairs are still the first ones of every head.
    for old, now in zip(first._states[0].packed, cache._states[0].packed, strict=True):
        for (a, _), (b, _) in zip(old.heads(torch.float32), now.heads(torch.float32), strict=True):
            assert torch.equal(a, b[: len(a)])
    answer, logits = generate(model, cache.inputs(QUESTION), cache)
    assert logits.isfinite().all() and answer.shape == (1, 12)
    assert (cache.head_scores() >= first.head_scores()).all()


def test_extend_scores_the_new_text_over_the_packed_one(model, tokenizer):
    """At ratio 1 the packed beginning is the dense one, so the scores are those of the last chunk of a whole pass."""
    for norm in ("full", "subset"):
        options = {"ratio": 1.0, "keep_scores": True, "norm": norm}
        whole = KVzipCache(model, tokenizer, CONTEXT, chunk=len(CONTEXT) // 2 + 1, **options)
        grown = KVzipCache(model, tokenizer, CONTEXT[: len(CONTEXT) // 2 + 1], **options)
        start = grown.seen_tokens
        grown.extend(CONTEXT[len(CONTEXT) // 2 + 1 :])
        for a, b in zip(whole._states[0].packed, grown._states[0].packed, strict=True):
            a, b = (p.scores.view(HEADS, -1)[:, start:] for p in (a, b))
            torch.testing.assert_close(a.exp(), b.exp(), rtol=2e-5, atol=2e-5)


def test_extend_with_max_tokens_makes_room(model, tokenizer):
    cache = KVzipCache(model, tokenizer, CONTEXT[:100], max_tokens=40, keep_scores=True)
    before = torch.stack(kept_pairs(tiny(), cache)).sum()
    cache.extend(CONTEXT[100:])
    assert counts(cache)[2] == 40 * LAYERS * HEADS and int(cache.lengths.sum()) == int(before)


def test_extend_at_head_level(model, tokenizer):
    cache = KVzipCache(model, tokenizer, CONTEXT[:100], ratio=0.5, level="head", recent=10)
    whole = cache.lengths > 60
    with Passes(model) as passes:
        cache.extend(CONTEXT[100:])
    assert len(passes) == 1
    prefix, new = counts(cache)[1], len(CONTEXT) - 100
    assert torch.equal(cache.lengths, torch.where(whole, prefix + 100 + new, prefix + 10 + 10))


# Other places


def test_a_short_context_and_a_short_text_behind_it(model):
    plain = byte_tokenizer(chat_template=None)
    cache = KVzipCache(model, plain, "A", ratio=0.3)
    assert counts(cache) == (1, 0, round(0.3 * 8))
    cache.extend("B")
    assert counts(cache) == (2, 0, 2 * round(0.3 * 8))
    assert cache.lengths.min() == 0  # heads that hold nothing
    answer, logits = generate(model, cache.inputs("?"), cache)
    assert logits.isfinite().all()
    again = model.generate(**cache.inputs("?"), past_key_values=cache, **GREEDY)
    assert torch.equal(again[0, -12:], answer[0])
