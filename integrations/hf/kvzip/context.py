"""A compressed context: how it is made, extended and pruned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from dataopt.core.arguments import check_choice, check_tensors
from dataopt.core.kvzip import PackedHeads, head_selection, pair_selection, recent_window
from dataopt.core.kvzip.budget import BUDGETS, check_ratio
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicSlidingWindowLayer

from .. import decoder
from ..chat import Chat
from . import build
from .layers import SlidingState

LEVELS = ("pair", "head")
NORMS = ("full", "subset")


@dataclass(frozen=True)
class Options:
    """How a context was compressed; the parameters of :class:`KVzipCache`."""

    ratio: float = 0.3
    level: str = "pair"
    budget: str = "global"
    max_tokens: int | None = None
    instruction: str | None = None
    chunk: int = 1024
    prefill_chunk: int = 2048
    norm: str = "full"
    recent: int = 128
    bits: int | None = None
    keep_scores: bool = False

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        for name, allowed in (("level", LEVELS), ("budget", BUDGETS), ("norm", NORMS), ("bits", (None, 8, 4))):
            check_choice(allowed, **{name: getattr(self, name)})
        for name, least in (("chunk", 1), ("prefill_chunk", 1), ("recent", 0), ("max_tokens", 1)):
            value = getattr(self, name)
            if not (name == "max_tokens" and value is None) and (not isinstance(value, int) or value < least):
                raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")
        if self.level == "head" and (self.budget != "global" or self.max_tokens is not None):
            raise ValueError("level='head' compares all heads; leave budget='global' and max_tokens=None")


@dataclass(frozen=True)
class Context:
    """A compressed context: all that is saved, and all that forks share.

    Attributes:
        layers: one entry for each layer of the model.
        ids: tokens that were read: the prefix, then the context.
        prefix: how many of them are the prefix.
        text: the context.
        head_scores: (L, H) float32, the maximum of each head's log scores; None if no pair was scored.
    """

    layers: tuple[PackedHeads | SlidingState, ...]
    ids: tuple[int, ...]
    prefix: int
    text: str
    options: Options
    template_kwargs: dict[str, Any]
    head_scores: Tensor | None

    @property
    def packed(self) -> list[PackedHeads]:
        return [p for p in self.layers if isinstance(p, PackedHeads)]

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self.layers)


def compress(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chat: Chat,
    ids: tuple[int, ...],
    prefix: int,
    text: str,
    options: Options,
    template_kwargs: dict[str, Any],
    head_scores: Tensor | None,
) -> Context:
    scored = effective_ratio(options, len(ids) - prefix) < 1 or options.keep_scores
    scored = scored and head_scores is None
    room = build.room(model, len(ids))
    chunk = scoring_chunk(tokenizer, chat, options, room) if scored else options.chunk
    whole = decoder.changing_rope_limit(model)
    step = len(ids) if whole is not None and len(ids) > whole else options.prefill_chunk
    layers = build.prefill(model, ids, step)
    scores = None
    if scored:
        scores = build.reconstruct(
            model, tokenizer, chat, layers, len(ids), prefix, ids[prefix:], (), chunk, options.norm
        )
        head_scores = head_maxima(scores, prefix)
    packed = keep_pairs(layers, scores, prefix, options, head_scores)
    return Context(packed, ids, prefix, text, options, template_kwargs, head_scores)


def keep_pairs(
    layers: Sequence[build.Dense | SlidingState],
    scores: Sequence[Tensor] | None,
    prefix: int,
    options: Options,
    head_scores: Tensor | None,
) -> tuple[PackedHeads | SlidingState, ...]:
    """Select among the dense pairs, pack those that stay, and append them where pairs were packed before."""
    full = [p for p in layers if isinstance(p, build.Dense)]
    n = full[0].keys.shape[2]
    heads = [p.keys.shape[1] for p in full]
    keep = [torch.ones(h, n, dtype=torch.bool, device=p.keys.device) for h, p in zip(heads, full, strict=True)]
    total = n - prefix
    ratio = effective_ratio(options, total)
    if options.level == "head" and ratio < 1:
        assert head_scores is not None
        for mask, stays in zip(keep, head_selection(head_scores, ratio), strict=True):
            window = recent_window(total, options.recent, mask.device)
            mask[:, prefix:] = stays.to(mask.device).unsqueeze(1) | window
    elif ratio < 1:
        assert scores is not None
        flat = [s[:, prefix:].flatten() for s in scores]
        chosen = pair_selection(flat, [[total] * h for h in heads], total, ratio, options.budget)
        for mask, part in zip(keep, chosen, strict=True):
            mask[:, prefix:] = part.view(len(mask), -1)
    kept = scores if options.keep_scores and scores is not None else [None] * len(full)
    packed = []
    for dense, mask, score in zip(full, keep, kept, strict=True):
        new = PackedHeads.pack(dense.keys[0], dense.values[0], mask, prefix, score)
        new = new.quantise(options.bits) if options.bits else new
        packed.append(new if dense.packed is None else dense.packed.append(new))
    rest = iter(packed)
    return tuple(p if isinstance(p, SlidingState) else next(rest) for p in layers)


def pruned(state: Context, ratio: float) -> Context:
    options, packed = state.options, state.packed
    total = len(state.ids) - state.prefix
    check_ratio(ratio)
    if ratio > effective_ratio(options, total):
        raise ValueError(
            f"ratio={ratio} is above the present {effective_ratio(options, total)}; compress the context again"
        )
    if options.level == "head":
        if state.head_scores is None:
            raise ValueError("no scores were kept, so the ratio cannot be lowered; compress with keep_scores=True")
        lost = ~head_selection(state.head_scores, ratio)
        chosen = [_without(p, total, options.recent, heads) for p, heads in zip(packed, lost, strict=True)]
    else:
        if any(p.scores is None for p in packed):
            raise ValueError("no scores were kept, so the ratio cannot be lowered; compress with keep_scores=True")
        flat, counts, free = [], [], []
        for p in packed:
            assert p.scores is not None
            mask = torch.cat([torch.arange(n, device=p.scores.device) >= p.prefix for n in p.lengths])
            free.append(mask)
            flat.append(p.scores[mask])
            counts.append([n - p.prefix for n in p.lengths])
        chosen = []
        for mask, part in zip(free, pair_selection(flat, counts, total, ratio, options.budget), strict=True):
            keep = ~mask
            keep[mask] = part
            chosen.append(keep)
    rest = iter([p.select(keep.to(p.keys.device)) for p, keep in zip(packed, chosen, strict=True)])
    layers = tuple(p if isinstance(p, SlidingState) else next(rest) for p in state.layers)
    return replace(state, layers=layers)


def _without(p: PackedHeads, total: int, recent: int, lost: Tensor) -> Tensor:
    parts = []
    for n, gone in zip(p.lengths, lost.tolist(), strict=True):
        keep = torch.ones(n, dtype=torch.bool)
        if gone and n == p.prefix + total:
            keep[p.prefix :] = recent_window(total, recent)
        parts.append(keep)
    return torch.cat(parts)


def effective_ratio(options: Options, total: int) -> float:
    return options.ratio if options.max_tokens is None else min(1.0, options.max_tokens / total)


def scoring_chunk(tokenizer: PreTrainedTokenizerBase, chat: Chat, options: Options, room: int | None) -> int:
    """Context tokens per scoring pass that the model's positions leave room for."""
    if room is None:
        return options.chunk
    prompt = len(build.repeat_prompt(tokenizer, chat, [0] * build.LAST))
    if room - prompt < 1:
        raise ValueError(
            f"context leaves {room} of the model's positions and the scoring prompt alone takes {prompt}; shorten the "
            "context, or give head_scores with level='head', which needs no scoring"
        )
    return min(options.chunk, room - prompt)


def head_maxima(scores: Sequence[Tensor], prefix: int) -> Tensor:
    return torch.stack([s[:, prefix:].amax(1).float().cpu() for s in scores])


def joined(parts: list[Any]) -> Any:
    """The same layer of several contexts: packed ones side by side, sliding ones aligned at their last token."""
    if isinstance(parts[0], PackedHeads):
        return parts
    if len(parts) == 1:
        return parts[0]
    width = max(p.keys.shape[2] for p in parts)
    keys, values = (
        torch.cat([torch.nn.functional.pad(t, (0, 0, width - t.shape[2], 0)) for t in tensors])
        for tensors in ([p.keys for p in parts], [p.values for p in parts])
    )
    return SlidingState(keys, values, parts[0].window, max(p.seen for p in parts))


def read_head_scores(source: Tensor | str | Path, model: PreTrainedModel) -> Tensor:
    from . import artifact

    config = model.config.get_text_config(decoder=True)
    if not isinstance(source, Tensor | str | Path):
        raise TypeError(f"head_scores is a {type(source).__name__}; give a tensor, a folder or a Hub repository id")
    if isinstance(source, Tensor):
        check_tensors(head_scores=source)
        scores = source.detach().to("cpu", torch.float32, copy=True)  # the caller's own may change later
    else:
        scores = artifact.load_head_scores(source, model)
    layers = sum(not isinstance(p, DynamicSlidingWindowLayer) for p in DynamicCache(config=config).layers)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if scores.shape != (layers, heads) or scores.isnan().any():
        raise ValueError(
            f"head_scores has the shape {tuple(scores.shape)} and must be ({layers}, {heads}), one number for each key "
            "head of each full-attention layer"
        )
    return scores
