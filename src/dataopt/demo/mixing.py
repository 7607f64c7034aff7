"""Digits that a timm network learns from: labels as given and cleaned, plainly and mixed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import mean

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_calibration_error

from .. import plots
from ..core.mixup import CoMixup, CutMix, Mixed, PuzzleMix, clean_loss, input_gradient, saliency
from .digits import CLASSES, Digits, enlarged
from .labels import Cleaning
from .step import Step, spread

MODEL = "test_resnet"
BATCH = 50
GIVEN, PLAIN = "plain, labels as given", "plain"
METHODS = (GIVEN, PLAIN, "CutMix", "Puzzle Mix", "Co-Mixup")
EPOCHS = 20
LEARNING_RATE = 3e-3


@dataclass(frozen=True)
class Images:
    """Normalised images (n, 1, 32, 32) float32 and labels (n,) int64; how they were normalised."""

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


def images_of(digits: Digits, rows: Tensor, labels: Tensor) -> Images:
    """For training on some rows under given labels."""
    x, test_x = enlarged(digits.x), enlarged(digits.test_x)
    centre, width = float(x.mean()), float(x.std())
    normal, test = ((t - centre) / width for t in (x, test_x))
    return Images(normal[rows], labels, test, digits.test_y, (centre,), (width,))


def augment(x: Tensor, fill: float, generator: torch.Generator) -> Tensor:
    """Turn each image by up to 10 degrees and shift it by up to 2 pixels."""
    n, size = len(x), x.shape[-1]
    angle = (torch.rand(n, generator=generator) * 2 - 1) * math.radians(10)
    shift = (torch.rand(n, 2, generator=generator) * 2 - 1) * 2 * 2 / size
    cos, sin = angle.cos(), angle.sin()
    rows = [torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    return F.grid_sample(x - fill, grid, align_corners=False) + fill


def train(method: str, seed: int, epochs: int, images: Images, step: Callable[[], object]) -> nn.Module:
    """One network; the seed gives every method the same first weights, batches and augmentations.

    ``step`` is called after every epoch.
    """
    torch.manual_seed(seed)
    model = timm.create_model(MODEL, in_chans=1, num_classes=CLASSES).train()
    batches = torch.Generator().manual_seed(seed)
    mixing = torch.Generator().manual_seed(1000 + seed)
    puzzle = PuzzleMix(CLASSES, mean=images.mean, std=images.std)
    comixup = CoMixup(CLASSES, partition=25)
    cutmix = CutMix(CLASSES)
    steps = epochs * math.ceil(len(images.x) / BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.2)
    black = -images.mean[0] / images.std[0]
    for _ in range(epochs):
        for rows in torch.randperm(len(images.x), generator=batches).split(BATCH):
            x, y = augment(images.x[rows], black, batches), images.y[rows]
            optimizer.zero_grad()
            if method == "CutMix":
                mixed = cutmix(x, y, generator=mixing)
                loss = F.cross_entropy(model(mixed.inputs), mixed.targets)
            elif method == "Puzzle Mix":
                mixed = puzzle(x, y, saliency(input_gradient(model, x, y)), generator=mixing)
                loss = F.cross_entropy(model(mixed.inputs), mixed.targets)
            elif method == "Co-Mixup":  # with the clean loss, as its authors train
                unmixed, gradient = clean_loss(model, x, y)
                joint = comixup(x, y, saliency(gradient), generator=mixing)
                loss = unmixed + F.cross_entropy(model(joint.inputs), joint.targets)
            else:
                loss = F.cross_entropy(model(x), y)
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


def mix(digits: Digits, cleanings: list[Cleaning], epochs: int, say: Callable[[str], Callable[[], object]]) -> Step:
    """The step: every method on every seed's labels; ``say`` is of the demo's ``progress``, a unit being an epoch."""
    scores = []
    rows = torch.arange(len(digits.y))
    for seed, cleaning in enumerate(cleanings):
        for method in METHODS:
            kept = (rows, cleaning.given) if method == GIVEN else (cleaning.result.rows, cleaning.result.labels)
            images = images_of(digits, *kept)
            step = say(f"{method}, seed {seed}")
            start = time.perf_counter()
            model = train(method, seed, epochs, images, step)
            seconds = time.perf_counter() - start
            scores.append(Score(method, seed, *evaluate(model, images.test_x, images.test_y), seconds))
    best = max(METHODS, key=lambda method: mean(_of(scores, method, "accuracy")))
    gain = [a - b for a, b in zip(_of(scores, PLAIN, "accuracy"), _of(scores, GIVEN, "accuracy"), strict=True)]
    caption = "Six pairs: both digits, where the network looks, the mask, the mix."
    return Step(
        "Train on mixed images",
        f"{MODEL} of timm learns the digits for {epochs} epochs: with the labels as given, then without what the "
        "rounds took out, plainly and with three ways to mix images.",
        ["trained", "test accuracy, %", "calibration error, %", "seconds"],
        [
            [
                method,
                spread(_of(scores, method, "accuracy"), 2),
                spread(_of(scores, method, "calibration_error"), 2),
                f"{mean(_of(scores, method, 'seconds')):.1f}",
            ]
            for method in METHODS
        ],
        f"Cleaning alone brings {spread(gain, 2)} points. The best accuracy here has {best}.",
        [
            "dataopt train path/to/images --model resnet50 --mixup puzzle",
            "dataopt train path/to/images --model resnet50 --mixup comixup --comixup-clean-weight 1",
        ],
        {"puzzle_mix.png": (caption, picture(model, images))},
        {"runs": [asdict(s) for s in scores], "epochs": epochs},
    )


def _of(scores: list[Score], method: str, name: str) -> list[float]:
    return [getattr(s, name) for s in scores if s.method == method]


def picture(model: nn.Module, images: Images) -> bytes:
    """Six pairs of different digits, mixed by what the network looks at."""
    x, y = images.test_x, images.test_y
    s = saliency(input_gradient(model, x, y))
    puzzle = PuzzleMix(CLASSES, mean=images.mean, std=images.std)
    m = puzzle(x, y, s, generator=torch.Generator().manual_seed(0), lam=0.5, grid=8)
    rows = pairs_to_show(y, m)
    partner = m.partner[rows]
    pixels, mixed = (t * images.std[0] + images.mean[0] for t in (x, m.inputs))
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
