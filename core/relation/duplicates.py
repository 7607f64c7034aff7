"""Near-duplicates: rows so close that they vouch for each other, wrong labels included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from .checks import as_features
from .pairs import unit


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


def near_duplicates(features: Any, threshold: float = 0.13) -> NearDuplicates:
    """Rows nearer to another row than ``threshold`` times the median of such distances; cleanlab's rule.

    Args:
        features: (n, d) finite, n of at least two.
        threshold: share of the median.

    Raises:
        ValueError: one row, or features that are none.
    """
    x = as_features(features)
    if len(x) < 2:
        raise ValueError("features has one row; near-duplicates need two")
    search = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(unit(x, None).cpu().numpy())
    # asked without data, each row's own place is left out
    distances, indices = (torch.from_numpy(a[:, 0]) for a in search.kneighbors())
    distances = distances.double().square() / 2  # of unit rows: 1 - cosine
    middle = distances.median()
    score = torch.where(distances + middle > 0, distances / (distances + middle), 0.0)
    return NearDuplicates(indices, distances, score, distances <= threshold * middle)
