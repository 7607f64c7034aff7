"""A decoding step over a packed context and its tail in one compiled sweep, instead of a fused operator a head."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .packed import PackedHeads

_ROWS = 16  # query rows of a key head, up to which a sweep was faster than the fused operator
_PAIRS = 5000  # of two threads of the fused operator each may take as many before they overtake the one of a sweep
_BLOCK = 256  # pairs whose scores are held at once
# Sums may be reordered into vector lanes; NaN keeps its meaning.
_FAST = {"reassoc", "contract", "nsz", "arcp"}


def serves(
    q: Tensor, contexts: Sequence[PackedHeads], k: Tensor, mask: Tensor | None, softcap: float | None, grad: bool
) -> bool:
    """Whether :func:`decode` can take these arguments of ``ragged_attention``, and is the faster way."""
    if q.device.type != "cpu" or len(q) != 1 or q.shape[2] != 1 or mask is not None or softcap is not None or grad:
        return False
    (context,), threads = contexts, torch.get_num_threads()
    if q.dtype != torch.float32 or not isinstance(context.keys, Tensor) or q.shape[1] > _ROWS * k.shape[1]:
        return False
    return (len(context.keys) + k.shape[1] * k.shape[2]) * (threads - 1) <= _PAIRS * threads


def decode(q: Tensor, context: PackedHeads, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """As ``ragged_attention``, of one query to each head that sees everything.

    Args:
        q: (1, Hq, 1, d) float32 on the CPU.
        k, v: (1, H, T, d) and (1, H, T, dv), the tail.
    """
    heads = k.shape[1]
    out = torch.empty(heads, q.shape[1] // heads, v.shape[3])
    lse = torch.empty(out.shape[:2])
    assert isinstance(context.keys, Tensor) and isinstance(context.values, Tensor)
    rows, keys, values, tail_keys, tail_values = (
        t.detach().contiguous().numpy()
        for t in (q.reshape(heads, -1, q.shape[3]), context.keys, context.values, k[0], v[0])
    )
    _step(rows, keys, values, context.starts.numpy(), tail_keys, tail_values, np.float32(scale), out.numpy(),
          lse.numpy())  # fmt: skip
    return out.view(1, -1, 1, v.shape[3]), lse.view(1, -1, 1)


@njit(cache=True, nogil=True, fastmath=_FAST)
def _step(q, keys, values, starts, tail_keys, tail_values, scale, out, lse):
    """q (H, R, d); keys and values (N, d) and (N, dv), head h's from starts[h] on; tails (H, T, d) and (H, T, dv)."""
    rows = q.shape[1]
    scores, exponents = np.empty((rows, _BLOCK), np.float32), np.empty(_BLOCK, np.int32)
    top, total = np.empty(rows, np.float32), np.empty(rows, np.float32)
    for h in range(q.shape[0]):
        top[:] = -3e38
        total[:] = 0
        out[h] = 0
        _sweep(q[h], keys[starts[h] : starts[h + 1]], values[starts[h] : starts[h + 1]], scale, top, total, out[h],
               scores, exponents)  # fmt: skip
        _sweep(q[h], tail_keys[h], tail_values[h], scale, top, total, out[h], scores, exponents)
        for r in range(rows):
            if total[r] == 0:  # it saw nothing
                lse[h, r] = -np.inf
            else:
                out[h, r] /= total[r]
                lse[h, r] = top[r] + math.log(total[r])


@njit(cache=True, nogil=True, fastmath=_FAST)
def _sweep(q, keys, values, scale, top, total, out, scores, exponents):
    """Add pairs to sums that are relative to the highest score so far."""
    rows, size, width = q.shape[0], q.shape[1], values.shape[1]
    for start in range(0, keys.shape[0], _BLOCK):
        count = min(_BLOCK, keys.shape[0] - start)
        for j in range(count):
            for r in range(rows):
                product = np.float32(0)
                for c in range(size):
                    product += q[r, c] * keys[start + j, c]
                scores[r, j] = product * scale
        for r in range(rows):
            highest, alike = scores[r, 0], np.float32(0)
            for j in range(count):
                highest = max(highest, scores[r, j])
                alike += scores[r, j]
            if highest > top[r]:
                shrink = math.exp(top[r] - highest) if total[r] > 0 else 0.0
                total[r] *= shrink
                for c in range(width):
                    out[r, c] *= shrink
                top[r] = highest
            for j in range(count):
                scores[r, j] -= top[r]
            _exponential(scores[r], exponents, count)
            weight = np.float32(0)
            for j in range(count):
                weight += scores[r, j]
            total[r] += weight if alike == alike else np.nan  # a score that is NaN would be lost in the exponential
        for j in range(count):
            for r in range(rows):
                weight = scores[r, j]
                for c in range(width):
                    out[r, c] += weight * values[start + j, c]


@njit(cache=True, nogil=True, fastmath=_FAST)
def _exponential(x, exponents, count):
    """exp of numbers up to 0, in place: a power of two by its bits, times a polynomial of the rest, to 2e-7."""
    powers = exponents.view(np.float32)
    for j in range(count):
        t = max(x[j], np.float32(-87)) * np.float32(1.4426950408889634)
        whole = math.floor(t + np.float32(0.5))
        rest = (t - whole) * np.float32(0.6931471805599453)
        p = np.float32(1 / 720)
        p = p * rest + np.float32(1 / 120)
        p = p * rest + np.float32(1 / 24)
        p = p * rest + np.float32(1 / 6)
        p = p * rest + np.float32(0.5)
        p = p * rest + np.float32(1)
        x[j] = p * rest + np.float32(1)
        exponents[j] = (np.int32(whole) + np.int32(127)) << np.int32(23)
    for j in range(count):
        x[j] *= powers[j]
