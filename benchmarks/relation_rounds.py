"""The loop of chapter 2: does a second round of cleaning, with a model trained on cleaner labels, find more?

Digits of scikit-learn (1,297 training images, a hidden layer) and FSDD (2,700 recordings, a small network), labels
changed at random. Each round trains from fresh weights on what the round before keeps, and judges all given labels.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import common
import numpy as np
import relation_data as data
import torch
from dataopt.core.relation import refine
from relation_models import RECIPES, accuracy, look
from torch import Tensor

PACKAGES = ("dataopt", "torch", "numpy", "scikit-learn")
MAX_ROUNDS = 5
PLAN = tuple(
    (name, share, action, seed)
    for name, share in (("digits", 0.08), ("digits", 0.2), ("digits", 0.35), ("fsdd", 0.08), ("fsdd", 0.2))
    for action in ("drop", "relabel")
    for seed in data.SEEDS
)
QUICK = (("digits", 0.08, "drop", 0),)

Job = tuple[str, float, str, int]


def key_of(job: Job) -> str:
    name, share, action, seed = job
    return f"{name} {100 * share:.0f} %, {action}, seed {seed}"


def measure(job: Job, folder: Path) -> tuple[common.Cell, float]:
    """All rounds, in a process of its own."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)  # the guard of the thesis' graph, on the noisiest labels
    start = time.perf_counter()
    name, share, action, seed = job
    x, truth, test_x, test = data.digits_rows() if name == "digits" else data.fsdd_rows(folder)
    everywhere = torch.ones(len(truth), dtype=torch.bool)
    other = truth + torch.randint(1, 10, truth.shape, generator=torch.Generator().manual_seed(seed))
    given = data.flip(truth, other % 10, everywhere, share, seed)
    wrong, recipe, tested = given != truth, RECIPES[name], []

    def fit(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        network, _ = recipe.train(x[rows], labels, seed)
        tested.append(accuracy(look(network, test_x, recipe.prepare)[1], test))
        return look(network, x, recipe.prepare)

    result = refine(fit, given, action=action, max_rounds=MAX_ROUNDS, progress=False)
    fit(result.rows, result.labels)  # what the last round's data are worth
    clean = recipe.train(x, truth, seed)[0]
    flags = [r.issues.is_label_issue for r in result.rounds]
    return {
        "wrong": int(wrong.sum()),
        "flagged": [int(f.sum()) for f in flags],
        "found": [int((f & wrong).sum()) for f in flags],
        "changed": [r.changed for r in result.rounds],
        "stable": result.stable,
        "accuracy": tested,  # trained on the given labels, then after each round
        "clean": accuracy(look(clean, test_x, recipe.prepare)[1], test),
    }, time.perf_counter() - start


def report(run: common.Run, plan: Sequence[Job]) -> None:
    rows, ran = [], run.ran([key_of(job) for job in plan])
    plan = [job for job in plan if key_of(job) in run.cells]
    for name, share, action in dict.fromkeys(job[:3] for job in plan):
        cells = [run.cells[key_of(job)] for job in plan if job[:3] == (name, share, action)]

        def after(values: str, number: int, cells: list[common.Cell] = cells) -> np.ndarray:
            """Of a round; rounds that were not needed are like the last one."""
            return np.array([c[values][min(number, len(c[values]) - 1)] for c in cells], float)

        wrong = np.array([c["wrong"] for c in cells], float)
        recalls = [100 * after("found", i) / wrong for i in (0, 1, MAX_ROUNDS)]
        precisions = [100 * after("found", i) / after("flagged", i) for i in (0, 1, MAX_ROUNDS)]
        accuracies = [after("accuracy", i) for i in (0, 1, 2, MAX_ROUNDS + 1)]
        gain = accuracies[2] - accuracies[1]
        rows.append(
            [
                f"{name} {100 * share:.0f} %, {action}",
                *(f"{r.mean():.1f} / {p.mean():.1f}" for r, p in zip(recalls, precisions, strict=True)),
                *(f"{a.mean():.2f}" for a in accuracies),
                f"{np.mean([c['clean'] for c in cells]):.2f}",
                f"{gain.mean():+.2f}" + (f" +- {gain.std(ddof=1):.2f}" if len(gain) > 1 else ""),
                f"{sum(c['stable'] for c in cells)} of {len(cells)}",
            ]
        )
    header = [
        "wrong labels", "round 1", "round 2", "last", "given", "after 1", "after 2", "after the last", "true labels",
        "2 less 1", "stable",
    ]  # fmt: skip
    run.report(
        f"{ran} Means over the seeds. Rounds, {MAX_ROUNDS} at most: share of the wrong labels that are found / of the "
        "found ones that are wrong, in per cent. Then test accuracy, in per cent, of a network trained on the labels "
        "as given, on what the rounds keep, and on the true labels; and the second round's gain (mean +- standard "
        "deviation).",
        common.table(header, rows),
    )


def main() -> None:
    arguments = common.parser(__doc__)
    common.add_data_option(arguments)
    args = arguments.parse_args()
    plan = QUICK if args.quick else PLAN
    settings = {"rounds": MAX_ROUNDS, "recipes": {n: RECIPES[n].settings for n in ("digits", "fsdd")}}
    title = "Rounds of cleaning and training"
    run = common.start(
        "relation_rounds", title, args, 1, settings, workers=data.WORKERS, packages=PACKAGES, timed=False
    )
    if any(job[0] == "fsdd" for job in plan):
        data.check(args.data, [data.Task("fsdd", "uniform", 0.08, 0)])
    jobs = {key_of(job): (job, args.data) for job in plan if key_of(job) not in run.cells}
    data.in_processes(run, measure, jobs)
    report(run, plan)


if __name__ == "__main__":
    main()
