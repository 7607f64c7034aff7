"""Error where only the background changes (thesis section 4.5.4)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..arguments import check_generator, check_numbers, check_tensors
from ..mixup.adversarial import normalise
from ..mixup.mixed import draw_rng
from .pixels import Channels, to_pixels
from .predictions import each, evaluating, logits_of

Boxes = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class BackgroundError:
    """Top-1 errors in [0, 1]; what Table 4.3 has in parentheses is the difference to ``clean``.

    Attributes:
        clean: on the images as they are.
        replaced: with another image as the background.
        noisy: with Gaussian noise on the background.
    """

    clean: float
    replaced: float
    noisy: float


def replace_background(x: Tensor, boxes: Boxes, generator: torch.Generator | None = None) -> Tensor:
    """Another image of the batch, drawn at random, everywhere outside the boxes.

    Args:
        x: (B, C, H, W), of any normalisation.
        boxes: (B, 4), or B tensors (n, 4) where images have several: left, top, right and bottom in pixels, the last
            two exclusive. Fractions of pixels count as inside.
        generator: CPU generator.

    Returns:
        Like ``x``.

    Raises:
        TypeError: ``x`` or an image's boxes are no tensor.
        ValueError: boxes that do not fit the images, or a batch of one.
    """
    inside = _inside(x, boxes)
    if len(x) < 2:
        raise ValueError("x is a batch of one, which has no other image to take a background from; use larger batches")
    order = torch.from_numpy(draw_rng(generator).permutation(len(x)))
    other = torch.empty_like(order)
    other[order] = order.roll(1)  # one cycle: nobody gets itself
    return torch.where(inside, x, x[other.to(x.device)])


def noisy_background(
    x: Tensor,
    boxes: Boxes,
    sigma: float = 0.1,
    mean: Channels = None,
    std: Channels = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Gaussian noise added to the pixels outside the boxes.

    Args:
        x: (B, C, H, W), normalised as ``mean`` and ``std`` say; None for pixels in [0, 1].
        boxes: as of :func:`replace_background`.
        sigma: standard deviation, in units of [0, 1] pixels; the thesis does not state its own.
        generator: CPU generator.

    Returns:
        Like ``x``; its pixels stay in [0, 1].

    Raises:
        TypeError: ``x`` or an image's boxes are no tensor, or ``sigma`` is no number.
        ValueError: boxes that do not fit the images, a negative ``sigma``, or pixels outside [0, 1].
    """
    inside = _inside(x, boxes)
    check_numbers(sigma=sigma)
    check_generator(generator)
    if not 0 <= sigma < float("inf"):
        raise ValueError(f"sigma={sigma} must be finite and not negative; 0.1 is a tenth of the range")
    noise = torch.randn(x.shape, generator=generator).to(x.device, x.dtype)
    noisy = normalise((to_pixels(x, mean, std) + sigma * noise).clamp(0, 1), mean, std)
    return torch.where(inside, x, noisy)


def background_error(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor, Boxes]],
    mean: Channels = None,
    std: Channels = None,
    sigma: float = 0.1,
    generator: torch.Generator | None = None,
) -> BackgroundError:
    """Top-1 error with the background as it is, replaced, and noisy (Table 4.3).

    Args:
        model: maps (B, C, H, W) to logits (B, K); it runs in evaluation mode, and its flags are restored.
        batches: of normalised inputs, (B,) class ids and boxes as of :func:`replace_background`; read once.
        mean, std, sigma, generator: as of :func:`noisy_background`.

    Raises:
        TypeError, ValueError: as of the two functions and :func:`predict`.
    """
    total, wrong = 0, torch.zeros(3, dtype=torch.int64)
    with evaluating(model):
        for x, y, boxes in each(batches, boxes=True):
            replaced = replace_background(x, boxes, generator)
            noisy = noisy_background(x, boxes, sigma, mean, std, generator)
            for i, seen in enumerate((x, replaced, noisy)):
                wrong[i] += (logits_of(model, seen, y).argmax(1) != y.cpu()).sum()
            total += len(y)
    if not total:
        raise ValueError("batches is empty; give at least one batch (an iterator can be read only once)")
    return BackgroundError(*(int(n) / total for n in wrong))


def _inside(x: Tensor, boxes: Boxes) -> Tensor:
    """(B, 1, H, W), true inside any of an image's boxes."""
    check_tensors(x=x)
    if x.ndim != 4 or not x.numel():
        raise ValueError(f"x has the shape {tuple(x.shape)}; give images (B, C, H, W)")
    check_count(boxes, len(x))
    height, width = x.shape[2:]
    inside = torch.zeros(len(x), 1, height, width, dtype=torch.bool)
    for i, of_image in enumerate(boxes):
        for left, top, right, bottom in check_boxes(of_image, height, width).tolist():
            inside[i, 0, int(top) : -int(-bottom // 1), int(left) : -int(-right // 1)] = True
    return inside.to(x.device)


def check_count(boxes: Boxes, images: int) -> None:
    """Raise unless there is one entry for each image."""
    if not isinstance(boxes, Tensor | list | tuple) or (isinstance(boxes, Tensor) and not boxes.ndim):
        raise TypeError(f"boxes is a {type(boxes).__name__}; give (B, 4), or a list of B tensors (n, 4)")
    if len(boxes) != images:
        raise ValueError(f"boxes are those of {len(boxes)} images, x holds {images}; give one entry for each image")


def check_boxes(boxes: Tensor, height: int, width: int) -> Tensor:
    """One image's boxes, (4,) or (n, 4), as (n, 4) float64 on the CPU.

    Raises:
        TypeError: no tensor.
        ValueError: another shape, no box, or a box that is empty or not within the image.
    """
    check_tensors(boxes=boxes)
    out = torch.as_tensor(boxes).double().cpu().view(-1, 4) if boxes.shape[-1:] == (4,) else torch.empty(0, 4)
    left, top, right, bottom = out.unbind(1)
    fits = (left >= 0) & (top >= 0) & (left < right) & (top < bottom) & (right <= width) & (bottom <= height)
    if not len(out) or not bool(fits.all()):
        raise ValueError(
            f"boxes={boxes.tolist()} of an image of {width} by {height} pixels; give (n, 4) left, top, right, bottom "
            "with left < right and top < bottom inside the image"
        )
    return out
