"""The compiled part of the symmetric pass: one sweep over a tile gives its row sums and its column sums."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba


@functools.cache
def tile_sums(temperature: float, compatible: bool) -> Callable[..., Any]:
    """A compiled ``sums(cos, pp, own, row_labels, col_labels, cut, row_all, row_same, col_all, col_same)``.

    Adds ``k = (cos * pp)^t`` of each pair to the sums of its row and of its column, and again to the ``same`` sums
    where their labels are equal. The power is a constant of the compiled code.

    cos, pp: (R, B) float32 or float64; cos is overwritten in part, pp is not read where ``compatible`` is False.
    own: where it is >= 0, row r is the block's column own + r, and only columns right of it count; else -1.
    cut and the sums, (R,) and (B,), are of the same type; sums start at what they hold.
    """
    # numba multiplies for whole exponents, which pays for small ones, and takes none beyond 64 bits
    t = int(temperature) if float(temperature).is_integer() and temperature <= 64 else float(temperature)

    # fastmath lets the sums run in vector lanes; inputs are finite. Loops start at 0, or they would not vectorise.
    @numba.njit(fastmath=True, nogil=True, cache=True)
    def sums(cos, pp, own, row_labels, col_labels, cut, row_all, row_same, col_all, col_same):
        zero = cos.dtype.type(0)
        for i in range(cos.shape[0]):
            row, factor, label = cos[i], pp[i], row_labels[i]
            if own >= 0:
                for j in range(min(own + i + 1, cos.shape[1])):
                    row[j] = zero
            total = zero
            same = zero
            for j in range(row.shape[0]):
                x = row[j] * factor[j] if compatible else row[j]
                x = x if x > cut else zero
                x = x**t
                m = x if col_labels[j] == label else zero
                total += x
                same += m
                col_all[j] += x
                col_same[j] += m
            row_all[i] += total
            row_same[i] += same

    return sums
