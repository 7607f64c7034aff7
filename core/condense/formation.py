"""Multi-formation: several training images out of each stored one (thesis section 6.3.2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise, product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import check_choice, check_strings, check_tensors, check_whole

AXES = ("space", "time")
MODES = ("single", "multi", "bound")


class MultiFormation(nn.Module):
    """Cut every stored image into tiles and enlarge each to the size of the whole (Figure 6.3).

    One tiling serves :meth:`forward` and :meth:`assemble`; it cuts a side of H at ``i * H // factor``, whatever H is.
    Enlarging is bilinear, and exact for tiles of one value.

    Args:
        factor: F; 1 leaves the images as they are.
        axes: ``"space"`` cuts both sides, F * F tiles; ``"time"`` the last axis only, F tiles (spectrograms).
        mode: ``"single"`` gives the tiles of F; ``"multi"`` those of 1, 2, ..., F; ``"bound"`` those of F for as many
            images as ``bound`` results allow, of F - 1 for as many as possible of the rest, and so on.
        bound: largest number of results, for ``mode="bound"``; never fewer than one for each image.

    Raises:
        ValueError: an argument outside its range.

    References:
        Kim et al., "Dataset Condensation via Efficient Synthetic-Data Parameterization", ICML 2022; thesis section
        6.3.2.

    Examples:
        >>> import torch
        >>> from dataopt.core.condense import MultiFormation
        >>> form = MultiFormation(2)
        >>> form(torch.rand(10, 3, 32, 32)).shape, form.labels(torch.tensor([7, 8])).tolist()
        (torch.Size([40, 3, 32, 32]), [7, 7, 7, 7, 8, 8, 8, 8])
    """

    def __init__(self, factor: int = 2, axes: str = "space", mode: str = "single", bound: int = 128):
        super().__init__()
        if isinstance(factor, bool) or not isinstance(factor, int) or factor < 1:
            raise ValueError(f"factor={factor!r} must be a whole number of at least 1")
        check_strings(axes=axes, mode=mode)
        check_whole(bound=bound)
        check_choice(AXES, axes=axes)
        check_choice(MODES, mode=mode)
        if bound < 1:
            raise ValueError(f"bound={bound} must be at least 1")
        self.factor, self.axes, self.mode, self.bound = factor, axes, mode, bound

    def extra_repr(self) -> str:
        return f"{self.factor}, axes={self.axes!r}, mode={self.mode!r}"

    def tiles(self, factor: int | None = None) -> int:
        """Results of one image at a factor; None is what ``mode`` gives (of ``"bound"``, the most)."""
        if factor is None:
            return sum(map(self.tiles, self._factors())) if self.mode == "multi" else self.tiles(self.factor)
        return factor if self.axes == "time" else factor**2

    def counts(self, n: int) -> list[int]:
        """Results of each of n images, in their order."""
        return [sum(map(self.tiles, factors)) for factors, part in self._parts(n) for _ in range(part)]

    def labels(self, y: Tensor) -> Tensor:
        """(n, ...) labels of the stored images to those of the results."""
        return y.repeat_interleave(torch.tensor(self.counts(len(y)), device=y.device, dtype=torch.long), 0)

    def check(self, size: Sequence[int]) -> None:
        """Raise ValueError where images of (H, W) have too few pixels for the factor."""
        if self.factor > (size[1] if self.axes == "time" else min(size)):
            raise ValueError(
                f"factor={self.factor} is larger than the {size[0]} x {size[1]} images; give at most one tile a pixel"
            )

    def forward(self, s: Tensor) -> Tensor:
        """(n, C, H, W) floating to (n', C, H, W); the results of one image stand together, tiles row by row.

        Raises:
            ValueError: another shape, or a factor larger than the image.
        """
        check_tensors(s=s)
        if s.ndim != 4 or not s.shape[1:].numel():
            raise ValueError(f"s has the shape {tuple(s.shape)}; give (n, C, H, W)")
        if not s.is_floating_point():
            raise TypeError(f"s holds {s.dtype}; give floating values")
        self.check(s.shape[2:])
        out, start = [], 0
        for factors, n in self._parts(len(s)):
            part = s[start : start + n]
            size = (s.shape[2], s.shape[3])
            formed = [_enlarge(tile, size) for f in factors for tile in self._cut(part, f)]
            out.append(formed[0] if len(formed) == 1 else torch.stack(formed, 1).flatten(0, 1))
            start += n
        return out[0] if len(out) == 1 else torch.cat(out)

    def assemble(self, images: Tensor) -> Tensor:
        """Shrink images by area and lay them out as tiles, what :meth:`forward` takes apart again.

        Args:
            images: (n * k, C, H, W) floating, k the :meth:`tiles` of ``factor``.

        Returns:
            (n, C, H, W).
        """
        k = self.tiles(self.factor)
        check_tensors(images=images)
        if images.ndim != 4 or len(images) % k or not images.numel():
            raise ValueError(f"images has the shape {tuple(images.shape)}; give (n * {k}, C, H, W)")
        if not images.is_floating_point():
            raise TypeError(f"images holds {images.dtype}; give floating values")
        self.check(images.shape[2:])
        groups = images.unflatten(0, (-1, k))
        out = torch.empty_like(groups[:, 0])
        for i, tile in enumerate(self._cut(out, self.factor)):
            tile.copy_(_shrink(groups[:, i], (tile.shape[2], tile.shape[3])))
        return out

    def _factors(self) -> range:
        return range(1, self.factor + 1)

    def _parts(self, n: int) -> Iterator[tuple[list[int], int]]:
        """Factors to apply, and to how many of the images."""
        if self.mode != "bound":
            yield (list(self._factors()) if self.mode == "multi" else [self.factor]), n
            return
        left, spare = n, self.bound - n  # every image gives one result at least
        for factor in reversed(self._factors()):
            more = self.tiles(factor) - 1
            part = left if not more else min(left, max(spare, 0) // more)
            if part:
                yield [factor], part
            left, spare = left - part, spare - part * more

    def _cut(self, s: Tensor, factor: int) -> Iterator[Tensor]:
        rows = spans(s.shape[2], 1 if self.axes == "time" else factor)
        for r, c in product(rows, spans(s.shape[3], factor)):
            yield s[:, :, r, c]


def spans(n: int, parts: int) -> list[slice]:
    """``range(n)`` in consecutive parts whose lengths differ by one at most."""
    edges = [i * n // parts for i in range(parts + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]


def _enlarge(tile: Tensor, size: tuple[int, int]) -> Tensor:
    if tile.shape[2:] == size:
        return tile
    base = tile[:, :, :1, :1].detach()  # keeps equal values equal; as weights sum to one, no gradient is lost
    return base + F.interpolate(tile - base, size=size, mode="bilinear", align_corners=False)


def _shrink(x: Tensor, size: tuple[int, int]) -> Tensor:
    base = x[:, :, :1, :1]  # the mean of equal values would be rounded
    return base + F.adaptive_avg_pool2d(x - base, size)
