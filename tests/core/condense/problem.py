"""Small data for the tests: the digits of scikit-learn, and made images."""

from functools import cache

import torch
from dataopt.core.condense import ConvNet
from sklearn.datasets import load_digits
from torch import Tensor, nn


@cache
def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """1297 training and 500 test images of 8 x 8 in [0, 1], with labels."""
    found = load_digits()
    x, y = torch.tensor(found.images / 16, dtype=torch.float32).unsqueeze(1), torch.tensor(found.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    test, train = order[:500], order[500:]
    return (x[train], y[train]), (x[test], y[test])


def digit_net() -> ConvNet:
    return ConvNet(1, 10, 8, depth=2, width=32)


def made(classes: int = 3, each: int = 20, shape: tuple[int, int, int] = (3, 8, 8), seed: int = 0):
    """Noise around one pattern a class, in [0, 1]."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(classes).repeat_interleave(each)
    patterns = torch.rand(classes, *shape, generator=g)
    x = (patterns[y] + 0.3 * torch.rand(len(y), *shape, generator=g)).div(1.3)
    return x, y


def tiny_net(channels: int = 3, classes: int = 3, width: int = 4) -> ConvNet:
    return ConvNet(channels, classes, 8, depth=2, width=width)


def wide_net() -> ConvNet:
    """In float64, where different orders of summation agree to many digits."""
    return tiny_net().double()


class Plain(nn.Module):
    """A network of another kind, with batch norm and dropout."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(4, 5)  # more outputs than classes

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))
