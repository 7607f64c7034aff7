"""Stochastic adversarial training on mixed inputs (thesis 3.4.3, Algorithm 2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..arguments import check_generator, check_numbers
from .saliency import check_batch


@dataclass(frozen=True)
class Noise:
    """The random start of one batch.

    Attributes:
        on: whether the first and the second input of every pair are perturbed.
        kappa: uniform noise like the inputs, pixel units; None where nothing is perturbed.
    """

    on: tuple[bool, bool]
    kappa: Tensor | None


@dataclass(frozen=True)
class Adversarial:
    """Adversarial perturbation at no extra network evaluation.

    Args:
        p: probability that one side of the batch's pairs is perturbed.
        eps: radius of the attack ball, in units of [0, 1] pixels; the thesis uses 10 / 255.
        step: step along the gradient's sign; the released code's (eps * 255 + 2) / 255.
        shared_draw: one draw for both sides (Table 3.9, nu_0 = nu_1).
        decay: scale the perturbation by a uniform draw per batch (False: Table 3.9, fgsm).
        mean, std: how inputs were normalised; :class:`PuzzleMix` fills in its own.

    Raises:
        ValueError: p outside [0, 1], or a negative eps or step.
    """

    p: float
    eps: float
    step: float
    shared_draw: bool = False
    decay: bool = True
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None

    def __post_init__(self) -> None:
        check_numbers(p=self.p, eps=self.eps, step=self.step)
        if not 0 <= self.p <= 1:
            raise ValueError(f"p={self.p} must lie in [0, 1]")
        for name in ("eps", "step"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be finite and not negative; 10/255 is the thesis' eps"
                )

    def start(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Noise]:
        """Draw who is perturbed, and the inputs on which to take the gradient.

        Args:
            x: (B, C, H, W) or (B, C, L) normalised inputs.
            generator: CPU generator.

        Returns:
            (inputs, noise): ``x`` itself where nothing is drawn.

        Raises:
            TypeError, ValueError: ``x`` is no finite floating batch, or ``generator`` no generator.
        """
        check_batch(x)
        check_generator(generator)
        draw = torch.rand(2, generator=generator)
        on = (bool(draw[0] < self.p), bool(draw[0 if self.shared_draw else 1] < self.p))
        if not any(on):
            return x, Noise(on, None)
        kappa = torch.empty(x.shape).uniform_(-self.eps, self.eps, generator=generator).to(x.device, x.dtype)
        pixels = unnormalise(x, self.mean, self.std)
        kappa = (pixels + kappa).clamp(0, 1) - pixels
        return normalise(pixels + kappa, self.mean, self.std), Noise(on, kappa)

    def finish(
        self,
        first: Tensor,
        second: Tensor,
        partner: Tensor,
        noise: Noise,
        gradient: Tensor,
        rng: np.random.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Step along the gradient and add the perturbation to the sides that were drawn."""
        if noise.kappa is None:
            return first, second
        kappa = (noise.kappa + self.step * gradient.sign().to(noise.kappa.dtype)).clamp(-self.eps, self.eps)
        if self.decay:
            kappa = kappa * float(rng.random())
        sides = []
        for on, x, moved in zip(noise.on, (first, second), (kappa, kappa[partner]), strict=True):
            pixels = (unnormalise(x, self.mean, self.std) + moved).clamp(0, 1)
            sides.append(normalise(pixels, self.mean, self.std) if on else x)
        return sides[0], sides[1]


def unnormalise(x: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """Normalised inputs (B, C, ...) back to pixels."""
    return x if mean is None or std is None else x * _channel(std, x) + _channel(mean, x)


def normalise(x: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """Pixels (B, C, ...) to normalised inputs."""
    return x if mean is None or std is None else (x - _channel(mean, x)) / _channel(std, x)


def _channel(values: Sequence[float], x: Tensor) -> Tensor:
    return torch.as_tensor(values, dtype=x.dtype, device=x.device).view(-1, *[1] * (x.ndim - 2))
