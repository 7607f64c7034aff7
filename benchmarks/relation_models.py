"""The small networks behind the relation benchmarks, how they are trained, and what they say about rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cifar
import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH = 100
Prepare = Callable[[Tensor, "torch.Generator | None"], Tensor]  # rows to inputs; with a generator, for training


@dataclass(frozen=True)
class Recipe:
    """A network, given seed and classes, and its training."""

    network: Callable[[int, int], nn.Sequential]
    epochs: int
    rate: float
    prepare: Prepare
    optimizer: Callable[[nn.Module, float], torch.optim.Optimizer]

    @property
    def settings(self) -> list[object]:
        return [self.epochs, self.rate, BATCH]

    def train(
        self, x: Tensor, y: Tensor, seed: int, classes: int = 10,
        after: Callable[[nn.Sequential], None] = lambda model: None,
    ) -> tuple[nn.Sequential, float]:  # fmt: skip
        """The trained network and the seconds that it took; ``after`` each epoch does not count."""
        model = self.network(seed, classes)
        return model, fit(model, x, y, self, seed, after)


def fit(
    model: nn.Sequential, x: Tensor, y: Tensor, recipe: Recipe, seed: int, after: Callable[[nn.Sequential], None]
) -> float:
    """Train with one rise and fall of the learning rate."""
    optimizer = recipe.optimizer(model, recipe.rate)
    batches = torch.Generator().manual_seed(seed)
    steps = -(-len(x) // BATCH) * recipe.epochs
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, steps, pct_start=0.25)
    seconds = 0.0
    for _ in range(recipe.epochs):
        start = time.perf_counter()
        model.train()
        for rows in torch.randperm(len(x), generator=batches).split(BATCH):
            loss = F.cross_entropy(model(recipe.prepare(x[rows], batches)), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        seconds += time.perf_counter() - start
        after(model)
    return seconds


@torch.inference_mode()
def look(model: nn.Sequential, x: Tensor, prepare: Prepare) -> tuple[Tensor, Tensor]:
    """Features before the last layer and probabilities, in evaluation mode."""
    model.eval()
    features = torch.cat([model[:-1](prepare(part, None)) for part in x.split(500)])
    return features, model[-1](features).softmax(1)


def accuracy(probs: Tensor, y: Tensor) -> float:
    """In percent."""
    return 100 * float((probs.argmax(1) == y).float().mean())


def small_network(widths: Sequence[int], channels: int = 3, classes: int = 10) -> nn.Sequential:
    """Four convolutions, the first three followed by halving, pooled features and a linear layer."""
    layers: list[nn.Module] = []
    for i, width in enumerate(widths):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if i < len(widths) - 1 else []
        channels = width
    model = nn.Sequential(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(channels, classes))
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def residual_network(seed: int, classes: int) -> nn.Sequential:
    """The network of the other CIFAR-10 benchmarks."""
    torch.manual_seed(seed)
    model = cifar.network()
    assert isinstance(model, nn.Sequential)
    return model


def image_network(seed: int, classes: int) -> nn.Sequential:
    """8 M multiply-adds, 128 features."""
    torch.manual_seed(seed)
    return small_network((24, 48, 96, 128), classes=classes)


def sound_network(seed: int, classes: int) -> nn.Sequential:
    """64 features of a log-mel picture."""
    torch.manual_seed(seed)
    return small_network((8, 16, 32, 64), channels=1, classes=classes)


def digits_network(seed: int, classes: int) -> nn.Sequential:
    """One hidden layer."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), nn.Linear(64, classes))


def plain(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return x


def flips(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """uint8 pixels to normalised ones, half of them mirrored while training."""
    if generator is not None:
        mirrored = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
        x = torch.where(mirrored, x.flip(3), x)
    return cifar.normalise(x).contiguous(memory_format=torch.channels_last)


def crops(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """As :func:`flips`, and moved by up to 4 pixels."""
    return cifar.normalise(x if generator is None else cifar.crop_and_flip(x, generator))


def sgd(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4, nesterov=True)


def adamw(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), rate)


RECIPES = {
    "cifar10": Recipe(image_network, 8, 0.05, flips, sgd),
    "teacher": Recipe(residual_network, 10, 0.2, crops, sgd),  # of CIFAR-10
    "fsdd": Recipe(sound_network, 20, 3e-3, plain, adamw),
    "digits": Recipe(digits_network, 30, 3e-3, plain, adamw),
}
