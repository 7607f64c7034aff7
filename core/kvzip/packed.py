"""The ragged store: every head keeps a different number of key-value pairs, in one array per layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_tensors, check_whole
from .quantise import Quantised


@dataclass(frozen=True)
class PackedHeads:
    """Key-value pairs of one layer, head after head, in the order of their positions. Immutable: copies share it.

    Attributes:
        keys: (N, d), N being the sum of the lengths.
        values: (N, dv).
        lengths: pairs of each of the H heads.
        prefix: the first pairs of each head that are never evicted.
        scores: (N,) float32 log importance, +inf on the prefix; None if not kept.

    Raises:
        TypeError, ValueError: keys, values, lengths and scores that are not those of the same pairs, or a prefix that
            is longer than a head.
    """

    keys: Tensor | Quantised
    values: Tensor | Quantised
    lengths: tuple[int, ...]
    prefix: int = 0
    scores: Tensor | None = None

    def __post_init__(self) -> None:
        keys, values, lengths = self.keys, self.values, self.lengths
        for name, pairs in (("keys", keys), ("values", values)):
            if not isinstance(pairs, Quantised):
                check_tensors(**{name: pairs})
            if len(pairs.shape) != 2:
                raise ValueError(f"{name} has the shape {tuple(pairs.shape)}; give (N, d)")
        whole = isinstance(lengths, tuple) and lengths and all(type(n) is int and n >= 0 for n in lengths)
        if not whole or not sum(lengths) == len(keys) == len(values):
            raise ValueError(
                f"lengths={lengths!r:.80} must be a tuple of the pairs of each head, keys and values having "
                f"{len(keys)} and {len(values)} in all"
            )
        check_whole(prefix=self.prefix)
        if not 0 <= self.prefix <= min(lengths):
            raise ValueError(f"prefix={self.prefix} must lie in [0, {min(lengths)}], the pairs of the shortest head")
        if self.scores is not None:
            check_tensors(scores=self.scores)
            if self.scores.shape != (len(keys),):
                raise ValueError(f"scores has the shape {tuple(self.scores.shape)}; give ({len(keys)},), one a pair")

    @classmethod
    def pack(
        cls, keys: Tensor, values: Tensor, keep: Tensor, prefix: int = 0, scores: Tensor | None = None
    ) -> PackedHeads:
        """Keep some pairs of a dense layer.

        Args:
            keys, values: (H, n, d) and (H, n, dv).
            keep: (H, n) bool; the first ``prefix`` columns must be True.
            prefix: see the class.
            scores: (H, n) float32, to be kept too.
        """
        check_tensors(keys=keys, values=values, keep=keep)
        check_whole(prefix=prefix)
        fits = keys.ndim == values.ndim == 3 and keys.shape[:2] == values.shape[:2] == keep.shape
        if not fits or keep.dtype != torch.bool:
            raise ValueError(
                f"keys {tuple(keys.shape)}, values {tuple(values.shape)} and keep {tuple(keep.shape)} {keep.dtype} "
                "must be (H, n, d), (H, n, dv) and (H, n) bool"
            )
        if not 0 <= prefix <= keep.shape[1] or not bool(keep[:, :prefix].all()):
            raise ValueError(f"prefix={prefix} must be at least 0, and keep True in that many first columns")
        if scores is not None:
            check_tensors(scores=scores)
            if scores.shape != keep.shape:
                raise ValueError(f"scores has the shape {tuple(scores.shape)}; give {tuple(keep.shape)}, as keep has")
        keep = keep.to(keys.device)
        lengths = tuple(keep.sum(1).tolist())
        return cls(keys[keep], values[keep], lengths, prefix, None if scores is None else scores[keep])

    @property
    def head_dim(self) -> int:
        return int(self.keys.shape[1])

    @property
    def value_dim(self) -> int:
        return int(self.values.shape[1])

    @cached_property
    def starts(self) -> Tensor:
        """(H + 1,) int32 on the device of the keys: where each head begins, and the end."""
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=self.keys.device)

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and, where kept, scores: ``N * (d + dv) * itemsize`` unless they are quantised."""
        parts = (self.keys, self.values, self.scores)
        return sum(p.nbytes for p in parts if p is not None)

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys (N, d) and values (N, dv), dequantised."""
        keys, values = self.keys, self.values
        return (
            keys.dequantise(dtype) if isinstance(keys, Quantised) else keys,
            values.dequantise(dtype) if isinstance(values, Quantised) else values,
        )

    def heads(self, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys (n_h, d) and values (n_h, dv) of one head after the other; only one is dequantised at a time."""
        for keys, values in self._views:
            yield (
                keys.dequantise(dtype) if isinstance(keys, Quantised) else keys,
                values.dequantise(dtype) if isinstance(values, Quantised) else values,
            )

    @cached_property
    def _views(self) -> list[tuple[Tensor | Quantised, Tensor | Quantised]]:
        parts = [slice(end - n, end) for n, end in zip(self.lengths, accumulate(self.lengths), strict=True)]
        return [(self.keys[part], self.values[part]) for part in parts]

    def prefix_pairs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(H, prefix, d) and (H, prefix, dv)."""
        pairs = [(k[: self.prefix], v[: self.prefix]) for k, v in self.heads(dtype)]
        return torch.stack([k for k, _ in pairs]), torch.stack([v for _, v in pairs])

    def select(self, keep: Tensor) -> PackedHeads:
        """Those pairs only.

        Args:
            keep: (N,) bool, True on the prefix.
        """
        check_tensors(keep=keep)
        if keep.shape != (len(self.keys),) or keep.dtype != torch.bool:
            raise ValueError(f"keep is {keep.dtype} of shape {tuple(keep.shape)}; give ({len(self.keys)},) bool")
        lengths = tuple(int(part.sum()) for part in keep.split(list(self.lengths)))
        scores = None if self.scores is None else self.scores[keep]
        return replace(self, keys=self.keys[keep], values=self.values[keep], lengths=lengths, scores=scores)

    def append(self, other: PackedHeads) -> PackedHeads:
        """The pairs of ``other`` behind those of every head; ``other`` has no prefix.

        Raises:
            TypeError: no packed pairs.
            ValueError: other heads, sizes or types.
        """
        if not isinstance(other, PackedHeads):
            raise TypeError(f"other is a {type(other).__name__}; give PackedHeads")
        kinds = [
            (len(p.lengths), p.head_dim, p.value_dim, type(p.keys).__name__, _kind(p.keys), _kind(p.values))
            for p in (self, other)
        ]
        if kinds[0] != kinds[1]:
            raise ValueError(f"other has heads, sizes and types {kinds[1]}; give {kinds[0]}, as those here")
        order = _interleave(self.lengths, other.lengths).to(self.keys.device)
        scores = None
        if self.scores is not None and other.scores is not None:
            scores = torch.cat([self.scores, other.scores])[order]
        return replace(
            self,
            keys=_cat(self.keys, other.keys)[order],
            values=_cat(self.values, other.values)[order],
            lengths=tuple(a + b for a, b in zip(self.lengths, other.lengths, strict=True)),
            scores=scores,
        )

    def quantise(self, bits: int, group: int = 32) -> PackedHeads:
        """Keys and values as integers of 8 or 4 bits; see :class:`Quantised`."""
        if isinstance(self.keys, Quantised) or isinstance(self.values, Quantised):
            raise ValueError("the pairs are quantised already; quantise the cache that was compressed without bits=")
        return replace(self, keys=Quantised.of(self.keys, bits, group), values=Quantised.of(self.values, bits, group))

    def to(self, device: torch.device | str) -> PackedHeads:
        scores = None if self.scores is None else self.scores.to(device)
        return replace(self, keys=self.keys.to(device), values=self.values.to(device), scores=scores)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedHeads:
        return self


def _kind(pairs: Tensor | Quantised) -> Any:
    """What two arrays must share to be joined."""
    return pairs.scale.shape[1] if isinstance(pairs, Quantised) else pairs.dtype


def _cat(first: Tensor | Quantised, second: Tensor | Quantised) -> Any:
    if isinstance(first, Quantised) and isinstance(second, Quantised):
        return first.cat(second)
    assert isinstance(first, Tensor) and isinstance(second, Tensor)
    return torch.cat([first, second])


def _interleave(first: tuple[int, ...], second: tuple[int, ...]) -> Tensor:
    """Indices into the concatenation of two packed arrays that put each head's parts side by side."""
    parts, a, b = [], 0, sum(first)
    for n, m in zip(first, second, strict=True):
        parts += [torch.arange(a, a + n), torch.arange(b, b + m)]
        a, b = a + n, b + m
    return torch.cat(parts)
