"""The training set that is condensed: checked once, and given out by class."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import check_channels
from ..relation.checks import as_tensor, chunks

CANDIDATES = 1000  # images of a class that clustering and herding look at
_POOLED = 16  # side to which images are averaged before they are clustered


class RealData:
    """Images in [0, 1] and their classes.

    Args:
        images: (N, C, H, W), floating in [0, 1] or uint8.
        labels: (N,) class ids 0 to K - 1, each present.
        mean, std: per channel, both or neither; None takes those of the images.
        device, dtype: of the batches given out; the images themselves stay as they are.
        complete: whether every class must have an image; a test set may lack some.

    Raises:
        TypeError, ValueError: images or labels that the message names.
    """

    def __init__(
        self,
        images: Any,
        labels: Any,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        complete: bool = True,
    ):
        self.images, self.labels = _images(images), as_tensor(labels, "labels")
        _check_labels(self.labels, len(self.images))
        self.labels = self.labels.long().cpu()
        seen = self.labels.unique()
        if complete and len(seen) <= int(seen[-1]):  # before a list as long as the largest label says
            empty = int((seen != torch.arange(len(seen))).nonzero()[0])
            raise ValueError(
                f"labels has no image of class {empty} though it goes up to {int(seen[-1])}; every class needs one "
                "image or more: number the classes that there are from 0"
            )
        self.rows = [(self.labels == c).nonzero().squeeze(1) for c in range(int(self.labels.max()) + 1)]
        self.device = self.images.device if device is None else torch.device(device)
        self.dtype = dtype
        check_channels(mean, std, self.shape[0])
        found = _moments(self.images) if mean is None or std is None else (mean, std)
        self.mean, self.std = (tuple(float(v) for v in values) for values in found)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return tuple(self.images.shape[1:])  # type: ignore[return-value]

    @property
    def size(self) -> tuple[int, int]:
        return self.shape[1], self.shape[2]

    @property
    def classes(self) -> int:
        return len(self.rows)

    def pixels(self, rows: Tensor) -> Tensor:
        """(B,) row numbers to (B, C, H, W) pixels in [0, 1]."""
        x = self.images[rows.to(self.images.device)].to(self.device)
        return x.to(self.dtype) / 255 if x.dtype == torch.uint8 else x.to(self.dtype)

    def __call__(self, rows: Tensor) -> Tensor:
        """(B,) row numbers to (B, C, H, W) normalised images."""
        return self.normalise(self.pixels(rows))

    def normalise(self, x: Tensor) -> Tensor:
        """Pixels to what networks see."""
        return normalise(x, self.mean, self.std)

    def draw(self, c: int, count: int, generator: torch.Generator) -> Tensor:
        """(min(count, size),) row numbers of class c, each once."""
        rows = self.rows[c]
        return rows[torch.randperm(len(rows), generator=generator)[:count]]

    def at_least(self, c: int, count: int, generator: torch.Generator) -> Tensor:
        """(count,) row numbers of class c, all of them before any comes again."""
        rounds = -(-count // len(self.rows[c]))
        return torch.cat([self.draw(c, count, generator) for _ in range(rounds)])[:count]

    def split(self, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Row numbers of a part and of the rest, by class; a class of one image is in both."""
        kept, held = [], []
        for rows in self.rows:
            mixed = rows[torch.randperm(len(rows), generator=generator)]
            count = max(1, min(round(share * len(rows)), len(rows) - 1))
            held.append(mixed[:count])
            kept.append(mixed[count:] if len(rows) > 1 else mixed)
        return torch.cat(kept), torch.cat(held)

    def subset(self, rows: Tensor) -> RealData:
        """The given rows, with the same mean and std."""
        images = self.images[rows.to(self.images.device)]
        return RealData(
            images, self.labels[rows], mean=self.mean, std=self.std, device=self.device, dtype=self.dtype
        )  # fmt: skip

    def clusters(self, rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """(n,) int64 cluster of each row, 0 to count - 1: k-means of pixels averaged to at most 16 x 16."""
        from sklearn.cluster import KMeans  # slow to import

        seed = int(torch.randint(2**31, (), generator=generator))
        flat = torch.cat([_pooled(self.pixels(part)) for part in rows.split(256)]).float().cpu().numpy()
        return torch.from_numpy(KMeans(count, n_init=1, random_state=seed).fit_predict(flat)).long()

    @cached_property
    def sha256(self) -> str:
        """Of the pixels and the labels, and of their shape and dtype."""
        digest = hashlib.sha256(f"{tuple(self.images.shape)} {self.images.dtype}".encode())
        for part in chunks(len(self.images)):
            digest.update(self.images[part].cpu().contiguous().view(torch.uint8).numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()


class Strata:
    """Batches that cover each class: one random image from each of k clusters (after Liu et al., DREAM, ICCV 2023).

    Args:
        data: whose classes are clustered, once, by their pixels.
        count: images of a batch, k.
    """

    def __init__(self, data: RealData, count: int, generator: torch.Generator):
        self.data = data
        self.clusters = [data.clusters(rows, min(count, len(rows)), generator) for rows in data.rows]

    def draw(self, c: int, count: int, generator: torch.Generator) -> Tensor:
        """(k,) row numbers of class c."""
        rows, cluster = self.data.rows[c], self.clusters[c]
        order = torch.randperm(len(rows), generator=generator)
        order = order[cluster[order].argsort(stable=True)]
        first = torch.ones(len(rows), dtype=torch.bool)
        first[1:] = cluster[order][1:] != cluster[order][:-1]
        return rows[order[first]]


def normalise(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(B, C, H, W) pixels minus mean, divided by std."""
    return (x - x.new_tensor(mean)[:, None, None]) / x.new_tensor(std)[:, None, None]


def _pooled(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, (min(x.shape[2], _POOLED), min(x.shape[3], _POOLED))).flatten(1)


def _images(images: Any) -> Tensor:
    x = as_tensor(images, "images")
    if x.ndim != 4 or not x.numel():
        raise ValueError(f"images has the shape {tuple(x.shape)}; give (N, C, H, W), C = 1 for grey ones")
    if x.dtype == torch.uint8:
        return x
    if not x.is_floating_point():
        raise TypeError(f"images holds {x.dtype}; give floating values in [0, 1], or uint8")
    for part in chunks(len(x)):
        low, high = (float(v) for v in x[part].aminmax())
        if not (low >= 0 and high <= 1):  # NaN fails both
            inside = ((x[part] >= 0) & (x[part] <= 1)).flatten(1).all(1)
            row = part.start + int((~inside).nonzero()[0])
            values = x[row].flatten()
            bad = float(values[~((values >= 0) & (values <= 1))][0])
            raise ValueError(f"images holds {bad:g}, first in row {row}; give finite pixels in [0, 1], not normalised")
    return x


def _check_labels(labels: Tensor, rows: int) -> None:
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels holds {labels.dtype}; give integer class ids")
    if labels.shape != (rows,):
        raise ValueError(f"labels has the shape {tuple(labels.shape)} where ({rows},) was expected; give one an image")
    if int(labels.min()) < 0:
        row = int((labels < 0).nonzero()[0])
        raise ValueError(f"labels is {int(labels[row])} in row {row}; give class ids from 0")


def _moments(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel; 1 for a channel of one value."""
    count, (total, squares) = 0, torch.zeros(2, images.shape[1], dtype=torch.float64, device=images.device)
    for part in chunks(len(images)):
        x = images[part].double() / (255 if images.dtype == torch.uint8 else 1)
        count += x.numel() // x.shape[1]
        total, squares = total + x.sum((0, 2, 3)), squares + x.square().sum((0, 2, 3))
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    return mean.tolist(), torch.where(std > 1e-4, std, 1.0).tolist()
