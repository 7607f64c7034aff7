"""Outliers: samples that are alike to nothing in the data (thesis section 5.3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checks import as_features, as_probs, as_tensor, chunks, warn_of_zero_rows
from .kernel import Kernel
from .pairs import Pairs, Whitening, kernel_values, prepare, settled, unit
from .sums import bar_of, pair_sums

_SMALLEST = 1e-6  # sums below it would give scores without bound
Subset = float | int | Tensor | Sequence[int] | None


@dataclass
class Outliers:
    """Outlier scores of new data against a reference set, which needs no labels.

    Args:
        kernel, compatibility, edge_cut: as in :class:`RelationGraph`.
        temperature: the thesis takes 1, for any size of S.
        subset: S: None is all reference rows; a share below 1, or a number of rows, drawn uniformly; or row numbers.
        device: where to compute; None is where the features are.
        generator: of the draw; None is a fixed seed.

    References:
        Thesis section 5.3.3.

    Examples:
        >>> import torch
        >>> from dataopt.core.relation import Outliers
        >>> features = torch.eye(3)[torch.arange(30) % 2]  # two directions, and no third
        >>> probs = torch.eye(2)[torch.arange(30) % 2] * 0.8 + 0.1
        >>> detector = Outliers().fit(features, probs)
        >>> detector.score(torch.eye(3)[[0, 2]], probs[:2]) > 1
        tensor([False,  True])
    """

    kernel: str = "cosine"
    compatibility: bool = True
    temperature: float = 1
    edge_cut: float = 0.03
    subset: Subset = None
    device: torch.device | str | None = None
    generator: torch.Generator | None = None
    _pairs: Pairs | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self._kernel()

    def _kernel(self) -> Kernel:
        return Kernel(self.kernel, self.compatibility, self.temperature, self.edge_cut)

    def fit(self, features: Any, probs: Any) -> Outliers:
        """Take the reference set: (n, d) features and (n, C) softmax outputs.

        Raises:
            ValueError: an input or a setting that the message names.
        """
        features = as_features(features)
        probs = as_probs(probs, rows=len(features))
        chosen = check_subset(self.subset, len(features), self.generator)
        device = None if self.device is None else torch.device(self.device)
        if chosen is not None:
            features, probs = features[chosen.to(features.device)], probs[chosen.to(probs.device)]
        warn_of_zero_rows(features)
        self._pairs = prepare(features, probs, device=device)
        return self

    def score(self, features: Any, probs: Any, progress: bool | None = None) -> Tensor:
        """1 / (sum of k over S): (m,) float64, high is an outlier, at most 1e6.

        Raises:
            RuntimeError: before ``fit``. ValueError: inputs of another width, or that are no features or probabilities.
        """
        if self._pairs is None:
            raise RuntimeError("score was called before fit; give the reference set to fit first")
        new = new_rows(features, probs, self._pairs, None)
        return outlier_scores(similarity_sums(self._pairs, self._kernel(), None, new, progress=progress))


def outlier_scores(sums: Tensor) -> Tensor:
    """(m,) float64 scores of (m,) sums."""
    return 1 / (sums + _SMALLEST)


def new_rows(features: Any, probs: Any, pairs: Pairs, whitening: Whitening | None) -> tuple[Tensor, Tensor]:
    """Features and probabilities of other samples, checked and prepared as those of ``pairs``."""
    features = as_features(features)
    probs = as_probs(probs, rows=len(features))
    for name, x, width in (("features", features, pairs.features.shape[1]), ("probs", probs, pairs.probs.shape[1])):
        if x.shape[1] != width:
            raise ValueError(f"{name} has {x.shape[1]} columns where the data has {width}; use the same model")
    warn_of_zero_rows(features)
    device, dtype = pairs.features.device, pairs.features.dtype
    ready = [
        (unit(features[c], whitening, dtype).to(device), settled(probs[c], dtype).to(device))
        for c in chunks(len(features))
    ]
    return torch.cat([f for f, _ in ready]), torch.cat([p for _, p in ready])


def similarity_sums(
    pairs: Pairs,
    kernel: Kernel,
    chosen: Tensor | None,
    new: tuple[Tensor, Tensor] | None = None,
    progress: bool | None = None,
    resume: Path | None = None,
) -> Tensor:
    """(m,) float64 sums of k over S: of the prepared ``new`` rows, or of the rows of ``pairs`` in its order.

    Args:
        chosen: row numbers of S; None is all rows (within a row's part, where ``pairs`` has several).
        resume: folder of :func:`pair_sums`, for the one long case: all rows against all.
    """
    if new is None and chosen is None:
        return pair_sums(pairs, torch.zeros_like(pairs.order), kernel, progress=progress, resume=resume).all.cpu()
    n, device = len(pairs.order), pairs.features.device
    members = torch.arange(n, device=device) if chosen is None else pairs.place[chosen.to(device)].sort().values
    features, probs = new or (pairs.features, pairs.probs)
    out = torch.zeros(len(features), dtype=torch.float64, device=device)
    with bar_of(len(features), progress) as bar:
        for rows in chunks(len(features)):
            for columns in members.split(1024):
                k = kernel_values(features[rows], probs[rows], pairs.features[columns], pairs.probs[columns], kernel)
                if new is None:
                    k.masked_fill_(torch.arange(rows.start, rows.stop, device=device)[:, None] == columns, 0)
                out[rows] += k.sum(1)
            bar.update(rows.stop - rows.start)
    return out.cpu()


def check_subset(subset: Subset, n: int, generator: torch.Generator | None) -> Tensor | None:
    """Row numbers of S; None for all rows.

    Raises:
        ValueError: a share or number outside the rows, or rows that are not there or come twice.
    """
    if subset is None:
        return None
    if isinstance(subset, Real):
        number = float(subset)
        share = not isinstance(subset, Integral)
        count = round(number * n if share else number) if 0 < number <= (1 if share else n) else 0
        if not 1 <= count <= n:
            raise ValueError(
                f"subset={subset} must leave between 1 and {n} rows; give a share of at most 1, a whole number, or rows"
            )
        if count == n:
            return None
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        return torch.randperm(n, generator=generator)[:count].sort().values
    rows = as_tensor(subset, "subset").cpu()
    if len(rows.shape) == 1 and len(rows) and (rows.is_floating_point() or rows.dtype == torch.bool):
        raise TypeError(f"subset holds {rows.dtype}; give a share, a number of rows, or whole row numbers")
    rows = rows.long()
    if rows.ndim != 1 or not len(rows) or rows.min() < 0 or rows.max() >= n or len(rows.unique()) < len(rows):
        raise ValueError(f"subset must name rows of 0 to {n - 1}, each once, and at least one")
    return rows
