"""Images of a data set as one tensor, as a command line asks for it."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

_GREY, _COLOUR = ("1", "L", "LA"), ("RGB", "RGBA", "P", "PA", "CMYK", "YCbCr", "HSV", "LAB")


def find_images(data: datasets.Dataset, column: str | None) -> str:
    """The column of images: the one that is named, or the only one.

    Raises:
        ValueError: none or several, or a column of something else than images, their paths or their bytes.
    """
    found = [name for name, f in data.features.items() if isinstance(f, datasets.Image)]
    if column is None:
        if len(found) != 1:
            raise ValueError(
                f"the column of images is not clear among {', '.join(data.column_names)}; give --input-column"
            )
        return found[0]
    if column not in data.column_names:
        raise ValueError(
            f"--input-column {column} is not among the columns {', '.join(data.column_names)}; name one of them"
        )
    if column not in found and not _may_hold_images(data.features[column]):
        raise ValueError(
            f"--input-column {column} holds {data.features[column]}, where images, paths to images or their bytes are "
            "read (of sounds make spectrograms)"
        )
    return column


def _may_hold_images(feature: Any) -> bool:
    """Whether texts or bytes, which CSV, JSON and plain parquet files hold, can be cast to images."""
    if isinstance(feature, dict):
        return set(feature) == {"bytes", "path"}
    kinds = ("string", "large_string", "binary", "large_binary")
    return isinstance(feature, datasets.Value) and feature.dtype in kinds


def read_images(data: datasets.Dataset, column: str, size: int | None, grey: bool | None = None) -> Tensor:
    """All images of a column.

    Args:
        size: side of the square that the middle of each image is resized to; None keeps images, which must then
            have one size.
        grey: one channel or three; None is grey where all images are.

    Returns:
        (n, C, H, W) uint8.

    Raises:
        ValueError: images of different sizes, or one that cannot be read, named by its row.
    """
    rows = data.with_format(None).select_columns([column]).cast_column(column, datasets.Image(decode=True))
    out: list[np.ndarray] = []
    for row in tqdm(range(len(rows)), desc="images", unit="image", disable=None):
        out.append(_pixels(_open(rows, column, row), row, column, size))
        if out[row].shape[:2] != out[0].shape[:2]:
            (h, w), (high, wide) = out[0].shape[:2], out[row].shape[:2]
            raise ValueError(f"images have different sizes ({w} x {h}, in row {row} {wide} x {high}); give --size")
    coloured = any(pixels.ndim == 3 for pixels in out)
    if grey is None:
        grey = not coloured
    elif grey and coloured:
        out = [np.asarray(Image.fromarray(p).convert("L")) for p in out]
    if not grey:
        out = [p if p.ndim == 3 else np.repeat(p[..., None], 3, -1) for p in out]
    x = torch.from_numpy(np.stack(out))
    return x[:, None] if grey else x.permute(0, 3, 1, 2).contiguous()


def _open(rows: datasets.Dataset, column: str, row: int) -> Image.Image:
    try:
        image = rows[row][column]
    except (OSError, SyntaxError, ValueError) as e:  # of Pillow, for broken files
        raise ValueError(f"the image in row {row} cannot be read ({e}); leave it out") from e
    if image is None:
        raise ValueError(f"column {column} holds no image in row {row}; leave the row out")
    return image


def _pixels(image: Image.Image, row: int, column: str, size: int | None) -> np.ndarray:
    """(H, W) or (H, W, 3) uint8."""
    if image.mode not in _GREY + _COLOUR:
        raise ValueError(
            f"column {column} holds an image of mode {image.mode} in row {row}; convert such images to 8 bits first"
        )
    image = image.convert("L" if image.mode in _GREY else "RGB")
    if size is not None:
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)
