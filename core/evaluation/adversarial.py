"""Error under attack: one step along the gradient's sign (FGSM), or several within a ball (PGD)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import check_generator, check_numbers, check_whole
from ..mixup.adversarial import normalise
from ..mixup.saliency import input_gradient
from .pixels import Channels, to_pixels
from .predictions import Batches, check_labels, check_model, device_of, each, top1_error


def fgsm(
    model: nn.Module, x: Tensor, y: Tensor, eps: float = 8 / 255, mean: Channels = None, std: Channels = None
) -> Tensor:
    """Inputs moved by ``eps`` along the sign of the gradient of the cross-entropy.

    The model runs in evaluation mode; its flags, buffers and parameter gradients stay what they are.

    Args:
        model: maps ``x`` to logits (B, K); it must lie where ``x`` lies.
        x: (B, C, H, W) or (B, C, L), normalised as ``mean`` and ``std`` say; None for pixels in [0, 1].
        y: (B,) class ids.
        eps: in units of [0, 1] pixels. The thesis uses 8/255 for CIFAR and 4/255 for Tiny-ImageNet.

    Returns:
        Like ``x``; its pixels stay in [0, 1].

    Raises:
        TypeError: no module, no tensors, or class ids that are no integers.
        ValueError: ``eps`` outside [0, 1], non-finite inputs, pixels outside [0, 1], class ids that the logits do not
            have, or a gradient that is not finite.

    References:
        Goodfellow, Shlens, Szegedy, "Explaining and harnessing adversarial examples", ICLR 2015; thesis section 3.6.1.
    """
    _check_sizes(eps=eps)
    pixels = to_pixels(x, mean, std)
    return normalise((pixels + eps * _direction(model, x, y)).clamp(0, 1), mean, std)


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float = 8 / 255,
    step: float = 2 / 255,
    steps: int = 7,
    mean: Channels = None,
    std: Channels = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Several steps of :func:`fgsm` from a random start, each time brought back to the ball of radius ``eps``.

    Args:
        model, x, y, mean, std: as of :func:`fgsm`.
        eps: radius of the ball in the maximum norm, in units of [0, 1] pixels.
        step: length of a step; the thesis uses 7 steps of 2/255.
        generator: CPU generator of the start, uniform in the ball.

    Returns:
        Like ``x``; its pixels stay in [0, 1] and within ``eps`` of those of ``x``.

    Raises:
        TypeError, ValueError: as of :func:`fgsm`, or ``steps`` below 1.

    References:
        Madry et al., "Towards deep learning models resistant to adversarial attacks", ICLR 2018; thesis section 3.6.3.
    """
    _check_sizes(eps=eps, step=step)
    check_whole(steps=steps)
    check_generator(generator)
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1; the thesis takes 7")
    pixels = to_pixels(x, mean, std)
    low, high = (pixels - eps).clamp_min(0), (pixels + eps).clamp_max(1)
    start = torch.empty(pixels.shape).uniform_(-eps, eps, generator=generator)
    moved = (pixels + start.to(pixels.device, pixels.dtype)).clamp(low, high)
    for _ in range(steps):
        moved = (moved + step * _direction(model, normalise(moved, mean, std), y)).clamp(low, high)
    return normalise(moved, mean, std)


def fgsm_error(
    model: nn.Module, batches: Batches, eps: float = 8 / 255, mean: Channels = None, std: Channels = None
) -> float:
    """Top-1 error in [0, 1] on inputs that :func:`fgsm` moved (Tables 3.2 to 3.4).

    Args:
        batches: of normalised inputs (B, C, H, W) and (B,) class ids.
        model, eps, mean, std: as of :func:`fgsm`.

    Raises:
        TypeError, ValueError: as of :func:`fgsm` and :func:`predict`.
    """
    device = device_of(model)
    moved = ((fgsm(model, x.to(device), y.to(device), eps, mean, std), y) for x, y in each(batches))
    return top1_error(model, moved)


def pgd_error(
    model: nn.Module,
    batches: Batches,
    eps: float = 8 / 255,
    step: float = 2 / 255,
    steps: int = 7,
    mean: Channels = None,
    std: Channels = None,
    generator: torch.Generator | None = None,
) -> float:
    """Top-1 error in [0, 1] on inputs that :func:`pgd` moved (Table 3.9).

    Args:
        batches: of normalised inputs (B, C, H, W) and (B,) class ids.
        model, eps, step, steps, mean, std, generator: as of :func:`pgd`.

    Raises:
        TypeError, ValueError: as of :func:`pgd` and :func:`predict`.
    """
    device = device_of(model)
    moved = (
        (pgd(model, x.to(device), y.to(device), eps, step, steps, mean, std, generator), y) for x, y in each(batches)
    )
    return top1_error(model, moved)


def _direction(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The sign of the gradient of the cross-entropy, like ``x``."""

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        check_labels(logits, y)  # an id beyond the logits would end a CUDA process
        return F.cross_entropy(logits, y.long())

    check_model(model)
    gradient = input_gradient(model, x, y, loss)
    if not bool(gradient.isfinite().all()):
        raise ValueError("the model's gradient at x is not finite; run it in float32, or look for the inputs at fault")
    return gradient.sign().to(x.dtype)


def _check_sizes(**sizes: float) -> None:
    check_numbers(**sizes)
    for name, value in sizes.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value} must lie in [0, 1], in units of pixels; 8/255 is usual")
