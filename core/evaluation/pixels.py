"""From normalised inputs to pixels in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..arguments import check_channels
from ..mixup.adversarial import unnormalise
from ..mixup.saliency import check_batch

Channels = Sequence[float] | None


def to_pixels(x: Tensor, mean: Channels, std: Channels) -> Tensor:
    """Pixels (B, C, ...) in [0, 1], float32 or what ``x`` is.

    Raises:
        TypeError: ``x`` is no tensor.
        ValueError: ``x`` is no finite floating batch, ``mean`` and ``std`` are not both None or one number a channel
            each, or pixels lie outside [0, 1].
    """
    check_batch(x)
    check_channels(mean, std, x.shape[1])
    pixels = unnormalise(x.detach(), mean, std)
    low, high = (float(v) for v in pixels.aminmax())
    if low < -0.01 or high > 1.01:
        raise ValueError(
            f"x means pixels from {low:.3g} to {high:.3g}, not in [0, 1]; give the mean= and std= of its normalisation"
        )
    return pixels.clamp(0, 1)
