"""Time of the exact mask solver for 128 pairs, against gco's swap and scipy's maximum flow.

One thread. gco runs in a child process, which measures its own time: the released per-sample loop
with the released integer scaling, without start-up. The solvers take turns; medians are reported.
A sample counts as optimal when its energy is within 1e-6, relatively, of the best of the solvers'.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import statistics
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection

import common
import numpy as np
import synthetic
import torch
from dataopt.core.mixup.grid import MaskCosts
from dataopt.core.mixup.labelling import mask_energy, solve_mask

GRIDS: tuple[int, ...] = (2, 4, 8, 16)
LAMBDAS: tuple[float, ...] = (0.1, 0.2, 0.5, 0.643, 0.8)
BATCH = 128
REPETITIONS = 9
OPTIMAL = 1e-6

Solve = Callable[[MaskCosts], tuple[np.ndarray, float]]


def serve_gco(pipe: Connection) -> None:
    """The child process: arrays in, (labels, seconds) out, None ends it."""
    from dataopt.core.mixup.gco_baseline import swap

    while (arrays := pipe.recv()) is not None:
        start = time.perf_counter()
        labels = swap(*arrays)
        pipe.send((labels, time.perf_counter() - start))


def timed(solver: str) -> Solve:
    def solve(costs: MaskCosts) -> tuple[np.ndarray, float]:
        start = time.perf_counter()
        labels = solve_mask(costs, solver)
        return labels, time.perf_counter() - start

    return solve


def through(pipe: Connection) -> Solve:
    def solve(costs: MaskCosts) -> tuple[np.ndarray, float]:
        pipe.send((costs.unary, costs.down, costs.right))
        return pipe.recv()

    return solve


def measure(lam: float, grids: tuple[int, ...], batch: int, repetitions: int, solvers: dict[str, Solve]) -> common.Cell:
    """Milliseconds and optimality of every solver on every grid."""
    generator = torch.Generator().manual_seed(0)
    x, s = synthetic.images(batch, generator), synthetic.blobs(batch, generator)
    partner = torch.randperm(batch, generator=generator)
    out: common.Cell = {}
    for cells in grids:
        costs = synthetic.costs(x, s, partner, lam, cells)
        labels = {name: solve(costs)[0] for name, solve in solvers.items()}  # and warm up
        times: dict[str, list[float]] = {name: [] for name in solvers}
        for _ in range(repetitions):
            for name, solve in solvers.items():
                times[name].append(solve(costs)[1])
        energy = {name: mask_energy(costs, t) for name, t in labels.items()}
        best = np.min(list(energy.values()), axis=0)
        out[str(cells)] = {}
        for name, e in energy.items():
            gap = (e - best) / np.abs(best)
            out[str(cells)][name] = {
                "ms": 1000 * statistics.median(times[name]),
                "optimal_percent": 100 * float((gap <= OPTIMAL).mean()),
                "mean_gap": float(gap.mean()),
                "max_gap": float(gap.max()),
            }
    return out


def report(run: common.Run, names: list[str], grids: tuple[int, ...]) -> None:
    rows: list[list[object]] = []
    means: dict[str, list[float]] = {name: [] for name in names}
    for key, cell in run.cells.items():
        for name in names:
            ms = [cell[str(g)][name]["ms"] for g in grids]
            means[name].append(statistics.mean(ms))
            ratio = means[name][-1] / means["numba"][-1]
            rows.append([key, name, *(f"{v:.2f}" for v in ms), f"{means[name][-1]:.2f}", f"{ratio:.1f}"])
    header = ["lambda", "solver", *(f"{g}x{g}" for g in grids), "mean", "times ours"]
    parts = [
        f"Milliseconds for {run.settings['batch']} pairs (numba is ours):",
        common.table(header, rows),
        "Optimal samples, mean and largest relative gap, over all lambdas:",
    ]
    rows = []
    for name in names:
        for g in grids:
            cells = [cell[str(g)][name] for cell in run.cells.values()]
            optimal, gap = (statistics.mean(c[k] for c in cells) for k in ("optimal_percent", "mean_gap"))
            rows.append([name, f"{g}x{g}", f"{optimal:.1f} %", f"{gap:.1e}", f"{max(c['max_gap'] for c in cells):.1e}"])
    parts.append(common.table(["solver", "grid", "optimal", "mean gap", "largest gap"], rows))
    if "gco" in names:
        ratios = [a / b for a, b in zip(means["gco"], means["numba"], strict=True)]
        parts.append(common.verdict("gco's mean over the grids, worst lambda, in multiples of ours,", min(ratios), 10))
    else:
        parts.append('gco is not installed, so its target is not measured; pip install "dataopt[pygco]" (Python 3.11).')
    run.report(*parts)


def main() -> None:
    args = common.parser(__doc__).parse_args()
    grids, lambdas, batch, repetitions = GRIDS, LAMBDAS, BATCH, REPETITIONS
    if args.quick:
        grids, lambdas, batch, repetitions = (2, 4), (0.5,), 8, 2
    gco = importlib.util.find_spec("gco") is not None
    names = ["numba", "scipy"] + ["gco"] * gco
    settings = {"grids": grids, "batch": batch, "repetitions": repetitions, "solvers": names}
    run = common.start("solver_time", "Mask solver", args, 1, settings)
    keys = [str(lam) for lam in lambdas]
    solvers: dict[str, Solve] = {"numba": timed("numba"), "scipy": timed("scipy")}
    if gco and run.missing(keys):
        context = multiprocessing.get_context("spawn")
        pipe, theirs = context.Pipe()
        child = context.Process(target=serve_gco, args=(theirs,), daemon=True)
        child.start()
        theirs.close()  # so that a child that dies ends the wait for its answer
        solvers["gco"] = through(pipe)
    for lam, key in zip(lambdas, keys, strict=True):
        run.cell(key, partial(measure, lam, grids, batch, repetitions, solvers))
    if "gco" in solvers:
        pipe.send(None)
        child.join()
    report(run, names, grids)


if __name__ == "__main__":
    main()
