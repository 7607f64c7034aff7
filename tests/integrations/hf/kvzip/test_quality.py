"""SmolLM2 on a text of lines: what compression costs, and what other choices of pairs would cost.

All figures are negative log-likelihoods per token of the right answer, teacher-forced, in one thread.
"""

from dataclasses import replace

import pytest
import torch
from dataopt.core.kvzip import PackedHeads
from dataopt.integrations.hf import KVzipCache
from dataopt.integrations.hf.kvzip.layers import ScoringLayer
from torch import Tensor
from transformers import Cache, DynamicCache

from .lines import document
from .reference import NAME

SEED, OTHER = 3, 1
RATIO = 0.3


@pytest.fixture(scope="module")
def asks():
    return document(SEED)[1]


@pytest.fixture(scope="module")
def full(smollm2) -> KVzipCache:
    """Every pair, with its scores; tests take forks."""
    return KVzipCache(*smollm2, document(SEED)[0], ratio=1.0, keep_scores=True)


@pytest.fixture(scope="module")
def other(smollm2) -> KVzipCache:
    """Half of another text."""
    text = document(OTHER)[0]
    return KVzipCache(*smollm2, text[: len(text) // 2], ratio=1.0, keep_scores=True)


@pytest.fixture(scope="module")
def full_nll(full, asks) -> float:
    return nll(full, asks)


@pytest.fixture(scope="module")
def compressed(full) -> KVzipCache:
    cache = full.fork()
    cache.prune(RATIO)
    return cache


@pytest.fixture(scope="module")
def compressed_nll(compressed, asks) -> float:
    return nll(compressed, asks)


@torch.no_grad()
def forced(cache: KVzipCache, inputs: dict[str, Tensor]) -> Tensor:
    """(B, Q, V) logits at the positions that ``generate`` would use."""
    cache.restore()
    mask = inputs["attention_mask"]
    width = inputs["input_ids"].shape[1]
    positions = (mask.cumsum(1) - 1)[:, -width:].clamp(min=0)
    logits = cache.model(
        input_ids=inputs["input_ids"], attention_mask=mask, position_ids=positions, past_key_values=cache
    ).logits
    cache.restore()
    return logits


def nll(cache: KVzipCache, asks: list[tuple[str, str, str]]) -> float:
    """Of the answers, all questions in one batch."""
    tokenizer = cache.tokenizer
    answers = [tokenizer(answer, add_special_tokens=False).input_ids for *_, answer in asks]
    longest = max(map(len, answers))
    rows = [[*cache._question_ids(q, start), *a] for (q, start, _), a in zip(asks, answers, strict=True)]
    logits = forced(cache, cache._batch(rows))[:, -longest - 1 : -1]
    losses, right = [], 0
    for row, answer in zip(logits, answers, strict=True):
        target = torch.tensor(answer)
        losses.append(torch.nn.functional.cross_entropy(row[-len(answer) :], target, reduction="none"))
        right += int((row[-len(answer) :].argmax(-1) == target).all())
    mean = float(torch.cat(losses).mean())
    print(f"NLL {mean:.3f}, {right} of {len(asks)} answers right, {cache}")
    return mean


def chosen_by(full: KVzipCache, scores: list[Tensor], budget: str = "global") -> KVzipCache:
    """The cache that keeps the highest of other scores, (H, n) for each layer."""
    state = full._states[0]
    layers = []
    for p, new in zip(state.packed, scores, strict=True):
        new = new.clone()
        new[:, : p.prefix] = torch.inf
        layers.append(replace(p, scores=new.flatten()))
    state = replace(state, layers=tuple(layers), options=replace(state.options, budget=budget))
    cache = KVzipCache._of(full.model, full.tokenizer, [state])
    cache.prune(RATIO)
    return cache


def own_scores(full: KVzipCache) -> list[Tensor]:
    return [p.scores.view(len(p.lengths), -1) for p in full._states[0].packed]


def dense(full: KVzipCache, length: int | None = None) -> list[tuple[Tensor, Tensor]]:
    """(1, H, n, d) keys and values of each layer."""
    pairs = []
    for p in full._states[0].packed:
        both = (t.view(1, len(p.lengths), -1, t.shape[1])[:, :, :length] for t in (p.keys, p.values))
        pairs.append(tuple(both))
    return pairs


def as_dynamic(full: KVzipCache, length: int | None = None) -> DynamicCache:
    cache = DynamicCache()
    for i, (k, v) in enumerate(dense(full, length)):
        cache.update(k, v, i)
    return cache


def snapkv(full: KVzipCache, window: int = 32) -> list[Tensor]:
    """Attention of the last queries of the context, pooled over positions; the window stays."""
    model, ids = full.model, full._states[0].ids
    before = as_dynamic(full, len(ids) - window)
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            out = model.base_model(torch.tensor([ids[-window:]]), past_key_values=before, output_attentions=True)
    finally:
        model.set_attn_implementation("dataopt")
    scores = []
    for weights, p in zip(out.attentions, full._states[0].packed, strict=True):
        received = weights[0].unflatten(0, (len(p.lengths), -1)).sum((1, 2))
        pooled = torch.nn.functional.avg_pool1d(received.unsqueeze(0), 7, 1, 3)[0]
        pooled[:, -window:] = torch.inf
        scores.append(pooled)
    return scores


@torch.no_grad()
def scored_while_reading(full: KVzipCache, ids: list[int]) -> list[Tensor]:
    """What every pair of the context receives at most while the model reads ``ids`` behind it."""
    state = full._states[0]
    seen = len(state.ids)
    layers = [ScoringLayer(k, v, seen, None, "full", state.prefix) for k, v in dense(full)]
    for layer in layers:
        layer.chunk = slice(0, seen)
    full.model.base_model(torch.tensor([ids]), past_key_values=Cache(layers=layers))
    return [layer.scores for layer in layers]


def repetition(full: KVzipCache, ids: tuple[int, ...]) -> list[int]:
    ask = full.tokenizer("\n\nRepeat the previous context exactly.", add_special_tokens=False).input_ids
    return [*ask, *full._chat.suffix, *ids]


# Against other choices


def test_a_third_of_the_pairs_answers_like_all(compressed, full_nll, compressed_nll):
    assert compressed.nbytes < 0.35 * compressed.full_nbytes
    assert compressed_nll <= full_nll + 0.08


def test_scores_of_the_last_queries_are_worse(full, asks, compressed_nll):
    assert nll(chosen_by(full, snapkv(full)), asks) >= compressed_nll + 0.8


def test_random_pairs_are_worse(full, asks, compressed_nll):
    g = torch.Generator().manual_seed(0)
    scores = [torch.rand(s.shape, generator=g) for s in own_scores(full)]
    assert nll(chosen_by(full, scores), asks) >= compressed_nll + 1.0


def test_the_same_number_for_every_head_is_worse(full, asks, compressed_nll):
    assert nll(chosen_by(full, own_scores(full), "uniform"), asks) >= compressed_nll + 0.3


def test_the_whole_context_must_be_repeated(full, asks, compressed_nll):
    """Figure 8.12: the scorer reads the first tenth only."""
    state = full._states[0]
    n = len(state.ids) - state.prefix
    part = state.ids[state.prefix : state.prefix + n // 10]
    scores = scored_while_reading(full, repetition(full, part))
    assert nll(chosen_by(full, scores), asks) >= compressed_nll + 0.4


def test_the_context_can_still_be_repeated(full, compressed):
    state = full._states[0]
    target = state.ids[state.prefix : state.prefix + 256]
    losses = []
    for cache in (full, compressed):
        logits = forced(cache, cache._batch([repetition(cache, target)]))[0, -257:-1]
        losses.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor(target))))
    print("repeating", losses)
    assert losses[1] <= losses[0] + 0.08


def test_extend_in_two_halves(smollm2, compressed, compressed_nll, asks):
    lines = document(SEED)[0].splitlines(keepends=True)
    half = len(lines) // 2
    cache = KVzipCache(*smollm2, "".join(lines[:half]), ratio=RATIO, keep_scores=True)
    cache.extend("".join(lines[half:]))
    assert cache._states[0].ids == compressed._states[0].ids
    assert abs(cache.nbytes / compressed.nbytes - 1) <= 0.01
    assert nll(cache, asks) <= compressed_nll + 0.12


@pytest.mark.parametrize("scores_of", ["full", "other"])
def test_heads_with_a_recent_window(request, full, asks, full_nll, scores_of):
    """Scores of the text itself, and of another text of its kind."""
    state = full._states[0]
    options = replace(state.options, level="head", recent=128, keep_scores=False)
    scores = request.getfixturevalue(scores_of).head_scores()
    heads = KVzipCache._of(full.model, full.tokenizer, [replace(state, options=options, head_scores=scores)])
    heads.prune(0.6)
    whole = heads.lengths == len(state.ids)
    assert int(whole.sum()) == round(0.6 * whole.numel())
    assert (heads.lengths[~whole] == state.prefix + 128).all()
    assert nll(heads, asks) <= full_nll + 0.05


# Exactness on a trained model


@torch.no_grad()
@pytest.mark.parametrize("ratio", [0.7, 0.3])
def test_packed_is_full_attention_with_a_mask_per_head(full, asks, ratio):
    cache = full.fork()
    cache.prune(ratio)
    ids = cache.inputs(*asks[0][:2])["input_ids"]
    positions = torch.arange(ids.shape[1]).unsqueeze(0) + cache.seen_tokens
    logits = cache.model(ids, past_key_values=cache, position_ids=positions).logits
    for module in full.model.modules():
        if hasattr(module, "layer_idx"):
            module.one_mask_per_head = keep_mask(full, cache, module.layer_idx)
    full.model.set_attn_implementation(NAME)
    try:
        expected = full.model(ids, past_key_values=as_dynamic(full), position_ids=positions).logits
    finally:
        full.model.set_attn_implementation("dataopt")
    assert expected.abs().max() > 20
    assert (logits - expected).abs().max() <= 2e-4
    whole = forced(full, full.inputs(*asks[0][:2]))
    assert (whole - expected).abs().max() > 1e-2


def keep_mask(full: KVzipCache, cache: KVzipCache, layer: int) -> Tensor:
    """(H, n) bool: the pairs of ``full`` that ``cache`` holds, found by the bits of their first two numbers."""
    masks = []
    both = (c._states[0].packed[layer].heads(torch.float32) for c in (full, cache))
    for (all_keys, all_values), (k, v) in zip(*both, strict=True):
        every, some = (t[:, :2].contiguous().view(torch.int64).flatten() for t in (all_keys, k))
        masks.append(torch.isin(every, some))
        assert torch.equal(all_keys[masks[-1]], k) and torch.equal(all_values[masks[-1]], v)
    return torch.stack(masks)


def test_logits_depend_on_what_is_kept(full, compressed, asks):
    """Without the pairs that matter most, or without one head, they move far beyond rounding."""
    inputs = compressed.inputs(*asks[0][:2])
    before = forced(compressed, inputs)
    state = compressed._states[0]

    def moved(layers: list[PackedHeads]) -> float:
        cache = KVzipCache._of(compressed.model, compressed.tokenizer, [replace(state, layers=tuple(layers))])
        return float((forced(cache, inputs) - before).abs().max())

    half = torch.tensor(0.5).log()
    without = [p.select((p.scores <= half) | (p.scores == torch.inf)) for p in state.packed]
    dropped = sum(sum(a.lengths) - sum(b.lengths) for a, b in zip(state.packed, without, strict=True))
    assert 0 < dropped < 0.1 * int(compressed.lengths.sum())
    assert moved(without) > 1
    one = state.packed[5]
    keep = torch.ones(sum(one.lengths), dtype=torch.bool)
    keep[one.prefix : one.lengths[0]] = False
    assert moved([*state.packed[:5], one.select(keep), *state.packed[6:]]) > 1e-2


def test_positions_that_start_again_give_other_logits(compressed, asks):
    """The question behind the number of stored pairs, where a cache that was merely shortened would put it."""
    inputs = compressed.inputs(*asks[0][:2])
    right = forced(compressed, inputs)
    restarted = torch.arange(inputs["input_ids"].shape[1]).unsqueeze(0) + int(compressed.lengths.float().mean())
    with torch.no_grad():
        wrong = compressed.model(inputs["input_ids"], past_key_values=compressed, position_ids=restarted).logits
    assert (right - wrong).abs().max() > 1
