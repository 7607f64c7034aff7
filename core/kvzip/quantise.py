"""Keys and values as small integers, in groups along the head dimension."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_tensors, check_whole


@dataclass(frozen=True)
class Quantised:
    """A (N, d) tensor as integers of 8 or 4 bits with a scale and a minimum for each group.

    Attributes:
        codes: (N, d) uint8, or (N, d / 2) with two codes in a byte, the even column in the low half.
        scale, minimum: (N, d / group) float16.
        bits: 8 or 4.
    """

    codes: Tensor
    scale: Tensor
    minimum: Tensor
    bits: int

    @classmethod
    def of(cls, x: Tensor, bits: int, group: int = 32) -> Quantised:
        """Round to the nearest of 2**bits equidistant values between each group's extremes.

        Args:
            x: (N, d) floating.
            bits: 8 or 4.
            group: columns that share a scale; must divide d.

        Raises:
            ValueError: other bits, a group that does not divide d, or values beyond float16.
        """
        check_tensors(x=x)
        check_whole(bits=bits, group=group)
        if bits not in (4, 8):
            raise ValueError(f"bits={bits} must be 8 or 4, or None to keep the model's precision")
        if x.ndim != 2 or not x.is_floating_point():
            raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}; give floating (N, d)")
        if bits == 4 and x.shape[1] % 2:
            raise ValueError(f"x has {x.shape[1]} columns; 4 bits store them in pairs, so give an even number")
        if group < 1 or not x.shape[1] or x.shape[1] % group:
            raise ValueError(f"group={group} must divide the head size {x.shape[1]}")
        grouped = x.float().unflatten(1, (-1, group))
        low, high = grouped.aminmax(dim=-1) if len(x) else (grouped[..., 0], grouped[..., 0])
        if not ((low.abs() < 6e4) & (high.abs() < 6e4)).all():
            raise ValueError("keys or values are beyond the range of float16 or not finite; keep them with bits=None")
        levels = 2**bits - 1
        minimum = low.half()
        # The largest code must reach the maximum from the rounded minimum.
        scale = ((high - minimum.float()) / levels).clamp(min=0).half()
        step = scale.float().masked_fill(scale == 0, 1).unsqueeze(-1)
        codes = ((grouped - minimum.float().unsqueeze(-1)) / step).round_().clamp_(0, levels).flatten(1).to(torch.uint8)
        if bits == 4:
            codes = codes[:, 0::2] | (codes[:, 1::2] << 4)
        return cls(codes, scale, minimum, bits)

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """(N, d) in the given dtype."""
        codes = self.codes
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], -1).flatten(1)
        grouped = codes.unflatten(1, (self.scale.shape[1], -1)).float()
        return (
            torch.addcmul(self.minimum.float().unsqueeze(-1), grouped, self.scale.float().unsqueeze(-1))
            .flatten(1)
            .to(dtype)
        )

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.codes), self.codes.shape[1] * (8 // self.bits)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes + self.minimum.nbytes

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: Any) -> Quantised:
        return Quantised(self.codes[rows], self.scale[rows], self.minimum[rows], self.bits)

    def cat(self, other: Quantised) -> Quantised:
        if self.bits != other.bits:
            raise ValueError(f"cannot join {self.bits}-bit and {other.bits}-bit pairs; use the same bits for both")
        parts = zip((self.codes, self.scale, self.minimum), (other.codes, other.scale, other.minimum), strict=True)
        codes, scale, minimum = (torch.cat(p) for p in parts)
        return Quantised(codes, scale, minimum, self.bits)

    def to(self, device: torch.device | str) -> Quantised:
        return Quantised(self.codes.to(device), self.scale.to(device), self.minimum.to(device), self.bits)
