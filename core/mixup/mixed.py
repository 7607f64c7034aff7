"""The result of mixing a batch, and what every mixing method checks first."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import check_generator, check_numbers, check_tensors, check_whole
from .grid import Grid

_INDICES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class Moves:
    """Regions of one input that change place, as indices on a grid.

    Attributes:
        grid: (rows, cols).
        sample, place, source: (k,) int64 each: in ``sample``, region ``source`` goes to ``place``.
    """

    grid: Grid
    sample: Tensor
    place: Tensor
    source: Tensor

    @classmethod
    def of(cls, source: np.ndarray, grid: Grid, shown: np.ndarray, device: torch.device) -> Moves:
        """From plans (B, n); moves into hidden places are left out, nobody sees them."""
        sample, place = np.nonzero((source != np.arange(source.shape[1])) & shown.reshape(source.shape))
        moved = np.stack([sample, place, source[sample, place]])
        return cls(grid, *torch.from_numpy(moved).to(device))

    def apply(self, t: Tensor) -> Tensor:
        """Move regions of (B, ..., H, W); a copy where anything moves."""
        if not len(self.sample):
            return t
        rows, cols = self.grid
        out = t.clone()
        source, target = regions(t, rows, cols), regions(out, rows, cols)
        target[self.sample, self.place // cols, self.place % cols] = source[
            self.sample, self.source // cols, self.source % cols
        ]
        return out


@dataclass(frozen=True)
class Mixed:
    """A mixed batch.

    Attributes:
        inputs: like the inputs, (B, C, H, W) or (B, C, L).
        targets: (B, K) float32, the labels of both inputs weighted by their share of the area.
        mask: (B, H, W) or (B, L) float32, share of the first input at each position.
        partner: (B,) int64, who the second input is.
        grid: (rows, cols) of the mask's regions, None where it has none (CutMix).
        moves: the transport of the first and of the second inputs, or None.
    """

    inputs: Tensor
    targets: Tensor
    mask: Tensor
    partner: Tensor
    grid: Grid | None = None
    moves: tuple[Moves, Moves] | None = None

    def apply(self, t: Tensor) -> Tensor:
        """The same mix on anything aligned with the inputs: depth maps, segmentations, features.

        Args:
            t: (B, ..., H', W') for images, (B, ..., L') for 1-d inputs. The sides may differ from
                the inputs' where the regions of the mix divide them. Integer and boolean tensors
                take the source with the larger share (the first one at a half).

        Returns:
            Like ``t``.

        Raises:
            ValueError: another batch size, or sides that the regions of the mix do not divide.
        """
        check_tensors(t=t)
        if t.ndim < self.mask.ndim or len(t) != len(self.mask) or not t.numel():
            raise ValueError(
                f"t has the shape {tuple(t.shape)}; give ({len(self.mask)}, ..., H, W) aligned with the inputs"
            )
        line = self.mask.ndim == 2
        image, mask = (t.unsqueeze(-2), self.mask.unsqueeze(1)) if line else (t, self.mask)
        size = image.shape[-2:]
        if mask.shape[1:] != size:
            grid = self.moves[0].grid if self.moves else self.grid
            if grid and (size[0] % grid[0] or size[1] % grid[1]):
                raise ValueError(
                    f"t has sides {tuple(size)}, which the mix's {grid[0]}x{grid[1]} regions do not divide; resize it"
                )
            mask = F.interpolate(mask.unsqueeze(1), size=size, mode="nearest").squeeze(1)
        finite = not t.is_floating_point() or bool(torch.isfinite(t).all())
        out = blend(image, image[self.partner], mask, self.moves, finite)
        return out.squeeze(-2) if line else out


def blend(
    first: Tensor, second: Tensor, mask: Tensor, moves: tuple[Moves, Moves] | None, finite: bool = True
) -> Tensor:
    """Transport both (B, ..., H, W) and combine them, ``mask`` (B, H, W) being the first one's share.

    With ``finite=False`` a NaN or infinity that the mask hides stays hidden.
    """
    if moves is not None:
        first, second = moves[0].apply(first), moves[1].apply(second)
    share = mask.view(len(mask), *[1] * (first.ndim - 3), *mask.shape[1:])
    if not first.is_floating_point():
        return torch.where(share >= 0.5, first, second)
    share = share.to(first.dtype)
    mixed = torch.lerp(second, first, share)
    return mixed if finite else torch.where(share == 1, first, torch.where(share == 0, second, mixed))


def one_hot(y: Tensor, num_classes: int, batch: int) -> Tensor:
    """(B,) class ids or (B, K) soft or multi-hot labels as (B, K) float32.

    Raises:
        ValueError: wrong shape, ids outside 0..K-1, negative or non-finite weights.
    """
    check_tensors(y=y)
    if y.ndim == 1 and len(y) == batch and not y.is_floating_point() and y.dtype != torch.bool:
        low, high = (int(v) for v in y.aminmax())
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"y holds class ids from {low} to {high}; num_classes={num_classes} allows 0 to {num_classes - 1}"
            )
        return F.one_hot(y.long(), num_classes).float()
    if y.shape == (batch, num_classes):
        y = y.float()
        if not bool((torch.isfinite(y) & (y >= 0)).all()):
            raise ValueError("y holds negative or non-finite label weights; give weights >= 0")
        return y
    raise ValueError(
        f"y is {y.dtype} of shape {tuple(y.shape)}; "
        f"give ({batch},) integer class ids or ({batch}, {num_classes}) weights"
    )


def draw_rng(generator: torch.Generator | None) -> np.random.Generator:
    """A numpy generator seeded by one draw from ``generator`` (the default one if None)."""
    check_generator(generator)
    return np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))


def resolve_partner(partner: Tensor | None, batch: int, rng: np.random.Generator, device: torch.device) -> Tensor:
    """Indices of the second inputs: the given ones checked, or a random permutation.

    Raises:
        ValueError: a batch of one with no partner given, or partners of another shape or range.
    """
    if partner is None:
        if batch < 2:
            raise ValueError(
                "x is a batch of one, which has nobody to mix with; use larger batches (drop_last=True in the loader) "
                "or give partner="
            )
        return torch.from_numpy(rng.permutation(batch)).to(device)
    try:
        partner = torch.as_tensor(partner, device=device)
    except (TypeError, ValueError, RuntimeError) as e:
        raise TypeError(f"partner={partner!r:.80} is no tensor; give ({batch},) indices from 0 to {batch - 1}") from e
    if partner.shape != (batch,) or partner.dtype not in _INDICES or partner.min() < 0 or partner.max() >= batch:
        raise ValueError(
            f"partner is {partner.dtype} of shape {tuple(partner.shape)}; give ({batch},) indices from 0 to {batch - 1}"
        )
    return partner.long()


def resolve_lam(lam: float | Tensor | None, alpha: float, batch: int, rng: np.random.Generator) -> Tensor:
    """Expected share of the first input, (B,) float64: the given one checked, or Beta(alpha, alpha).

    Raises:
        ValueError: a value outside [0, 1], or a tensor that is not (B,).
    """
    if lam is None:
        lam = rng.beta(alpha, alpha) if alpha > 0 else 1.0
    try:
        out = torch.as_tensor(lam, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as e:
        raise TypeError(f"lam={lam!r:.80} must be a number in [0, 1] or a ({batch},) tensor of such numbers") from e
    if out.ndim > 1 or (out.ndim == 1 and len(out) != batch) or not bool(((out >= 0) & (out <= 1)).all()):
        raise ValueError(f"lam={lam} must be a number in [0, 1] or a ({batch},) tensor of such numbers")
    return out.expand(batch)


def check_constructor(num_classes: int, alpha: float) -> None:
    check_whole(num_classes=num_classes)
    check_numbers(alpha=alpha)
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes} must be at least 1")
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha={alpha} must be finite and not negative; 1.0 draws the share uniformly")


def regions(t: Tensor, rows: int, cols: int) -> Tensor:
    """(B, ..., H, W) as a view (B, rows, cols, ..., H / rows, W / cols)."""
    t = t.unflatten(-1, (cols, -1)).unflatten(-3, (rows, -1))  # ..., rows, bh, cols, bw
    return t.movedim((-4, -2), (1, 2))
