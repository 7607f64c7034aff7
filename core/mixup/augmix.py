"""AugMix images, to be mixed or to be trained on with a consistency loss (thesis section 3.6.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import check_channels, check_flags, check_generator, check_tensors, check_whole
from ..extras import optional
from .adversarial import normalise, unnormalise


def augmix(
    x: Tensor,
    generator: torch.Generator | None = None,
    *,
    severity: int = 3,
    all_ops: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """Every image blended with augmented copies of itself, with draws of its own, by torchvision's AugMix.

    Mixing two AugMix images, "Puzzle Mix (aug)" of Table 3.7, is a mix of what this returns: take saliency and mix as
    usual, ``x = augmix(x, generator, mean=mean, std=std)`` before both.

    Args:
        x: (B, C, H, W), C being 1 or 3: uint8 pixels, or floating and normalised as ``mean`` and ``std`` say. The
            images pass through 8 bits.
        generator: CPU generator; the default one if None. Other random state stays as it is.
        severity: 1 to 10.
        all_ops: also brightness, contrast, colour and sharpness. Its authors leave these out, because corruptions that
            the network is tested on should be new to it.
        mean, std: per channel; None for pixels in [0, 1].

    Returns:
        Like ``x``.

    Raises:
        TypeError: no tensor, no whole ``severity``, or an ``all_ops`` that is no bool.
        ValueError: inputs of another shape, dtype or range, or a severity outside 1 to 10.
        ModuleNotFoundError: torchvision is not installed.

    References:
        Hendrycks et al., "AugMix: A simple data processing method to improve robustness and uncertainty", ICLR 2020.
    """
    check_tensors(x=x)
    check_whole(severity=severity)
    check_flags(all_ops=all_ops)
    check_generator(generator)
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}; give uint8 pixels, or floating ones")
    if x.ndim != 4 or x.shape[1] not in (1, 3) or not x.numel():
        raise ValueError(f"x has the shape {tuple(x.shape)}; give images (B, 1, H, W) or (B, 3, H, W)")
    if not 1 <= severity <= 10:
        raise ValueError(f"severity={severity} must lie in [1, 10]; 3 is usual")
    check_channels(mean, std, x.shape[1])
    transform = optional("torchvision.transforms.v2", "eval").AugMix(severity=severity, all_ops=all_ops)
    small = _to_bytes(x, mean, std)
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would touch the devices' generators too
        mixed = torch.stack([transform(image) for image in small])  # of a batch, all images would get the same draws
    if x.dtype == torch.uint8:
        return mixed.to(x.device)
    return normalise((mixed.to(x.device).float() / 255), mean, std).to(x.dtype)


def jensen_shannon_loss(*logits: Tensor) -> Tensor:
    """Jensen-Shannon divergence of a network's outputs on views of the same images.

    AugMix trains on ``cross_entropy(clean, y) + 12 * jensen_shannon_loss(clean, first, second)``, first and second
    being two AugMix images, at three network evaluations a step.

    Args:
        logits: two or more, (B, K) each.

    Returns:
        Scalar float32: between 0 and the logarithm of how many there are.

    Raises:
        TypeError: no tensors.
        ValueError: fewer than two, of different shapes, or empty.

    References:
        Hendrycks et al., ICLR 2020, section 3.
    """
    for view in logits:
        check_tensors(logits=view)
    if len(logits) < 2 or not logits[0].numel() or len({tuple(v.shape) for v in logits}) != 1 or logits[0].ndim != 2:
        raise ValueError(f"logits of shapes {[tuple(v.shape) for v in logits]}; give two or more of one shape (B, K)")
    views = torch.stack(logits).float().log_softmax(-1)
    views = views.clamp_min(-1e4)  # a class that is masked out, of logit -inf, would be 0 * (inf - inf)
    middle = views.logsumexp(0) - math.log(len(logits))
    return F.kl_div(middle.expand_as(views), views, reduction="sum", log_target=True) / views[..., 0].numel()


def _to_bytes(x: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    if x.dtype == torch.uint8:
        if mean is not None:
            raise ValueError("x is uint8, which no mean and std have changed; leave both out")
        return x.cpu()
    pixels = unnormalise(x.detach().float(), mean, std)
    low, high = (float(v) for v in pixels.aminmax())
    if not (low >= -0.01 and high <= 1.01):
        raise ValueError(
            f"x means pixels from {low:.3g} to {high:.3g}, not in [0, 1]; give the mean= and std= of its normalisation"
        )
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).cpu()
