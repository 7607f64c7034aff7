"""CIFAR-10 with 12,000 training images: plain, input mixup, CutMix and Puzzle Mix.

Two processes of one thread each share the 15 trainings: 3 seeds of plain training, torchvision's
MixUp and CutMix, Puzzle Mix with as many epochs, and Puzzle Mix with half the epochs, which makes
as many network evaluations as plain training. All 10,000 test images, after each of the last ten
epochs; the median of these is reported, as in the thesis, and its mean and spread over the seeds.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import cifar
import common
import torch

SEEDS: tuple[int, ...] = (0, 1, 2)
WORKERS = 2
ROWS = {  # name: (method, epochs as a share)
    "Puzzle Mix, equal epochs": ("Puzzle Mix", 1.0),  # the longest first, so that the two processes end together
    "plain": ("plain", 1.0),
    "input mixup": ("input mixup", 1.0),
    "CutMix": ("CutMix", 1.0),
    "Puzzle Mix, equal evaluations": ("Puzzle Mix", 0.5),
}
SHOWN = ("plain", "input mixup", "CutMix", "Puzzle Mix, equal evaluations", "Puzzle Mix, equal epochs")


def train(row: str, seed: int, folder: Path, scale: cifar.Scale, scratch: Path) -> tuple[common.Cell, float]:
    """One training, in a process of its own."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    method, share = ROWS[row]
    epochs = round(scale.epochs * share)
    trained = cifar.train(method, seed, epochs, cifar.load(folder, scale), common.say)
    if method == "plain" and seed == 0:
        cifar.keep_weights(trained.model, scale, scratch)  # for the benchmarks that need a trained network
    cell = {
        "epochs": epochs,
        "top1": trained.top1,
        "top5": trained.top5,
        "loss": trained.loss,
        "training_seconds": trained.seconds,
    }
    return cell, time.perf_counter() - start


def report(run: common.Run, keys: dict[str, tuple[str, int]]) -> None:
    rows = []
    for row in SHOWN:
        cells = [run.cells[key] for key, (name, _) in keys.items() if name == row]
        if not cells:
            continue  # a quick run leaves rows out
        columns = [
            [statistics.median(c["top1"]) for c in cells],
            [statistics.median(c["top5"]) for c in cells],
            [c["top1"][-1] for c in cells],
        ]
        rows.append([row, cells[0]["epochs"], *(spread(values) for values in columns)])
    header = ["method", "epochs", "top-1 %", "top-5 %", "last epoch's top-1 %"]
    seeds = len({seed for _, seed in keys.values()})
    run.report(
        f"CIFAR-10 (JPEG), {run.settings['training']} training images, a residual network of 240,000 parameters, batch "
        f"{cifar.BATCH}; median over the last {cifar.LAST} epochs, mean +- standard deviation over {seeds} seeds:",
        common.table(header, rows),
    )


def spread(values: list[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.2f} +- {statistics.stdev(values):.2f}" if len(values) > 1 else f"{mean:.2f}"


def main() -> None:
    arguments = common.parser(__doc__)
    common.add_data_option(arguments)
    args = arguments.parse_args()
    scale, seeds, wanted = cifar.Scale(), SEEDS, tuple(ROWS)
    if args.quick:
        scale, seeds, wanted = cifar.QUICK, (0,), ("plain", "Puzzle Mix, equal evaluations")
    run = common.start("cifar10", "Accuracy on CIFAR-10", args, 1, scale.settings, workers=WORKERS)
    keys = {f"{row}, seed {seed}": (row, seed) for row in wanted for seed in seeds}
    missing = run.missing(list(keys))
    if missing:
        cifar.check(args.data)
    failed: list[BaseException] = []
    # spawned, not forked: a fork of a process with torch's threads can hang
    with ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = {pool.submit(train, *keys[key], args.data, scale, run.scratch): key for key in missing}
        for job in as_completed(jobs):
            error = job.exception()
            if error:
                failed.append(error)  # the other trainings go on, and are kept
            else:
                run.store(jobs[job], *job.result())
    if failed:
        raise failed[0]
    report(run, keys)


if __name__ == "__main__":
    main()
