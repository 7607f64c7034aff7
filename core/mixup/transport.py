"""Moving salient regions into the shown part of the mask (thesis 3.4.2).

A plan is an index array ``source``: region j of the result is region ``source[j]`` of the input.
The cost of moving region i to j is C'_ij = cost * C_ij - s_i * [z_j > 0], C being the squared
distance of the regions over the squared longer side of the grid minus one. Half-shown regions count as shown, as
in the released code; with the printed z_j itself Proposition 3 fails.
"""

from __future__ import annotations

import functools

import numpy as np
from scipy.optimize import linear_sum_assignment

TRANSPORTS = ("iterative", "exact", None)


def plan_transport(s: np.ndarray, shown: np.ndarray, cost: float, method: str = "iterative") -> np.ndarray:
    """Binary transport plans for a batch.

    ``"iterative"`` is Algorithm 1 run to convergence with an unbounded penalty: every region asks
    for the place it likes best among those that have not refused it, and a place keeps the offer
    with the least cost (ties: lower index). That is deferred acceptance, whose result does not
    depend on the order of the offers, so one region at a time gives the plan of the n x n matrix
    form at a fraction of its work. ``"exact"`` minimises the sum over shown places by assignment.

    Args:
        s: (B, rows, cols) saliency of the regions, summing to one.
        shown: (B, rows, cols) bool, where the input is shown.
        cost: price of the unit distance, the thesis' xi and the released t_eps, >= 0.
        method: ``"iterative"`` or ``"exact"``.

    Returns:
        (B, rows * cols) int64 permutations.
    """
    batch, rows, cols = s.shape
    s = np.ascontiguousarray(s.reshape(batch, -1), dtype=np.float64)
    shown = np.ascontiguousarray(shown.reshape(batch, -1))
    distance = distances(rows, cols)
    source = np.empty((batch, rows * cols), np.int64)
    if method == "exact":
        for b in range(batch):
            source[b] = _assign(cost * distance, s[b], shown[b])
        return source
    from .matching import deferred_acceptance  # importing numba takes half a second

    deferred_acceptance(s, shown, cost * distance, _by_distance(rows, cols), source)
    return source


def plan_cost(source: np.ndarray, s: np.ndarray, shown: np.ndarray, cost: float) -> np.ndarray:
    """The partial objective of Proposition 4, sum of C' over shown places: (B,) float64."""
    batch, rows, cols = s.shape
    moved = cost * distances(rows, cols)[source, np.arange(rows * cols)]
    gained = np.take_along_axis(s.reshape(batch, -1), source, 1)
    return ((moved - gained) * shown.reshape(batch, -1)).sum(1)


@functools.lru_cache(maxsize=32)
def distances(rows: int, cols: int) -> np.ndarray:
    """(n, n) squared distances of the regions of a grid, the longer side minus one being the unit."""
    r, c = np.divmod(np.arange(rows * cols), cols)
    d = (r[:, None] - r) ** 2 + (c[:, None] - c) ** 2
    return d / max(rows - 1, cols - 1, 1) ** 2


@functools.lru_cache(maxsize=32)
def _by_distance(rows: int, cols: int) -> np.ndarray:
    """(n, n) places in the order of their distance from each region, ties by index."""
    return np.argsort(distances(rows, cols), axis=1, kind="stable")


def _assign(price: np.ndarray, s: np.ndarray, shown: np.ndarray) -> np.ndarray:
    places = np.flatnonzero(shown)
    source = np.full(len(s), -1)
    row, col = linear_sum_assignment((price - s[:, None])[:, places])
    source[places[col]] = row
    # hidden places change nothing: what is left stays at home where it can
    free = np.setdiff1d(np.arange(len(s)), row)
    empty = np.flatnonzero(~shown)
    home = np.intersect1d(free, empty)
    source[home] = home
    source[np.setdiff1d(empty, home)] = np.setdiff1d(free, home)
    return source
