"""Moving keys that carry rotary positions to other positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """The rotary embedding of a model: R(b) R(a)^-1 = R(b - a) moves a key from position a to b.

    A scaling of the embedding (YaRN, LongRoPE) stays on the key as it is.

    Attributes:
        frequencies: (r / 2,) radians per position of each pair of the first r of the head's d dimensions.
        interleaved: pairs are (0, 1), (2, 3), ...; otherwise (0, r / 2), (1, r / 2 + 1), ...
    """

    frequencies: Tensor
    interleaved: bool = False

    def __call__(self, keys: Tensor, shift: Tensor) -> Tensor:
        """Rotate by whole positions, computed in float32 or better.

        Args:
            keys: (B, H, m, d).
            shift: (B or 1, m) or (m,) integers.
        """
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
