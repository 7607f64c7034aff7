"""Time of one training step of ResNet-18 with Puzzle Mix, against the plain step.

timm's resnet18, 64 x 64 images, batch 128, float32, two threads; ``--device cuda`` measures the same
on a GPU. Steps of the three kinds (plain, saliency at full and at half resolution) take turns on each
of the four grids; medians for each grid, then the mean over the grids. The second part, on a trained
network and real images, asks how far saliency at half resolution agrees with saliency at full
resolution.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import cifar
import common
import synthetic
import timm
import torch
import torch.nn.functional as F
from dataopt.core.mixup import PuzzleMix, input_gradient, puzzle, saliency
from dataopt.core.mixup.grid import pool
from torch import Tensor, nn

GRIDS: tuple[int, ...] = (2, 4, 8, 16)
BATCH = 128
CLASSES = 1000
REPETITIONS = 10
THREADS = 2
KINDS = {"plain": None, "full": 1.0, "half": 0.5}  # resolution of the saliency
PHASES = ("forward", "gradient", "costs", "solve", "transport", "paste")
TARGETS = {"full": 1.8, "half": 1.4}
LAMBDAS = (0.3, 0.5, 0.7)


def now() -> float:
    """Seconds, after all that was queued on a GPU."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


class Stopwatch(nn.Module):
    """A network that adds the time of its forward passes to a total."""

    def __init__(self, inner: nn.Module, seconds: dict[str, float]):
        super().__init__()
        self.inner = inner
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        start = now()
        out = self.inner(x)
        self.seconds["forward"] += now() - start
        return out


def timed(function: Callable[..., Any], phase: str, seconds: dict[str, float]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        start = now()
        out = function(*args, **kwargs)
        seconds[phase] += now() - start
        return out

    return call


@contextmanager
def watched(mix: PuzzleMix, seconds: dict[str, float]) -> Iterator[None]:
    """Let the parts of a mix add their time to ``seconds`` for a while."""
    parts = [
        (puzzle, "mask_costs", "costs"),
        (puzzle, "region_distances", "costs"),
        (puzzle, "solve_mask", "solve"),
        (puzzle, "blend", "paste"),
        (mix, "_transport", "transport"),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in parts]
    try:
        for owner, name, phase in parts:
            setattr(owner, name, timed(getattr(owner, name), phase, seconds))
        yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


class Steps:
    """A network in training, one step at a time."""

    def __init__(self, batch: int, side: int, device: str):
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        self.model = timm.create_model("resnet18", num_classes=CLASSES).to(device).train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.01, momentum=0.9)
        self.x = synthetic.images(batch, generator, side).to(device)
        self.y = torch.randint(0, CLASSES, (batch,), generator=generator).to(device)
        self.mix = PuzzleMix(CLASSES)
        self.generator = generator

    def step(self, resolution: float | None, grid: int) -> dict[str, float]:
        """Seconds of each phase and in all."""
        seconds: dict[str, float] = defaultdict(float)
        start = now()
        x, target = self.x, self.y
        if resolution is not None:
            network = Stopwatch(self.model, seconds)
            gradient = input_gradient(network, x, self.y, resolution=resolution)
            s = saliency(gradient)
            seconds["gradient"] = now() - start - seconds["forward"]
            with watched(self.mix, seconds):
                m = self.mix(x, self.y, s, generator=self.generator, grid=grid)
            x, target = m.inputs, m.targets
            seconds["mixing in all"] = now() - start
        loss = F.cross_entropy(self.model(x), target)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        seconds["step"] = now() - start
        return seconds


def measure(steps: Steps, grid: int, repetitions: int) -> common.Cell:
    """Median milliseconds of every phase for each kind of step."""
    taken: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for resolution in KINDS.values():
        steps.step(resolution, grid)  # warm up
    for _ in range(repetitions):
        for kind, resolution in KINDS.items():
            taken[kind].append(steps.step(resolution, grid))
    return {
        kind: {phase: 1000 * statistics.median(s[phase] for s in seconds) for phase in seconds[0]}
        for kind, seconds in taken.items()
    }


def agreement(model: nn.Module, data: cifar.Data, images: int) -> common.Cell:
    """How saliency at half resolution compares with full resolution on test images."""
    x, y = cifar.normalise(data.test_x[:images]), data.test_y[:images]
    full, half = (saliency(input_gradient(model, x, y, resolution=r)) for r in (1.0, 0.5))
    pooled = torch.stack([pool(s, (8, 8)).flatten(1) for s in (full, half)])
    centred = F.normalize(pooled - pooled.mean(2, keepdim=True), dim=2)
    out: common.Cell = {"correlation": float((centred[0] * centred[1]).sum(1).mean()), "equal_percent": {}}
    mix = PuzzleMix(cifar.CLASSES, mean=cifar.MEAN, std=cifar.STD)
    partner = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    for grid in GRIDS:
        masks = [[mix(x, y, s, partner=partner, lam=lam, grid=grid).mask for lam in LAMBDAS] for s in (full, half)]
        same = torch.stack(masks[0]) == torch.stack(masks[1])
        out["equal_percent"][str(grid)] = 100 * float(same.float().mean())
    return out


def report(run: common.Run, grids: tuple[int, ...]) -> None:
    def mean(kind: str, phase: str) -> float:
        return statistics.mean(run.cells[f"grid {g}"][kind].get(phase, 0.0) for g in grids)

    header = ["saliency", *PHASES, "mixing in all", "step", "times plain"]
    rows = []
    for kind in KINDS:
        ratio = mean(kind, "step") / mean("plain", "step")
        phases = (f"{mean(kind, phase):.1f}" if kind != "plain" else "" for phase in header[1:-2])
        rows.append([kind, *phases, f"{mean(kind, 'step'):.1f}", f"{ratio:.2f}"])
    rows_by_grid = [[f"{g}x{g}", *(f"{run.cells[f'grid {g}'][kind]['step']:.1f}" for kind in KINDS)] for g in grids]
    verdicts = [
        common.verdict(
            f"step with {kind}-resolution saliency over the plain step",
            mean(kind, "step") / mean("plain", "step"),
            most=most,
        )
        for kind, most in TARGETS.items()
    ]
    run.report(
        f"Milliseconds of one step, batch {run.settings['batch']}, mean over the grids:",
        common.table(header, rows),
        "The step on each grid:",
        common.table(["grid", *KINDS], rows_by_grid),
        *verdicts,
        agreement_line(run),
    )


def agreement_line(run: common.Run) -> str:
    if "agreement" not in run.cells:
        return "Half against full resolution: not measured, it needs CIFAR-10 (--data FOLDER)."
    a = run.cells["agreement"]
    equal = ", ".join(f"{v:.1f} % on {g}x{g}" for g, v in a["equal_percent"].items())
    return (
        f"Half against full resolution on {run.settings['images']} test images of CIFAR-10 (JPEG), plainly trained "
        f"network: correlation of the saliency pooled to 8x8 {a['correlation']:.3f}; equal mask cells {equal}."
    )


def main() -> None:
    arguments = common.parser(__doc__)
    common.add_data_option(arguments)
    arguments.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where the network runs (cpu)")
    args = arguments.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        common.stop("--device cuda: torch finds no GPU here")
    scale, grids, batch, side, repetitions, images = cifar.Scale(), GRIDS, BATCH, synthetic.SIDE, REPETITIONS, 1000
    if args.quick:
        scale, grids, batch, side, repetitions, images = cifar.QUICK, (2,), 4, 32, 1, 50
    settings = {"batch": batch, "side": side, "repetitions": repetitions, "images": images, "network": scale.settings}
    gpu = f" on {torch.cuda.get_device_name()}" if args.device == "cuda" else ""
    name = "step_time" if args.device == "cpu" else f"step_time_{args.device}"
    run = common.start(name, f"One training step{gpu}", args, THREADS, settings)
    keys = {f"grid {g}": g for g in grids}
    missing = run.missing(list(keys))
    if missing:
        steps = Steps(batch, side, args.device)
        for key in missing:
            run.cell(key, partial(measure, steps, keys[key], repetitions))
    if run.missing(["agreement"]) and cifar.available(args.data):
        data = cifar.load(args.data, scale)
        model = cifar.plainly_trained(data, scale, run.scratch)
        run.cell("agreement", partial(agreement, model, data, images))
    report(run, grids)


if __name__ == "__main__":
    main()
