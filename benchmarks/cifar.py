"""CIFAR-10 and the small residual network that several benchmarks train or use.

The images are JPEG copies of CIFAR-10, not its original pixels.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import common
import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from dataopt.core.mixup import PuzzleMix, input_gradient, saliency
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torchvision.transforms import v2

CLASSES = 10
MEAN, STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)
BATCH = 100
TRAINING = 12_000
EPOCHS = 24  # what half an hour on two cores allows: an epoch of plain training takes about 7.5 s on one core
LEARNING_RATE, WEIGHT_DECAY = 0.1, 5e-4
LAST = 10  # the test images are looked at after each of the last epochs
METHODS = ("plain", "input mixup", "CutMix", "Puzzle Mix")


@dataclass(frozen=True)
class Scale:
    """How many images and epochs; every image if ``training`` or ``testing`` is None."""

    training: int | None = TRAINING
    testing: int | None = None
    epochs: int = EPOCHS

    @property
    def settings(self) -> common.Cell:
        """What a trained network depends on."""
        recipe = {"batch": BATCH, "learning_rate": LEARNING_RATE, "weight_decay": WEIGHT_DECAY}
        return {"training": self.training, "epochs": self.epochs} | recipe


QUICK = Scale(200, 100, 2)


@dataclass(frozen=True)
class Data:
    """Pixels (n, 3, 32, 32) uint8 and labels (n,) int64."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass
class Trained:
    """A network and how it came to be: training seconds, test accuracies after each of the last epochs."""

    model: nn.Module
    seconds: float = 0.0
    loss: list[float] = field(default_factory=list)
    top1: list[float] = field(default_factory=list)
    top5: list[float] = field(default_factory=list)


def available(folder: Path) -> bool:
    return all((folder / f"{name}.parquet").is_file() for name in ("train", "test"))


def check(folder: Path) -> None:
    """Stop with one line where the data are missing."""
    if not available(folder):
        common.stop("no train.parquet and test.parquet in the data folder; give CIFAR-10 as parquet with --data FOLDER")


@functools.lru_cache(maxsize=1)
def load(folder: Path, scale: Scale) -> Data:
    """Training images, stratified and always the same, and the first test images."""
    check(folder)
    images, labels = _read(folder / "train.parquet")
    rows = list(range(len(labels)))
    if scale.training is not None:
        rows = sorted(train_test_split(rows, train_size=scale.training, stratify=labels, random_state=0)[0])
    test_images, test_labels = _read(folder / "test.parquet")
    return Data(
        _decode([images[i] for i in rows]),
        torch.from_numpy(labels[rows]),
        _decode(test_images[: scale.testing]),
        torch.from_numpy(test_labels[: scale.testing]),
    )


def _read(path: Path) -> tuple[list[bytes], np.ndarray]:
    content = pq.read_table(path, columns=["image", "label"])
    return [image["bytes"] for image in content["image"].to_pylist()], content["label"].to_numpy().copy()


def _decode(images: list[bytes]) -> Tensor:
    pixels = [np.asarray(Image.open(BytesIO(image)).convert("RGB")) for image in images]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()


def normalise(x: Tensor) -> Tensor:
    """uint8 pixels to normalised float32."""
    return v2.functional.normalize(x.float() / 255, MEAN, STD)


class Block(nn.Module):
    """Two convolutions, the first of which halves the sides, and a shortcut."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, 2, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


def network() -> nn.Module:
    """Six-layer residual network for 32 x 32 images, 240,000 parameters, 5 M multiply-adds."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Block(16, 48),
        Block(48, 128),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, CLASSES),
    )
    return model.to(memory_format=torch.channels_last)


def crop_and_flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random crops after padding by 4 pixels, and flips, each image its own: (B, 3, H, W) uint8."""
    n, _, height, width = x.shape
    padded = F.pad(x, (4, 4, 4, 4)).permute(0, 2, 3, 1)
    top, left = torch.randint(0, 9, (2, n, 1), generator=generator)
    columns = torch.arange(width).expand(n, width)
    columns = torch.where(torch.rand(n, 1, generator=generator) < 0.5, columns, columns.flip(1))
    rows = top + torch.arange(height)
    picked = padded[torch.arange(n)[:, None, None], rows[:, :, None], (left + columns)[:, None, :]]
    return picked.permute(0, 3, 1, 2)  # channels last in memory


def mixer(method: str, model: nn.Module, seed: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(inputs, labels) to mixed inputs and targets; torchvision's methods draw from torch's own generator."""
    if method == "plain":
        return lambda x, y: (x, y)
    if method == "input mixup":
        return v2.MixUp(alpha=1.0, num_classes=CLASSES)
    if method == "CutMix":
        return v2.CutMix(alpha=1.0, num_classes=CLASSES)
    puzzle = PuzzleMix(CLASSES, transport_patch=4, mean=MEAN, std=STD)  # the thesis' settings for CIFAR
    generator = torch.Generator().manual_seed(seed)

    def mix(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        m = puzzle(x, y, saliency(input_gradient(model, x, y)), generator=generator)
        return m.inputs, m.targets

    return mix


def fit(
    model: nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    count: int,
    epochs: int,
    generator: torch.Generator,
    rate: float = LEARNING_RATE,
    decay: float = WEIGHT_DECAY,
    milestones: Sequence[float] = (1 / 2, 3 / 4),
) -> Iterator[tuple[float, float]]:
    """SGD with momentum, whose rate falls tenfold at the milestones, shares of the epochs.

    Args:
        loss_of: of a batch, given as (B,) rows.
        count: of the rows.
        generator: of the batches.

    Yields:
        Mean loss and seconds of each epoch; what the caller does in between does not count.
    """
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=decay, nesterov=True)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [int(share * epochs) for share in milestones])
    for _ in range(epochs):
        model.train()
        start, total = time.perf_counter(), 0.0
        for rows in torch.randperm(count, generator=generator).split(BATCH):
            loss = loss_of(rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        schedule.step()
        yield total / count, time.perf_counter() - start


def train(method: str, seed: int, epochs: int, data: Data, say: Callable[[str], None] | None = None) -> Trained:
    """SGD with momentum; the rate falls tenfold at a half and at three quarters of the epochs, as in the thesis.

    The seed gives every method the same first weights, batches, crops and flips. ``say`` gets a
    line after each epoch.
    """
    torch.manual_seed(seed)
    model = network()
    batches = torch.Generator().manual_seed(seed)
    mix = mixer(method, model, seed)

    def loss_of(rows: Tensor) -> Tensor:
        x, target = mix(normalise(crop_and_flip(data.x[rows], batches)), data.y[rows])
        return F.cross_entropy(model(x), target)

    out = Trained(model)
    for epoch, (loss, seconds) in enumerate(fit(model, loss_of, len(data.x), epochs, batches)):
        out.seconds += seconds
        out.loss.append(loss)
        if epoch >= epochs - LAST:
            for accuracies, value in zip((out.top1, out.top5), evaluate(model, data), strict=True):
                accuracies.append(value)
        if say:
            tested = f", top-1 {out.top1[-1]:.2f} %" if out.top1 else ""
            say(f"{method}, seed {seed}: epoch {epoch + 1} of {epochs}, loss {out.loss[-1]:.3f}{tested}")
    model.eval()
    return out


@torch.inference_mode()
def evaluate(model: nn.Module, data: Data) -> tuple[float, float]:
    """Top-1 and top-5 accuracy on the test images, in percent."""
    model.eval()
    top = torch.cat([model(normalise(part)).topk(5).indices for part in data.test_x.split(500)])
    hits = top == data.test_y.unsqueeze(1)
    return 100 * float(hits[:, 0].float().mean()), 100 * float(hits.any(1).float().mean())


def keep_weights(model: nn.Module, scale: Scale, scratch: Path) -> None:
    """Store a plainly trained network among the scratch files."""
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    common.write_whole(_weights(scale, scratch), save(state, metadata={"settings": json.dumps(scale.settings)}))


def plainly_trained(data: Data, scale: Scale, scratch: Path) -> nn.Module:
    """The network of seed 0 without mixing, in evaluation mode: stored weights, or trained now where there are none."""
    path, wanted = _weights(scale, scratch), json.dumps(scale.settings)
    stored = None
    if path.exists():
        with safe_open(path, "pt") as file:
            stored = (file.metadata() or {}).get("settings")
    if stored != wanted:
        common.say("training the plain network")
        keep_weights(train("plain", 0, scale.epochs, data, common.say).model, scale, scratch)
    model = network()
    model.load_state_dict(load_file(path))
    return model.eval()


def _weights(scale: Scale, scratch: Path) -> Path:
    return scratch / f"plain-{scale.training}-images-{scale.epochs}-epochs.safetensors"
