"""Time of Co-Mixup's plan for 100 inputs, against the released loop of gco calls; energies, repeats and restarts.

One thread; 100 inputs in partitions of 20, a 4x4 grid, 4 sweeps, the released settings. The gco loop has its
bookkeeping in numpy and runs in a child process, which measures its own time without start-up; both start from the same
random labels and take turns, and medians are reported. Sub-problems are those that the gco loop came upon.
"""

from __future__ import annotations

import importlib.util
import itertools
import multiprocessing
import statistics
import time
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection

import common
import numpy as np
import synthetic
import torch
from dataopt.core.mixup import CoMixup
from dataopt.core.mixup.comixup import compatibility, salient_places
from dataopt.core.mixup.grid import pool
from dataopt.core.mixup.joint import neighbours, objective, solve_cells, sweeps

BATCH, PARTITION, GRID, SWEEPS = 100, 20, 4, 4
BETA, GAMMA, ETA, TAU, OMEGA = 0.32, 1.0, 0.05, 0.83, 0.001
HALF_BONUS = 5e-4
CAP = 200_000
REPETITIONS = 15
BATCHES = 30  # for repeats and restarts
RESTARTS = (1, 2, 4, 8)
NO_GCO = 'gco is not installed, so {} not measured; pip install "dataopt[pygco]" (Python 3.11).'


@dataclass(frozen=True)
class Partition:
    """One partition's problem: (cells, m) costs, (m, m) compatibility, (m', cells) random start."""

    cost: np.ndarray
    compatible: np.ndarray
    start: np.ndarray


def partitions(batch: int, seed: int) -> list[Partition]:
    """The problems of one batch of synthetic saliency."""
    s = synthetic.blobs(batch, torch.Generator().manual_seed(seed))
    rng = np.random.default_rng(seed)
    pooled, places = pool(s, (GRID, GRID)).flatten(1).double().numpy(), salient_places(s)
    out = []
    for start in range(0, batch, PARTITION):
        rows = slice(start, start + PARTITION)
        m, n = pooled[rows].shape
        prior = ETA / n * np.log(rng.dirichlet(np.full(m, 2.0)) + 1e-8)
        cost = np.ascontiguousarray((-pooled[rows] - prior[:, None]).T)
        out.append(Partition(cost, compatibility(places[rows], OMEGA), rng.integers(m, size=(m, n))))
    return out


def ours(problems: list[Partition]) -> tuple[float, float]:
    """(seconds, objective) of a batch."""
    start = time.perf_counter()
    total = 0.0
    for p in problems:
        n = len(p.cost)
        first, second = p.start.copy(), p.start.copy()
        total += sweeps(
            p.cost, BETA / n, p.compatible, 2 * GAMMA / n, TAU * n, True, GRID, GRID, SWEEPS, GAMMA / n, CAP, first,
            second,
        )[0]  # fmt: skip
    return time.perf_counter() - start, total


def gco_sweeps(p: Partition, kept: list | None) -> tuple[np.ndarray, np.ndarray]:
    """The released loop on one partition; (first, second) inputs of each cell. ``kept`` gets every sub-problem."""
    import gco

    n, m = p.cost.shape
    weight, identity = BETA / n, np.eye(m)
    down, right = np.full((GRID - 1, GRID), weight), np.full((GRID, GRID - 1), weight)
    first, second = p.start.copy(), p.start.copy()
    counts = identity[first].sum(1)
    extra = np.zeros_like(counts)
    for t in range(SWEEPS):
        if t == SWEEPS - 1:
            part_repeats(counts, GAMMA / n, extra)
        for j in range(len(first)):
            others = counts.sum(0) - counts[j]
            over = p.compatible @ others > TAU * n
            unary = p.cost + 2 * GAMMA / n * (p.compatible @ (over * others)) + extra[j]
            shown = np.flatnonzero(counts[j])
            top = shown[np.argsort(-counts[j, shown], kind="stable")[:3]] if t else shown[:0]
            pairs = [(min(q), max(q)) for q in itertools.combinations(top, 2)]
            dist = np.ones((m + len(pairs), m + len(pairs)))
            np.fill_diagonal(dist, 0)
            for k, pair in enumerate(pairs, m):
                dist[k, list(pair)] = dist[list(pair), k] = 0.25
            mixed = [(unary[:, a] + unary[:, b]) / 2 - HALF_BONUS for a, b in pairs]
            table = np.column_stack([unary, *mixed])
            chosen = gco.cut_grid_graph(table.reshape(GRID, GRID, -1), dist, down, right, algorithm="swap")
            if kept is not None:
                kept.append((table, dist, np.asarray(chosen)))
            one, two = (np.array([*range(m), *(pair[side] for pair in pairs)]) for side in (0, 1))
            first[j], second[j] = one[chosen], two[chosen]
            counts[j] = (identity[first[j]] + identity[second[j]]).sum(0) / 2
    return first, second


def part_repeats(counts: np.ndarray, cost: float, extra: np.ndarray) -> None:
    supports = counts > 0
    for j in range(len(counts)):
        for other in range(j):
            shown = np.flatnonzero(supports[j])
            if len(shown) > 1 and (supports[j] == supports[other]).all():
                extra[other, shown[0]] += cost
                extra[j, shown[1]] += cost


def serve_gco(pipe: Connection) -> None:
    """The child process: (problems, whether to keep) in, (seconds, plans, sub-problems) out, None ends it."""
    while (message := pipe.recv()) is not None:
        problems, keep = message
        kept: list | None = [] if keep else None
        start = time.perf_counter()
        plans = [gco_sweeps(p, kept) for p in problems]
        pipe.send((time.perf_counter() - start, plans, kept))


def energy(unary: np.ndarray, dist: np.ndarray, labels: np.ndarray) -> float:
    """Of a sub-problem's labelling, (cells,)."""
    on = labels.reshape(GRID, GRID)
    edges = dist[on[1:], on[:-1]].sum() + dist[on[:, 1:], on[:, :-1]].sum()
    return float(unary[np.arange(len(labels)), labels].sum() + BETA / len(labels) * edges)


def value(p: Partition, first: np.ndarray, second: np.ndarray) -> float:
    """What :func:`sweeps` returns, of a plan that somebody else made."""
    n, m = p.cost.shape
    counts = (np.eye(m)[first] + np.eye(m)[second]).sum(1) / 2
    near, degree = neighbours(GRID, GRID)
    return objective(p.cost, BETA / n, p.compatible, 2 * GAMMA / n, TAU * n, True, near, degree, first, second, counts)


def measure_time(batch: int, repetitions: int, pipe: Connection | None) -> common.Cell:
    """Milliseconds per batch, ours alone, ours as users call it, and gco's."""
    problems = partitions(batch, 0)
    g = torch.Generator().manual_seed(0)
    x, s, y = torch.rand(batch, 3, 32, 32), synthetic.blobs(batch, g, 32), torch.arange(batch)
    mix = CoMixup(batch)
    times: dict[str, list[float]] = {"ours": [], "ours, the whole call": [], **({"gco": []} if pipe else {})}
    ours(problems), mix(x, y, s, g)  # compile
    for _ in range(repetitions):
        times["ours"].append(ours(problems)[0])
        start = time.perf_counter()
        mix(x, y, s, g)
        times["ours, the whole call"].append(time.perf_counter() - start)
        if pipe:
            pipe.send((problems, False))
            times["gco"].append(pipe.recv()[0])
    return {name: 1000 * statistics.median(t) for name, t in times.items()}


def measure_energies(batch: int, batches: int, pipe: Connection) -> common.Cell:
    """On the sub-problems of the gco loop: how often each solver is higher, and the gaps; both loops' objectives."""
    near, degree = neighbours(GRID, GRID)
    gaps, higher, final = [], 0, []
    for seed in range(batches):
        problems = partitions(batch, seed)
        pipe.send((problems, True))
        _, plans, kept = pipe.recv()
        for unary, dist, theirs in kept:
            chosen = np.empty(len(unary), np.int64)
            solve_cells(unary, BETA / len(unary), dist, GRID, GRID, near, degree, CAP, chosen)
            mine, other = energy(unary, dist, chosen), energy(unary, dist, theirs)
            higher += mine > other + 1e-9
            gaps.append((other - mine) / abs(mine))
        final.append((ours(problems)[1], sum(value(p, *plan) for p, plan in zip(problems, plans, strict=True))))
    gap, difference_ = np.maximum(gaps, 0), np.subtract(*np.transpose(final))
    return {
        "sub-problems": len(gaps),
        "ours higher": int(higher),
        "gco optimal_percent": 100 * float((gap <= 1e-6).mean()),
        "gco mean_gap": float(gap.mean()),
        "gco max_gap": float(gap.max()),
        "objective": [float(np.mean(side)) for side in zip(*final, strict=True)],
        "paired": [float(difference_.mean()), float(difference_.std(ddof=1) / len(final) ** 0.5)],
    }


def measure_restarts(batch: int, batches: int, restarts: int) -> common.Cell:
    """Mean objective of a batch, repeated supports per 1,000 outputs, and milliseconds of the whole call."""
    y, x = torch.arange(batch), torch.zeros(batch, 1, synthetic.SIDE, synthetic.SIDE)
    mix = CoMixup(batch, restarts=restarts)
    values, times, repeats, inputs, halves = [], [], 0, [], []
    for seed in range(batches):
        s = synthetic.blobs(batch, torch.Generator().manual_seed(seed))
        start = time.perf_counter()
        m = mix(x, y, s, torch.Generator().manual_seed(seed))
        times.append(time.perf_counter() - start)
        supports = [frozenset(row.nonzero().flatten().tolist()) for row in m.sources]
        mixed = [u for u in supports if len(u) > 1]
        repeats += len(mixed) - len(set(mixed))
        values.append(m.objective)
        inputs.append(float((m.sources > 0).sum(1).float().mean()))
        halves.append(float((m.first != m.second).float().mean()))
    return {
        "objective": statistics.mean(values),
        "repeats": 1000 * repeats / (batches * batch),
        "ms": 1000 * statistics.median(times),
        "inputs per output": statistics.mean(inputs),
        "halves_percent": 100 * statistics.mean(halves),
    }


def report(run: common.Run, gco: bool) -> None:
    times = run.cells["time"]
    rows = [[k, f"{times[k]:.2f}"] for k in ("gco", "ours", "ours, the whole call") if k in times]
    parts = [
        f"Milliseconds for {run.settings['batch']} inputs in partitions of {PARTITION}, {SWEEPS} sweeps:",
        common.table(["", "ms"], rows),
    ]
    if gco:
        e = run.cells["energies"]
        parts += [
            common.verdict("gco's time in multiples of ours", times["gco"] / times["ours"], least=20),
            f"{e['sub-problems']} sub-problems: gco's swap is optimal in {e['gco optimal_percent']:.1f} %, its mean "
            f"gap is {e['gco mean_gap']:.1e}, the largest {e['gco max_gap']:.1e}.",
            common.verdict("sub-problems that end higher than gco's", e["ours higher"], most=0),
            f"Objective of a batch after {SWEEPS} sweeps from the same start: ours {e['objective'][0]:.1f}, the gco "
            f"loop's {e['objective'][1]:.1f}; paired difference {e['paired'][0]:.1f} +- {e['paired'][1]:.1f}.",
        ]
    else:
        parts.append(NO_GCO.format("the targets against it are"))
    cells = {n: run.cells[f"restarts {n}"] for n in run.settings["restarts"]}
    rows = [
        [n, *(f"{c[k]:.{d}f}" for k, d in (("objective", 1), ("repeats", 1), ("inputs per output", 2),
                                          ("halves_percent", 1), ("ms", 1)))]
        for n, c in cells.items()
    ]  # fmt: skip
    header = ["restarts", "objective", "repeats per 1,000", "inputs per output", "half regions, %", "ms, whole call"]
    parts += [
        f"Restarts, means over {run.settings['batches']} batches:",
        common.table(header, rows),
        common.verdict("repeated supports per 1,000 outputs", cells[1]["repeats"], most=10),
    ]
    run.report(*parts)


def main() -> None:
    args = common.parser(__doc__).parse_args()
    batch, repetitions, batches, restarts = BATCH, REPETITIONS, BATCHES, RESTARTS
    if args.quick:
        batch, repetitions, batches, restarts = 25, 2, 2, (1, 2)
    gco = importlib.util.find_spec("gco") is not None
    settings = {"batch": batch, "repetitions": repetitions, "batches": batches, "restarts": restarts, "gco": gco}
    run = common.start("comixup_time", "Co-Mixup's plan", args, 1, settings)
    pipe = None
    if gco and run.missing(["time", "energies"]):
        context = multiprocessing.get_context("spawn")
        pipe, theirs = context.Pipe()
        child = context.Process(target=serve_gco, args=(theirs,), daemon=True)
        child.start()
        theirs.close()  # so that a child that dies ends the wait for its answer
    run.cell("time", partial(measure_time, batch, repetitions, pipe))
    if pipe is not None:
        run.cell("energies", partial(measure_energies, batch, batches, pipe))
        pipe.send(None)
        child.join()
    for n in restarts:
        run.cell(f"restarts {n}", partial(measure_restarts, batch, batches, n))
    report(run, gco)


if __name__ == "__main__":
    main()
