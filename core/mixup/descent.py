"""Compiled exact solver for the mask: steepest descent by warm-started grid cuts.

With convex unaries the energy of :class:`~dataopt.core.mixup.grid.MaskCosts` is L-natural-convex
(Murota, "Discrete convex analysis", 2003): from any labelling, moving the best set of regions one
label up until no set helps, then down until no set helps, ends at the global minimum. The best set
is a minimum cut of the plain grid:

    E(t + s 1_X) - E(t) = sum_(i in X) theta_i + sum_(i,j) c_ij |1_X(i) - 1_X(j)|,
    theta_i = u_i(t_i + s) - u_i(t_i) + 2 s sum_j c_ij (t_i - t_j),   c_ij = w_ij / m^2.

One flow serves all cuts of a sample: after a move only the residuals across its border and the
supplies of the moved regions change.

Arrays are on a grid with a border of one idle cell, so that neighbours need no bounds checks.
Direction d of a cell leads to cell + step[d]; the reverse arc is direction d ^ 1 of that cell.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_ZERO = 1e-13  # supplies below this are rounding


@njit(cache=True, nogil=True)
def _theta_up(unary, cost, t, cell, flat, labels, step):
    """theta of moving ``cell`` up; the top label continues its last slope."""
    k = t[cell]
    slope = unary[flat, k + 1] - unary[flat, k] if k + 1 < labels else unary[flat, k] - unary[flat, k - 1]
    for d in range(4):
        slope += 2.0 * cost[cell, d] * (k - t[cell + step[d]])
    return slope


@njit(cache=True, nogil=True)
def _start(unary, cost, t, cells, labels, step):
    """Smallest unaries, then up to four sweeps that give every region its best label."""
    n = cells.size
    for i in range(n):
        best = 0
        for k in range(1, labels):
            if unary[i, k] < unary[i, best]:
                best = k
        t[cells[i]] = best
    for _ in range(4):
        changed = False
        for i in range(n):
            cell = cells[i]
            total = 0.0
            pull = 0.0
            for d in range(4):
                total += cost[cell, d]
                pull += cost[cell, d] * t[cell + step[d]]
            best = 0
            for k in range(labels - 1):
                if pull > 0.5 * (unary[i, k + 1] - unary[i, k] + (2 * k + 1) * total):
                    best += 1
            if best != t[cell]:
                t[cell] = best
                changed = True
        if not changed:
            break


@njit(cache=True, nogil=True)
def _cut(excess, closed, residual, sources, count, step, seen, stamp, came, queue, dead):
    """Augment every source as far as it goes; ``dead`` marks the minimal best set.

    A positive excess is a source, a negative one or a closed cell is a sink. A search that finds no
    sink has seen everything its source can reach: those cells are the source side of the cut.
    Returns (number of dead cells, last stamp used).
    """
    found = 0
    for index in range(count):  # the neighbours first: most flow ends there
        s = sources[index]
        for d in range(4):
            if excess[s] <= 0.0:
                break
            q = s + step[d]
            if residual[s, d] > 0.0 and (closed[q] or excess[q] < 0.0):
                amount = min(excess[s], residual[s, d])
                if not closed[q]:
                    amount = min(amount, -excess[q])
                residual[s, d] -= amount
                residual[q, d ^ 1] += amount
                excess[s] -= amount
                excess[q] += amount
    for index in range(count):
        s = sources[index]
        while excess[s] > _ZERO and not dead[s]:
            stamp += 1
            seen[s] = stamp
            queue[0] = s
            head = 0
            tail = 1
            sink = -1
            while head < tail and sink < 0:
                p = queue[head]
                head += 1
                for d in range(4):
                    if residual[p, d] > 0.0:
                        q = p + step[d]
                        if seen[q] != stamp and not dead[q]:
                            seen[q] = stamp
                            came[q] = d
                            if closed[q] or excess[q] < 0.0:
                                sink = q
                                break
                            queue[tail] = q
                            tail += 1
            if sink < 0:
                for i in range(tail):
                    dead[queue[i]] = True
                found += tail
                break
            amount = excess[s]
            if not closed[sink]:
                amount = min(amount, -excess[sink])
            q = sink
            while q != s:
                d = came[q]
                q -= step[d]
                amount = min(amount, residual[q, d])
            q = sink
            while q != s:
                d = came[q]
                p = q - step[d]
                residual[p, d] -= amount
                residual[q, d ^ 1] += amount
                q = p
            excess[s] -= amount
            excess[sink] += amount
    return found, stamp


@njit(cache=True, nogil=True)
def descend(unary, down, right, out):
    """Minimise every sample's mask energy; all unaries must be convex in the label.

    Args:
        unary: (B, rows, cols, labels) float64.
        down: (B, rows - 1, cols) float64, non-negative.
        right: (B, rows, cols - 1) float64, non-negative.
        out: (B, rows, cols) int64, receives the labels.
    """
    batch, rows, cols, labels = unary.shape
    m = labels - 1
    n = rows * cols
    width = cols + 2
    size = (rows + 2) * width
    step = np.array([1, -1, width, -width])
    cells = np.empty(n, np.int64)
    for r in range(rows):
        for c in range(cols):
            cells[r * cols + c] = (r + 1) * width + c + 1
    cost = np.zeros((size, 4))
    residual = np.zeros((size, 4))
    excess = np.zeros(size)
    closed = np.zeros(size, np.bool_)
    dead = np.zeros(size, np.bool_)
    seen = np.zeros(size, np.int64)
    came = np.zeros(size, np.int64)
    queue = np.empty(size, np.int64)
    sources = np.empty(size, np.int64)
    t = np.zeros(size, np.int64)
    stamp = 0
    scale = 1.0 / (m * m)
    for b in range(batch):
        u = unary[b].reshape(n, labels)
        for r in range(rows):
            for c in range(cols):
                p = cells[r * cols + c]
                if c + 1 < cols:
                    cost[p, 0] = cost[p + 1, 1] = right[b, r, c] * scale
                if r + 1 < rows:
                    cost[p, 2] = cost[p + width, 3] = down[b, r, c] * scale
        _start(u, cost, t, cells, labels, step)
        residual[:] = cost
        count = 0
        for i in range(n):
            p = cells[i]
            theta = _theta_up(u, cost, t, p, i, labels, step)
            excess[p] = -theta if abs(theta) > _ZERO else 0.0
            closed[p] = t[p] == m
            if excess[p] > 0.0 and not closed[p]:
                sources[count] = p
                count += 1
        for direction in (1, -1):
            if direction == -1:  # the same flow seen from the other side
                count = 0
                for i in range(n):
                    p = cells[i]
                    k = t[p]
                    bend = u[i, k + 1] - 2.0 * u[i, k] + u[i, k - 1] if 0 < k < m else 0.0
                    excess[p] = -excess[p] - bend
                    closed[p] = k == 0
                    if excess[p] > _ZERO and not closed[p]:
                        sources[count] = p
                        count += 1
                    # an edge's two residuals change places
                    for d in (0, 2):
                        q = p + step[d]
                        swap = residual[p, d]
                        residual[p, d] = residual[q, d ^ 1]
                        residual[q, d ^ 1] = swap
            while count > 0:
                found, stamp = _cut(excess, closed, residual, sources, count, step, seen, stamp, came, queue, dead)
                if found == 0:
                    break
                for i in range(n):  # arcs leaving the set: full the other way round
                    p = cells[i]
                    if dead[p]:
                        for d in range(4):
                            q = p + step[d]
                            if not dead[q]:
                                residual[p, d] = 2.0 * cost[p, d]
                                residual[q, d ^ 1] = 0.0
                count = 0
                for i in range(n):
                    p = cells[i]
                    if dead[p]:
                        dead[p] = False
                        k = t[p] + direction
                        t[p] = k
                        if 0 < k < m:
                            excess[p] -= u[i, k + 1] - 2.0 * u[i, k] + u[i, k - 1]
                            if excess[p] > _ZERO:
                                sources[count] = p
                                count += 1
                        else:
                            closed[p] = True
        for i in range(n):
            out[b, i // cols, i % cols] = t[cells[i]]


@njit(cache=True, nogil=True)
def ishikawa(unary, down, right, out):
    """Minimise every sample's mask energy by one minimum cut, whatever the unaries.

    Ishikawa's construction (PAMI 2003): bit l of a region says t >= l, l = 1..m. For such bits
    (t_i - t_j)^2 = sum_(k,l) |b_ik - b_jl| + (t_i^2 - m t_i) + (t_j^2 - m t_j), so each edge is m^2
    arcs of capacity c and a correction of the unaries. Arguments as for :func:`descend`.
    """
    batch, rows, cols, labels = unary.shape
    m = labels - 1
    n = rows * cols
    nodes = n * m
    degree = 4 * m + 2  # m^2 arcs per edge over m bits, and the chain below and above
    head = np.empty((nodes, degree), np.int64)
    back = np.empty((nodes, degree), np.int64)
    residual = np.empty((nodes, degree))
    used = np.empty(nodes, np.int64)
    excess = np.empty(nodes)
    seen = np.zeros(nodes, np.int64)
    came = np.empty(nodes, np.int64)
    origin = np.empty(nodes, np.int64)
    queue = np.empty(nodes, np.int64)
    dead = np.empty(nodes, np.bool_)
    around = np.empty(n)
    stamp = 0
    scale = 1.0 / (m * m)
    for b in range(batch):
        used[:] = 0
        dead[:] = False
        around[:] = 0.0
        for r in range(rows):
            for c in range(cols):
                i = r * cols + c
                for h in range(1, m):  # bit h + 1 without bit h costs infinity
                    _arc(head, back, residual, used, i * m + h, i * m + h - 1, np.inf, 0.0)
                for vertical in range(2):
                    if vertical == 1 and r + 1 < rows:
                        j, w = i + cols, down[b, r, c] * scale
                    elif vertical == 0 and c + 1 < cols:
                        j, w = i + 1, right[b, r, c] * scale
                    else:
                        continue
                    around[i] += w
                    around[j] += w
                    for k in range(m):
                        for h in range(m):
                            _arc(head, back, residual, used, i * m + k, j * m + h, w, w)
        for i in range(n):
            for h in range(m):
                slope = unary[b, i // cols, i % cols, h + 1] - unary[b, i // cols, i % cols, h]
                excess[i * m + h] = -(slope + around[i] * (2 * h + 1 - m))
        for s in range(nodes):
            while excess[s] > _ZERO and not dead[s]:
                stamp += 1
                seen[s] = stamp
                queue[0] = s
                first, last, sink = 0, 1, -1
                while first < last and sink < 0:
                    p = queue[first]
                    first += 1
                    for a in range(used[p]):
                        q = head[p, a]
                        if residual[p, a] > 0.0 and seen[q] != stamp and not dead[q]:
                            seen[q] = stamp
                            came[q] = a
                            origin[q] = p
                            if excess[q] < 0.0:
                                sink = q
                                break
                            queue[last] = q
                            last += 1
                if sink < 0:
                    for i in range(last):
                        dead[queue[i]] = True
                    break
                amount = min(excess[s], -excess[sink])
                q = sink
                while q != s:
                    amount = min(amount, residual[origin[q], came[q]])
                    q = origin[q]
                q = sink
                while q != s:
                    p = origin[q]
                    residual[p, came[q]] -= amount
                    residual[q, back[p, came[q]]] += amount
                    q = p
                excess[s] -= amount
                excess[sink] += amount
        for i in range(n):
            t = 0
            for h in range(m):
                t += dead[i * m + h]
            out[b, i // cols, i % cols] = t


@njit(cache=True, nogil=True)
def _arc(head, back, residual, used, p, q, forward, backward):
    a, z = used[p], used[q]
    used[p] += 1
    used[q] += 1
    head[p, a], back[p, a], residual[p, a] = q, z, forward
    head[q, z], back[q, z], residual[q, z] = p, a, backward
