"""From pixels to the regions of the mask: pooling, region distances, the mixing prior.

A *grid* (rows, cols) cuts an input into rows x cols equal regions; 1-d inputs are images of one
row. Everything here is batched and runs on the device of its input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]

_PRIOR_EPS = 1e-8  # the released code's guard inside the logarithm


@dataclass(frozen=True)
class MaskCosts:
    """The mask energy of a batch, for labels t = 0..m, t/m being the share of the first input.

    E(t) = sum_i unary[i, t_i] + sum_(i,j) w_ij ((t_i - t_j) / m)^2 over vertical and horizontal
    neighbours. float64 arrays on the CPU.

    Attributes:
        unary: (B, rows, cols, m + 1).
        down: (B, rows - 1, cols), w between a region and the one below it.
        right: (B, rows, cols - 1), w between a region and the one to its right.
    """

    unary: np.ndarray
    down: np.ndarray
    right: np.ndarray


def as_image(x: Tensor) -> Tensor:
    """(B, C, L) becomes (B, C, 1, L); images stay as they are."""
    return x.unsqueeze(2) if x.ndim == 3 else x


def resolve_grid(grid: int | Grid, size: tuple[int, ...]) -> Grid:
    """The (rows, cols) of ``grid`` on inputs of spatial ``size`` (H, W) or (L,).

    Raises:
        ValueError: the grid is not positive or does not divide the size.
    """
    sides = list(grid) if isinstance(grid, Sequence) else [1 if len(size) == 1 else grid, grid]
    if len(sides) != 2 or not all(isinstance(n, int | np.integer) and not isinstance(n, bool) for n in sides):
        raise TypeError(f"grid={grid!r:.80} must be a whole number, or a pair of them (rows, cols)")
    rows, cols = (int(n) for n in sides)
    height, width = size if len(size) == 2 else (1, *size)
    if rows < 1 or cols < 1 or height % rows or width % cols:
        side = math.gcd(height, width) if len(size) == 2 else width
        fits = [b for b in range(2, side + 1) if side % b == 0]
        raise ValueError(
            f"grid={grid} does not divide inputs of size {'x'.join(map(str, size))}; "
            f"grids that fit: {', '.join(map(str, fits[:12])) or 'none but 1, resize the inputs'}"
        )
    return rows, cols


def pool(s: Tensor, grid: Grid) -> Tensor:
    """Mean over each region, normalised to sum to one: (B, H, W) to (B, rows, cols)."""
    rows, cols = grid
    p = F.avg_pool2d(s.unsqueeze(1), (s.shape[1] // rows, s.shape[2] // cols)).squeeze(1)
    return p / p.sum((1, 2), keepdim=True)


def in_double(x: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none."""
    return x.cpu().double() if x.device.type == "mps" else x.double()


def binomial_prior(lam: Tensor, labels: int) -> Tensor:
    """-log p(t) for t = 0..m, t ~ Binomial(m, lam), as thesis 3.4.1: (B,) to (B, m + 1).

    E[t / m] = lam, the expected share of the first input. The 1e-8 inside the logarithm is the
    released code's; it keeps lam = 0 and 1 finite.
    """
    m = labels - 1
    t = torch.arange(labels, dtype=torch.float64, device=lam.device)
    ways = torch.tensor([math.comb(m, k) for k in range(labels)], dtype=torch.float64, device=lam.device)
    lam = lam.double().unsqueeze(1)
    return -torch.log(ways * lam**t * (1 - lam) ** (m - t) + _PRIOR_EPS)


def region_distances(x: Tensor, partner: Tensor, grid: Grid, neigh_size: int) -> tuple[Tensor, Tensor]:
    """Distance d_p between the facing borders of neighbouring regions, thesis 3.5.

    Args:
        x: (B, C, H, W) with values in [0, 1].
        partner: (B,) indices of the second inputs.
        grid: the regions.
        neigh_size: pixels are averaged over squares of this side first; the largest divisor of
            the region's side that is not above it is taken.

    Returns:
        (down, right) of shapes (B, 2, 2, rows - 1, cols) and (B, 2, 2, rows, cols - 1): entry
        [b, a, c] compares source a of the upper or left region with source c of the other one,
        1 being the first input and 0 its partner: mean absolute difference over channels and border.
    """
    rows, cols = grid
    bh, bw = x.shape[2] // rows, x.shape[3] // cols
    kh, kw = _divisor(bh, neigh_size), _divisor(bw, neigh_size)
    first = F.avg_pool2d(x, (kh, kw))
    h, w = bh // kh, bw // kw  # a region's side after pooling
    sources = (first[partner], first)

    def facing(upper: Tensor, lower: Tensor, across: int) -> Tensor:
        d = (upper - lower).abs().mean(1)  # mean over channels
        return d.unflatten(-1, (-1, across)).mean(-1)  # and over the border

    down, right = [], []
    for a in sources:
        for c in sources:
            down.append(facing(a[:, :, h - 1 : -1 : h], c[:, :, h::h], w))
            right.append(facing(a[..., w - 1 : -1 : w].transpose(2, 3), c[..., w::w].transpose(2, 3), h))
    return (
        torch.stack(down, 1).unflatten(1, (2, 2)),
        torch.stack(right, 1).unflatten(1, (2, 2)).transpose(3, 4),
    )


def mask_costs(
    first: Tensor,
    second: Tensor,
    lam: Tensor,
    distances: tuple[Tensor, Tensor] | None,
    *,
    labels: int,
    beta: float,
    gamma: float,
    eta: float,
    data_term: str,
) -> MaskCosts:
    """The energy of thesis eq. 3.4 on one grid, scaled as the released code scales it.

    beta acts as beta / (16 * n) on each edge, n being the number of parallel edges that a straight
    cut crosses, so a cut costs the same on every grid (the released beta / (16 B) on a B x B grid);
    gamma is relative to beta; eta acts as eta / (rows * cols).

    ``data_term="released"`` keeps the interaction kappa = (d10 + d01 - d11 - d00) / 2 in the
    pairwise weight; ``"thesis"`` is Definition 3, where it cancels and only its affine part, which
    both share, remains in the unaries.

    Args:
        first, second: (B, rows, cols) pooled saliency of the inputs and of their partners.
        lam: (B,) expected share of the first input.
        distances: what :func:`region_distances` gives, or None for gamma = 0.
    """
    rows, cols = first.shape[1:]
    first, second = in_double(first), in_double(second)
    lam = lam.to(first.device)
    w_down = torch.full_like(first[:, 1:], beta / (16 * cols))
    w_right = torch.full_like(first[:, :, 1:], beta / (16 * rows))
    show_second, show_first = first.clone(), second.clone()  # showing one hides the other's saliency
    if distances is not None:
        for d, w, upper, lower in (
            (in_double(distances[0]), w_down, np.s_[:, :-1], np.s_[:, 1:]),
            (in_double(distances[1]), w_right, np.s_[:, :, :-1], np.s_[:, :, 1:]),
        ):
            g = gamma * w  # before kappa is added to w
            d00, d01, d10, d11 = (d[:, a, c] for a in (0, 1) for c in (0, 1))
            show_first[upper] += g * (d10 + d11) / 2
            show_second[upper] += g * (d00 + d01) / 2
            show_first[lower] += g * (d01 + d11) / 2
            show_second[lower] += g * (d00 + d10) / 2
            if data_term == "released":
                w += g * (d10 + d01 - d11 - d00) / 2
    share = torch.linspace(0, 1, labels, dtype=torch.float64, device=first.device)
    unary = show_first.unsqueeze(-1) * share + show_second.unsqueeze(-1) * (1 - share)
    unary += (eta / (rows * cols)) * binomial_prior(lam, labels)[:, None, None, :]
    flat = torch.cat([unary.flatten(), w_down.flatten(), w_right.flatten()]).cpu().numpy()  # one transfer
    parts = np.split(flat, np.cumsum([unary.numel(), w_down.numel()]))
    return MaskCosts(*(p.reshape(t.shape) for p, t in zip(parts, (unary, w_down, w_right), strict=True)))


def _divisor(n: int, limit: int) -> int:
    return max(k for k in range(1, min(n, limit) + 1) if n % k == 0)
