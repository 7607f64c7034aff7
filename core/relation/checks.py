"""Inputs looked at once, where they enter. Everything becomes a tensor; a memory-mapped array stays on disk."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROWS = 1024  # rows looked at together, so that a mapped file is never in memory whole


def chunks(n: int, size: int = ROWS) -> Iterator[slice]:
    """Consecutive slices that cover ``range(n)``."""
    return (slice(i, min(i + size, n)) for i in range(0, n, size))


def as_tensor(x: Any, name: str) -> Tensor:
    """A tensor that shares memory with ``x`` where it can.

    Raises:
        TypeError: ``x`` is no tensor and no array of numbers.
    """
    if isinstance(x, Tensor):
        if x.is_complex():
            raise TypeError(f"{name} holds {x.dtype}; give a tensor or an array of real numbers")
        return x.detach()
    array = np.asanyarray(x)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name} holds {array.dtype}; give a tensor or an array of numbers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a read-only mapping is never written to here
        return torch.from_numpy(array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("=")))


def as_features(x: Any, name: str = "features", rows: int | None = None) -> Tensor:
    """(n, d) floating point, finite.

    Raises:
        ValueError: another shape, no rows or columns, another number of rows, or values that are not finite.
    """
    out = as_tensor(x, name)
    if out.ndim != 2 or not out.numel():
        raise ValueError(f"{name} has the shape {tuple(out.shape)}; give (n, d), one row for each sample")
    if rows is not None and len(out) != rows:
        raise ValueError(f"{name} has {len(out)} rows where {rows} were expected; give one row for each sample")
    if not out.is_floating_point():
        out = out.float()
    for part in chunks(len(out)):
        if not all(end.isfinite() for end in out[part].aminmax()):  # a tenth of the time of isfinite on all values
            row = part.start + int((~out[part].isfinite().all(1)).nonzero()[0])
            raise ValueError(f"{name} holds non-finite values, first in row {row}; remove or recompute such rows")
    return out


def as_probs(x: Any, name: str = "probs", rows: int | None = None) -> Tensor:
    """(n, C) predicted probabilities, C at least two.

    Raises:
        ValueError: as :func:`as_features`; one class; negative values, or rows that do not sum to one.
    """
    out = as_features(x, name, rows)
    if out.shape[1] < 2:
        raise ValueError(f"{name} has one class; comparing labels needs two or more")
    for part in chunks(len(out)):
        block = out[part].float()
        off = (block.sum(1) - 1).abs()
        bad = (block.min(1).values < 0) | (off > 0.01)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"{name} is no distribution in row {part.start + row} (smallest value {block[row].min():.4g}, sum "
                f"{block[row].sum():.4g}); give softmax outputs, not logits"
            )
    return out


def as_labels(y: Any, rows: int, classes: int, name: str = "labels") -> Tensor:
    """(n,) int64 class ids in [0, C), of at least two classes.

    Raises:
        TypeError: labels that are no integers.
        ValueError: another shape or number, labels outside the classes, one class only, or fewer rows than classes.
    """
    out = as_tensor(y, name)
    if out.is_floating_point() or out.dtype == torch.bool:
        raise TypeError(f"{name} holds {out.dtype}; give integer class ids")
    if out.ndim != 1 or len(out) != rows:
        raise ValueError(f"{name} has the shape {tuple(out.shape)} where ({rows},) was expected; give one class a row")
    if rows < classes:
        raise ValueError(f"{name} has {rows} rows for {classes} classes; give at least one row a class, better many")
    out = out.long()
    bad = (out < 0) | (out >= classes)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(f"{name} is {int(out[row])} in row {row}; give class ids of probs, 0 to {classes - 1}")
    if bool((out == out[0]).all()):
        raise ValueError(f"{name} is {int(out[0])} in every row; conflicts need rows of at least two classes")
    return out


def warn_of_zero_rows(features: Tensor) -> None:
    """A row of zeros has no direction, which deserves a word."""
    zero = torch.cat([features[part].abs().amax(1) == 0 for part in chunks(len(features))])
    if zero.any():
        warnings.warn(
            f"{int(zero.sum())} of {len(features)} rows of features are zero, first row {int(zero.nonzero()[0])}; look "
            "at what the model makes of them",
            stacklevel=3,
        )
