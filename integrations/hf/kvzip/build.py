"""From a text to scored key-value pairs: prefill, then one reconstruction pass (section 8.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from dataopt.core.kvzip import PackedHeads
from torch import Tensor
from tqdm.auto import tqdm
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..attention import switch_attention
from ..chat import Chat, continued
from ..decoder import changing_rope_limit, check_decoder, forward, input_device
from .layers import PackedLayer, ScoringLayer, SlidingState

REPEAT = "\n\nRepeat the previous context exactly."
REPEAT_PART = "\n\nRepeat the part of the previous context exactly, starting with "
LAST = 8  # tokens of the preceding part that name the place (section 8.3.4)


@dataclass(frozen=True)
class Dense:
    """One full-attention layer after a prefill: (1, H, n, d) keys and values, behind ``packed`` ones if any."""

    keys: Tensor
    values: Tensor
    packed: PackedHeads | None = None


def check_model(model: PreTrainedModel) -> None:
    """Refuse what a compressed cache cannot serve, before anything runs.

    Raises:
        TypeError, ValueError: naming what is in the way.
    """
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    if model.training:
        raise ValueError("model is in training mode; call model.eval() first")
    check_decoder(model)
    if getattr(config, "output_attentions", False):
        raise ValueError(
            "config.output_attentions=True: attention over a compressed cache forms no weights; set it to False"
        )
    if any(getattr(m, "masked_key_indices", None) is not None for m in model.modules()):
        raise ValueError(
            "a kvpress press left masked_key_indices on the model, which hides keys; delete them or reload it"
        )
    layers = DynamicCache(config=config).layers
    if layers and all(type(layer) is DynamicSlidingWindowLayer for layer in layers):
        raise TypeError(
            f"model: {name} has sliding-window layers only, whose cache is bounded; nothing can be compressed"
        )
    switch_attention(model)


@torch.no_grad()
def prefill(model: PreTrainedModel, ids: Sequence[int], chunk: int) -> list[Dense | SlidingState]:
    """Read the context in pieces of ``chunk`` tokens."""
    cache = DynamicCache(config=model.config)
    _feed(model, cache, ids, chunk, "reading")
    layers: list[Dense | SlidingState] = []
    for layer in cache.layers:
        if isinstance(layer, DynamicSlidingWindowLayer):
            layers.append(SlidingState.of(layer))
        else:
            assert isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None
            layers.append(Dense(layer.keys, layer.values))
    return layers


@torch.no_grad()
def prefill_more(
    model: PreTrainedModel,
    layers: Sequence[PackedHeads | SlidingState],
    seen: int,
    ids: Sequence[int],
    chunk: int,
    modules: frozenset[int],
) -> list[Dense | SlidingState]:
    """Read more text behind a compressed context."""
    cache = Cache(
        layers=[p.layer() if isinstance(p, SlidingState) else PackedLayer([p], seen, modules) for p in layers]
    )
    _feed(model, cache, ids, chunk, "reading")
    out: list[Dense | SlidingState] = []
    for layer, before in zip(cache.layers, layers, strict=True):
        if isinstance(layer, DynamicSlidingWindowLayer):
            out.append(SlidingState.of(layer))
        else:
            assert isinstance(layer, PackedLayer) and isinstance(before, PackedHeads)
            assert layer.keys is not None and layer.values is not None
            out.append(Dense(layer.keys, layer.values, before))
    return out


def _feed(model: PreTrainedModel, cache: Cache, ids: Sequence[int], chunk: int, what: str) -> None:
    pieces = torch.tensor(ids, device=input_device(model)).unsqueeze(0).split(chunk, 1)
    for piece in tqdm(pieces, desc=what, unit="chunk", disable=None if len(pieces) > 1 else True, leave=False):
        forward(model, piece, cache)


@torch.no_grad()
def reconstruct(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chat: Chat,
    layers: Sequence[Dense | SlidingState],
    seen: int,
    prefix: int,
    ids: Sequence[int],
    before: Sequence[int],
    chunk: int,
    norm: str,
) -> list[Tensor]:
    """Importance of the pairs of the last ``ids`` (eq. 8.2), chunk by chunk (figure 8.7).

    Args:
        layers: after the context was read.
        seen: its tokens, all of them.
        prefix: tokens at the start that are never evicted.
        ids: the text to be scored; it ends the context.
        before: the tokens just before it, which name the place of the first chunk; empty at the context's start.
        chunk: tokens per pass.
        norm: "full" or "subset".

    Returns:
        For each full-attention layer (H, n) float32 log scores; +inf on the prefix, if the dense pairs hold it.
    """
    full = [p for p in layers if isinstance(p, Dense)]
    fresh = prefix if full[0].packed is None else 0  # prefix pairs among the dense ones
    scoring = [ScoringLayer(p.keys, p.values, seen, p.packed, norm, fresh) for p in full]
    starts = range(0, len(ids), chunk)
    for start in tqdm(starts, desc="scoring", unit="chunk", disable=None if len(starts) > 1 else True, leave=False):
        part = list(ids[start : start + chunk])
        rest = iter(scoring)
        cache = Cache(layers=[p.layer() if isinstance(p, SlidingState) else next(rest) for p in layers])
        for layer in scoring:
            layer.chunk = slice(fresh + start, fresh + start + len(part))
        last = [*before, *ids[:start]][-LAST:]
        prompt = repeat_prompt(tokenizer, chat, last)
        forward(model, torch.tensor([[*prompt, *part]], device=input_device(model)), cache)
    return [layer.scores for layer in scoring]


def repeat_prompt(tokenizer: PreTrainedTokenizerBase, chat: Chat, last: Sequence[int]) -> list[int]:
    """Ids that ask for the context, or for its part behind the tokens ``last``; the answer follows."""
    ask = [*continued(tokenizer, REPEAT_PART), *last] if last else continued(tokenizer, REPEAT)
    return [*ask, *chat.suffix]


def room(model: PreTrainedModel, seen: int) -> int | None:
    """Positions that the model has behind ``seen`` tokens; None where it has no limit.

    Raises:
        ValueError: there are none, or a rotary embedding that changes with the length would change in between.
    """
    config = model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None)
    changes = changing_rope_limit(model)
    if changes is not None and seen <= changes:
        limit = min(limit or changes, changes)
    if limit is None:
        return None
    if seen >= limit:
        raise ValueError(f"context has {seen} tokens and the model {limit} positions; shorten the context")
    return int(limit) - seen
