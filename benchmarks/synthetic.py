"""Inputs for timing: smooth random images, and saliency that looks like a network's."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from dataopt.core.mixup import grid
from torch import Tensor

SIDE = 64


def images(batch: int, generator: torch.Generator, side: int = SIDE) -> Tensor:
    """(B, 3, side, side) float32 in [0, 1]: random 8x8 colours, enlarged bicubically."""
    coarse = torch.rand(batch, 3, 8, 8, generator=generator)
    return F.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1)


def blobs(batch: int, generator: torch.Generator, side: int = SIDE) -> Tensor:
    """(B, side, side) float32, each summing to one: three round blobs times |N(0, 1)|."""
    place = torch.arange(side).float()
    centre = torch.rand(batch, 3, 2, generator=generator) * side
    width = (0.05 + 0.1 * torch.rand(batch, 3, generator=generator)) * side
    down = (place - centre[..., :1]) ** 2
    right = (place - centre[..., 1:]) ** 2
    s = torch.exp(-(down[..., :, None] + right[..., None, :]) / (2 * width[..., None, None] ** 2)).sum(1)
    s = s * torch.randn(s.shape, generator=generator).abs() + 1e-9
    return s / s.sum((1, 2), keepdim=True)


def costs(x: Tensor, s: Tensor, partner: Tensor, lam: float, cells: int) -> grid.MaskCosts:
    """The mask energies of a batch with the thesis' coefficients."""
    pooled = grid.pool(s, (cells, cells))
    distances = grid.region_distances(x, partner, (cells, cells), neigh_size=4)
    share = torch.full((len(x),), lam, dtype=torch.float64)
    options = {"labels": 3, "beta": 1.2, "gamma": 0.5, "eta": 0.2, "data_term": "released"}
    return grid.mask_costs(pooled, pooled[partner], share, distances, **options)  # type: ignore[arg-type]


def shown(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the first and where the second inputs are shown, from (B, rows, cols) labels 0..2."""
    return labels > 0, labels < 2
