"""Exact minimisers of the mask energy (thesis eq. 3.4), behind one function.

Since the pairwise term is convex in the label difference, the energy has an exact polynomial
solution for any unaries; the alpha-beta swap of the released code is a heuristic for it.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from io import BytesIO

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from ..arguments import check_choice
from .grid import MaskCosts

SOLVERS = ("auto", "numba", "scipy", "gco")


def solve_mask(costs: MaskCosts, solver: str = "auto") -> np.ndarray:
    """Labels of least energy, deterministic.

    Args:
        costs: the batch's energies.
        solver: ``"numba"`` (what ``"auto"`` takes): compiled, float64, exact; releases the GIL.
            ``"scipy"``: one maximum flow per sample without a compiler, capacities rounded to
            2^-30 of a sample's total. ``"gco"``: the released code's alpha-beta swap with its integer
            scaling, not exact, in a child process; a baseline that needs the extra ``pygco``.

    Returns:
        (B, rows, cols) int64, labels 0..m.

    Raises:
        ValueError: unknown solver, or a negative weight (the energy is then not submodular).
        RuntimeError: the gco child process failed.
    """
    check_solver(solver)
    for name in ("down", "right"):
        w = getattr(costs, name)
        if w.size and not w.min() >= 0:
            raise ValueError(
                f"costs.{name} has the weight {w.min():g}; pairwise weights must be finite and not negative "
                "(gamma <= 1, region distances in [0, 1])"
            )
    return {"auto": _numba, "numba": _numba, "scipy": _scipy, "gco": _gco}[solver](costs)


def check_solver(solver: str) -> None:
    check_choice(SOLVERS, solver=solver)


def mask_energy(costs: MaskCosts, labels: np.ndarray) -> np.ndarray:
    """Energy of each sample's labelling: (B, rows, cols) labels to (B,) float64."""
    m = costs.unary.shape[-1] - 1
    t = labels / m
    e = np.take_along_axis(costs.unary, labels[..., None], -1).sum((1, 2, 3))
    e += (costs.down * (t[:, 1:] - t[:, :-1]) ** 2).sum((1, 2))
    return e + (costs.right * (t[:, :, 1:] - t[:, :, :-1]) ** 2).sum((1, 2))


def _numba(costs: MaskCosts) -> np.ndarray:
    from .descent import descend, ishikawa  # importing numba takes half a second

    unary, down, right = (np.ascontiguousarray(a) for a in (costs.unary, costs.down, costs.right))
    out = np.empty(unary.shape[:-1], np.int64)
    # near lam = 0 and 1 the prior's 1e-8 bends the unaries the wrong way; rounding alone does not count
    convex = bool((np.diff(unary, n=2, axis=-1) >= -1e-12 * np.abs(unary).max()).all())
    (descend if convex else ishikawa)(unary, down, right, out)
    return out


@functools.lru_cache(maxsize=16)
def _ishikawa_graph(rows: int, cols: int, m: int) -> tuple[np.ndarray, ...]:
    """Arcs of Ishikawa's graph: bits (cell * m + l), then the source and the sink.

    Returns (indptr, indices, order, edge), the pattern in row order; ``edge`` points into the
    vector [one per neighbour pair, 0, infinity, source supplies, sink demands].
    """
    n = rows * cols
    cell = np.arange(n).reshape(rows, cols)
    pairs = np.concatenate(
        [
            np.stack([cell[:-1].ravel(), cell[1:].ravel()], 1),
            np.stack([cell[:, :-1].ravel(), cell[:, 1:].ravel()], 1),
        ]
    )
    k, h = np.meshgrid(np.arange(m), np.arange(m), indexing="ij")
    a = (pairs[:, :1] * m + k.ravel()).ravel()
    z = (pairs[:, 1:] * m + h.ravel()).ravel()
    w = np.repeat(np.arange(len(pairs)), m * m)
    bit = (np.arange(n)[:, None] * m + np.arange(1, m)).ravel()
    bits = np.arange(n * m)
    infinite, supply = len(pairs), len(pairs) + 1
    start = np.concatenate([a, z, bit, np.full(n * m, n * m), bits])
    end = np.concatenate([z, a, bit - 1, bits, np.full(n * m, n * m + 1)])
    value = np.concatenate([w, w, np.full(bit.size, infinite), supply + bits, supply + n * m + bits])
    order = np.lexsort((end, start))
    indptr = np.searchsorted(start[order], np.arange(n * m + 3))
    return indptr.astype(np.int32), end[order].astype(np.int32), value[order], pairs


def _scipy(costs: MaskCosts) -> np.ndarray:
    batch, rows, cols, labels = costs.unary.shape
    m, n = labels - 1, rows * cols
    indptr, indices, value, pairs = _ishikawa_graph(rows, cols, m)
    weights = np.concatenate([costs.down.reshape(batch, -1), costs.right.reshape(batch, -1)], 1) / m**2
    around = np.zeros((batch, n))
    for end in (0, 1):
        np.add.at(around.T, pairs[:, end], weights.T)
    slope = np.diff(costs.unary, axis=-1).reshape(batch, n, m)
    slope = (slope + around[..., None] * (2 * np.arange(m) + 1 - m)).reshape(batch, n * m)
    out = np.empty((batch, n), np.int64)
    for b in range(batch):
        supply, demand = np.maximum(-slope[b], 0), np.maximum(slope[b], 0)
        if not supply.any():
            out[b] = 0
            continue
        scale = 2**30 / max(supply.sum(), demand.sum(), weights[b].max(initial=0))
        capacity = np.concatenate([weights[b] * scale, [2**31 - 1], supply * scale, demand * scale])
        graph = csr_array((np.rint(capacity).astype(np.int32)[value], indices, indptr), shape=(n * m + 2,) * 2)
        flow = maximum_flow(graph, n * m, n * m + 1).flow
        left = csr_array(graph - flow)
        left.eliminate_zeros()
        reached = np.zeros(n * m + 2, bool)
        reached[breadth_first_order(left, n * m, return_predecessors=False)] = True
        out[b] = reached[: n * m].reshape(n, m).sum(1)
    return out.reshape(batch, rows, cols)


def _gco(costs: MaskCosts) -> np.ndarray:
    # A child process: importing gco changes numpy globally, and its errors abort the process.
    payload = BytesIO()
    np.savez(payload, unary=costs.unary, down=costs.down, right=costs.right)
    child = subprocess.run(
        [sys.executable, "-m", "dataopt.core.mixup.gco_baseline"], input=payload.getvalue(), capture_output=True
    )
    if child.returncode:
        reason = child.stderr.decode(errors="replace").strip().splitlines()
        raise RuntimeError(
            f"solver='gco' failed with exit code {child.returncode} ({reason[-1] if reason else 'no message'}); "
            'it needs the extra, get it with: pip install "dataopt[pygco]"'
        )
    return np.load(BytesIO(child.stdout))
