"""Condensed images as PIL images or arrays, and how stored ones are decoded in a ``datasets.map``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from dataopt.core.arguments import check_strings
from dataopt.core.condense import Condensed, MultiFormation
from PIL.Image import Image as Picture
from PIL.Image import fromarray
from torch import Tensor

MODES = {1: "L", 3: "RGB"}  # of PNG images, by channels; in others PNG means the last channel as transparency


def decode_condensed(
    batch: Mapping[str, Any], factor: int, axes: str = "space", mode: str = "single", image_column: str = "image"
) -> dict[str, list[Any]]:
    """Stored images to those to train on, for ``Dataset.map(..., batched=True)``.

    Args:
        batch: columns of n rows, PIL images (grey or colour) or (C, H, W) floating arrays in [0, 1] among them.
        factor, axes, mode: as the card and ``condensed.json`` say; see :class:`MultiFormation`.
        image_column: where the images are. Other columns are repeated.

    Returns:
        Columns of n' rows, images in the form that they came in.

    Raises:
        TypeError, ValueError: images of another kind or of several sizes, a factor larger than they are.

    Examples:
        >>> import numpy as np
        >>> from datasets import Dataset
        >>> from PIL import Image
        >>> from dataopt.integrations.hf import decode_condensed
        >>> stored = Dataset.from_dict({"image": [Image.fromarray(np.zeros((8, 8, 3), np.uint8))], "label": [4]})
        >>> dataset = stored.map(decode_condensed, batched=True, fn_kwargs={"factor": 2})
        >>> dataset["label"][:], dataset[0]["image"].size
        ([4, 4, 4, 4], (8, 8))
    """
    form = MultiFormation(factor, axes, mode)
    if mode == "bound":
        raise ValueError("mode='bound' depends on how many images are decoded at once; give 'single' or 'multi'")
    check_strings(image_column=image_column)
    if not isinstance(batch, Mapping) or image_column not in batch or not len(batch[image_column]):
        raise ValueError(f"batch has no rows in image_column={image_column!r}; name the column that holds the images")
    x = pixels(batch[image_column], image_column)
    pictures = isinstance(batch[image_column][0], Picture)
    counts = form.counts(len(x))
    rows = {
        name: [value for value, count in zip(values, counts, strict=True) for _ in range(count)]
        for name, values in batch.items()
        if name != image_column
    }
    decoded = form(x)
    return {**rows, image_column: as_pictures(decoded) if pictures else list(decoded.numpy())}


def as_png(condensed: Condensed) -> Condensed:
    """The data set as config ``default`` gives it back: rounded to 8 bits, to measure what that costs."""
    return dataclasses.replace(condensed, images=_eight_bits(condensed.images).float() / 255)


def rounding(condensed: Condensed) -> dict[str, float]:
    """By how much 8 bits change the pixels, which are in [0, 1]."""
    gap = (as_png(condensed).images - condensed.images).double()
    return {"rms": float(gap.square().mean().sqrt()), "max": float(gap.abs().max())}


def as_pictures(x: Tensor) -> list[Picture]:
    """(n, 1 or 3, H, W) in [0, 1] as PIL images."""
    rows = _eight_bits(x).permute(0, 2, 3, 1).cpu().numpy()
    return [fromarray(row[:, :, 0] if row.shape[2] == 1 else row) for row in rows]


def pixels(images: Any, name: str) -> Tensor:
    """PIL images or (C, H, W) floating arrays as (n, C, H, W) float32 in [0, 1]."""
    rows = []
    for image in images:
        if isinstance(image, Picture):
            if image.mode not in MODES.values():
                raise ValueError(f"{name} holds images of mode {image.mode!r}; condensed ones are grey (L) or RGB")
            row = np.asarray(image, np.float32) / 255
            row = row[None] if row.ndim == 2 else row.transpose(2, 0, 1)
        else:
            try:
                row = np.asarray(image)
            except (TypeError, ValueError):  # lists of several lengths
                row = np.zeros(0, object)
            if row.ndim != 3 or row.dtype.kind != "f":
                raise TypeError(
                    f"{name} holds {type(image).__name__} ({row.dtype}, {row.ndim} axes), neither PIL images nor "
                    "(C, H, W) floating arrays; take the format off: dataset.with_format(None)"
                )
        rows.append(row.astype(np.float32))
        if rows[-1].shape != rows[0].shape:
            raise ValueError(
                f"{name} holds images of {rows[0].shape} and {rows[-1].shape}; condensed ones have one size"
            )
    return torch.from_numpy(np.stack(rows))


def _eight_bits(x: Tensor) -> Tensor:
    return (x * 255).round().clamp(0, 255).to(torch.uint8)
