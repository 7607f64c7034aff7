"""Puzzle Mix and Co-Mixup in the workers of a ``DataLoader``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from dataopt.core.mixup import CoMixup, PuzzleMix
from dataopt.core.mixup.mixed import one_hot
from dataopt.core.mixup.resample import resample
from torch import Tensor
from torch.utils.data import default_collate


class MixCollate:
    """What :class:`PuzzleCollate` and :class:`CoMixupCollate` share: a collate function that mixes each batch.

    The saliency comes with the samples, or from a callable.

    Samples are tuples (image, saliency, label), as ``SaliencyFolder`` gives them; tuples (image,
    label) with a ``saliency`` callable; or dicts with these keys, as rows of ``datasets`` are.

    - image: (C, H, W) tensor or array, or (H, W, C) array or PIL image; all of one shape. uint8
      stays uint8, which timm's prefetcher wants, and a PuzzleMix must then have no ``mean`` and
      ``std``; floats are normalised as it says.
    - saliency: (h, w) non-negative, on any grid: spread over the image area by area. A map that is
      zero or not finite becomes uniform.
    - label: class id, or (K,) weights.

    The draws follow from ``seed`` and the content of the batch, so they are the same on any number
    of workers, and the same batch is mixed the same way whenever it comes up.

    In timm: ``create_loader(dataset, ..., collate_fn=...)``, with and without
    ``use_prefetcher``. Stop mixing by ``collate.mixup_enabled = False``; this reaches workers that
    are already running, from the next epoch on. ``loader.mixup_enabled`` of timm's prefetcher knows
    only timm's own collate function: it reads False, and setting it does nothing. Targets are soft
    with and without mixing, so use a soft-target loss throughout.

    Args:
        mix: how to mix, a PuzzleMix without ``adversarial``, which needs a gradient.
        saliency: (B, C, H, W) float images, uint8 ones over 255, to (B, h, w); picklable where
            workers are spawned. Saliency among the samples is then not read.
        prob: probability that a batch is mixed.
        smoothing: label smoothing by timm's rule, off = smoothing / K, on = 1 - smoothing + off.
        seed: changes all draws.
        image_key, saliency_key, label_key: keys of dict samples.

    Returns of a call:
        (inputs (B, C, H, W), targets (B, K) float32) for tuples; for dicts a dict with both under
        ``image_key`` and ``label_key``, other keys left out: they would not fit a mixed input.

    Raises:
        TypeError: ``mix`` is of the other method, or of none.
        ValueError: ``prob`` or ``smoothing`` out of range, an adversarial ``mix``, samples of
            another form, shape or dtype, or what ``mix`` raises; Puzzle Mix does on a batch of one
            (``drop_last=True`` avoids the last one).
    """

    method: ClassVar[type]

    def __init__(
        self,
        mix: PuzzleMix | CoMixup,
        saliency: Callable[[Tensor], Tensor] | None = None,
        *,
        prob: float = 1.0,
        smoothing: float = 0.0,
        seed: int = 0,
        image_key: str = "image",
        saliency_key: str = "saliency",
        label_key: str = "label",
    ):
        if not isinstance(mix, self.method):
            raise TypeError(f"mix is a {type(mix).__name__}; give a {self.method.__name__}(num_classes, ...)")
        if isinstance(mix, PuzzleMix) and mix.adversarial is not None:
            raise ValueError("mix has adversarial=, which needs a gradient; loader workers have none, so leave it out")
        for name, value in (("prob", prob), ("smoothing", smoothing)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value} must lie in [0, 1]")
        self.mix = mix
        self.saliency = saliency
        self.prob = prob
        self.smoothing = smoothing
        self.seed = seed
        self.image_key = image_key
        self.saliency_key = saliency_key
        self.label_key = label_key
        # shared, for workers that persist hold a copy of this object
        self._enabled = torch.ones(1, dtype=torch.uint8).share_memory_()

    @property
    def mixup_enabled(self) -> bool:
        """Whether batches are mixed; may be set while workers run."""
        return bool(self._enabled)

    @mixup_enabled.setter
    def mixup_enabled(self, enabled: bool) -> None:
        self._enabled.fill_(enabled)

    def __call__(self, samples: Sequence[Any]) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        columns = self._columns(samples)
        x = _stack("image", [_image(v) for v in columns[0]])
        y = default_collate(list(columns[-1]))
        s = _stack("saliency", [_map(v) for v in columns[1]]) if self.saliency is None else None
        out, targets = self._mix(x, y, s)
        targets = targets * (1 - self.smoothing) + self.smoothing / self.mix.num_classes
        if isinstance(samples[0], Mapping):
            return {self.image_key: out, self.label_key: targets}
        return out, targets

    def _columns(self, samples: Sequence[Any]) -> list[tuple]:
        keys = [self.image_key, self.saliency_key, self.label_key]
        if self.saliency is not None:
            del keys[1]
        if isinstance(samples[0], Mapping):
            if missing := [k for k in keys if k not in samples[0]]:
                raise ValueError(
                    f"samples have the keys {list(samples[0])} and lack {missing}; give them (add_saliency or "
                    "saliency= for the saliency), or name yours with image_key=, saliency_key=, label_key="
                )
            return [tuple(sample[k] for sample in samples) for k in keys]
        if not isinstance(samples[0], tuple | list) or len(samples[0]) != len(keys):
            form = "(image, saliency, label)" if self.saliency is None else "(image, label), saliency= being given"
            found = f" of {len(samples[0])}" if isinstance(samples[0], tuple | list) else ""
            raise ValueError(f"samples are {type(samples[0]).__name__}{found}; give tuples {form}, or dicts")
        return list(zip(*samples, strict=True))

    def _mix(self, x: Tensor, y: Tensor, s: Tensor | None) -> tuple[Tensor, Tensor]:
        labels = one_hot(y, self.mix.num_classes, len(x))
        whole = x.dtype == torch.uint8
        if whole and isinstance(self.mix, PuzzleMix) and self.mix.mean is not None:
            raise ValueError(
                f"images are uint8 and mix has mean={self.mix.mean}; leave mean and std out of PuzzleMix: uint8 images "
                "are mixed as pixels, and normalised later"
            )
        if not whole and not x.is_floating_point():
            raise ValueError(f"images are {x.dtype}; give uint8 or floating ones")
        generator = torch.Generator().manual_seed(self._draw(x, y, s))
        if not self.mixup_enabled or float(torch.rand((), generator=generator)) >= self.prob:
            return x, labels
        pixels = x.float() / 255 if whole else x
        if s is None:
            assert self.saliency is not None  # or the samples would have had to carry it
            s = self.saliency(pixels)
            if s.ndim != 3 or len(s) != len(x):
                raise ValueError(
                    f"saliency= gave the shape {tuple(s.shape)} for {len(x)} images; it must give (B, h, w)"
                )
        mixed = self.mix(pixels, labels, _spread(s, pixels), generator=generator)
        return (mixed.inputs.mul(255).round().to(torch.uint8) if whole else mixed.inputs), mixed.targets

    def _draw(self, x: Tensor, y: Tensor, s: Tensor | None) -> int:
        """A seed from the batch itself: no worker id or random state enters."""
        h = hashlib.blake2b(str(self.seed).encode(), digest_size=8)
        few = x.reshape(-1)[:: (x.numel() // 4096) | 1]  # an odd stride, not to read one column of every image
        for t in (y, few) if s is None else (y, few, s):
            h.update(t.contiguous().view(-1).view(torch.uint8).numpy().data)
        return int.from_bytes(h.digest(), "big") >> 1


class PuzzleCollate(MixCollate):
    """Puzzle Mix as a collate function; all else is said at :class:`MixCollate`.

    References:
        Thesis chapter 3.

    Examples:
        >>> import torch
        >>> from dataopt.core.mixup import PuzzleMix
        >>> from dataopt.integrations.timm import PuzzleCollate
        >>> samples = [(torch.rand(3, 32, 32), torch.rand(16, 16), label) for label in range(4)]
        >>> loader = torch.utils.data.DataLoader(samples, batch_size=4, collate_fn=PuzzleCollate(PuzzleMix(10)))
        >>> x, target = next(iter(loader))
        >>> x.shape, target.shape
        (torch.Size([4, 3, 32, 32]), torch.Size([4, 10]))
    """

    method = PuzzleMix


class CoMixupCollate(MixCollate):
    """Co-Mixup as a collate function; all else is said at :class:`MixCollate`.

    References:
        Thesis chapter 4.

    Examples:
        >>> import torch
        >>> from dataopt.core.mixup import CoMixup
        >>> from dataopt.integrations.timm import CoMixupCollate
        >>> samples = [(torch.rand(3, 32, 32), torch.rand(16, 16), label) for label in range(4)]
        >>> loader = torch.utils.data.DataLoader(samples, batch_size=4, collate_fn=CoMixupCollate(CoMixup(10)))
        >>> x, target = next(iter(loader))
        >>> x.shape, target.shape
        (torch.Size([4, 3, 32, 32]), torch.Size([4, 10]))
    """

    method = CoMixup


def _image(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.as_subclass(Tensor)
    t = torch.from_numpy(np.array(value))
    last = t.ndim == 3 and t.shape[2] in (1, 3, 4) and t.shape[0] not in (1, 3, 4)
    return t.permute(2, 0, 1) if last else t


def _map(value: Any) -> Tensor:
    t = value.as_subclass(Tensor) if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
    return t.squeeze(0) if t.ndim == 3 else t


def _stack(name: str, values: list[Tensor]) -> Tensor:
    ndim, form = (3, "(C, H, W)") if name == "image" else (2, "(h, w)")
    shapes = sorted({tuple(t.shape) for t in values})
    if len(shapes) > 1 or len(shapes[0]) != ndim:
        raise ValueError(f"{name} of the samples has the shapes {shapes[:4]}; give {form}, the same for all")
    return torch.stack(values)


def _spread(s: Tensor, x: Tensor) -> Tensor:
    """(B, h, w) as (B, H, W) float32 like ``x``, uniform where it is zero or not finite."""
    s = resample(s, (x.shape[2], x.shape[3]))
    usable = torch.isfinite(s).all(2).all(1) & (s.sum((1, 2)) > 0)
    return torch.where(usable.view(-1, 1, 1), s, torch.ones_like(s))
