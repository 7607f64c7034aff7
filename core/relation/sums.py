"""Sums of the kernel over all pairs of a data set, exact, without ever holding them.

The pairs form a square; by symmetry only one triangle is computed, column block by column block, each tile giving
sums for its rows and for its columns. Blocks are dealt to a fixed number of lanes and each lane adds in a fixed order,
so the result is bitwise the same on any number of threads and processes, and after a kill and a restart.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from ..tensor_file import load_tensors, save_tensors
from .kernel import Kernel
from .pairs import Pairs, kernel_values, row_chunks, working

LANES = 16
COLUMNS, ROWS = 512, 1024  # of a tile; its two float32 arrays stay in the cache of a core
_SAVE_EVERY = 20.0  # seconds between two saves of a lane


@dataclass(frozen=True)
class Sums:
    """In the order of :class:`Pairs`, without the diagonal.

    Attributes:
        all: (n,) float64, sum over j of k(i, j).
        same: (n,) float64, the part of it with equal labels.
        computed: share of the n^2 pairs that were computed; symmetry and skipping spare the others.
    """

    all: Tensor
    same: Tensor
    computed: float


def pair_sums(
    pairs: Pairs,
    labels: Tensor,
    kernel: Kernel,
    *,
    block: tuple[int, int] | None = None,
    resume: Path | None = None,
    progress: bool | None = None,
) -> Sums:
    """The symmetric pass; with ``torch.distributed`` initialised, shared by its processes.

    Args:
        pairs: n prepared rows.
        labels: (n,) class ids, in the order of ``pairs``.
        kernel: of a pair.
        block: rows and columns of a tile; None is what suits a processor's cache or a GPU.
        resume: folder where lanes are saved every 20 seconds and found again.
        progress: a bar; None shows one on a terminal.

    Raises:
        ValueError: ``resume`` holds the sums of other data or settings, or a damaged file.
    """
    n, device = len(pairs.order), pairs.features.device
    rows, columns = block or ((ROWS, COLUMNS) if device.type == "cpu" else (8192, 8192))
    blocks = [(c, min(c + columns, stop), stop) for start, stop in pairs.bounds for c in range(start, stop, columns)]
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
    mine = range(rank, LANES, world)
    store = _Store(resume, _fingerprint(pairs, labels, kernel, columns, rows)) if resume else None
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    # all and same of each lane; the place behind the last row counts the computed pairs
    out = torch.zeros(LANES, 2, n + 1, dtype=torch.float64, device=device)
    total = sum(stop - start for lane in mine for start, stop, _ in blocks[lane::LANES])

    # all are looked at before any is written, so that refused files stay alone
    saved_blocks = {lane: store.load(lane, out[lane]) if store else 0 for lane in mine}
    stopped = threading.Event()
    shown = False if rank else progress  # one bar, of the first process
    with bar_of(total, shown) as bar:
        lock = threading.Lock()

        def advance(count: int) -> None:
            with lock:
                bar.update(count)

        def work(lane: int) -> None:
            worker = _worker(pairs, labels, kernel, rows, columns)
            done = saved_blocks[lane]
            advance(sum(stop - start for start, stop, _ in blocks[lane::LANES][:done]))
            saved = time.monotonic()
            for count, (start, stop, last) in enumerate(blocks[lane::LANES][done:], done + 1):
                if stopped.is_set():
                    break
                worker(out[lane], start, stop, last)
                advance(stop - start)
                if store and (time.monotonic() - saved > _SAVE_EVERY or count == len(blocks[lane::LANES])):
                    store.save(lane, out[lane], count)
                    saved = time.monotonic()

        _run(work, mine, threads, stopped)

    if world > 1:
        on_gpu = dist.get_backend() == "nccl"
        shared = out.cuda() if on_gpu else out.cpu()
        dist.all_reduce(shared)  # a lane is zero in all processes but one
        out = shared.to(device)
    result = out[0]
    for lane in out[1:]:
        result = result + lane
    return Sums(result[0, :n].clone(), result[1, :n].clone(), float(result[0, n]) / n**2)


def bar_of(total: int, progress: bool | None, what: str = "relations", unit: str = "row") -> tqdm[Any]:
    """A bar; None shows it on a terminal only."""
    disable = None if progress is None else not progress
    return tqdm(total=total, desc=what, unit=unit, unit_scale=unit != "row", disable=disable)


def _run(work: Callable[[int], None], lanes: range, threads: int, stopped: threading.Event) -> None:
    """Lanes on threads, each with one thread for its products."""
    if threads == 1:
        for lane in lanes:
            work(lane)
        return
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            try:
                list(pool.map(work, lanes))
            finally:
                stopped.set()  # after an error or an interrupt the other threads end at their next block
    finally:
        torch.set_num_threads(threads)


def _worker(
    pairs: Pairs, labels: Tensor, kernel: Kernel, rows: int, columns: int
) -> Callable[[Tensor, int, int, int], None]:
    """A function that adds one column block, with the rows from its start on, to a lane."""
    if pairs.features.device.type == "cpu":
        return _compiled_worker(pairs, labels, kernel, rows, columns)
    return _tensor_worker(pairs, labels, kernel, rows)


def _tensor_worker(pairs: Pairs, labels: Tensor, kernel: Kernel, rows: int) -> Callable[[Tensor, int, int, int], None]:
    """The same in plain tensor operations, for a GPU."""

    def work(lane: Tensor, start: int, stop: int, last: int) -> None:
        columns = slice(start, stop)
        for at in row_chunks(pairs.reachable(columns, start, last, kernel), rows):
            k = kernel_values(
                pairs.features[at], pairs.probs[at], pairs.features[columns], pairs.probs[columns], kernel
            )
            index = torch.arange(at.start, at.stop, device=k.device) if isinstance(at, slice) else at
            k.mul_(index[:, None] > torch.arange(start, stop, device=k.device))
            same = torch.where(labels[index, None] == labels[columns], k, 0.0)
            lane[0].index_add_(0, index, k.sum(1).double())
            lane[1].index_add_(0, index, same.sum(1).double())
            lane[0, columns] += k.sum(0)
            lane[1, columns] += same.sum(0)
            lane[0, -1] += k.numel()

    return work


def _compiled_worker(
    pairs: Pairs, labels: Tensor, kernel: Kernel, rows: int, columns: int
) -> Callable[[Tensor, int, int, int], None]:
    from .tiles import tile_sums  # importing numba takes half a second

    sums = tile_sums(kernel.temperature, kernel.compatibility)
    classes = labels.to(torch.int32).numpy()
    dtype = pairs.features.dtype
    wider = working(dtype)
    real = np.float64 if wider == torch.float64 else np.float32
    cut = real(kernel.cut)
    wide, deep = pairs.features.shape[1], pairs.probs.shape[1]
    gathered = torch.empty(rows, wide, dtype=dtype), torch.empty(rows, deep, dtype=dtype)
    products = torch.empty(rows * columns, dtype=dtype), torch.empty(rows * columns, dtype=dtype)

    def work(lane: Tensor, start: int, stop: int, last: int) -> None:
        sums_of = lane.numpy()
        width = stop - start
        features, probs = pairs.features[start:stop].T, pairs.probs[start:stop].T
        # the block's own rows hold the diagonal, and come as one chunk of rows in order
        own = slice(start, stop)
        reached = pairs.reachable(own, start, last, kernel)
        rest = _from(reached, stop)
        for at in itertools.chain(row_chunks(own, rows), row_chunks(rest, rows)):
            if isinstance(at, slice):
                count, f, p, y = at.stop - at.start, pairs.features[at], pairs.probs[at], classes[at]
            else:
                count, y = len(at), classes[at.numpy()]
                f, p = (torch.index_select(x, 0, at, out=g[:count]) for x, g in
                        zip((pairs.features, pairs.probs), gathered, strict=True))  # fmt: skip
            dots, both = (x[: count * width].view(count, width) for x in products)
            torch.mm(f, features, out=dots)
            if kernel.compatibility:
                torch.mm(p, probs, out=both)
            dots, both = kernel.similarities_(dots.to(wider)), both.to(wider)
            row_all, row_same, col_all, col_same = (np.zeros(m, real) for m in (count, count, width, width))
            offset = at.start - start if isinstance(at, slice) and at.start < stop else -1
            sums(dots.numpy(), both.numpy(), offset, y, classes[own], cut, row_all, row_same, col_all, col_same)
            index = at if isinstance(at, slice) else at.numpy()
            sums_of[0, index] += row_all
            sums_of[1, index] += row_same
            sums_of[0, own] += col_all
            sums_of[1, own] += col_same
            sums_of[0, -1] += count * width

    return work


def _from(rows: Tensor | slice, first: int) -> Tensor | slice:
    """The part of sorted rows that starts at ``first``."""
    if isinstance(rows, slice):
        return slice(max(rows.start, first), max(rows.stop, first))
    return rows[int(torch.searchsorted(rows, first)) :]


def _fingerprint(pairs: Pairs, labels: Tensor, kernel: Kernel, columns: int, rows: int) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for x in (pairs.features, pairs.probs, pairs.order, labels):
        for part in x.split(4096):
            digest.update(part.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    digest.update(repr((pairs.features.shape, pairs.probs.shape, pairs.bounds, kernel, columns, rows)).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class _Store:
    """One file for each lane: its sums, how many blocks they hold, what they belong to."""

    folder: Path
    fingerprint: str

    def _path(self, lane: int) -> Path:
        return self.folder / f"lane-{lane:02d}.safetensors"

    def save(self, lane: int, sums: Tensor, done: int) -> None:
        save_tensors(self._path(lane), {"sums": sums}, {"fingerprint": self.fingerprint, "done": str(done)})

    def load(self, lane: int, into: Tensor) -> int:
        """Fill ``into`` and tell how many blocks it holds; 0 where nothing was saved."""
        path = self._path(lane)
        if not os.path.lexists(path):
            return 0
        try:
            tensors, about = load_tensors(path)
        except ValueError as e:
            raise ValueError(f"resume file {path} is damaged ({e}); delete it to begin anew") from e
        if about.get("fingerprint") != self.fingerprint:
            raise ValueError(
                f"resume file {path} belongs to other data or settings; give another folder, or delete this one"
            )
        into.copy_(tensors["sums"])
        return int(about["done"])
