"""Moving keys that carry rotary positions to other positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import check_flags, check_tensors


@dataclass(frozen=True)
class Rotation:
    """The rotary embedding of a model: R(b) R(a)^-1 = R(b - a) moves a key from position a to b.

    A scaling of the embedding (YaRN, LongRoPE) stays on the key as it is.

    Attributes:
        frequencies: (r / 2,) radians per position of each pair of the first r of the head's d dimensions.
        interleaved: pairs are (0, 1), (2, 3), ...; otherwise (0, r / 2), (1, r / 2 + 1), ...

    Raises:
        TypeError, ValueError: frequencies that are no floating (r / 2,).
    """

    frequencies: Tensor
    interleaved: bool = False

    def __post_init__(self) -> None:
        check_tensors(frequencies=self.frequencies)
        check_flags(interleaved=self.interleaved)
        f = self.frequencies
        if f.ndim != 1 or not len(f) or not f.is_floating_point():
            raise ValueError(f"frequencies is {f.dtype} of shape {tuple(f.shape)}; give floating (r / 2,)")
        if f.device.type == "cpu" and not bool(f.isfinite().all()):  # elsewhere a look would wait for the device
            raise ValueError("frequencies holds non-finite values; give radians per position")

    def __call__(self, keys: Tensor, shift: Tensor) -> Tensor:
        """Rotate by whole positions, computed in float32 or better.

        Args:
            keys: (B, H, m, d).
            shift: (B or 1, m) or (m,) integers.

        Raises:
            TypeError: no tensors, or a shift that holds no integers.
            ValueError: shapes that do not go together, or heads smaller than the frequencies need.
        """
        check_tensors(keys=keys, shift=shift)
        if keys.ndim != 4 or not keys.is_floating_point() or keys.shape[3] < 2 * self.frequencies.numel():
            raise ValueError(
                f"keys is {keys.dtype} of shape {tuple(keys.shape)}; give floating (B, H, m, d), d at least "
                f"{2 * self.frequencies.numel()}, two for each of the frequencies"
            )
        if shift.is_floating_point() or shift.dtype == torch.bool:
            raise TypeError(f"shift holds {shift.dtype}; give integers, whole positions")
        batch, length = keys.shape[0], keys.shape[2]
        if shift.shape not in ((length,), (1, length), (batch, length)):
            raise ValueError(f"shift has the shape {tuple(shift.shape)}; give ({length},) or ({batch}, {length})")
        dtype = torch.promote_types(keys.dtype, torch.float32)
        # Angles in float64, where there is one: in float32, 100,000 positions are off by .01 radians.
        exact = torch.float32 if shift.device.type == "mps" else torch.float64
        angle = shift.to(exact).unsqueeze(-1) * self.frequencies.to(shift.device, exact)
        if angle.ndim == 3:
            angle = angle.unsqueeze(1)
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        size = 2 * self.frequencies.numel()
        rotated, rest = keys[..., :size].to(dtype), keys[..., size:]
        if self.interleaved:
            first, second = rotated[..., 0::2], rotated[..., 1::2]
        else:
            first, second = rotated.chunk(2, -1)
        pair = (first * cos - second * sin, second * cos + first * sin)
        out = torch.stack(pair, -1).flatten(-2) if self.interleaved else torch.cat(pair, -1)
        return torch.cat([out.to(keys.dtype), rest], -1) if rest.shape[-1] else out.to(keys.dtype)
