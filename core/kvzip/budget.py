"""Which pairs stay: exact counts, and ties broken by the first layer, head and position."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..arguments import check_choice, check_strings, check_tensors, check_whole

BUDGETS = ("global", "layer", "uniform")


def pair_selection(
    scores: Sequence[Tensor], counts: Sequence[Sequence[int]], total: int, ratio: float, budget: str = "global"
) -> list[Tensor]:
    """The highest scores (section 8.3).

    Args:
        scores: for each layer (N,) float, head after head; only pairs that may be evicted.
        counts: for each layer the pairs of each head in ``scores``.
        total: pairs of each head that ``ratio`` refers to: the context tokens seen, also where some of their pairs
            were evicted before.
        ratio: share that stays, in (0, 1].
        budget: "global" compares all pairs of all layers, "layer" gives each layer the same share, "uniform" each
            head.

    Returns:
        For each layer (N,) bool. Exactly ``round(ratio * total * heads)`` are True, over all heads, those of each
        layer, or for each single head; all, where fewer are there. A smaller ratio keeps a subset.

    Raises:
        ValueError: an unknown budget, or a ratio outside (0, 1].
    """
    check_ratio(ratio)
    check_whole(total=total)
    if not isinstance(scores, list | tuple) or not isinstance(counts, list | tuple) or len(scores) != len(counts):
        raise ValueError(f"scores {scores!r:.40} and counts {counts!r:.40} must be lists with one entry for each layer")
    for s, c in zip(scores, counts, strict=True):
        check_tensors(scores=s)
        whole = isinstance(c, list | tuple) and all(type(n) is int and n >= 0 for n in c)
        if not whole or s.shape != (sum(c),) or not s.is_floating_point():
            raise ValueError(f"counts={c!r:.80} must be the pairs of each head, {tuple(s.shape)} scores in all")
    if not scores or total < 0:
        raise ValueError(
            f"scores has {len(scores)} layers and total={total}; give one layer or more, and tokens from 0"
        )
    check_strings(budget=budget)
    check_choice(BUDGETS, budget=budget)
    heads = sum(len(c) for c in counts)
    if budget == "global":
        flat = highest(torch.cat([s.cpu() for s in scores]), round(ratio * total * heads))
        return [part.to(s.device) for part, s in zip(flat.split([len(s) for s in scores]), scores, strict=True)]
    if budget == "layer":
        return [highest(s, round(ratio * total * len(c))) for s, c in zip(scores, counts, strict=True)]
    each = round(ratio * total)
    return [torch.cat([highest(part, each) for part in s.split(list(c))]) for s, c in zip(scores, counts, strict=True)]


def highest(scores: Tensor, count: int) -> Tensor:
    """(N,) bool, True for the ``count`` largest of (N,) scores; among equal ones the first win."""
    if count >= len(scores):
        return torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    if count <= 0:
        return torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    least = scores.topk(count, sorted=True).values[-1]
    keep = scores > least
    ties = (scores == least).nonzero().flatten()
    keep[ties[: count - int(keep.sum())]] = True
    return keep


def head_selection(scores: Tensor, ratio: float) -> Tensor:
    """The heads that keep their whole context (section 8.4.2, context-independent eviction).

    Args:
        scores: (L, H), the maximum of each head's pair scores over a long text.
        ratio: share of heads, in (0, 1].

    Returns:
        (L, H) bool with exactly ``round(ratio * L * H)`` True.
    """
    check_ratio(ratio)
    check_tensors(scores=scores)
    if scores.ndim != 2 or not scores.is_floating_point() or scores.isnan().any():
        raise ValueError(f"scores is {scores.dtype} of shape {tuple(scores.shape)}; give floating (L, H) without NaN")
    return highest(scores.flatten(), round(ratio * scores.numel())).view_as(scores)


def recent_window(length: int, recent: int, device: torch.device | str = "cpu") -> Tensor:
    """(length,) bool, True on the last ``recent`` positions: what a head keeps that lost its context."""
    check_whole(length=length, recent=recent)
    if length < 0:
        raise ValueError(f"length={length} must be at least 0")
    return torch.arange(length, device=device) >= length - recent


def check_ratio(ratio: float) -> None:
    """Raises:
    ValueError: not a number in (0, 1].
    """
    if not isinstance(ratio, int | float) or isinstance(ratio, bool) or not 0 < ratio <= 1:
        raise ValueError(
            f"ratio={ratio!r} must be above 0 and at most 1: it is the share of the context's pairs that stays"
        )
