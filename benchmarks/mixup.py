"""What mixing brings beyond accuracy: errors under attack and corruption, calibration, and the time that it takes.

CIFAR-10 (12,000 training images, JPEG) and a residual network of 240,000 parameters: plain training, input mixup,
manifold mixup, CutMix, AugMix with its consistency loss, Puzzle Mix and Co-Mixup, three seeds each; then variants of
Puzzle Mix (Tables 3.2 and 3.7 to 3.9), three and four inputs (Table 4.4) and variants of Co-Mixup, one seed each.
Figure 4.2 b to d on the plainly trained network, reliability diagrams (Figure 4.4), and spoken digits (the speech
column of Table 4.1).

All rows share optimiser, schedule, batches, crops, flips and evaluation. The network after the last epoch is tested on
10,000 images for its error and calibration, on the first 2,000 under FGSM (8/255) and PGD (7 steps of 2/255), and on
the first 1,000 under twelve corruptions of severities 1, 3 and 5. AugMix takes a millisecond or two an image, so that
four versions of each training image are made once and drawn from; half the epochs take twice the learning rate, as in
the thesis. With more epochs than 12 the run would not end in 45 minutes on two cores.

Two processes of one thread; the main rows come first, all their seeds, then the others. No cell is begun that might not
end within --minutes, and the report says which have run: call the script again for the others.

``--thesis`` is the schedule of section 4.5.1 on a GPU: 50,000 images, PreActResNet-18, 300 epochs, rate 0.2 that falls
tenfold at 100 and 200, all rows with three seeds. It has not run yet.
"""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import cifar
import common
import mixup_methods as methods
import numpy as np
import torch
from cifar10 import spread
from dataopt import plots
from dataopt.core.evaluation import (
    CORRUPTIONS,
    corruption_error,
    expected_calibration_error,
    fgsm_error,
    pgd_error,
    predict,
    reliability,
)
from dataopt.core.mixup import CoMixup, CutMix, PuzzleMix, input_gradient, saliency
from torch import Tensor, nn

SEEDS: tuple[int, ...] = (0, 1, 2)
SIDE_SEEDS: tuple[int, ...] = (0,)
WORKERS = 2
MINUTES = 45
EPOCHS, SPEECH_EPOCHS = 12, 20
THESIS = cifar.Scale(None, None, 300)
ATTACKED, CORRUPTED, SEVERITIES = 2000, 1000, (1, 3, 5)
EPS, STEP, STEPS = 8 / 255, 2 / 255, 7
TAUS = (0.5, 0.7, 0.8, 0.83, 0.86, 0.9, 1.0, 1.2, 1.5)  # 0.83 is the thesis'
FIGURE_IMAGES = 1000
PACKAGES = ("dataopt", "torch", "torchvision", "timm", "numpy", "scipy", "numba", "scikit-image", "torchmetrics")
FIGURE = "Figure 4.2"
MEASURES = {  # of a cell: title
    "error": "top-1 error %",
    "fgsm": "FGSM error %",
    "pgd": "PGD error %",
    "ece": "calibration error %",
    "corruption": "corruption error %",
    "seconds": "training s",
    "processor_seconds": "of the processor",
}


@dataclass(frozen=True)
class Setup:
    """What all cells depend on."""

    folder: Path
    scratch: Path
    scale: cifar.Scale
    speech_epochs: int
    severities: tuple[int, ...]
    taus: tuple[float, ...]
    thesis: bool = False
    device: str = "cpu"

    def task(self, name: str) -> methods.Task:
        return methods.task_of(name, self.folder, self.scale, self.speech_epochs, self.device)


Job = tuple[Callable[..., common.Cell], tuple[object, ...]]


# Cells


def trained(row: str, seed: int, data: str, setup: Setup) -> common.Cell:
    """One training and all that is measured on its network."""
    task = setup.task(data)

    def say(epoch: int, epochs: int, loss: float) -> None:
        if epoch in (1, epochs):
            common.say(f"{data}, {row}, seed {seed}: epoch {epoch} of {epochs}, loss {loss:.3f}")

    start = time.process_time()
    model, seconds = methods.train(methods.ROWS[row], seed, task, setup.scratch, say)
    processor = time.process_time() - start
    if (row, seed, data) == ("plain", 0, "images"):
        cifar.keep_weights(model, setup.scale, setup.scratch)  # for Figure 4.2
    made = {"epochs": methods.ROWS[row].epochs(task.epochs), "seconds": seconds, "processor_seconds": processor}
    return made | tested(model, task, () if data == "speech" else setup.severities)


def tested(model: nn.Module, task: methods.Task, severities: Sequence[int]) -> common.Cell:
    """Errors in percent, and the bins of the reliability diagram; without severities, no attacks and corruptions."""
    x, y = task.prepare(task.data.test_x, None), task.data.test_y

    def batches(count: int | None = None) -> list[tuple[Tensor, Tensor]]:
        return list(zip(x[:count].split(500), y[:count].split(500), strict=True))

    logits, labels = predict(model, batches())
    curve = reliability(logits, labels)
    out: common.Cell = {
        "error": 100 * float((logits.argmax(1) != labels).double().mean()),
        "ece": 100 * expected_calibration_error(logits, labels),
        "reliability": [t.nan_to_num(-1).tolist() for t in (curve.confidence, curve.accuracy, curve.share)],
    }
    if severities:
        scaled = {"mean": task.mean, "std": task.std}
        start = torch.Generator().manual_seed(0)  # the same start and the same corruptions for all networks
        out["fgsm"] = 100 * fgsm_error(model, batches(ATTACKED), EPS, **scaled)
        out["pgd"] = 100 * pgd_error(model, batches(ATTACKED), EPS, STEP, STEPS, **scaled, generator=start)
        corrupted = corruption_error(
            model, batches(CORRUPTED), **scaled, severities=severities, generator=torch.Generator().manual_seed(0)
        )
        out["corruption"] = 100 * corrupted.mean
        out["corruptions"] = {name: [100 * e for e in errors] for name, errors in corrupted.errors.items()}
    return out


def augmix_images(version: int, data: str, setup: Setup) -> common.Cell:
    x = setup.task(data).data.x
    methods.augmented(x, version, setup.scratch)
    return {"images": len(x)}


def figure_4_2(images: int, setup: Setup) -> common.Cell:
    """Inputs of each output, saliency that a batch keeps and its diversity, over tau and of the other methods."""
    data = setup.task("images").data
    model = cifar.plainly_trained(data, setup.scale, setup.scratch)
    x, y = cifar.normalise(data.test_x[:images]), data.test_y[:images]
    batches = [
        (a, b, saliency(input_gradient(model, a, b)))
        for a, b in zip(x.split(cifar.BATCH), y.split(cifar.BATCH), strict=True)
    ]
    out: common.Cell = {}
    for tau in setup.taus:
        joint, g = CoMixup(cifar.CLASSES, tau=tau), torch.Generator().manual_seed(0)
        mixes = [joint(a, b, s, g) for a, b, s in batches]
        out[f"Co-Mixup {tau}"] = summary(
            [m.sources for m in mixes], [m.apply(s) for m, (*_, s) in zip(mixes, batches, strict=True)]
        )
    g, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    puzzle, cut = PuzzleMix(cifar.CLASSES, mean=cifar.MEAN, std=cifar.STD), CutMix(cifar.CLASSES)
    for name, mix in (
        ("Puzzle Mix", lambda a, b, s: puzzle(a, b, s, generator=g)),
        ("CutMix", lambda a, b, s: cut(a, b, generator=g)),
    ):
        pairs = [mix(*batch) for batch in batches]
        shares = [m.mask.mean((1, 2)) for m in pairs]
        sources = [pair_sources(share, m.partner) for share, m in zip(shares, pairs, strict=True)]
        out[name] = summary(sources, [m.apply(s) for m, (*_, s) in zip(pairs, batches, strict=True)])
    blends = [methods.Blend.draw(len(a), rng, 2, 1.0) for a, *_ in batches]
    sources = [
        pair_sources(torch.full((len(a),), blend.shares[0]).float(), torch.from_numpy(blend.orders[1]))
        for blend, (a, *_) in zip(blends, batches, strict=True)
    ]
    out["input mixup"] = summary(sources, [blend(s) for blend, (*_, s) in zip(blends, batches, strict=True)])
    return out


def pair_sources(share: Tensor, partner: Tensor) -> Tensor:
    """(B, B) share of each input in each output of a method that mixes pairs."""
    one = torch.eye(len(share))
    return share[:, None] * one + (1 - share)[:, None] * one[partner]


def summary(sources: Sequence[Tensor], kept: Sequence[Tensor]) -> common.Cell:
    """Means over the batches; diversity as below Figure 4.2, and how many outputs show 1, 2, 3 and more inputs."""
    counts = torch.cat([(o > 0).sum(1) for o in sources]).clamp_max(4)
    cross = [float((o.sum(0).square().sum() - o.square().sum()) / len(o)) for o in sources]
    return {
        "inputs": float(torch.cat([(o > 0).sum(1) for o in sources]).double().mean()),
        "shares": (counts.bincount(minlength=5)[1:] / len(counts)).tolist(),
        "saliency": float(torch.cat([t.sum((1, 2)) for t in kept]).mean()),
        "diversity": float(np.mean([1 - c for c in cross])),
    }


# Running them


def planned(setup: Setup, rows: Mapping[str, Sequence[int]], with_speech: bool, images: int) -> dict[str, Job]:
    """Every cell by its name, in the order in which they run: seed by seed the main rows, then the others."""
    data = "thesis" if setup.thesis else "images"

    def trainings(names: Sequence[str], data: str, prefix: str = "") -> dict[str, Job]:
        pairs = [(row, seed) for seed in SEEDS for row in names if seed in rows[row]]
        return {f"{prefix}{row}, seed {seed}": (trained, (row, seed, data, setup)) for row, seed in pairs}

    out: dict[str, Job] = {
        f"AugMix images, version {k}": (augmix_images, (k, data, setup)) for k in range(methods.VERSIONS)
    }
    out |= trainings(list(methods.MAIN), data)
    if not setup.thesis:
        out[FIGURE] = figure_4_2, (images, setup)
    out |= trainings(list(methods.PUZZLE), data)
    if with_speech:
        out |= trainings(methods.SPEECH, "speech", "speech: ")
    return out | trainings([*methods.SEVERAL, *methods.JOINT], data)


def measured(job: Job) -> tuple[common.Cell, float]:
    """In a process of its own: the cell and its seconds."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    function, given = job
    return function(*given), time.perf_counter() - start


def run_cells(run: common.Run, jobs: Mapping[str, Job], minutes: float, workers: int) -> None:
    """Store each cell as it ends; none is begun when less time is left than the longest so far has taken.

    A quick run stays in this process.
    """
    if run.args.quick:
        for key, job in jobs.items():
            run.store(key, *measured(job))
        return
    end, longest = time.perf_counter() + 60 * minutes, 0.0
    waiting, failed = list(jobs.items()), []
    running: dict[Future[tuple[common.Cell, float]], str] = {}
    # spawned, not forked: a fork of a process with torch's threads can hang
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        while waiting or running:
            if time.perf_counter() + longest > end:
                waiting.clear()
            while waiting and len(running) < workers:
                key, job = waiting.pop(0)
                running[pool.submit(measured, job)] = key
            for ended in wait(running, return_when=FIRST_COMPLETED).done:
                key, error = running.pop(ended), ended.exception()
                if error:
                    failed.append(error)  # the others go on, and are kept
                else:
                    result, seconds = ended.result()
                    run.store(key, result, seconds)
                    longest = max(longest, seconds)
    if failed:
        raise failed[0]


# The report


def table_of(run: common.Run, rows: Sequence[str], speech: bool = False) -> str:
    """Means and standard deviations over the seeds that have run; rows without any are left out."""
    lines = []
    measures = [name for name in MEASURES if not speech or name in ("error", "ece", "seconds", "processor_seconds")]
    for row in rows:
        prefix = f"speech: {row}, seed " if speech else f"{row}, seed "
        cells = [cell for key, cell in run.cells.items() if key.startswith(prefix)]
        if cells:
            columns = [[cell[name] for cell in cells] for name in measures]
            *errors, seconds, processor = columns
            times = [f"{np.mean(c):.0f}" for c in (seconds, processor)]
            lines.append([row, cells[0]["epochs"], len(cells), *map(spread, errors), *times])
    return common.table(["method", "epochs", "seeds", *(MEASURES[name] for name in measures)], lines)


def draw_reliability(run: common.Run) -> str:
    """The picture of seed 0 (Figure 4.4), as a line of Markdown."""
    cells = {row: run.cells[f"{row}, seed 0"] for row in methods.MAIN if f"{row}, seed 0" in run.cells}
    curves = {
        row: tuple(np.where(np.array(v) < 0, np.nan, v) for v in cell["reliability"]) for row, cell in cells.items()
    }
    figure = plots.show_reliability(curves, {row: cell["ece"] / 100 for row, cell in cells.items()})
    return picture(run, "reliability", figure)


def figure_report(run: common.Run) -> list[str]:
    """Figure 4.2 b to d as a table and a picture."""
    cell, taus, lines = run.cells[FIGURE], run.settings["taus"], []
    for name in (*(f"Co-Mixup {tau}" for tau in taus), "Puzzle Mix", "CutMix", "input mixup"):
        v = cell[name]
        method, tau = name.split() if name.startswith("Co-Mixup") else (name, "")
        shares = [f"{100 * share:.1f}" for share in v["shares"]]
        lines.append([method, tau, *shares, f"{v['inputs']:.2f}", f"{v['saliency']:.3f}", f"{v['diversity']:.3f}"])
    header = ["method", "tau", "1 input %", "2 %", "3 %", "more %", "inputs", "batch saliency", "diversity"]
    panels = {
        title: {
            "Co-Mixup": (taus, [cell[f"Co-Mixup {tau}"][name] for tau in taus]),
            **{other: (taus, [cell[other][name]] * len(taus)) for other in ("Puzzle Mix", "CutMix")},
        }
        for name, title in (("inputs", "inputs per output"), ("saliency", "batch saliency"), ("diversity", "diversity"))
    }
    figure = plots.show_curves(panels, "tau")
    return [
        f"Figure 4.2 b to d: {run.settings['figure_images']} test images in batches of {cifar.BATCH}, the plainly "
        "trained network of seed 0; saliency of an input sums to 1:",
        picture(run, "figure_4_2", figure),
        common.table(header, lines),
    ]


def picture(run: common.Run, name: str, figure: object) -> str:
    common.write_whole(run.args.out / f"{run.name}_{name}.png", plots.to_png(figure))
    return f"![{name}]({run.name}_{name}.png)"


def report(run: common.Run, plan: Sequence[str]) -> None:
    ran = run.ran(plan)
    if not run.cells:
        print(ran)
        return
    s = run.settings
    severities = ", ".join(map(str, s["severities"]))
    parts = [
        f"{ran} {s['training'] or 'All 50,000'} training images of CIFAR-10 (JPEG), batch {cifar.BATCH}, mean +- "
        "standard deviation over the seeds; error and calibration on all test images, FGSM (8/255) and PGD (7 steps of "
        f"2/255) on {s['attacked']}, {len(CORRUPTIONS)} corruptions of severities {severities} on {s['corrupted']}. "
        "Training seconds are those of a process beside another one, and depend on what else the machine did; those of "
        "the processor hardly do. AugMix images are made before.",
    ]
    sections = (  # title, rows above for comparison, rows
        ("Main comparison:", (), methods.MAIN),
        (
            "Variants of Puzzle Mix; half the epochs take twice the rate, adversarial rows p = 0.1 and eps = 10/255:",
            ("plain", "AugMix with JSD", "Puzzle Mix"),
            methods.PUZZLE,
        ),
        (
            "Three and four inputs (Table 4.4); the shares come from a Dirichlet prior of the same alpha:",
            ("input mixup", "manifold mixup", "CutMix", "Co-Mixup"),
            methods.SEVERAL,
        ),
        ("Variants of Co-Mixup:", ("Co-Mixup", "Co-Mixup, clean loss added"), methods.JOINT),
    )
    for title, above, rows in sections:
        if any(key.startswith(tuple(f"{row}, seed" for row in rows)) for key in run.cells):
            parts += [title, table_of(run, [*above, *rows])]
    if any(f"{row}, seed 0" in run.cells for row in methods.MAIN):
        parts += ["Reliability (Figure 4.4), seed 0:", draw_reliability(run)]
    if FIGURE in run.cells:
        parts += figure_report(run)
    if any(key.startswith("speech") for key in run.cells):
        parts += [
            "Spoken digits (FSDD), log-mel pictures of 40 x 32, a network of four convolutions, 300 test recordings:",
            table_of(run, methods.SPEECH, speech=True),
        ]
    run.report(*parts)


def main() -> None:
    arguments = common.parser(__doc__)
    common.add_data_option(arguments)
    arguments.add_argument(
        "--minutes",
        type=float,
        help=f"no cell is begun that may not end within them ({MINUTES}; no limit with --thesis)",
    )
    arguments.add_argument("--thesis", action="store_true", help="the schedule of section 4.5.1, on a GPU")
    args = arguments.parse_args()
    scale, speech_epochs, images = cifar.Scale(epochs=EPOCHS), SPEECH_EPOCHS, FIGURE_IMAGES
    rows = {row: SEEDS if row in methods.MAIN or args.thesis else SIDE_SEEDS for row in methods.ROWS}
    severities, taus = SEVERITIES, TAUS
    device, recipe, name = "cpu", {}, "mixup"
    if args.thesis:
        scale, name, recipe = THESIS, "mixup_thesis", {"network": "PreActResNet-18", "schedule": "section 4.5.1"}
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu" and not args.quick:
            common.stop("--thesis trains on 50,000 images for 300 epochs and finds no GPU; without it the run is short")
    if args.quick:
        scale, speech_epochs, images, severities, taus = cifar.QUICK, 1, 100, (3,), (0.83, 1.0)
        rows = {row: (0,) if row in methods.OWN_PATHS else () for row in rows}
    tests = {"attacked": ATTACKED, "corrupted": CORRUPTED, "severities": severities}
    figure = {"figure_images": images, "taus": taus}
    others = {"speech_epochs": speech_epochs, "augmix_versions": methods.VERSIONS}
    settings = scale.settings | recipe | tests | figure | others
    workers = 1 if args.thesis else WORKERS
    run = common.start(name, "What mixing brings beyond accuracy", args, 1, settings, workers, PACKAGES, timed=False)
    setup = Setup(args.data, run.scratch, scale, speech_epochs, severities, taus, args.thesis, device)
    with_speech = not args.thesis and (args.data.parent / "fsdd" / "fsdd.npz").is_file()
    plan = planned(setup, rows, with_speech, images)
    missing = run.missing(list(plan))
    if missing:
        cifar.check(args.data)
    if args.fresh:
        for path in run.scratch.glob("augmix-*.safetensors"):
            path.unlink()
    minutes = args.minutes if args.minutes is not None else math.inf if args.thesis else MINUTES
    run_cells(run, {key: plan[key] for key in missing}, minutes, workers)
    report(run, list(plan))


if __name__ == "__main__":
    main()
