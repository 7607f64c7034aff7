"""Near-duplicates: rows so close that they vouch for each other, wrong labels included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_numbers
from .checks import as_features, chunks
from .pairs import unit
from .sums import bar_of


@dataclass(frozen=True)
class NearDuplicates:
    """Each row's nearest other row.

    Attributes:
        nearest: (n,) int64.
        distance: (n,) float64, cosine distance in [0, 2].
        score: (n,) float64 in [0, 1], low is a duplicate: distance over distance plus the median of all.
        is_issue: (n,) bool.
    """

    nearest: Tensor
    distance: Tensor
    score: Tensor
    is_issue: Tensor


def near_duplicates(
    features: Any,
    threshold: float = 0.13,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> NearDuplicates:
    """Rows nearer to another row than ``threshold`` times the median of such distances; cleanlab's rule.

    All pairs are compared, a few thousand rows at a time; nothing is copied whole.

    Args:
        features: (n, d) finite, n of at least two.
        threshold: share of the median.
        device: where to compute; None is where ``features`` are.
        progress: a bar; None shows one on a terminal.

    Raises:
        ValueError: one row, a negative threshold, or features that are none.
    """
    x = as_features(features)
    n = len(x)
    if n < 2:
        raise ValueError("features has one row; near-duplicates need two")
    check_numbers(threshold=threshold)
    if not 0 <= threshold < float("inf"):
        raise ValueError(f"threshold={threshold} must be at least 0 and finite")
    place = x.device if device is None else torch.device(device)
    best, nearest = torch.full((n,), -2.0, device=place), torch.zeros(n, dtype=torch.int64, device=place)

    def offer(rows: slice, dots: Tensor, first: int) -> None:
        values = dots.amax(1)
        better = (values > best[rows]).nonzero().squeeze(1)  # soon few; of equal ones the first stays
        best[better + rows.start] = values[better]
        nearest[better + rows.start] = dots[better].argmax(1) + first

    with bar_of(n * n, progress, "near-duplicates", "pair") as bar:
        for rows in chunks(n):  # a pair is computed once, and tells both of its rows
            a = unit(x[rows]).to(place)
            for columns in chunks(n):
                if columns.start < rows.start:
                    continue
                dots = a @ unit(x[columns]).to(place).T
                if rows == columns:
                    dots.fill_diagonal_(-2.0)
                else:
                    offer(columns, dots.T, rows.start)
                offer(rows, dots, columns.start)
                bar.update(dots.numel() * (1 if rows == columns else 2))
    nearest = nearest.cpu()
    # 1 - cosine of unit rows, from their difference: exact where it is small
    distance = torch.cat(
        [(unit(x[rows].double(), dtype=torch.float64) - unit(x[nearest[rows]].double(), dtype=torch.float64))
         .square().sum(1).cpu() / 2 for rows in chunks(n)]
    )  # fmt: skip
    middle = distance.median()
    score = torch.where(distance + middle > 0, distance / (distance + middle), 0.0)
    return NearDuplicates(nearest, distance, score, distance <= threshold * middle)
