"""Saliency on another grid, its mass kept where it was."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def resample(s: Tensor, size: tuple[int, int]) -> Tensor:
    """Spread maps over a finer or coarser grid; the sum over every area stays what it was.

    Each cell's mass is taken as uniform inside the cell and divided among the new cells by the area
    of their overlap, so neither side has to divide the other.

    Args:
        s: (..., h, w) masses, any floating dtype.
        size: (H, W) of the result.

    Returns:
        (..., H, W) float32.
    """
    rows = _shares(s.shape[-2], size[0]).to(s.device)
    cols = _shares(s.shape[-1], size[1]).to(s.device)
    return rows @ s.float() @ cols.T


@functools.lru_cache(maxsize=64)
def _shares(old: int, new: int) -> Tensor:
    """(new, old) share of each old cell's length that lies in each new cell; columns sum to one."""
    # both grids in units of 1 / (old * new), where every border is an integer
    start_new, start_old = torch.arange(new).unsqueeze(1) * old, torch.arange(old) * new
    overlap = torch.minimum(start_new + old, start_old + new) - torch.maximum(start_new, start_old)
    return overlap.clamp(min=0).float() / new
