"""A data set prepared for comparing all its pairs: unit rows, in an order in which most pairs can be skipped."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .checks import chunks
from .kernel import Kernel

_TINY = 1e-12  # smaller probabilities become denormal numbers under the power, and those are slow
_SLACK = 1 - 1e-5  # rounding of the bound
_SHRINK = 0.1  # of the whitening, for many rows
_FEW, _MANY = 128, 512  # members of a tile: fewer make slow products, more reach too many rows
_ROWS = 1024  # of a tile with _MANY members; its float32 values stay in the cache of a core


@dataclass(frozen=True)
class Pairs:
    """Rows of a data set, ordered by part, predicted class and falling confidence.

    Attributes:
        features: (n, d) float32, bfloat16 or float64, each row of length one, or zero where it was zero.
        probs: (n, C), same dtype.
        order: (n,) int64: row r here is row ``order[r]`` of the data set.
        bounds: parts [start, stop) in this order; rows of different parts have no edge.
    """

    features: Tensor
    probs: Tensor
    order: Tensor
    bounds: tuple[tuple[int, int], ...]

    @property
    def place(self) -> Tensor:
        """(n,) int64: row i of the data set is row ``place[i]`` here."""
        out = torch.empty_like(self.order)
        out[self.order] = torch.arange(len(self.order), device=self.order.device)
        return out

    def reachable(self, columns: slice | Tensor, first: int, last: int, kernel: Kernel) -> Tensor | slice:
        """Rows in [first, last) that can have an edge to any of the columns; a slice where they lie together.

        Exact: p_i.p_j is at most p_i.u with u the columns' elementwise maximum, and the similarity is at most one, so
        every other edge falls below the cut.
        """
        if not kernel.compatibility:
            return slice(first, last)
        most = self.probs[columns].amax(0).float()
        found = [(self.probs[first + c.start : first + c.stop].float() @ most) for c in chunks(last - first, 65536)]
        rows = (torch.cat(found) > kernel.cut * _SLACK).nonzero().squeeze(1) + first
        if len(rows) and int(rows[-1]) - int(rows[0]) + 1 == len(rows):
            return slice(int(rows[0]), int(rows[-1]) + 1)
        return rows

    @functools.cached_property
    def _class_ends(self) -> Tensor:
        """Ends of the runs of rows of one part and predicted class."""
        guess = torch.cat([self.probs[c].float().argmax(1) for c in chunks(len(self.probs), 65536)])
        ends = torch.cat([guess.diff().nonzero().squeeze(1).cpu() + 1, torch.tensor([stop for _, stop in self.bounds])])
        return ends.unique()

    def tiles(self, members: Tensor, kernel: Kernel) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """All edges of some rows, a tile at a time.

        Args:
            members: (m,) rows in this order, sorted.
            kernel: of the edges.

        Yields:
            Which members, (R,) rows, and (R, members of the tile) k with 0 at k(i, i). Rows without any edge are left
            out; members of few predicted classes come together, since these reach the fewest rows.
        """
        starts = torch.tensor([start for start, _ in self.bounds])
        stops = torch.tensor([stop for _, stop in self.bounds])
        on_cpu = members.cpu()
        borders = torch.searchsorted(on_cpu, self._class_ends).tolist()
        part_borders = set(torch.searchsorted(on_cpu, stops).tolist())
        done = 0
        for border in borders:
            if border == done or (border - done < _FEW and border not in part_borders):
                continue
            part = int(torch.searchsorted(stops, on_cpu[done], right=True))
            for at in range(done, border, _MANY):
                which = slice(at, min(at + _MANY, border))
                columns = members[which]
                reached = self.reachable(columns, int(starts[part]), int(stops[part]), kernel)
                for rows in row_chunks(reached, _ROWS * _MANY // len(columns)):
                    k = self.values(rows, columns, kernel)
                    index = _numbers(rows, k.device)
                    place = torch.searchsorted(index, columns).clamp(max=len(index) - 1)
                    own = (index[place] == columns).nonzero().squeeze(1)
                    k[place[own], own] = 0
                    yield which, index, k
            done = border

    def values(self, rows: slice | Tensor, columns: slice | Tensor, kernel: Kernel) -> Tensor:
        """(R, B) k of rows and columns of one part; the diagonal is not removed."""
        return kernel_values(self.features[rows], self.probs[rows], self.features[columns], self.probs[columns], kernel)


def row_chunks(rows: Tensor | slice, size: int) -> list[Tensor | slice]:
    if isinstance(rows, slice):
        return [slice(i, min(i + size, rows.stop)) for i in range(rows.start, rows.stop, size)]
    return list(rows.split(size)) if len(rows) else []


def _numbers(rows: Tensor | slice, device: torch.device) -> Tensor:
    return torch.arange(rows.start, rows.stop, device=device) if isinstance(rows, slice) else rows


def kernel_values(
    features: Tensor, probs: Tensor, other_features: Tensor, other_probs: Tensor, kernel: Kernel
) -> Tensor:
    """(R, B) float32 or float64 k of prepared rows."""
    dtype = working(features.dtype)
    dots = (features @ other_features.T).to(dtype)
    return kernel.values_(dots, (probs @ other_probs.T).to(dtype) if kernel.compatibility else None)


@dataclass(frozen=True)
class Whitening:
    """x = (f - mean) V / sqrt(eig + s mean(eig)): no direction of the feature space counts more than another.

    s is 0.1 + d / n: with few rows the small eigenvalues are mostly chance, and dividing by them would amplify noise.

    Attributes:
        mean: (d,) float64.
        matrix: (d, d) float64, V scaled.
    """

    mean: Tensor
    matrix: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Whitening:
        """From all rows, no labels; in one pass that holds a few thousand rows at a time."""
        n, d = features.shape
        total = torch.zeros(d, dtype=torch.float64)
        for part in chunks(n):
            total += features[part].double().sum(0).cpu()
        mean = total / n
        covariance = torch.zeros(d, d, dtype=torch.float64)
        for part in chunks(n):
            x = features[part].cpu().float() - mean.float()
            covariance += (x.T @ x).double()
        values, vectors = torch.linalg.eigh(covariance / n)
        values = values.clamp(min=0)
        scale = values + (_SHRINK + d / n) * values.mean()
        return cls(mean, vectors / scale.clamp(min=torch.finfo(torch.float32).tiny).sqrt())

    def __call__(self, features: Tensor) -> Tensor:
        """(m, d), in the precision of ``features``."""
        return (features - self.mean.to(features)) @ self.matrix.to(features)


def unit(features: Tensor, whitening: Whitening | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """(m, d), whitened if wanted, each row scaled to length one; a zero row stays zero."""
    x = features.to(working(dtype))
    x = whitening(x) if whitening else x
    x = x / x.abs().amax(1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)  # squares of large rows overflow
    return torch.nn.functional.normalize(x, dim=1, eps=1e-30).to(dtype)


def settled(probs: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(m, C) without the tails that count for nothing."""
    p = probs.to(working(dtype))
    return torch.where(p < _TINY, 0.0, p).to(dtype)


def working(dtype: torch.dtype) -> torch.dtype:
    """What products are continued in: float64 where the data is, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def prepare(
    features: Tensor,
    probs: Tensor,
    whitening: Whitening | None = None,
    part: Tensor | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    on_disk: bool = False,
) -> Pairs:
    """One reordered copy of the data.

    Args:
        features: (n, d); probs: (n, C).
        whitening: applied before the rows are scaled.
        part: (n,) number of each row's part; None is one part.
        device: where the copy lives; None is where ``features`` are.
        dtype: float32, bfloat16 or float64.
        on_disk: keep the copy in a temporary file, mapped into memory.
    """
    n, d = features.shape
    device = features.device if device is None else device
    part = torch.zeros(n, dtype=torch.int64) if part is None else part
    top, guess = torch.empty(n), torch.empty(n, dtype=torch.int64)
    for rows in chunks(n):
        best = probs[rows].float().max(1)
        top[rows], guess[rows] = best.values.cpu(), best.indices.cpu()
    order = torch.from_numpy(np.lexsort((-top.numpy(), guess.numpy(), part.numpy())))
    counts = torch.bincount(part).cumsum(0).tolist()
    bounds = tuple(zip([0, *counts[:-1]], counts, strict=True))

    on_disk = on_disk and device.type == "cpu"
    f, p = (_room((n, width), dtype, device, on_disk) for width in (d, probs.shape[1]))
    for rows in chunks(n):
        source = order[rows]
        f[rows] = unit(features[source.to(features.device)], whitening, dtype).to(device)
        p[rows] = settled(probs[source.to(probs.device)], dtype).to(device)
    return Pairs(f, p, order.to(device), bounds)


def _room(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, on_disk: bool) -> Tensor:
    if not on_disk:
        return torch.empty(shape, dtype=dtype, device=device)
    with tempfile.TemporaryFile() as file:  # the mapping outlives the name
        mapped = np.memmap(file, np.uint8, "w+", shape=(shape[0] * shape[1] * dtype.itemsize,))
    return torch.from_numpy(mapped).view(dtype).view(shape)
