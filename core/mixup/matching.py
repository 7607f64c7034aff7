"""Compiled deferred acceptance for :mod:`dataopt.core.mixup.transport`."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def deferred_acceptance(s, shown, price, order, source):
    """Stable plans of a batch.

    Args:
        s: (B, n) float64 saliency.
        shown: (B, n) bool.
        price: (n, n) float64, price of moving region i to place j.
        order: (n, n) int64, places by increasing price for each region, ties by index.
        source: (B, n) int64, receives the region at each place.
    """
    batch, n = s.shape
    # how far each region has asked among the shown and among the hidden places
    at_shown = np.empty(n, np.int64)
    at_hidden = np.empty(n, np.int64)
    waiting = np.empty(n, np.int64)
    for b in range(batch):
        holds = source[b]
        holds[:] = -1
        at_shown[:] = 0
        at_hidden[:] = 0
        # a shown region likes its own place best, a hidden one too unless it is worth a move
        count = 0
        for i in range(n):
            waiting[count] = n - 1 - i
            count += 1
        while count > 0:
            count -= 1
            i = waiting[count]
            while True:
                a, h = at_shown[i], at_hidden[i]
                while a < n and not shown[b, order[i, a]]:
                    a += 1
                while h < n and shown[b, order[i, h]]:
                    h += 1
                at_shown[i], at_hidden[i] = a, h
                j = -1
                best = np.inf
                if a < n:
                    j = order[i, a]
                    best = price[i, j] - s[b, i]
                if h < n:
                    k = order[i, h]
                    if price[i, k] < best or (price[i, k] == best and k < j):
                        j = k
                        best = price[i, k]
                if shown[b, j]:
                    at_shown[i] += 1
                else:
                    at_hidden[i] += 1
                rival = holds[j]
                if rival < 0:
                    holds[j] = i
                    break
                held = price[rival, j] - (s[b, rival] if shown[b, j] else 0.0)
                if best < held or (best == held and i < rival):
                    holds[j] = i
                    i = rival
