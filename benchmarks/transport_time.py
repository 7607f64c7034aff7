"""Time of the transport of 128 pairs, against the dense form of Algorithm 1.

One thread. The dense form works on (16, n, n) cost and plan matrices, 16 samples at a time, and runs
B iterations on a B x B grid, both as the released code; it applies the plan by a matrix product
with the regions' pixels. Ours plans by deferred acceptance and moves regions by index. Both plan
and apply for the first and the second inputs. The dense plan and ours must agree on every shown
place before anything is timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import common
import numpy as np
import synthetic
import torch
from dataopt.core.mixup.grid import pool
from dataopt.core.mixup.labelling import solve_mask
from dataopt.core.mixup.mixed import Moves
from dataopt.core.mixup.transport import distances, plan_transport
from torch import Tensor

GRIDS: tuple[int, ...] = (2, 4, 8, 16)
BATCH = 128
REPETITIONS = 5
COST, PENALTY = 0.8, 1.0
CHUNK = 16  # samples whose matrices are alive at once, as the released code; all at once is several times slower
LAMBDA = 0.5


def dense_plan(s: Tensor, shown: Tensor, distance: Tensor, iterations: int) -> Tensor:
    """Algorithm 1 on matrices: s (B, n), shown (B, n) float, distance (n, n), to (B, n, n) winning moves."""
    cost = COST * distance - s.unsqueeze(2) * shown.unsqueeze(1)
    for _ in range(iterations):
        plan = torch.zeros_like(cost).scatter_(2, cost.argmin(2, keepdim=True), 1)
        conflict = torch.addcmul(PENALTY * (1 - plan), cost, plan)
        win = torch.zeros_like(cost).scatter_(1, conflict.argmin(1, keepdim=True), 1).mul_(plan)
        cost.add_(plan - win, alpha=PENALTY)
    return win


def dense_apply(plan: Tensor, x: Tensor, cells: int) -> Tensor:
    """Move regions of (B, C, H, W) by the product of the transposed plan and the regions."""
    b, c, h, w = x.shape
    bh, bw = h // cells, w // cells
    regions = x.view(b, c, cells, bh, cells, bw).permute(0, 2, 4, 1, 3, 5).reshape(b, cells * cells, -1)
    moved = torch.bmm(plan.transpose(1, 2), regions)
    return moved.view(b, cells, cells, c, bh, bw).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


def check(dense: Tensor, source: np.ndarray, shown: np.ndarray) -> None:
    """Raise unless both plans take the same region to every shown place."""
    ours = torch.from_numpy(source)
    wins = dense.gather(1, ours.unsqueeze(1)).squeeze(1)  # what the dense plan says about our region
    wrong = (wins != 1) & torch.from_numpy(shown)
    if wrong.any():
        raise RuntimeError(f"the dense plan and ours differ at {int(wrong.sum())} of {int(shown.sum())} shown places")


def measure(cells: int, batch: int, repetitions: int) -> common.Cell:
    """Milliseconds for planning, and for planning and applying, of both forms."""
    generator = torch.Generator().manual_seed(0)
    x, s = synthetic.images(batch, generator), synthetic.blobs(batch, generator)
    partner = torch.randperm(batch, generator=generator)
    labels = solve_mask(synthetic.costs(x, s, partner, LAMBDA, cells))
    pooled = pool(s, (cells, cells))
    sides = list(zip((pooled, pooled[partner]), synthetic.shown(labels), (x, x[partner]), strict=True))
    distance = torch.from_numpy(distances(cells, cells)).float()
    dense_in = [(w.flatten(1), torch.from_numpy(shown).flatten(1).float(), image) for w, shown, image in sides]
    ours_in = [(w.double().numpy(), shown, image) for w, shown, image in sides]

    def dense(apply: bool) -> list:
        out: list = []
        for side in dense_in:
            chunks = []
            for w, shown, image in zip(*(t.split(CHUNK) for t in side), strict=True):
                plan = dense_plan(w, shown, distance, cells)
                chunks.append(dense_apply(plan, image, cells) if apply else plan)
            out.append(torch.cat(chunks) if apply else chunks)
        return out

    def ours(apply: bool) -> list:
        out: list = []
        for w, shown, image in ours_in:
            source = plan_transport(w, shown, COST)
            out.append(Moves.of(source, (cells, cells), shown, image.device).apply(image) if apply else source)
        return out

    places = [shown.reshape(batch, -1) for _, shown, _ in sides]
    plans = ours(False)
    for plan, source, shown in zip(dense(False), plans, places, strict=True):
        check(torch.cat(plan), source, shown)
    moved = sum(int(((p != np.arange(p.shape[1])) & q).sum()) for p, q in zip(plans, places, strict=True))
    out: common.Cell = {"moved_percent": 100 * moved / sum(int(q.sum()) for q in places)}
    for name, apply in (("plan", False), ("plan and apply", True)):
        ours(apply)
        times: dict[str, list[float]] = {"ours": [], "dense": []}
        for _ in range(repetitions):
            for form, function in (("ours", ours), ("dense", dense)):
                times[form].append(_seconds(function, apply))
        out[name] = {form: 1000 * statistics.median(t) for form, t in times.items()}
    return out


def _seconds(function: Callable[[bool], object], apply: bool) -> float:
    start = time.perf_counter()
    function(apply)
    return time.perf_counter() - start


def main() -> None:
    args = common.parser(__doc__).parse_args()
    grids, batch, repetitions = ((2, 4), 8, 2) if args.quick else (GRIDS, BATCH, REPETITIONS)
    settings = {
        "batch": batch,
        "repetitions": repetitions,
        "lambda": LAMBDA,
        "image": [3, synthetic.SIDE, synthetic.SIDE],
    }
    run = common.start("transport_time", "Transport", args, 1, settings)
    rows = []
    for cells in grids:
        cell = run.cell(f"{cells}x{cells}", partial(measure, cells, batch, repetitions))
        for name in ("plan", "plan and apply"):
            ours, dense = cell[name]["ours"], cell[name]["dense"]
            moved = f"{cell['moved_percent']:.2f} %"
            rows.append([f"{cells}x{cells}", name, f"{ours:.2f}", f"{dense:.2f}", f"{dense / ours:.0f}", moved])
    header = ["grid", "what", "ours ms", "dense ms", "times ours", "shown regions moved"]
    parts = [
        f"Milliseconds for {batch} pairs, both inputs; plans equal on every shown place:",
        common.table(header, rows),
    ]
    last = run.cells[f"{grids[-1]}x{grids[-1]}"]
    for name in ("plan", "plan and apply"):
        ratio = last[name]["dense"] / last[name]["ours"]
        parts.append(common.verdict(f"dense over ours at {grids[-1]}x{grids[-1]}, {name},", ratio, 40))
    run.report(*parts)


if __name__ == "__main__":
    main()
