"""How every row of the mixup benchmark trains: the data sets, their networks, and the loss of a batch by each method.

Within a data set all rows share the first weights, batches, crops and flips of a seed, the optimiser and its schedule;
the loss is the cross entropy with the mixed label everywhere.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cifar
import numpy as np
import timm
import torch
import torch.nn.functional as F
from dataopt.core.artifacts import whole_file
from dataopt.core.mixup import (
    Adversarial,
    CoMixup,
    CutMix,
    PuzzleMix,
    augmix,
    clean_loss,
    input_gradient,
    jensen_shannon_loss,
    saliency,
)
from relation_data import fsdd_rows
from relation_models import residual_network, sound_network
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

VERSIONS = 4  # AugMix images of each training image
CONSISTENCY = 12.0  # weight of the Jensen-Shannon divergence, as AugMix's authors have it
FRAMES = 32  # of a spectrogram: the last of 33 goes, so that grids divide it
PIXEL = 1 / 255

Views = tuple[str, ...]  # of an image, in the batch one after the other: "clean", "augmented", "another"
Loss = Callable[[Tensor, Tensor], Tensor]  # inputs and labels of a batch to its loss


@dataclass(frozen=True)
class Task:
    """A data set, a network and the schedule of all its rows.

    Attributes:
        data: pixels uint8, or inputs as they are.
        network: of a seed.
        layers: the modules of a network whose input manifold mixup mixes.
        prepare: (B, V C, H, W) of V views to inputs (V B, C, H, W); with a generator, for training.
        mean, std: how inputs were normalised.
        puzzle: settings of Puzzle Mix.
        epochs, rate, decay, milestones: of SGD, as of ``cifar.fit``.
        device: of the training.
    """

    data: cifar.Data
    network: Callable[[int], nn.Module]
    layers: Callable[[nn.Module], list[nn.Module]]
    prepare: Callable[[Tensor, torch.Generator | None], Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    puzzle: dict[str, Any]
    epochs: int
    rate: float = cifar.LEARNING_RATE
    decay: float = cifar.WEIGHT_DECAY
    milestones: tuple[float, ...] = (1 / 2, 3 / 4)
    device: str = "cpu"


@dataclass(frozen=True)
class Row:
    """A method with its settings.

    Attributes:
        kind: one of ``LOSSES``.
        settings: of the mixing object, or ``inputs`` and ``alpha`` of the methods without saliency.
        share: of the epochs; the learning rate grows as it falls, as in the thesis' halves.
        views: of each image that a batch holds.
    """

    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    share: float = 1.0
    views: Views = ("clean",)

    def epochs(self, whole: int) -> int:
        return max(1, round(self.share * whole))


# Data sets


def images(pixels: Tensor, generator: torch.Generator | None) -> Tensor:
    """Normalised inputs; crops and flips are the same for all views of an image."""
    moved = pixels if generator is None else cifar.crop_and_flip(pixels, generator)
    views = torch.cat(moved.split(3, 1))
    return cifar.normalise(views).contiguous(memory_format=torch.channels_last)


def small_images(folder: Path, scale: cifar.Scale) -> Task:
    """CIFAR-10 and the small residual network of the other benchmarks."""
    data = cifar.load(folder, scale)
    return Task(
        data, lambda seed: residual_network(seed, cifar.CLASSES), lambda model: [model[0], model[3], model[4]], images,
        cifar.MEAN, cifar.STD, {"transport_patch": 4}, scale.epochs,
    )  # fmt: skip


def preact_network(seed: int) -> nn.Module:
    """PreActResNet-18 for 32 x 32 images."""
    torch.manual_seed(seed)
    model = timm.create_model("resnetv2_18", num_classes=cifar.CLASSES)
    model.stem = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    return model


def thesis(folder: Path, scale: cifar.Scale, device: str) -> Task:
    """The network and the schedule of thesis section 4.5.1, on CIFAR-10."""
    data = cifar.load(folder, scale)
    moved = cifar.Data(*(t.to(device) for t in (data.x, data.y, data.test_x, data.test_y)))
    return Task(
        moved, lambda seed: preact_network(seed).to(device),
        lambda model: [model.stem, model.stages[1], model.stages[2]], images, cifar.MEAN, cifar.STD,
        {"transport_patch": 4}, scale.epochs, 0.2, 1e-4, (1 / 3, 2 / 3), device,
    )  # fmt: skip


def speech(folder: Path, epochs: int, count: int | None = None) -> Task:
    """Spoken digits as log-mel pictures (1, 40, 32), and a network of four convolutions."""
    x, y, test_x, test_y = fsdd_rows(folder)
    low, high = (float(v) for v in x.aminmax())
    data = cifar.Data(x[:count, ..., :FRAMES], y[:count], test_x[..., :FRAMES], test_y)
    return Task(
        data, lambda seed: sound_network(seed, cifar.CLASSES),
        lambda model: [model[0][0], model[0][4], model[0][8]], lambda pixels, generator: pixels,
        (-low / (high - low),), (1 / (high - low),), {"grids": (2, 4, 8)}, epochs,
    )  # fmt: skip


# AugMix images


def augmented(x: Tensor, version: int, scratch: Path) -> Tensor:
    """One AugMix image of each, (n, 3, 32, 32) uint8; made once, since that takes 1 ms or two an image, and kept."""
    digest = hashlib.sha256(x.cpu().numpy().tobytes()).hexdigest()[:12]
    path = scratch / f"augmix-{digest}-{version}.safetensors"
    if not path.exists():
        made = augmix(x.cpu(), torch.Generator().manual_seed(version))
        with whole_file(path) as temporary:
            save_file({"x": made}, temporary)
    return load_file(path)["x"].to(x.device)


# Losses


def plain(row: Row, task: Task, model: nn.Module, seed: int) -> Loss:
    return lambda x, y: F.cross_entropy(model(x), y)


@dataclass(frozen=True)
class Blend:
    """Shares of several inputs for a whole batch, and who they are."""

    shares: np.ndarray
    orders: list[np.ndarray]

    @classmethod
    def draw(cls, batch: int, rng: np.random.Generator, inputs: int, alpha: float) -> Blend:
        """Each row first, and ``inputs - 1`` others."""
        orders = [np.arange(batch), *(rng.permutation(batch) for _ in range(inputs - 1))]
        return cls(rng.dirichlet([alpha] * inputs), orders)

    def __call__(self, t: Tensor) -> Tensor:
        return sum(float(share) * t[order] for share, order in zip(self.shares, self.orders, strict=True))  # type: ignore[return-value]


def labels_of(y: Tensor) -> Tensor:
    return F.one_hot(y, cifar.CLASSES).float()


def input_mixup(row: Row, task: Task, model: nn.Module, seed: int) -> Loss:
    rng = np.random.default_rng(seed)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        blend = Blend.draw(len(x), rng, **row.settings)
        return F.cross_entropy(model(blend(x)), blend(labels_of(y)))

    return loss


def manifold_mixup(row: Row, task: Task, model: nn.Module, seed: int) -> Loss:
    """Input mixup of the input of a layer, drawn for each batch (Verma et al., ICML 2019)."""
    rng, layers = np.random.default_rng(seed), task.layers(model)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        blend = Blend.draw(len(x), rng, **row.settings)
        layer = layers[rng.integers(len(layers))]
        hook = layer.register_forward_pre_hook(lambda module, given: (blend(given[0]),))
        try:
            return F.cross_entropy(model(x), blend(labels_of(y)))
        finally:
            hook.remove()

    return loss


def cutmix(row: Row, task: Task, model: nn.Module, seed: int) -> Loss:
    """One rectangle for each further input, later ones over earlier ones; labels by the area that is seen."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    paste = CutMix(cifar.CLASSES)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        blend = Blend.draw(len(x), rng, **row.settings)
        out, owner = x, torch.zeros(x.shape[2:], dtype=torch.int64, device=x.device)
        for k in range(1, len(blend.orders)):
            share = 1 - float(blend.shares[k])
            mask = paste(x, y, partner=torch.from_numpy(blend.orders[k]), lam=share, generator=generator).mask[0]
            owner[mask == 0] = k
            out = torch.where(mask == 0, x[blend.orders[k]], out)
        area = owner.flatten().bincount(minlength=len(blend.orders)).double() / owner.numel()
        seen = replace(blend, shares=area.cpu().numpy())
        return F.cross_entropy(model(out), seen(labels_of(y)))

    return loss


def augmix_consistency(row: Row, task: Task, model: nn.Module, seed: int) -> Loss:
    """AugMix's own training: three views in one batch, and the Jensen-Shannon divergence between them."""

    def loss(x: Tensor, y: Tensor) -> Tensor:
        logits = model(x).chunk(3)
        return F.cross_entropy(logits[0], y) + CONSISTENCY * jensen_shannon_loss(*logits)

    return loss


def puzzle_mix(row: Row, task: Task, model: nn.Module, seed: int) -> Loss:
    mix = PuzzleMix(cifar.CLASSES, mean=task.mean, std=task.std, **(task.puzzle | row.settings))
    generator = torch.Generator().manual_seed(seed)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        seen, noise = mix.adversarial.start(x, generator) if mix.adversarial else (x, None)
        gradient = input_gradient(model, seen, y)
        m = mix(x, y, saliency(gradient), noise, gradient if noise else None, generator)
        return F.cross_entropy(model(m.inputs), m.targets)

    return loss


def co_mixup(row: Row, task: Task, model: nn.Module, seed: int) -> Loss:
    """With ``clean`` the loss on the unmixed batch is added, as in the released CIFAR runs."""
    settings = dict(row.settings)
    clean = settings.pop("clean", 0.0)
    mix, generator = CoMixup(cifar.CLASSES, **settings), torch.Generator().manual_seed(seed)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        if clean:
            unmixed, gradient = clean_loss(model, x, y)
        else:
            unmixed, gradient = torch.zeros((), device=x.device), input_gradient(model, x, y)
        m = mix(x, y, saliency(gradient), generator)
        return F.cross_entropy(model(m.inputs), m.targets) + clean * unmixed

    return loss


LOSSES: dict[str, Callable[[Row, Task, nn.Module, int], Loss]] = {
    "plain": plain,
    "input mixup": input_mixup,
    "manifold mixup": manifold_mixup,
    "CutMix": cutmix,
    "AugMix": augmix_consistency,
    "Puzzle Mix": puzzle_mix,
    "Co-Mixup": co_mixup,
}


# The rows

# alpha as the methods' authors have it: 2 for manifold mixup, 1 for the others
_INPUT, _MANIFOLD = {"inputs": 2, "alpha": 1.0}, {"inputs": 2, "alpha": 2.0}
_ATTACK = Adversarial(p=0.1, eps=10 * PIXEL, step=12 * PIXEL)  # section 3.6.1 and the released code
MAIN: dict[str, Row] = {
    "plain": Row("plain"),
    "input mixup": Row("input mixup", _INPUT),
    "manifold mixup": Row("manifold mixup", _MANIFOLD),
    "CutMix": Row("CutMix", _INPUT),
    "AugMix with JSD": Row("AugMix", views=("clean", "augmented", "another")),
    "Puzzle Mix": Row("Puzzle Mix"),
    "Co-Mixup": Row("Co-Mixup"),
    "Co-Mixup, clean loss added": Row("Co-Mixup", {"clean": 1.0}),  # as the released code trains
}
PUZZLE: dict[str, Row] = {  # Tables 3.2 and 3.7 to 3.9
    "Puzzle Mix, half the epochs": Row("Puzzle Mix", share=0.5),
    "Puzzle Mix, binary": Row("Puzzle Mix", {"labels": 2}),
    "Puzzle Mix, mask only": Row("Puzzle Mix", {"transport": None}),
    "Puzzle Mix, adversarial": Row("Puzzle Mix", {"adversarial": _ATTACK}),
    "Puzzle Mix, adversarial, shared draw": Row("Puzzle Mix", {"adversarial": replace(_ATTACK, shared_draw=True)}),
    "Puzzle Mix, adversarial, without decay": Row("Puzzle Mix", {"adversarial": replace(_ATTACK, decay=False)}),
    "Puzzle Mix on AugMix images": Row("Puzzle Mix", views=("augmented",)),
}
SEVERAL: dict[str, Row] = {  # Table 4.4
    f"{name}, {inputs} inputs": Row(MAIN[name].kind, MAIN[name].settings | {"inputs": inputs})
    for inputs in (3, 4)
    for name in ("input mixup", "manifold mixup", "CutMix")
}
JOINT: dict[str, Row] = {
    "Co-Mixup, best of 4 starts": Row("Co-Mixup", {"restarts": 4}),
}
ROWS = MAIN | PUZZLE | SEVERAL | JOINT
OWN_PATHS = {  # rows that between them run all of the code above
    *MAIN, "Puzzle Mix, half the epochs", "Puzzle Mix, mask only", "Puzzle Mix, adversarial, without decay",
    "Puzzle Mix on AugMix images", "CutMix, 3 inputs",
}  # fmt: skip
SPEECH = [name for name in MAIN if name != "AugMix with JSD"]


def train(
    row: Row, seed: int, task: Task, scratch: Path, say: Callable[[int, int, float], None]
) -> tuple[nn.Module, float]:
    """The trained network, in evaluation mode, and the seconds of its epochs; ``say`` gets epoch, epochs and loss."""
    torch.manual_seed(seed)
    model = task.network(seed)
    batches, drawn = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    loss = LOSSES[row.kind](row, task, model, seed)
    made = [augmented(task.data.x, k, scratch) for k in range(VERSIONS)] if row.views != ("clean",) else []

    def loss_of(rows: Tensor) -> Tensor:
        views = {"clean": task.data.x[rows]}
        if made:  # two different versions of each image
            one = torch.randint(VERSIONS, rows.shape, generator=drawn)
            other = (one + torch.randint(1, VERSIONS, rows.shape, generator=drawn)) % VERSIONS
            versions = torch.stack([x[rows] for x in made])
            views["augmented"], views["another"] = (versions[v, torch.arange(len(rows))] for v in (one, other))
        pixels = torch.cat([views[name] for name in row.views], 1)
        return loss(task.prepare(pixels, batches), task.data.y[rows])

    epochs, seconds, rate = row.epochs(task.epochs), 0.0, task.rate / row.share
    each = cifar.fit(model, loss_of, len(task.data.x), epochs, batches, rate, task.decay, task.milestones)
    for epoch, (mean, took) in enumerate(each):
        seconds += took
        say(epoch + 1, epochs, mean)
    return model.eval(), seconds


@functools.cache
def task_of(name: str, folder: Path, scale: cifar.Scale, speech_epochs: int, device: str) -> Task:
    """The task "images", "thesis" or "speech", read once in a process."""
    if name == "speech":
        return speech(folder, speech_epochs, scale.training)
    return thesis(folder, scale, device) if name == "thesis" else small_images(folder, scale)
