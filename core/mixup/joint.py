"""Compiled solver of Co-Mixup: sweeps over the outputs of a partition, each output solved exactly (thesis algorithm 3).

The sub-problem of one output: every cell of a small grid takes a label, an input or the half-and-half of two inputs, at
a unary cost and a cost w V(l, q) for each two neighbours, V = 0 for equal labels, 1/4 between a half and one of its
inputs, else 1. Labels that no optimum has are eliminated (Goldstein, "Efficient rotamer elimination applied to protein
side-chains", 1994), and the survivors are searched by dynamic programming along a broken line of cells.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_HALF_BONUS = 5e-4  # the released code's preference for halves, per cell


@njit(cache=True, nogil=True)
def difference(a, b, c, d):
    """V between the labels {a, b} and {c, d}; an input is {a, a}."""
    if a == c and b == d:
        return 0.0
    if a == b and c != d:
        return 0.25 if a in (c, d) else 1.0
    if c == d and a != b:
        return 0.25 if c in (a, b) else 1.0
    return 1.0


@njit(cache=True, nogil=True)
def _best_rival(i, slot, unary, weight, dist, alive, count, near, degree):
    """Largest Goldstein sum of a label over its rivals: above zero, no optimum has it."""
    label = alive[i, slot]
    best = -np.inf
    for other in range(count[i]):
        if other == slot:
            continue
        rival = alive[i, other]
        total = unary[i, label] - unary[i, rival]
        for d in range(degree[i]):
            j = near[i, d]
            least = np.inf
            for k in range(count[j]):
                q = alive[j, k]
                least = min(least, dist[label, q] - dist[rival, q])
            total += weight * least
            if total + weight * (degree[i] - d - 1) <= best:
                break
        else:
            best = max(best, total)
    return best


@njit(cache=True, nogil=True)
def _eliminate(unary, weight, dist, alive, count, near, degree):
    """Drop labels until none can go without losing every optimum."""
    changed = True
    while changed:
        changed = False
        for i in range(unary.shape[0]):
            slot = 0
            while slot < count[i]:
                if count[i] > 1 and _best_rival(i, slot, unary, weight, dist, alive, count, near, degree) > 0.0:
                    count[i] -= 1
                    for k in range(slot, count[i]):
                        alive[i, k] = alive[i, k + 1]
                    changed = True
                else:
                    slot += 1


@njit(cache=True, nogil=True)
def _table_sizes(count, order, line):
    """Largest table and the sum of all, of the search along ``order``."""
    most, total = 1.0, 0.0
    for at in range(len(order)):
        size = 1.0
        for back in range(max(0, at - line + 1), at + 1):
            size *= count[order[back]]
        most = max(most, size)
        total += size
    return most, total


@njit(cache=True, nogil=True)
def _search(unary, weight, dist, alive, count, order, line, out):
    """Exact minimum over the surviving labels; writes a label for each cell."""
    n = len(order)
    starts = np.empty(n, np.int64)
    total = 0
    for at in range(n):
        size = 1
        for back in range(max(0, at - line + 1), at + 1):
            size *= count[order[back]]
        starts[at] = total
        total += size
    came = np.empty(total, np.uint16)
    old = np.zeros(1)  # table over the labels of the last cells, the oldest one lowest
    for at in range(n):
        cell = order[at]
        first = at % line == 0
        drops = at >= line
        radix = count[order[at - line]] if drops else 1
        rest = len(old) // radix
        last = 1 if at == 0 else count[order[at - 1]]
        below = rest // last if line > 1 and at > 0 else 1  # states of the cells before the last one
        new = np.empty(rest * count[cell])
        for k in range(count[cell]):
            label = alive[cell, k]
            for r in range(rest):
                cost = unary[cell, label]
                if not first:
                    cost += weight * dist[alive[order[at - 1], r // below], label]
                best = np.inf
                choice = 0
                for o in range(radix):
                    value = old[r * radix + o]
                    if drops:
                        value += weight * dist[alive[order[at - line], o], label]
                    if value < best:
                        best = value
                        choice = o
                new[k * rest + r] = best + cost
                came[starts[at] + k * rest + r] = choice
        old = new
    state = np.argmin(old)
    for at in range(n - 1, -1, -1):
        rest = 1
        for back in range(max(0, at - line + 1), at):
            rest *= count[order[back]]
        slot = state // rest
        out[order[at]] = alive[order[at], slot]
        radix = count[order[at - line]] if at >= line else 1
        state = (state % rest) * radix + came[starts[at] + state]
    return old.min()


@njit(cache=True, nogil=True)
def solve_cells(unary, weight, dist, rows, cols, near, degree, cap, out):
    """Labels of least energy; returns how far above the minimum they may be at most (0 unless ``cap`` was needed).

    unary: (cells, labels); dist: (labels, labels) V; near, degree: neighbours of each cell; cap: states of a table.
    """
    n, labels = unary.shape
    alive = np.empty((n, labels), np.int64)
    count = np.zeros(n, np.int64)
    for i in range(n):
        limit = unary[i].min() + degree[i] * weight
        for k in range(labels):
            if unary[i, k] <= limit:
                alive[i, count[i]] = k
                count[i] += 1
    _eliminate(unary, weight, dist, alive, count, near, degree)

    by_rows = np.arange(n)
    by_cols = np.empty(n, np.int64)
    for c in range(cols):
        for r in range(rows):
            by_cols[c * rows + r] = r * cols + c
    gap = 0.0
    while True:
        most_r, total_r = _table_sizes(count, by_rows, cols)
        most_c, total_c = _table_sizes(count, by_cols, rows)
        if min(most_r, most_c) <= cap:
            break
        # the label that is nearest to being no optimum's goes, and its distance is kept
        best, cell, slot = -np.inf, -1, -1
        for i in range(n):
            if count[i] > 1:
                for k in range(count[i]):
                    value = _best_rival(i, k, unary, weight, dist, alive, count, near, degree)
                    if value > best:
                        best, cell, slot = value, i, k
        gap += max(0.0, -best)
        count[cell] -= 1
        for k in range(slot, count[cell]):
            alive[cell, k] = alive[cell, k + 1]
        _eliminate(unary, weight, dist, alive, count, near, degree)
    if most_r <= cap and (total_r <= total_c or most_c > cap):
        _search(unary, weight, dist, alive, count, by_rows, cols, out)
    else:
        _search(unary, weight, dist, alive, count, by_cols, rows, out)
    return gap


@njit(cache=True, nogil=True)
def neighbours(rows, cols):
    """(cells, 4) neighbours and (cells,) how many, row by row."""
    near = np.zeros((rows * cols, 4), np.int64)
    degree = np.zeros(rows * cols, np.int64)
    for r in range(rows):
        for c in range(cols):
            i = r * cols + c
            for dr, dc in ((-1, 0), (0, -1), (0, 1), (1, 0)):
                if 0 <= r + dr < rows and 0 <= c + dc < cols:
                    near[i, degree[i]] = (r + dr) * cols + c + dc
                    degree[i] += 1
    return near, degree


@njit(cache=True, nogil=True)
def penalty(others, compatible, scale, limit, hard):
    """(m,) cost of a cell for showing each input, given how often the other outputs show it (eq. 4.2 and its variant).

    others: (m,) cells of the other outputs; scale: 2 gamma / n; limit: tau n.
    """
    v = compatible @ others
    if hard:
        return scale * (compatible @ np.where(v > limit, others, 0.0))
    return scale * np.maximum(v, limit)


@njit(cache=True, nogil=True)
def _counts(first, second, counts):
    counts[:] = 0.0
    for i in range(len(first)):
        counts[first[i]] += 0.5
        counts[second[i]] += 0.5


@njit(cache=True, nogil=True)
def objective(cost, weight, compatible, scale, limit, hard, near, degree, first, second, counts):
    """Eq. 4.1 with the compatibility term modularised as in the sweeps, each pair of outputs once."""
    total = 0.0
    sums = counts.sum(0)
    for j in range(len(first)):
        for i in range(cost.shape[0]):
            a, b = first[j, i], second[j, i]
            total += (cost[i, a] + cost[i, b]) / 2
            for d in range(degree[i]):
                q = near[i, d]
                if q > i:
                    total += weight * difference(a, b, first[j, q], second[j, q])
        total += 0.5 * (penalty(sums - counts[j], compatible, scale, limit, hard) * counts[j]).sum()
    return total


@njit(cache=True, nogil=True)
def sweeps(cost, weight, compatible, scale, limit, hard, rows, cols, n_iter, resolve, cap, first, second):
    """Algorithm 3 on one partition, in place; returns (objective, largest gap of a sub-problem).

    cost: (cells, m), saliency and prior; first, second: (m', cells) inputs of each cell, equal where it shows one.
    resolve: what a repeated support costs in the last sweep.
    """
    n, m = cost.shape
    outputs = len(first)
    near, degree = neighbours(rows, cols)
    counts = np.zeros((outputs, m))
    for j in range(outputs):
        _counts(first[j], second[j], counts[j])
    sums = counts.sum(0)
    labels_a, labels_b = np.zeros(m + 3, np.int64), np.zeros(m + 3, np.int64)
    dist = np.ones((m + 3, m + 3))
    for k in range(m):
        labels_a[k] = labels_b[k] = k
        dist[k, k] = 0.0
    unary = np.empty((n, m + 3))
    chosen = np.empty(n, np.int64)
    extra = np.zeros((outputs, m))
    worst, before = 0.0, np.inf
    t = 0
    while t < n_iter:
        if t == n_iter - 1 and t > 0 and resolve > 0.0:
            _part_repeats(counts, resolve, extra)
        for j in range(outputs):
            sums -= counts[j]
            pen = penalty(sums, compatible, scale, limit, hard) + extra[j]
            labels = m
            if t > 0:
                labels = _halves(counts[j], labels_a, labels_b, dist, m)
            for i in range(n):
                for k in range(m):
                    unary[i, k] = cost[i, k] + pen[k]
                for k in range(m, labels):
                    unary[i, k] = (unary[i, labels_a[k]] + unary[i, labels_b[k]]) / 2 - _HALF_BONUS
            part, table = unary[:, :labels], dist[:labels, :labels]
            worst = max(worst, solve_cells(part, weight, table, rows, cols, near, degree, cap, chosen))
            for i in range(n):
                first[j, i] = labels_a[chosen[i]]
                second[j, i] = labels_b[chosen[i]]
            _counts(first[j], second[j], counts[j])
            sums += counts[j]
        now = _plain_objective(cost, weight, scale / 2, near, degree, first, second, counts)
        t += 1
        if t > 1 and abs(now - before) <= 1e-6 * abs(before) and t < n_iter - 1:
            t = n_iter - 1  # nothing moves any more: only repeats are left to part
        before = now
    return objective(cost, weight, compatible, scale, limit, hard, near, degree, first, second, counts), worst


@njit(cache=True, nogil=True)
def _plain_objective(cost, weight, gamma, near, degree, first, second, counts):
    """Without threshold and compatibility, as the released stop test has it."""
    total = 0.0
    sums = counts.sum(0)
    for j in range(len(first)):
        for i in range(cost.shape[0]):
            a, b = first[j, i], second[j, i]
            total += (cost[i, a] + cost[i, b]) / 2
            for d in range(degree[i]):
                q = near[i, d]
                if q > i:
                    total += weight * difference(a, b, first[j, q], second[j, q])
        total += gamma * ((sums - counts[j]) * counts[j]).sum()
    return total


@njit(cache=True, nogil=True)
def _halves(counts, labels_a, labels_b, dist, m):
    """Half labels of the two or three inputs that an output shows most; returns the number of labels."""
    used = np.nonzero(counts > 0)[0]
    if len(used) < 2:
        return m
    top = used[np.argsort(-counts[used], kind="mergesort")[:3]]
    labels = m
    for x in range(len(top)):
        for y in range(x + 1, len(top)):
            labels_a[labels], labels_b[labels] = min(top[x], top[y]), max(top[x], top[y])
            labels += 1
    for k in range(m, labels):
        for q in range(labels):
            value = difference(labels_a[k], labels_b[k], labels_a[q], labels_b[q])
            dist[k, q] = dist[q, k] = value
    return labels


@njit(cache=True, nogil=True)
def _part_repeats(counts, cost, extra):
    """Of two outputs that show the same inputs, one pays for the first and the other for the second of them."""
    for j in range(len(counts)):
        for other in range(j):
            same = True
            for k in range(counts.shape[1]):
                if (counts[j, k] > 0) != (counts[other, k] > 0):
                    same = False
                    break
            shown = np.nonzero(counts[j] > 0)[0]
            if same and len(shown) > 1:
                extra[other, shown[0]] += cost
                extra[j, shown[1]] += cost
