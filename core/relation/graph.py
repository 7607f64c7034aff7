"""The relation graph of a labelled data set (thesis chapter 5)."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arguments import check_flags, check_generator, check_numbers, check_strings, check_whole
from . import label_noise as noise
from .checks import as_features, as_labels, as_probs, as_tensor, chunks, warn_of_zero_rows
from .kernel import Kernel, power_
from .outliers import check_subset, new_rows, outlier_scores, similarity_sums
from .pairs import Pairs, Whitening, prepare, working
from .sums import Sums, pair_sums

_RELATIVE = 0.05  # of the largest score, the threshold where none is given
_EDGES = 2**19  # computed together where single rows are asked for: a few MB


@dataclass(frozen=True)
class Relations:
    """The strongest edges of rows: what speaks for and what speaks against their labels.

    Attributes:
        agreeing, conflicting: int64 row numbers, strongest first, of one row or of m rows (m, top); -1 where a row has
            fewer edges.
        agreeing_values, conflicting_values: float32 r(i, j), eq. 5.1; positive, and negative; 0 where there is none.
    """

    agreeing: Tensor
    agreeing_values: Tensor
    conflicting: Tensor
    conflicting_values: Tensor


class RelationGraph:
    """Samples as nodes, joined by how alike the model finds them, signed by whether their labels agree.

    The edges are never stored: every result comes from exact passes over tiles of the pairs, on the processor or on a
    GPU, with memory for one copy of the inputs.

    Args:
        features: (n, d), of the layer before the classifier. Tensor, array or memory-mapped array; finite.
        probs: (n, C), the model's softmax outputs for the same samples.
        labels: (n,) given class ids.
        kernel: ``"cosine"``, the thesis' choice, or ``"rbf"``.
        compatibility: multiply the similarity by p_i.p_j (eq. 5.5).
        temperature: t of eq. 5.4; 4 for raw features, 2 with ``whiten``.
        whiten: whiten the features first (not in the thesis).
        edge_cut: smaller products s * c are no edge, as in the authors' code; 0 keeps all, as printed in the thesis.
        partitions: split the rows at random into so many parts of one class balance, without edges between them: time
            falls by that factor. None is one graph.
        device: where to compute; None is where ``features`` are.
        block: columns of a tile; None suits the device. Changes speed, and sums by rounding only.
        dtype: float32; bfloat16 for faster products with a relative error of about 0.3 %; or float64.
        resume: folder in which the long pass saves its sums, to go on there after a kill.
        generator: of the parts; None is a fixed seed.
        progress: show a bar; None does so on a terminal.

    Raises:
        TypeError: inputs that are no numbers, or labels that are no integers.
        ValueError: an input or a setting that the message names.

    References:
        Thesis sections 5.3.1 to 5.3.4.

    Examples:
        >>> import torch
        >>> from dataopt.core.relation import RelationGraph
        >>> features = torch.tensor([[1.0, 0.1], [1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 1.0], [1.0, 0.2]])
        >>> probs = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.2, 0.8], [0.8, 0.2]])
        >>> graph = RelationGraph(features, probs, torch.tensor([0, 0, 0, 1, 1, 1]))  # the last label is wrong
        >>> found = graph.label_noise()
        >>> found.noisy.nonzero().squeeze(1), found.suggested[5]
        (tensor([5]), tensor(0))
        >>> graph.relations(5).conflicting
        tensor([0, 1, 2])
    """

    def __init__(
        self,
        features: Any,
        probs: Any,
        labels: Any,
        *,
        kernel: str = "cosine",
        compatibility: bool = True,
        temperature: float = 4,
        whiten: bool = False,
        edge_cut: float = 0.03,
        partitions: int | None = None,
        device: torch.device | str | None = None,
        block: int | None = None,
        dtype: torch.dtype = torch.float32,
        resume: str | Path | None = None,
        generator: torch.Generator | None = None,
        progress: bool | None = None,
    ) -> None:
        check_strings(kernel=kernel)
        check_flags(compatibility=compatibility, whiten=whiten)
        check_numbers(temperature=temperature, edge_cut=edge_cut)
        check_generator(generator)
        self.kernel = Kernel(kernel, compatibility, float(temperature), edge_cut)
        on_disk = isinstance(features, np.memmap)
        features = as_features(features)
        n = len(features)
        probs = as_probs(probs, rows=n)
        self.classes = probs.shape[1]
        self.labels = as_labels(labels, n, self.classes).cpu()
        if block is not None:
            check_whole(block=block)
        if block is not None and block < 1:
            raise ValueError(f"block={block} must be at least 1; None suits the device")
        if dtype not in (torch.float32, torch.bfloat16, torch.float64):
            raise ValueError(f"dtype={dtype} must be torch.float32, torch.bfloat16 or torch.float64")
        warn_of_zero_rows(features)
        self._whitening = Whitening.of(features) if whiten else None
        part = None if partitions is None else _parts(self.labels, partitions, generator)
        device = None if device is None else torch.device(device)
        self.pairs: Pairs = prepare(features, probs, self._whitening, part, device, dtype, on_disk)
        self._place = self.pairs.place
        self._labels = self.labels.to(self.device)[self.pairs.order]
        self._block, self._progress = block, progress
        self._resume = None if resume is None else Path(resume)
        if self._resume is not None and self._resume.exists() and not self._resume.is_dir():
            raise ValueError(f"resume={str(resume)!r} is a file; give a folder for the saved sums")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        return self.pairs.features.device

    @functools.cached_property
    def sums(self) -> Sums:
        """Over all pairs, in the order of ``pairs``: the one long computation, done once."""
        block = None if self._block is None else (self._block, self._block)
        return pair_sums(
            self.pairs, self._labels, self.kernel, block=block, resume=self._resume, progress=self._progress
        )

    def label_noise(
        self,
        threshold: float | None = None,
        update: str = "set",
        max_iter: int | None = 1,
        mode: str = "thesis",
    ) -> noise.LabelNoise:
        """Find the labels that conflict with the rest: Algorithm 4.

        Args:
            threshold: lambda >= 0 of eq. 5.2, in units of the score; None takes 0.05 of the largest first score. With
                ``mode="released"`` a share of the largest score.
            update: ``"set"``, all nodes at once, the printed form; ``"single"``, one node after the other, which
                always converges (Proposition 9) and does not look at ``max_iter``.
            max_iter: corrections of the scores: 0 is the plain sum, None goes on until nothing changes. The set of the
                last correction is not compared with the one before it, which would take another pass.
            mode: ``"thesis"``, w(i, i) = 0; ``"released"``, the authors' code: the diagonal counts, and the threshold
                is relative to the current scores.

        Returns:
            The scores after the last correction, and the set they give.

        Warns:
            UserWarning: the first set holds more than a quarter of the rows, where corrections do harm; or set updates
                went in a circle or got worse.

        Raises:
            ValueError: an unknown or negative setting.

        References:
            Thesis algorithm 4, proposition 9.
        """
        noise.check(threshold, update, max_iter, mode)
        first = (self.sums.all - 2 * self.sums.same).cpu().numpy()
        corrected: tuple[np.ndarray, Tensor] | None = None  # the last correction's set, and its class sums

        def to_set(places: np.ndarray) -> np.ndarray:
            nonlocal corrected
            inside, class_sums = self._to_set(places)
            corrected = places, class_sums
            return inside

        cut = noise.Cut(first, to_set, self._edges)
        if mode == "released":
            threshold = _RELATIVE if threshold is None else threshold
            assert max_iter is not None
            scores, noisy = noise.released(cut, self._own(), threshold, max_iter)
        else:
            threshold = float(_RELATIVE * np.abs(first).max()) if threshold is None else threshold
            scores, noisy = (
                noise.by_single_moves(cut, threshold) if update == "single" else noise.by_sets(cut, threshold, max_iter)
            )
        place = self._place.cpu()
        noisy_rows = torch.from_numpy(noisy)[place]
        suggested = self.labels.clone()
        rows = noisy_rows.nonzero().squeeze(1)
        suggested[rows] = self._most_alike(rows, self._outside(rows, corrected))
        return noise.LabelNoise(torch.from_numpy(scores)[place], noisy_rows, suggested, self.labels, threshold)

    def class_sums(self, rows: Tensor, without: Tensor | None = None) -> Tensor:
        """(m, C) float64: sum of k(i, j) over the rows j of each label, j = i and the rows of ``without`` excepted."""
        counted = torch.ones(len(self), 1, device=self.device)  # 0 for rows without a say
        if without is not None:
            counted[self._place[without.to(self.device)]] = 0
        places = self._place[rows.to(self.device)].sort()
        sums = torch.zeros(len(rows), self.classes, dtype=torch.float64, device=self.device)
        for which, index, k in self.pairs.tiles(places.values, self.kernel):
            sums[which] += (k.T @ (self._one_hot(index, k) * counted[index].to(k))).double()
        out = torch.empty_like(sums)
        out[places.indices] = sums
        return out.cpu()

    def _one_hot(self, index: Tensor, like: Tensor) -> Tensor:
        """(m, C) labels of rows of ``pairs``."""
        out = torch.zeros(len(index), self.classes, dtype=like.dtype, device=like.device)
        return out.scatter_(1, self._labels[index, None], 1)

    def suggest(self, rows: Tensor, without: Tensor | None = None) -> Tensor:
        """(m,) int64: the class whose samples are most alike to each row; its own label where none is."""
        return self._most_alike(rows, self.class_sums(rows, without))

    def _most_alike(self, rows: Tensor, class_sums: Tensor) -> Tensor:
        best = class_sums.max(1)
        return torch.where(best.values > 0, best.indices, self.labels[rows])

    def _outside(self, rows: Tensor, corrected: tuple[np.ndarray, Tensor] | None) -> Tensor:
        """(m, C) class sums without the set that the last correction held (without a correction, ``rows``)."""
        if corrected is None:
            return self.class_sums(rows, without=rows)
        places, sums = corrected
        held = self.pairs.order[torch.from_numpy(places).to(self.device)].cpu()
        known = torch.full((len(self),), -1)
        known[held] = torch.arange(len(held))
        at = known[rows]
        out = sums[at]
        out[at < 0] = self.class_sums(rows[at < 0], without=held)
        return out

    def relations(self, rows: int | Sequence[int] | Tensor, top: int = 20) -> Relations:
        """The strongest agreeing and conflicting neighbours: why a label was found, or was not.

        Args:
            rows: one row number, or m of them.
            top: how many of each kind at most.

        Returns:
            For one row, only its edges; for m rows, (m, top) padded with -1.

        Raises:
            ValueError: ``top`` below 1. IndexError: a row that is not there.
        """
        check_whole(top=top)
        if top < 1:
            raise ValueError(f"top={top} must be at least 1")
        index = self._index(rows)
        width = min(top, len(self) - 1)
        out = [torch.full((len(index), width), -1), torch.zeros(len(index), width)]
        out += [x.clone() for x in out]
        for at, k, columns in self._rows(index):
            same = self.labels.to(self.device)[index[at].to(self.device), None] == self._labels[columns]
            source = self.pairs.order[columns]
            for kind, sign in ((0, 1.0), (2, -1.0)):
                best = torch.where(same if sign > 0 else ~same, k, 0.0).topk(min(width, k.shape[1]), dim=1)
                found, values = best.values > 0, best.values
                out[kind][at, : values.shape[1]] = torch.where(found, source[best.indices], -1).cpu()
                out[kind + 1][at, : values.shape[1]] = (sign * values).float().cpu()
        if torch.as_tensor(rows).ndim == 0:
            for kind in (0, 2):
                count = int((out[kind][0] >= 0).sum())
                out[kind], out[kind + 1] = out[kind][0, :count], out[kind + 1][0, :count]
        return Relations(*out)

    def row(self, i: int) -> Tensor:
        """(n,) in the precision of the sums: relations r(i, j) of one row to all, eq. 5.1; 0 at i."""
        index = self._index(i)
        if len(index) != 1:
            raise ValueError(f"row={i!r:.80} must be one row number")
        place = self._place[index.to(self.device)].cpu().numpy()
        return -torch.from_numpy(self._edges(place)[0])[self._place.cpu()]

    def outlier_scores(
        self,
        features: Any | None = None,
        probs: Any | None = None,
        subset: float | int | Tensor | Sequence[int] | None = None,
        temperature: float = 1,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """How little each sample is alike to the data: 1 / (sum of k over S), whatever the labels.

        Args:
            features, probs: (m, d), (m, C) of new samples; None scores the data itself, without a sample's own k(i, i).
            subset: S: None, all rows; a share below 1, or a number of rows, drawn uniformly; or row numbers.
            temperature: of this kernel; the thesis takes 1. Best with raw features: whitened ones hide outliers.
            generator: of the draw; None is a fixed seed.

        Returns:
            (m,) float64, high is an outlier; at most 1e6, where nothing is alike.

        References:
            Thesis section 5.3.3.
        """
        check_numbers(temperature=temperature)
        check_generator(generator)
        kernel = replace(self.kernel, temperature=temperature)
        chosen = check_subset(subset, len(self), generator)
        if (features is None) != (probs is None):
            missing = "probs" if probs is None else "features"
            raise ValueError(f"{missing}=None while the other is given; give both for new samples, or none")
        if features is None:
            # in a folder of its own: these sums are not those of the labels
            resume = None if self._resume is None else self._resume / "outliers"
            sums = similarity_sums(self.pairs, kernel, chosen, progress=self._progress, resume=resume)
            return outlier_scores(sums)[self._place.cpu()]
        new = new_rows(features, probs, self.pairs, self._whitening)
        return outlier_scores(similarity_sums(self.pairs, kernel, chosen, new, progress=self._progress))

    def _index(self, rows: int | Sequence[int] | Tensor) -> Tensor:
        found = as_tensor(rows, "row")
        if found.numel() and (found.is_floating_point() or found.dtype == torch.bool):
            raise TypeError(f"row={rows!r:.80} holds {found.dtype}; give whole numbers")
        index = found.long().reshape(-1).cpu()
        bad = (index < 0) | (index >= len(self))
        if bad.any():
            raise IndexError(f"row {int(index[bad][0])} is not among the {len(self)} rows; give 0 to {len(self) - 1}")
        return index

    def _rows(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor, slice]]:
        """Some of ``rows`` at a time: their positions, k (m, width) to all columns of their part, and these columns."""
        places = self._place[rows.to(self.device)]
        for start, stop in self.pairs.bounds:
            inside = ((places >= start) & (places < stop)).nonzero().squeeze(1)
            for at in inside.split(max(1, _EDGES // (stop - start))):
                k = self.pairs.values(places[at], slice(start, stop), self.kernel)
                k[torch.arange(len(at), device=k.device), places[at] - start] = 0
                yield at.cpu(), k, slice(start, stop)

    def _to_set(self, places: np.ndarray) -> tuple[np.ndarray, Tensor]:
        """Two sums over edges of the rows M at ``places``, sorted, in one pass.

        Returns:
            Sum over j in M of w(i, j), for each row i in the order of ``pairs``, and (m, C) class sums of M without M.
        """
        members = torch.from_numpy(places).to(self.device)
        inside = torch.zeros(len(self), dtype=torch.float64, device=self.device)
        outside = torch.zeros(len(members), self.classes, dtype=torch.float64, device=self.device)
        counted = torch.ones(len(self), 1, device=self.device)
        counted[members] = 0
        for which, index, k in self.pairs.tiles(members, self.kernel):
            sums = k @ self._one_hot(members[which], k)
            same = sums.gather(1, self._labels[index, None]).squeeze(1)
            inside.index_add_(0, index, (sums.sum(1) - 2 * same).double())
            outside[which] += (k.T @ (self._one_hot(index, k) * counted[index].to(k))).double()
        return inside.cpu().numpy(), outside.cpu()

    def _edges(self, places: np.ndarray) -> np.ndarray:
        """(m, n) float32 w of the rows at ``places``, in the order of ``pairs``."""
        index = torch.from_numpy(places).to(self.device)
        out = torch.zeros(len(index), len(self), dtype=working(self.pairs.features.dtype), device=self.device)
        for at, k, columns in self._rows(self.pairs.order[index].cpu()):
            same = self._labels[index[at.to(self.device)], None] == self._labels[columns]
            out[at.to(self.device), columns] = torch.where(same, -k, k)
        return out.cpu().numpy()

    def _own(self) -> np.ndarray:
        """(n,) float64 k(i, i), in the order of ``pairs``."""
        own = _squares(self.pairs.features)
        own = self.kernel.similarities_(own)
        if self.kernel.compatibility:
            own = own * _squares(self.pairs.probs)
        own = torch.where(own > self.kernel.cut, own, 0.0)
        return power_(own, self.kernel.temperature).double().cpu().numpy()


def _squares(x: Tensor) -> Tensor:
    """(n,) squared length of each row."""
    return torch.cat([x[rows].to(working(x.dtype)).square().sum(1) for rows in chunks(len(x))])


def _parts(labels: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """(n,) part of each row: shuffled, then dealt out label by label."""
    n = len(labels)
    check_numbers(partitions=count)
    if not 1 <= count <= n // 2 or count != int(count):
        raise ValueError(
            f"partitions={count} must be a whole number between 1 and {n // 2}, so that a part has two rows at least"
        )
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    shuffled = torch.randperm(n, generator=generator)
    dealt = shuffled[labels[shuffled].argsort(stable=True)]
    part = torch.empty(n, dtype=torch.int64)
    part[dealt] = torch.arange(n) % count
    return part
