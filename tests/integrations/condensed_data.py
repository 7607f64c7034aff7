"""A condensed data set that any classifier learns in a few steps, and real images of the same classes."""

import dataclasses

import numpy as np
import torch
from dataopt.core.condense import Condensed, MultiFormation, Score, Scores
from datasets import Dataset

NAMES = ("cross", "arrow", "blob", "ring")  # not in the order of the alphabet
MEAN, STD = 0.4, 0.25


def pixels(rows: int, channels: int = 3, size: tuple[int, int] = (16, 16), seed: int = 0) -> torch.Tensor:
    """(rows, C, H, W) in [0, 1]: noise, with a bright band in a place of its own for each of four classes, in turn."""
    x = torch.rand(rows, channels, *size, generator=torch.Generator().manual_seed(seed)) / 2
    for row in range(rows):
        c, band = row % len(NAMES), size[0] // 4
        x[row, :, c * band : (c + 1) * band] += 0.5
    return x


def condensed(factor: int = 2, channels: int = 3, size: tuple[int, int] = (16, 16), axes: str = "space") -> Condensed:
    """Two stored images a class."""
    made = {"objective": "gradients", "steps": 30, "source": {"images": 400, "sha256": "5ca1ab1e" * 8}}
    form = MultiFormation(factor, axes)
    images = pixels(4 * 2 * form.tiles(), channels, size)
    stored = torch.cat([form.assemble(images[c::4]) for c in range(4)]).clamp(0, 1)
    labels = torch.arange(4).repeat_interleave(2)
    statistics = (MEAN,) * channels, (STD,) * channels
    return Condensed(stored, labels, factor, axes, "single", *statistics, made, NAMES)


def table(*rows: tuple[str, float]) -> Scores:
    return Scores(tuple(Score(name, "ConvNet", 8, 32, 300, (a, a + 0.02)) for name, a in rows), 500)


SCORES = table(("condensed", 0.8), ("random", 0.5))


def same(a: Condensed, b: Condensed) -> bool:
    names = [f.name for f in dataclasses.fields(Condensed) if f.name not in ("images", "labels")]
    return (
        torch.equal(a.images, b.images)
        and torch.equal(a.labels, b.labels)
        and all(getattr(a, name) == getattr(b, name) for name in names)
    )


def arrays(dataset: Dataset) -> torch.Tensor:
    """(n, C, H, W) uint8 of PIL images."""
    rows = [np.atleast_3d(np.asarray(image)) for image in dataset["image"]]
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2)
