"""The memory of one layer while contexts come one by one (eq. 7.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import check_numbers, check_tensors, check_whole
from .layout import merge_rate
from .rotation import Rotation


def concatenated(memory: Tensor, new: Tensor) -> Tensor:
    """Mem(t) = [Mem(t-1) ; h(t)]: (B, H, m, d) and (B, H, n, d) -> (B, H, m + n, d), of the memory's dtype.

    Raises:
        TypeError, ValueError: no floating tensors of such shapes.
    """
    _check_states(memory=memory, new=new)
    return torch.cat([memory, new.to(memory.dtype)], 2)


def merged(memory: Tensor, new: Tensor, step: Tensor, ema: float | None = None) -> Tensor:
    """Mem(t) = (1 - a_t) Mem(t-1) + a_t h(t), with a_1 = 1.

    Args:
        memory: (B, H, n, d), float32 or better: in half precision 1 / t would soon round to nothing. Its content does
            not matter for rows at their first step.
        new: (B, H, n, d) in any dtype.
        step: (B,) integers, t of each row, counted from 1.
        ema: a constant a_t for t >= 2, in (0, 1]; None is 1 / t.

    Raises:
        TypeError: no tensors, or steps that are no integers.
        ValueError: other shapes, a step below 1, or an ``ema`` outside (0, 1].
    """
    _check_states(memory=memory, new=new)
    check_tensors(step=step)
    if memory.shape != new.shape:
        raise ValueError(f"memory {tuple(memory.shape)} and new {tuple(new.shape)} must have one shape (B, H, n, d)")
    if step.is_floating_point() or step.dtype == torch.bool:
        raise TypeError(f"step holds {step.dtype}; give integers")
    if step.shape != (len(memory),) or min(step.tolist(), default=1) < 1:
        raise ValueError(f"step={step.tolist()!r:.80} must be the step of each of {len(memory)} rows, counted from 1")
    check_numbers(ema=1 if ema is None else ema)
    if ema is not None and not 0 < ema <= 1:
        raise ValueError(f"ema={ema} must lie in (0, 1]; None is the arithmetic mean")
    rates = [merge_rate(int(t), ema) for t in step.tolist()]
    rate = torch.tensor(rates, dtype=torch.float64).to(memory).view(-1, 1, 1, 1)
    first = (step == 1).to(memory.device).view(-1, 1, 1, 1)
    new = new.to(memory.dtype)
    return torch.where(first, new, memory + rate * (new - memory))


def without_oldest(keys: Tensor, values: Tensor, drop: int, rotate: Rotation | None) -> tuple[Tensor, Tensor]:
    """Emit the ``drop`` oldest slots (figure 7.9) and move the others to the positions that become free.

    Args:
        keys, values: (B, H, m, d) and (B, H, m, dv).
        drop: 0 to m.
        rotate: moves the keys; None leaves them as they are.

    Raises:
        TypeError, ValueError: no floating tensors of such shapes, or another ``drop``.
    """
    _check_states(same_size=False, keys=keys, values=values)
    check_whole(drop=drop)
    if keys.shape[2] != values.shape[2] or not 0 <= drop <= keys.shape[2]:
        raise ValueError(
            f"drop={drop} must lie in [0, m], keys {tuple(keys.shape)} and values {tuple(values.shape)} having m slots"
        )
    if not isinstance(rotate, Rotation | None):
        raise TypeError(f"rotate is a {type(rotate).__name__}; give a Rotation, or None")
    keys, values = keys[:, :, drop:], values[:, :, drop:]
    if rotate is not None and drop and keys.shape[2]:
        keys = rotate(keys, torch.full((keys.shape[2],), -drop, device=keys.device))
    return keys, values


def _check_states(same_size: bool = True, **states: Tensor) -> None:
    """Raise unless both are floating (B, H, any, d) of one batch and one number of heads."""
    check_tensors(**states)
    (first, a), (second, b) = states.items()
    fits = a.ndim == b.ndim == 4 and a.shape[:2] == b.shape[:2] and (not same_size or a.shape[3] == b.shape[3])
    if not fits or not (a.is_floating_point() and b.is_floating_point()):
        raise ValueError(
            f"{first} {tuple(a.shape)} {a.dtype} and {second} {tuple(b.shape)} {b.dtype} must be floating "
            "(B, H, slots, d) of the same rows and heads"
        )
