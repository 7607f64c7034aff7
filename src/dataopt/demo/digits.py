"""scikit-learn's digits for the demo: one split, and wrong labels for every seed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

CLASSES = 10
TRAINING = 600
FLIPPED = 0.08  # share of the labels


@dataclass(frozen=True)
class Digits:
    """Bright ink on black, (n, 1, 8, 8) float32 in [0, 1], and labels (n,) int64."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def load() -> Digits:
    """600 images for training and 1,197 for testing, the same in every call."""
    digits = load_digits()
    # whole steps of 1/255, so that a picture file holds the same numbers
    images = (torch.from_numpy(digits.images).float().unsqueeze(1) * 255 / 16).round() / 255
    labels = torch.from_numpy(digits.target).long()
    parts = train_test_split(range(len(labels)), train_size=TRAINING, stratify=digits.target, random_state=0)
    train, test = (torch.tensor(part) for part in parts)
    return Digits(images[train], labels[train], images[test], labels[test])


def flip(y: Tensor, seed: int) -> Tensor:
    """The labels, 8 % of them changed to another class."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(y), generator=g)[: round(FLIPPED * len(y))]
    out = y.clone()
    out[rows] = (y[rows] + torch.randint(1, CLASSES, rows.shape, generator=g)) % CLASSES
    return out


def enlarged(x: Tensor) -> Tensor:
    """(n, 1, 32, 32), for networks that are made for photographs."""
    return F.interpolate(x, size=(32, 32), mode="bilinear")
