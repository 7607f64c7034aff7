"""The thesis' schedule on a GPU: ConvNet-3 of 128 channels, CIFAR-10 (JPEG), factor 2, 10 and 50 images a class.

Preset "released" with its rate, 32 batches for the network after each round, networks renewed every 100 rounds, and
200,000 rounds (two million class updates) in all; every 10,000 rounds (the first time after 1,000) the set is scored by
three networks of 1,000 epochs, after the last one. The report gives the accuracy at the updates that were reached,
beside the thesis' 67.5 and 74.5 % and DREAM's 69.4 and 74.8 %, which also is a row: batches of one image of each of 64
k-means clusters.

The run may be cut at any time: it goes on from its last checkpoint, of every 500 rounds, and no score is made twice.
``--hours`` ends it before a stretch that would not end in time. It has not run yet, except with ``--quick``.
"""

from __future__ import annotations

import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import common
import condense_data as source
import torch
from cifar10 import spread
from dataopt.core.condense import Augment, Condensed, Condenser, ConvNet, evaluate
from torch import nn

ROUNDS, FIRST, EVERY = 200_000, 1000, 10_000
WIDTH, BATCHES, EPOCHS = 128, 32, 1000
SEEDS: tuple[int, ...] = (0, 1, 2)
ROWS = {"IDC": "random", "DREAM": "kmeans"}  # how real batches are drawn
ANCHORS = {(10, "IDC"): 67.5, (50, "IDC"): 74.5, (10, "DREAM"): 69.4, (50, "DREAM"): 74.8}
TESTED = Augment(cutout=0, flip=True, scale=1.2, rotate=15)  # as released, of the networks that are tested
PACKAGES = ("dataopt", "torch", "torchvision", "numpy", "scikit-learn")


@dataclass(frozen=True)
class Setup:
    """Data, device, and how much: a quick run is tiny."""

    folder: Path
    scratch: Path
    device: str
    quick: bool

    @property
    def targets(self) -> list[int]:
        """Rounds after which the set is scored."""
        return [2, 4] if self.quick else [FIRST, *range(EVERY, ROUNDS + 1, EVERY)]

    def network(self) -> nn.Module:
        return ConvNet(3, source.CLASSES, 32, depth=3, width=8 if self.quick else WIDTH)


def stretch(row: str, per_class: int, rounds: int, setup: Setup) -> common.Cell:
    """Go on to a number of rounds, and score."""
    data = source.load("CIFAR-10", setup.folder, 200 if setup.quick else None)
    (x, y), (test_x, test_y) = data.train, data.test
    train, test = (x.to(setup.device), y), (test_x.to(setup.device), test_y)
    condenser = Condenser(
        setup.network, per_class, 2, "released", steps=rounds, sampler=ROWS[row], device=setup.device,
        network_steps=1 if setup.quick else BATCHES, checkpoint_every=500,
    )  # fmt: skip
    start = time.perf_counter()
    made = condenser.fit(*train, resume=folder(row, per_class, setup))
    condensing = time.perf_counter() - start
    made.save(folder(row, per_class, setup) / "set")
    return {"updates": rounds * source.CLASSES, "seconds": condensing, "loss": made.made["loss"]} | score(
        made, train, test, setup, ("random", "herding", "init") if rounds == setup.targets[0] else ()
    )


def score(
    made: Condensed,
    train: tuple[torch.Tensor, torch.Tensor],
    test: tuple[torch.Tensor, torch.Tensor],
    setup: Setup,
    baselines: tuple[str, ...],
) -> common.Cell:
    found = evaluate(
        made, train, test, {"ConvNet": setup.network}, seeds=SEEDS[:1] if setup.quick else SEEDS,
        epochs=1 if setup.quick else EPOCHS, baselines=baselines, augment=TESTED, device=setup.device,
    )  # fmt: skip
    return {"steps": found["condensed"].steps} | {
        "accuracies": {row.data: [100 * a for a in row.accuracies] for row in found.rows}
    }


def folder(row: str, per_class: int, setup: Setup) -> Path:
    return setup.scratch / "condense_gpu" / f"{row}-{per_class}{'-quick' if setup.quick else ''}"


def key_of(row: str, per_class: int, rounds: int) -> str:
    return f"{row}, {per_class} per class, {rounds} rounds"


def report(run: common.Run, counts: list[int], setup: Setup) -> None:
    lines = []
    for row in ROWS:
        for n in counts:
            cells = [c for t in setup.targets if (c := run.cells.get(key_of(row, n, t)))]
            if not cells:
                continue
            for name in ("random", "herding", "init"):
                lines.append([f"{name}, {n} per class", "", "", cells[0]["steps"], spread(cells[0]["accuracies"][name]),
                              ""])  # fmt: skip
            seconds = 0.0
            for c in cells:
                seconds += c["seconds"]
                accuracy = spread(c["accuracies"]["condensed"])
                lines.append([f"{row}, {n} per class", f"{c['updates']:,}", f"{seconds / 3600:.1f}", c["steps"],
                              accuracy, ANCHORS[n, row]])  # fmt: skip
    header = ["", "class updates", "hours", "test steps", "accuracy %", "published, 2,000,000 updates"]
    parts = [common.table(header, lines)]
    for (n, row), anchor in ANCHORS.items():
        last = run.cells.get(key_of(row, n, setup.targets[-1]))
        if last and not setup.quick:
            value = statistics.mean(last["accuracies"]["condensed"])
            parts.append(f"{row}, {n} per class: {value:.1f} %, published {anchor}: {value - anchor:+.1f} points.")
        else:
            parts.append(f"{row}, {n} per class: the whole schedule has not run, so it is not compared with {anchor}.")
    run.report(f"Rounds in all: {ROUNDS:,}; accuracy of the last epoch of {EPOCHS}, hard labels.", *parts)


def main() -> None:
    arguments = common.parser(__doc__)
    common.add_data_option(arguments)
    arguments.add_argument("--hours", type=float, default=float("inf"), help="end before a stretch that takes longer")
    arguments.add_argument("--rows", nargs="+", choices=list(ROWS), default=["IDC"], help="IDC, DREAM or both (IDC)")
    arguments.add_argument("--images-per-class", type=int, nargs="+", default=[10, 50], choices=[10, 50])
    args = arguments.parse_args()
    if not torch.cuda.is_available() and not args.quick:
        common.stop(
            "two million class updates of a wide network need a GPU, and there is none; --quick shows that it runs"
        )
    end, settings = time.perf_counter() + 3600 * args.hours, {"rounds": ROUNDS, "epochs": EPOCHS, "batches": BATCHES}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings |= {"width": WIDTH, "gpu": torch.cuda.get_device_name() if device == "cuda" else None}
    run = common.start("condense_gpu", "The thesis' condensation of CIFAR-10", args, 1, settings, packages=PACKAGES)
    setup = Setup(args.data, run.scratch, device, args.quick)
    source.check(args.data, {"CIFAR-10"})
    if args.fresh:
        shutil.rmtree(run.scratch / "condense_gpu", ignore_errors=True)
    counts = args.images_per_class[:1] if args.quick else args.images_per_class
    for row in args.rows:
        for n in counts:
            longest = 0.0
            for rounds in setup.targets:
                if key_of(row, n, rounds) in run.cells:
                    continue
                start = time.perf_counter()
                if start + longest > end:
                    break
                run.cell(key_of(row, n, rounds), lambda row=row, n=n, rounds=rounds: stretch(row, n, rounds, setup))
                longest = max(longest, time.perf_counter() - start)
    if run.cells:
        report(run, counts, setup)


if __name__ == "__main__":
    main()
