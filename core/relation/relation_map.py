"""How the relations of one sample developed over training (thesis section 5.3.6), and scores over checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import as_tensor
from .graph import RelationGraph
from .label_noise import normalised


@dataclass(frozen=True)
class RelationMap:
    """Relations r(i, j) of one sample i to all others.

    Attributes:
        index: i.
        others: (n - 1,) int64, j.
        mean, std: (n - 1,) float32 over the checkpoints; the standard deviation is that of the population.
        last: (n - 1,) float32, at the last checkpoint.
    """

    index: int
    others: Tensor
    mean: Tensor
    std: Tensor
    last: Tensor


def relation_map(checkpoints: Iterable[RelationGraph], i: int) -> RelationMap:
    """Mean and spread of a sample's relations over checkpoints, in the order of training.

    Args:
        checkpoints: one graph for each, of the same samples; a generator keeps one in memory at a time.
        i: row number.

    Raises:
        ValueError: no checkpoint, or graphs of different numbers of rows.

    References:
        Thesis section 5.3.6.
    """
    if not isinstance(checkpoints, Iterable):
        raise TypeError(f"checkpoints is a {type(checkpoints).__name__}; give one graph for each checkpoint")
    rows: list[Tensor] = []
    for graph in checkpoints:
        if not isinstance(graph, RelationGraph):
            raise TypeError(f"checkpoints hold a {type(graph).__name__}; give one graph for each checkpoint")
        row = graph.row(i)
        if rows and len(row) != len(rows[0]):
            raise ValueError(
                f"checkpoint {len(rows)} has {len(row)} rows, the first {len(rows[0])}; use the same samples"
            )
        rows.append(row)
    if not rows:
        raise ValueError("checkpoints is empty; give one graph for each checkpoint")
    values = torch.stack(rows)
    others = torch.arange(values.shape[1])
    others = others[others != i]
    values = values[:, others]
    return RelationMap(i, others, values.mean(0), values.std(0, correction=0), values[-1])


def _vector(scores: Any) -> Tensor:
    out = as_tensor(scores, "scores").double()
    if out.ndim != 1 or not len(out) or not bool(out.isfinite().all()):
        raise ValueError(f"scores hold a vector of shape {tuple(out.shape)}; give finite scores (n,) a checkpoint")
    return out


def average_scores(scores: Iterable[Tensor]) -> Tensor:
    """Temporal ensemble: the mean over checkpoints of scores (n,), each divided by its largest magnitude.

    Checkpoints from before about half of the training make it worse than the last one alone.

    Raises:
        ValueError: none given, or of different lengths.

    References:
        Thesis section 5.4.2, table 5.5.
    """
    if not isinstance(scores, Iterable) or isinstance(scores, Tensor | str | bytes | Mapping):
        raise TypeError(f"scores is a {type(scores).__name__}; give one vector a checkpoint, several of them")
    all_scores = [normalised(_vector(s)) for s in scores]
    if not all_scores or len({len(s) for s in all_scores}) > 1:
        raise ValueError(
            f"scores has the lengths {[len(s) for s in all_scores]}; give one vector a checkpoint, of one length"
        )
    return torch.stack(all_scores).mean(0)
