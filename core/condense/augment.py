"""Differentiable siamese augmentation (Zhao and Bilen, ICML 2021): the same random change for two batches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import check_flags, check_generator, check_numbers, check_tensors

Draw = Mapping[str, Tensor]  # what Augment.draw returns; each value has one row for all images, or one for each


@dataclass(frozen=True)
class Augment:
    """Colour and cutout always; of crop, flip, scale and rotation, one for a batch where several are on.

    Every change is affine in the pixels, so gradients pass. Meant for normalised images: what leaves the image and what
    is cut out becomes 0, the mean.

    Args:
        colour: brightness +-0.5, saturation times [0, 2], contrast times [0.5, 1.5].
        crop: largest shift as a share of the sides; a pair gives rows and columns their own ((0, 0.125) shifts
            spectrograms in time). 0 is off.
        cutout: sides of the square cut out, as a share of the image's; 0 is off.
        flip: mirror left and right, one in two.
        scale: largest ratio, each side's is drawn from [1 / scale, scale]; 1 is off.
        rotate: largest angle in degrees; 0 is off.

    Raises:
        ValueError: an argument outside its range.

    Examples:
        >>> import torch
        >>> from dataopt.core.condense import Augment
        >>> augment = Augment()
        >>> draw = augment.draw(1, (32, 32), torch.Generator().manual_seed(0))
        >>> x = torch.rand(4, 3, 32, 32)
        >>> torch.equal(augment(x, draw)[:2], augment(x[:2], draw))
        True
    """

    colour: bool = True
    crop: float | tuple[float, float] = 0.125
    cutout: float = 0.5
    flip: bool = False
    scale: float = 1.0
    rotate: float = 0.0

    def __post_init__(self) -> None:
        check_flags(colour=self.colour, flip=self.flip)
        check_numbers(cutout=self.cutout, scale=self.scale, rotate=self.rotate)
        if isinstance(self.crop, tuple) and len(self.crop) != 2:
            raise ValueError(f"crop={self.crop!r:.80} must be a share, or one of height and one of width")
        for share in self._crop():
            check_numbers(crop=share)
        for name, value in (("crop", max(self._crop())), ("crop", min(self._crop())), ("cutout", self.cutout)):
            if not 0 <= value < 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1); it is a share of the image")
        if not 1 <= self.scale < float("inf"):
            raise ValueError(f"scale={self.scale} must be at least 1, which is off")
        if not 0 <= self.rotate <= 180:
            raise ValueError(f"rotate={self.rotate} must be degrees from 0, which is off, to 180")
        for name in ("colour", "flip"):  # as JSON can hold them
            object.__setattr__(self, name, bool(getattr(self, name)))
        for name in ("cutout", "scale", "rotate"):
            object.__setattr__(self, name, float(getattr(self, name)))
        crop = tuple(map(float, self.crop)) if isinstance(self.crop, tuple) else float(self.crop)
        object.__setattr__(self, "crop", crop)

    def _crop(self) -> tuple[float, float]:
        return self.crop if isinstance(self.crop, tuple) else (self.crop, self.crop)

    def draw(self, rows: int, size: tuple[int, int], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Random parameters: ``rows=1`` for one change of all images (siamese), else one row for each image.

        Args:
            rows: images, or 1.
            size: (H, W) of the images.
            generator: on the CPU; None is torch's own.

        Returns:
            Any of ``colour`` (rows, 3) float32 in [0, 1), ``cutout`` and ``crop`` (rows, 2) int64 pixels, ``flip``
            (rows,) bool, ``scale`` (rows, 2) and ``rotate`` (rows,) float32, radians.
        """
        out: dict[str, Tensor] = {}

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator)

        if self.colour:
            out["colour"] = uniform(rows, 3)
        if self.cutout:
            out["cutout"] = (uniform(rows, 2) * torch.tensor(size)).long()
        rest = [name for name in ("crop", "flip", "scale", "rotate") if self._is_on(name)]
        if not rest:
            return out
        which = rest[0] if len(rest) == 1 else rest[int(torch.randint(len(rest), (), generator=generator))]
        if which == "crop":
            reach = torch.tensor([int(n * share + 0.5) for n, share in zip(size, self._crop(), strict=True)])
            out["crop"] = (uniform(rows, 2) * (2 * reach + 1)).long() - reach
        elif which == "flip":
            out["flip"] = uniform(rows) < 0.5
        elif which == "scale":
            out["scale"] = 1 / self.scale + uniform(rows, 2) * (self.scale - 1 / self.scale)
        else:
            out["rotate"] = (uniform(rows) * 2 - 1) * math.radians(self.rotate)
        return out

    def _is_on(self, name: str) -> bool:
        return {"crop": max(self._crop()) > 0, "flip": self.flip, "scale": self.scale > 1, "rotate": self.rotate > 0}[
            name
        ]

    def __call__(
        self, x: Tensor, draw: Draw | None = None, *, generator: torch.Generator | None = None, siamese: bool = False
    ) -> Tensor:
        """Augment (B, C, H, W) floating images.

        Args:
            x: normalised images.
            draw: parameters from :meth:`draw`, with 1 or B rows; None draws.
            generator, siamese: for ``draw=None``; siamese changes all images alike.
        """
        check_tensors(x=x)
        check_generator(generator)
        if x.ndim != 4 or not x.numel() or not x.is_floating_point():
            raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}; give floating (B, C, H, W)")
        if draw is None:
            draw = self.draw(1 if siamese else len(x), (x.shape[2], x.shape[3]), generator)
        for name, value in draw.items():
            if len(value) not in (1, len(x)):
                raise ValueError(f"draw[{name!r}] has {len(value)} rows; give 1, or {len(x)} as x has")
        crop = draw.get("crop")
        draw = {name: value.to(x.device) for name, value in draw.items() if name != "crop"}
        if "colour" in draw:
            x = _colour(x, draw["colour"].to(x.dtype))
        if "scale" in draw or "rotate" in draw:
            x = _affine(x, draw.get("scale"), draw.get("rotate"))
        if "flip" in draw:
            x = torch.where(draw["flip"].view(-1, 1, 1, 1), x.flip(3), x)
        if crop is not None:
            x = _shift(x, crop)
        if "cutout" in draw:
            x = x * _kept(draw["cutout"], (x.shape[2], x.shape[3]), self.cutout).to(x.dtype)
        return x


def without_cutout(augment: Augment | None) -> Augment | None:
    """What networks train with: CutMix takes the place of cutout."""
    return None if augment is None else replace(augment, cutout=0)


def _colour(x: Tensor, u: Tensor) -> Tensor:
    bright, saturation, contrast = (v.view(-1, 1, 1, 1) for v in (u[:, 0] - 0.5, u[:, 1] * 2, u[:, 2] + 0.5))
    x = x + bright
    if x.shape[1] > 1:
        x = torch.lerp(x.mean(1, keepdim=True).expand_as(x), x, saturation.expand_as(x))
    return torch.lerp(x.mean((1, 2, 3), keepdim=True).expand_as(x), x, contrast.expand_as(x))


def _shift(x: Tensor, by: Tensor) -> Tensor:
    """Move by rows and columns of pixels; 0 comes in."""
    height, width = x.shape[2:]
    if len(by) == 1:
        down, right = by[0].tolist()  # on the CPU, where it was drawn: a GPU need not be waited for
        return F.pad(x, (right, -right, down, -down))
    by = by.to(x.device)
    rows = torch.arange(height, device=x.device) - by[:, :1]
    cols = torch.arange(width, device=x.device) - by[:, 1:]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((cols >= 0) & (cols < width))[:, None]
    batch = torch.arange(len(x), device=x.device)[:, None, None]
    moved = x[batch, :, rows.clamp(0, height - 1)[:, :, None], cols.clamp(0, width - 1)[:, None]]
    return moved.permute(0, 3, 1, 2) * inside[:, None]


def _kept(centre: Tensor, size: tuple[int, int], share: float) -> Tensor:
    """(rows, 1, H, W) bool, False in the square around the centre."""
    inside = []
    for axis, n in enumerate(size):
        side = int(n * share + 0.5)
        start = centre[:, axis : axis + 1] - side // 2
        at = torch.arange(n, device=centre.device)
        inside.append((at >= start) & (at < start + side))
    return ~(inside[0][:, :, None] & inside[1][:, None])[:, None]


def _affine(x: Tensor, scale: Tensor | None, angle: Tensor | None) -> Tensor:
    rows = len(scale if scale is not None else angle if angle is not None else x)
    scale = torch.ones(rows, 2, device=x.device) if scale is None else scale
    angle = torch.zeros(rows, device=x.device) if angle is None else angle
    cos, sin = angle.cos(), angle.sin()
    long = x.shape[3] / x.shape[2]  # the grid's units are half a side each
    zero = torch.zeros_like(cos)
    across = torch.stack([scale[:, 0] * cos, -sin / long, zero], 1)
    theta = torch.stack([across, torch.stack([sin * long, scale[:, 1] * cos, zero], 1)], 1)
    grid = F.affine_grid(theta.to(x.dtype).expand(len(x), 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="zeros", align_corners=False)
