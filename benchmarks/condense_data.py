"""The data sets of the condensation benchmarks, the networks that they are condensed and tested with, and their scores.

Digits of scikit-learn (8 x 8), Fashion-MNIST, CIFAR-10 (JPEG copies), and spoken digits (FSDD) as 64 x 64 spectrograms.
The networks are narrower than the thesis', whose ConvNet-3 of 128 channels would take days on a processor.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import cifar
import common
import numpy as np
import torch
from dataopt.core.condense import (
    Augment,
    Condensed,
    ConvNet,
    MultiFormation,
    RealData,
    ResNet10,
    evaluate,
    initial_images,
)
from relation_data import digits_rows, fashion
from torch import Tensor, nn
from torchvision.models import DenseNet

CLASSES = 10
REAL = ("random", "herding")  # whole real images
ModelFn = Callable[[], nn.Module]
FOLDERS = {"Fashion-MNIST": "fashion_mnist", "spoken digits": "fsdd"}  # beside that of CIFAR-10


@dataclass(frozen=True)
class Data:
    """Images (n, C, H, W), uint8 or floating in [0, 1], and labels (n,) int64.

    Attributes:
        network: that condenses, and the first to be tested.
        axes: of the formation. augment, cutmix: of all test networks' trainings.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    network: ModelFn
    axes: str = "space"
    augment: Augment = field(default_factory=lambda: Augment(cutout=0))
    cutmix: float = 0.5

    @functools.cached_property
    def real(self) -> RealData:
        """The training set as the condenser sees it."""
        return RealData(*self.train)


def check(folder: Path, names: set[str]) -> None:
    """Stop with one line where a data set is missing."""
    for name, beside in FOLDERS.items():
        if name in names and not (folder.parent / beside).is_dir():
            common.stop(f"no {name} in {beside} beside the folder of CIFAR-10; give that as --data FOLDER")
    if "CIFAR-10" in names:
        cifar.check(folder)


@functools.lru_cache(maxsize=4)
def load(name: str, folder: Path, testing: int | None = None) -> Data:
    """A data set by its name; ``testing`` limits the test images."""
    data = LOADERS[name](folder)
    return dataclasses.replace(data, test=(data.test[0][:testing], data.test[1][:testing]))


def _digits(folder: Path) -> Data:
    x, y, test_x, test_y = digits_rows()
    shape = (-1, 1, 8, 8)
    return Data(
        (x.view(shape), y.long()), (test_x.view(shape), test_y.long()),
        lambda: ConvNet(1, CLASSES, 8, depth=2, width=32),
    )  # fmt: skip


def _fashion(folder: Path) -> Data:
    def labels(kind: str) -> Tensor:
        with gzip.open(folder.parent / "fashion_mnist" / f"{kind}-labels-idx1-ubyte.gz") as file:
            return torch.from_numpy(np.frombuffer(file.read(), np.uint8, offset=8).astype(np.int64))

    train, test = ((fashion(folder, kind).unsqueeze(1), labels(kind)) for kind in ("train", "t10k"))
    return Data(train, test, lambda: ConvNet(1, CLASSES, 28, depth=3, width=16, first_padding=3))


def _cifar10(folder: Path) -> Data:
    found = cifar.load(folder, cifar.Scale(None))
    return Data((found.x, found.y), (found.test_x, found.test_y), lambda: ConvNet(3, CLASSES, 32, depth=3, width=32))


def _speech(folder: Path) -> Data:
    """Log magnitudes of 64 frequencies and 64 steps of 10 ms; 5 of each speaker and digit are for testing."""
    stored = np.load(folder.parent / "fsdd" / "fsdd.npz")
    audio, offset = torch.from_numpy(stored["audio"].astype(np.float32) / 2**15), stored["offset"]
    clips = torch.zeros(len(offset) - 1, 63 * 80)
    for clip, start, end in zip(clips, offset[:-1], offset[1:], strict=True):
        part = audio[start : min(end, start + clips.shape[1])]
        clip[: len(part)] = part
    magnitude = torch.stft(clips, 126, 80, window=torch.hann_window(126), return_complex=True).abs()
    x = (magnitude + 1e-3).log().unsqueeze(1)
    x = (x - x.min()) / (x.max() - x.min())
    y, testing = torch.from_numpy(stored["label"]).long(), torch.from_numpy(stored["index"] < 5)
    return Data(
        (x[~testing], y[~testing]), (x[testing], y[testing]),
        lambda: ConvNet(1, CLASSES, 64, depth=4, width=16), "time",
        Augment(colour=False, crop=(0, 0.125), cutout=0), 0.0,
    )  # fmt: skip


LOADERS: dict[str, Callable[[Path], Data]] = {
    "digits": _digits,
    "Fashion-MNIST": _fashion,
    "CIFAR-10": _cifar10,
    "spoken digits": _speech,
}


def dense_net() -> nn.Module:
    """A small DenseNet with batch norm for three channels of 32 x 32."""
    net = DenseNet(growth_rate=12, block_config=(4, 4, 4), num_init_features=24, num_classes=CLASSES)
    net.features.conv0 = nn.Conv2d(3, 24, 3, 2, 1, bias=False)
    net.features.pool0 = nn.Identity()
    return net


def transfer_networks() -> dict[str, ModelFn]:
    """Test networks for CIFAR-10 that nothing was condensed with (Table 6.1)."""
    return {"ResNet-10": lambda: ResNet10(3, CLASSES, 32, width=16), "DenseNet": dense_net}


def scores(
    condensed: Condensed, data: Data, networks: Mapping[str, ModelFn], seeds: tuple[int, ...], steps: int
) -> dict[str, list[float]]:
    """Test accuracies in percent after the last step, one a seed, by network."""
    found = evaluate(
        condensed, data.train, data.test, networks, seeds=seeds, steps=steps, baselines=(), augment=data.augment,
        cutmix=data.cutmix, progress=False,
    )  # fmt: skip
    return {row.network: [100 * a for a in row.accuracies] for row in found.rows}


def chosen(data: Data, per_class: int, how: str, seed: int) -> Condensed:
    """Whole real images: ``"random"`` or ``"herding"``."""
    generator = torch.Generator().manual_seed(seed)
    images = initial_images(data.real, per_class, how, MultiFormation(1), generator, data.network)
    return stored(images, data)


def stored(images: Tensor, data: Data, factor: int = 1) -> Condensed:
    """Images (n, C, H, W), classes one after another, as a condensed set that does not say what made it."""
    y = torch.arange(CLASSES).repeat_interleave(len(images) // CLASSES)
    return Condensed(images.float(), y, factor, data.axes, mean=data.real.mean, std=data.real.std)
