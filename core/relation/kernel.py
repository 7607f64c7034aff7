"""The similarity kernel k(i, j) of two samples (thesis section 5.3.4)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import check_choice

SIMILARITIES = ("cosine", "rbf")


@dataclass(frozen=True)
class Kernel:
    """k = (s * c)^t, eq. 5.4, with products of at most ``cut`` set to zero before the power.

    Attributes:
        similarity: s of unit features a, b: ``"cosine"``, max(0, a.b); or ``"rbf"``, exp(-|a - b|^2), whose
            bandwidth is the temperature's.
        compatibility: c = p_i.p_j, eq. 5.5; False for c = 1.
        temperature: t > 0. Whole numbers are much faster than others.
        cut: in [0, 1).
    """

    similarity: str = "cosine"
    compatibility: bool = True
    temperature: float = 4
    cut: float = 0.03

    def __post_init__(self) -> None:
        check_choice(SIMILARITIES, kernel=self.similarity)
        if not (0 < self.temperature < math.inf):
            raise ValueError(f"temperature={self.temperature:g} must be a positive number, such as 4")
        if not 0 <= self.cut < 1:
            raise ValueError(f"edge_cut={self.cut} must lie in [0, 1); 0 keeps every edge")

    def similarities_(self, dots: Tensor) -> Tensor:
        """s from dot products of unit features, in place; the hinge is left to the cut, which is not negative."""
        return dots.sub_(1).mul_(2).exp_() if self.similarity == "rbf" else dots

    def values_(self, dots: Tensor, compatible: Tensor | None) -> Tensor:
        """k from the products of features and of probabilities, in place of ``dots``."""
        x = self.similarities_(dots)
        if compatible is not None:
            x.mul_(compatible)
        return power_(torch.threshold_(x, self.cut, 0.0), self.temperature)


def power_(x: Tensor, t: float) -> Tensor:
    """x^t in place, by squaring where t is a power of two."""
    if t in (1, 2, 4, 8, 16):
        while t > 1:
            x.square_()
            t /= 2
        return x
    return x.pow_(t)
