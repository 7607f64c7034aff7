"""Error on corrupted images: twelve corruptions of five severities, for images of any size.

The kinds are those of Hendrycks and Dietterich; the strengths are of this module, with lengths as shares of the
image's shorter side. Numbers compare with each other, not with published ones on CIFAR-C or ImageNet-C.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor, nn
from tqdm import tqdm

from ..arguments import check_choice, check_generator, check_whole
from ..extras import optional
from ..mixup.adversarial import normalise
from ..mixup.mixed import draw_rng
from .pixels import Channels, to_pixels
from .predictions import Batches, each, evaluating, logits_of

SEVERITIES = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class CorruptionError:
    """Top-1 errors in [0, 1].

    Attributes:
        clean: on the images as they are.
        errors: for each corruption, one error for each severity.
    """

    clean: float
    errors: dict[str, tuple[float, ...]]

    @property
    def mean(self) -> float:
        """Over all corruptions and severities, what Table 3.7 reports."""
        return fmean(fmean(row) for row in self.errors.values())

    def relative_to(self, baseline: CorruptionError) -> float:
        """The mean corruption error of Hendrycks and Dietterich: each corruption's error by a baseline's, averaged.

        Raises:
            TypeError: the baseline is none.
            ValueError: the baseline has other corruptions, or makes no error on one of them.
        """
        if not isinstance(baseline, CorruptionError):
            raise TypeError(f"baseline is a {type(baseline).__name__}; give what corruption_error returned")
        if self.errors.keys() != baseline.errors.keys():
            raise ValueError(f"the baseline was measured on {', '.join(baseline.errors)}; measure the same corruptions")
        without = [name for name, row in baseline.errors.items() if not sum(row)]
        if without:
            raise ValueError(f"the baseline makes no error on {', '.join(without)}; nothing can be divided by it")
        return fmean(fmean(row) / fmean(baseline.errors[name]) for name, row in self.errors.items())


def corrupt(x: Tensor, name: str, severity: int, generator: torch.Generator | None = None) -> Tensor:
    """Corrupt images; one seed gives one result, whatever the device.

    Args:
        x: (B, C, H, W) floating pixels in [0, 1], C being 1 or 3.
        name: one of ``CORRUPTIONS``.
        severity: 1 to 5.
        generator: CPU generator of every draw.

    Returns:
        Like ``x``, in [0, 1]; the work is done on the CPU.

    Raises:
        TypeError: no tensor, no name, or a severity that is no whole number.
        ValueError: an unknown name or severity, or inputs of another shape or range.
        ModuleNotFoundError: the extra ``eval`` is not installed.

    References:
        Hendrycks, Dietterich, "Benchmarking neural network robustness to common corruptions and perturbations",
        ICLR 2019; thesis section 3.6.2.
    """
    _check_choice([name], [severity])
    pixels = to_pixels(x, None, None)
    if pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
        raise ValueError(f"x has the shape {tuple(x.shape)}; give images (B, 1, H, W) or (B, 3, H, W)")
    function, strengths = _TABLE[name]
    out = function(pixels.float().cpu(), strengths[severity - 1], draw_rng(generator))
    return out.clamp(0, 1).to(x.device, x.dtype)


def corruption_error(
    model: nn.Module,
    batches: Batches,
    mean: Channels = None,
    std: Channels = None,
    names: Iterable[str] | None = None,
    severities: Iterable[int] = SEVERITIES,
    generator: torch.Generator | None = None,
) -> CorruptionError:
    """Top-1 error on every corruption and severity; with twelve by five the model runs 61 times over the images.

    Args:
        model: maps (B, C, H, W) to logits (B, K); it runs in evaluation mode, and its flags are restored.
        batches: of inputs, normalised as ``mean`` and ``std`` say, and (B,) class ids; read once.
        names: some of ``CORRUPTIONS``; None is all.
        generator: CPU generator; each corruption and severity gets a stream of its own from it, so that its images do
            not depend on which others are asked for.

    Raises:
        TypeError, ValueError: as of :func:`corrupt` and :func:`predict`.
        ModuleNotFoundError: the extra ``eval`` is not installed.
    """
    names = CORRUPTIONS if names is None else names
    for argument, value in (("names", names), ("severities", severities)):
        if isinstance(value, str | Tensor) or not isinstance(value, Iterable):
            raise TypeError(f"{argument}={value!r:.80} is a {type(value).__name__}; give a list")
    names, severities = list(names), list(severities)
    _check_choice(names, severities)
    check_generator(generator)
    seed = int(torch.randint(2**31, (), generator=generator))
    streams = {
        (name, severity): torch.Generator().manual_seed(seed + 10 * CORRUPTIONS.index(name) + severity)
        for name in names
        for severity in severities
    }
    total, clean, wrong = 0, 0, dict.fromkeys(streams, 0)

    def wrong_on(pixels: Tensor, y: Tensor) -> int:
        logits = logits_of(model, normalise(pixels, mean, std), y)
        return int((logits.argmax(1) != y.cpu()).sum())

    with evaluating(model):
        for x, y in tqdm(each(batches), desc="corruptions", unit="batch", disable=None):
            pixels = to_pixels(x, mean, std)
            clean += wrong_on(pixels, y)
            total += len(y)
            for (name, severity), stream in streams.items():
                wrong[name, severity] += wrong_on(corrupt(pixels, name, severity, stream), y)
    if not total:
        raise ValueError("batches is empty; give at least one batch (an iterator can be read only once)")
    return CorruptionError(
        clean / total, {name: tuple(wrong[name, severity] / total for severity in severities) for name in names}
    )


def _check_choice(names: list[str], severities: list[int]) -> None:
    if not names or not severities:
        raise ValueError(f"names={names} and severities={severities} must hold at least one each")
    for name in names:
        check_choice(_TABLE, name=name)
    for severity in severities:
        check_whole(severity=severity)
        check_choice(SEVERITIES, severity=severity)


def _gaussian_noise(x: Tensor, sigma: float, rng: np.random.Generator) -> Tensor:
    noisy = optional("skimage.util", "eval").random_noise(x.numpy(), "gaussian", rng=rng, var=sigma**2)
    return torch.from_numpy(noisy).float()


def _shot_noise(x: Tensor, photons: float, rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(rng.poisson(x.numpy() * photons) / photons).float()


def _impulse_noise(x: Tensor, amount: float, rng: np.random.Generator) -> Tensor:
    noisy = optional("skimage.util", "eval").random_noise(x.numpy(), "s&p", rng=rng, amount=amount)
    return torch.from_numpy(noisy).float()


def _defocus_blur(x: Tensor, radius: float, rng: np.random.Generator) -> Tensor:
    radius *= min(x.shape[2:])
    dy, dx = _offsets(radius)
    return _convolve(x, (radius + 1 - torch.hypot(dy, dx)).clamp(0, 1))


def _motion_blur(x: Tensor, length: float, rng: np.random.Generator) -> Tensor:
    half = length * min(x.shape[2:]) / 2
    dy, dx = _offsets(half)
    angle = torch.from_numpy(rng.uniform(0, np.pi, (len(x), 1, 1))).float()  # each image its own
    along, across = dx * angle.cos() + dy * angle.sin(), dy * angle.cos() - dx * angle.sin()
    beyond = (along.abs() - half).clamp_min(0)
    return _convolve(x, (1 - torch.hypot(beyond, across)).clamp_min(0))


def _zoom_blur(x: Tensor, most: float, rng: np.random.Generator) -> Tensor:
    scale = torch.linspace(1, 1 / most, 8)
    views = [F.affine_grid(s * torch.eye(2, 3).expand(len(x), 2, 3), list(x.shape), align_corners=False) for s in scale]
    return torch.stack([F.grid_sample(x, v, align_corners=False, padding_mode="border") for v in views]).mean(0)


def _fog(x: Tensor, amount: float, rng: np.random.Generator) -> Tensor:
    fog = torch.zeros(len(x), 1, *x.shape[2:])
    for octave in range(1, 6):
        noise = torch.from_numpy(rng.random((len(x), 1, 2**octave, 2**octave))).float()
        fog += F.interpolate(noise, size=x.shape[2:], mode="bicubic") / 2**octave
    low, high = fog.amin((1, 2, 3), keepdim=True), fog.amax((1, 2, 3), keepdim=True)
    peak = x.amax((1, 2, 3), keepdim=True)
    share = (fog - low) / (high - low).clamp_min(1e-6)  # an image of one pixel has no range
    return (x + amount * share) * peak / (peak + amount)


def _brightness(x: Tensor, factor: float, rng: np.random.Generator) -> Tensor:
    return optional("torchvision.transforms.v2.functional", "eval").adjust_brightness(x, factor)


def _contrast(x: Tensor, factor: float, rng: np.random.Generator) -> Tensor:
    return optional("torchvision.transforms.v2.functional", "eval").adjust_contrast(x, factor)


def _elastic(x: Tensor, shift: float, rng: np.random.Generator) -> Tensor:
    side = min(x.shape[2:])
    field = rng.normal(size=(len(x), *x.shape[2:], 2))
    field = ndimage.gaussian_filter(field, (0, 0.08 * side, 0.08 * side, 0), mode="reflect")
    field *= shift / field.std((1, 2, 3), keepdims=True)
    scale = 2 * side / torch.tensor([x.shape[3], x.shape[2]])  # grid_sample's sides are 2 long
    grid = F.affine_grid(torch.eye(2, 3).expand(len(x), 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(
        x, grid + torch.from_numpy(field).float() * scale, align_corners=False, padding_mode="reflection"
    )


def _pixelate(x: Tensor, share: float, rng: np.random.Generator) -> Tensor:
    size = [max(1, round(share * n)) for n in x.shape[2:]]
    return F.interpolate(F.interpolate(x, size=size, mode="area"), size=x.shape[2:], mode="nearest-exact")


def _jpeg(x: Tensor, quality: float, rng: np.random.Generator) -> Tensor:
    jpeg = optional("torchvision.transforms.v2.functional", "eval").jpeg
    return jpeg((x * 255).round().to(torch.uint8), int(quality)).float() / 255


def _offsets(reach: float) -> tuple[Tensor, Tensor]:
    """Distances (n, n) down and right from the middle of a kernel that reaches so far."""
    n = int(np.ceil(reach)) + 1
    d = torch.arange(-n, n + 1.0)
    return d[:, None].expand(len(d), len(d)), d.expand(len(d), len(d))


def _convolve(x: Tensor, kernel: Tensor) -> Tensor:
    """Every channel of (B, C, H, W) with a kernel (n, n), or (B, n, n), that is made to sum to one."""
    batch, channels, height, width = x.shape
    n = kernel.shape[-1]
    kernel = kernel / kernel.sum((-2, -1), keepdim=True)
    weight = kernel.expand(batch, n, n).repeat_interleave(channels, 0).unsqueeze(1)
    padded = F.pad(x, [n // 2] * 4, mode="replicate").flatten(0, 1).unsqueeze(0)
    return F.conv2d(padded, weight, groups=batch * channels).view(batch, channels, height, width)


_Corruption = Callable[[Tensor, float, np.random.Generator], Tensor]
_TABLE: dict[str, tuple[_Corruption, tuple[float, ...]]] = {
    "gaussian_noise": (_gaussian_noise, (0.04, 0.08, 0.12, 0.16, 0.2)),  # standard deviation
    "shot_noise": (_shot_noise, (200, 100, 50, 25, 12)),  # photons of a white pixel
    "impulse_noise": (_impulse_noise, (0.01, 0.03, 0.06, 0.1, 0.15)),  # share of the values
    "defocus_blur": (_defocus_blur, (0.015, 0.02, 0.03, 0.04, 0.05)),  # radius
    "motion_blur": (_motion_blur, (0.04, 0.07, 0.1, 0.14, 0.18)),  # length
    "zoom_blur": (_zoom_blur, (1.06, 1.11, 1.16, 1.21, 1.26)),  # largest zoom
    "fog": (_fog, (0.2, 0.5, 0.75, 1, 1.5)),  # density
    "brightness": (_brightness, (1.15, 1.3, 1.5, 1.75, 2)),  # factor
    "contrast": (_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),  # factor
    "elastic": (_elastic, (0.008, 0.015, 0.022, 0.03, 0.04)),  # standard deviation of the shift
    "pixelate": (_pixelate, (0.5, 0.4, 0.33, 0.25, 0.2)),  # share of the side that is kept
    "jpeg": (_jpeg, (60, 40, 25, 15, 10)),  # quality
}
CORRUPTIONS = tuple(_TABLE)
