"""``dataopt demo``: handwritten digits, trained plainly, with CutMix and with Puzzle Mix.

300 training images of scikit-learn's digits, enlarged to 32 x 32; the other 1497 are for testing.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_calibration_error
from tqdm.auto import tqdm

from . import plots
from .core.artifacts import write_whole
from .core.mixup import CutMix, Mixed, PuzzleMix, input_gradient, saliency

MODEL = "test_resnet"
CLASSES = 10
BATCH = 50
METHODS = ("plain", "CutMix", "Puzzle Mix")
# Chosen once, by plain training alone and without the test images (on 200 of the 300, the other 100 held out): its loss
# has fallen to 0.02 and no longer moves by the last quarter.
EPOCHS = 40
LEARNING_RATE = 3e-3


@dataclass(frozen=True)
class Digits:
    """Normalised images (n, 1, 32, 32) float32 and labels (n,) int64."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    mean: tuple[float]
    std: tuple[float]


@dataclass(frozen=True)
class Score:
    """One trained network: accuracy and expected calibration error in percent, and its training time."""

    method: str
    seed: int
    accuracy: float
    calibration_error: float
    seconds: float


def load(training: int = 300) -> Digits:
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    images = F.interpolate(images, size=(32, 32), mode="bilinear")
    split = train_test_split(range(len(images)), train_size=training, stratify=digits.target, random_state=0)
    train, test = (torch.tensor(part) for part in split)
    labels = torch.from_numpy(digits.target).long()
    centre, spread = float(images[train].mean()), float(images[train].std())
    x = (images - centre) / spread
    return Digits(x[train], labels[train], x[test], labels[test], (centre,), (spread,))


def augment(x: Tensor, fill: float, generator: torch.Generator) -> Tensor:
    """Turn each image by up to 10 degrees and shift it by up to 2 pixels."""
    n, size = len(x), x.shape[-1]
    angle = (torch.rand(n, generator=generator) * 2 - 1) * math.radians(10)
    shift = (torch.rand(n, 2, generator=generator) * 2 - 1) * 2 * 2 / size
    cos, sin = angle.cos(), angle.sin()
    rows = [torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    return F.grid_sample(x - fill, grid, align_corners=False) + fill


def train(method: str, seed: int, epochs: int, digits: Digits, step: Callable[[], object]) -> nn.Module:
    """One network; the seed gives every method the same first weights, batches and augmentations.

    ``step`` is called after every batch.
    """
    torch.manual_seed(seed)
    model = timm.create_model(MODEL, in_chans=1, num_classes=CLASSES).train()
    batches = torch.Generator().manual_seed(seed)
    mixing = torch.Generator().manual_seed(1000 + seed)
    puzzle = PuzzleMix(CLASSES, mean=digits.mean, std=digits.std)
    cutmix = CutMix(CLASSES)
    steps = epochs * math.ceil(len(digits.x) / BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.2)
    black = -digits.mean[0] / digits.std[0]
    for _ in range(epochs):
        for rows in torch.randperm(len(digits.x), generator=batches).split(BATCH):
            x, y = augment(digits.x[rows], black, batches), digits.y[rows]
            target = y
            if method == "CutMix":
                mixed = cutmix(x, y, generator=mixing)
                x, target = mixed.inputs, mixed.targets
            elif method == "Puzzle Mix":
                mixed = puzzle(x, y, saliency(input_gradient(model, x, y)), generator=mixing)
                x, target = mixed.inputs, mixed.targets
            loss = F.cross_entropy(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step()
    return model.eval()


@torch.inference_mode()
def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Accuracy and expected calibration error over 15 bins, both in percent."""
    probabilities = torch.cat([model(part) for part in x.split(500)]).softmax(1)
    error = multiclass_calibration_error(probabilities, y, num_classes=CLASSES, n_bins=15)
    return 100 * float((probabilities.argmax(1) == y).float().mean()), 100 * float(error)


def table(scores: list[Score]) -> str:
    """Mean and spread over the seeds, a line for each method."""
    lines = [f"{'':12} {'accuracy %':>14} {'calibration error %':>21} {'seconds':>8}"]
    for method in METHODS:
        rows = [s for s in scores if s.method == method]
        accuracy, error = (_spread([getattr(s, name) for s in rows]) for name in ("accuracy", "calibration_error"))
        lines.append(f"{method:12} {accuracy:>14} {error:>21} {mean(s.seconds for s in rows):8.1f}")
    return "\n".join(lines)


def picture(model: nn.Module, digits: Digits) -> bytes:
    """Six pairs of different digits, mixed by what the network looks at."""
    x, y = digits.test_x, digits.test_y
    s = saliency(input_gradient(model, x, y))
    puzzle = PuzzleMix(CLASSES, mean=digits.mean, std=digits.std)
    m = puzzle(x, y, s, generator=torch.Generator().manual_seed(0), lam=0.5, grid=8)
    rows = pairs_to_show(y, m)
    partner = m.partner[rows]
    pixels, mixed = (t * digits.std[0] + digits.mean[0] for t in (x, m.inputs))
    seen = F.avg_pool2d(s.unsqueeze(1), 4).squeeze(1)  # per region of the mask, as the solver sees it
    parts = (pixels[rows], pixels[partner], seen[rows], seen[partner], m.mask[rows], mixed[rows])
    return plots.to_png(plots.show_mixes(*(p.numpy() for p in parts)))


def pairs_to_show(y: Tensor, m: Mixed, count: int = 6) -> list[int]:
    """Rows of a batch that show the method well: few blended regions, and no digit more than twice."""
    share = m.mask.mean((1, 2))
    blended = ((m.mask > 0) & (m.mask < 1)).float().mean((1, 2))
    rows: list[int] = []
    pairs: list[set[int]] = []
    for i in (blended + 2 * (share - 0.5).abs()).argsort(stable=True).tolist():
        pair = {int(y[i]), int(y[m.partner[i]])}
        if len(pair) == 2 and pair not in pairs and all(sum(c in p for p in pairs) < 2 for c in pair):
            rows.append(i)
            pairs.append(pair)
    return rows[:count]


def main(out: Path = Path("demo"), epochs: int | None = None, seeds: int = 3) -> None:
    """Train every method on every seed, print the table, write ``puzzle_mix.png`` and ``results.json`` into ``out``.

    Raises:
        ValueError: ``epochs`` or ``seeds`` below one, or ``out`` is a file.
    """
    epochs = EPOCHS if epochs is None else epochs
    for name, value in (("epochs", epochs), ("seeds", seeds)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out} is a file; give a folder")
    digits = load()
    print(
        f"{MODEL} on scikit-learn's digits, {len(digits.x)} images for training and {len(digits.test_x)} for testing; "
        f"{epochs} epochs, {seeds} seed{'s' if seeds > 1 else ''}, threads: {torch.get_num_threads()}"
    )
    scores = []
    steps = epochs * math.ceil(len(digits.x) / BATCH)
    with tqdm(total=steps * seeds * len(METHODS), disable=None, unit="step") as bar:
        for seed in range(seeds):
            for method in METHODS:
                bar.set_description(f"{method}, seed {seed}")
                start = time.perf_counter()
                model = train(method, seed, epochs, digits, bar.update)
                seconds = time.perf_counter() - start
                scores.append(Score(method, seed, *evaluate(model, digits.test_x, digits.test_y), seconds))
    print(f"\nTest images, after the last epoch, mean +- standard deviation over {seeds} seeds:\n")
    print(table(scores))
    write_whole(out / "puzzle_mix.png", picture(model, digits))
    write_whole(out / "results.json", json.dumps(report(scores, epochs), indent=2) + "\n")
    print(f"\nWrote {out / 'puzzle_mix.png'} (six pairs and their mixes) and {out / 'results.json'}.")


def report(scores: list[Score], epochs: int) -> dict[str, object]:
    """What ``results.json`` holds."""
    packages = ("dataopt", "torch", "timm", "numpy", "scikit-learn", "torchmetrics")
    return {
        "model": MODEL,
        "epochs": epochs,
        "batch": BATCH,
        "learning_rate": LEARNING_RATE,
        "seeds": sorted({s.seed for s in scores}),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
        "runs": [asdict(s) for s in scores],
        "table": table(scores).splitlines(),
    }


def _spread(values: list[float]) -> str:
    return f"{mean(values):.2f} +- {stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"
