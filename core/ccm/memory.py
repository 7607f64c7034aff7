"""The memory of one layer while contexts come one by one (eq. 7.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import merge_rate
from .rotation import Rotation


def concatenated(memory: Tensor, new: Tensor) -> Tensor:
    """Mem(t) = [Mem(t-1) ; h(t)]: (B, H, m, d) and (B, H, n, d) -> (B, H, m + n, d)."""
    return torch.cat([memory, new.to(memory.dtype)], 2)


def merged(memory: Tensor, new: Tensor, step: Tensor, ema: float | None = None) -> Tensor:
    """Mem(t) = (1 - a_t) Mem(t-1) + a_t h(t), with a_1 = 1.

    Args:
        memory: (B, H, n, d), float32 or better: in half precision 1 / t would soon round to nothing. Its content does
            not matter for rows at their first step.
        new: (B, H, n, d) in any dtype.
        step: (B,) integers, t of each row, counted from 1.
        ema: a constant a_t for t >= 2; None is 1 / t.
    """
    rates = [merge_rate(int(t), ema) for t in step.tolist()]
    rate = torch.tensor(rates, dtype=torch.float64).to(memory).view(-1, 1, 1, 1)
    first = (step == 1).to(memory.device).view(-1, 1, 1, 1)
    new = new.to(memory.dtype)
    return torch.where(first, new, memory + rate * (new - memory))


def without_oldest(keys: Tensor, values: Tensor, drop: int, rotate: Rotation | None) -> tuple[Tensor, Tensor]:
    """Emit the ``drop`` oldest slots (figure 7.9) and move the others to the positions that become free."""
    keys, values = keys[:, :, drop:], values[:, :, drop:]
    if rotate is not None and drop and keys.shape[2]:
        keys = rotate(keys, torch.full((keys.shape[2],), -drop, device=keys.device))
    return keys, values
