"""Saliency of whole data sets: small maps, made once by a trained model, that travel with the images."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from dataopt.core.mixup import input_gradient, saliency
from dataopt.core.mixup.resample import resample
from torch import Tensor, nn

if TYPE_CHECKING:
    from PIL.Image import Image
    from torchvision import tv_tensors

View = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Squash:
    """A PIL image as the model sees it: all of it, resized to ``size`` (C, H, W) and normalised."""

    size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: Image) -> Tensor:
        channels, height, width = self.size
        image = image.convert("L" if channels == 1 else "RGB").resize((width, height), 2)  # bilinear, antialiased
        x = torch.from_numpy(np.array(image)).view(height, width, channels).permute(2, 0, 1).float() / 255
        return (x - torch.tensor(self.mean).view(-1, 1, 1)) / torch.tensor(self.std).view(-1, 1, 1)


def default_view(model: nn.Module) -> Squash:
    """:class:`Squash` to the input size, mean and std of ``model.pretrained_cfg``.

    Raises:
        ValueError: the model has no ``pretrained_cfg``, as models outside timm.
    """
    cfg = getattr(model, "pretrained_cfg", None)
    if not cfg or "input_size" not in cfg:
        raise ValueError(
            f"model {type(model).__name__} has no pretrained_cfg that tells its input size; give transform=, a "
            "callable from a PIL image to a normalised (C, H, W) tensor that shows the whole image"
        )
    channels = getattr(model, "in_chans", cfg["input_size"][0])
    moments = [cfg.get(name) or (0.5,) * channels for name in ("mean", "std")]
    mean, std = (tuple(m) if len(m) == channels else (sum(m) / len(m),) * channels for m in moments)
    return Squash((channels, *cfg["input_size"][1:]), mean, std)


def provenance(model: nn.Module, view: View, grid: int) -> dict[str, str]:
    """What the maps depend on beside the data, as short strings.

    Raises:
        ValueError: ``grid`` is not positive, or ``view`` prints differently in every process.
    """
    if grid < 1:
        raise ValueError(f"grid={grid} must be at least 1; 16 keeps 16 x 16 values per image")
    if " at 0x" in repr(view):
        raise ValueError(
            f"transform={view!r} prints its address, so a cache cannot recognise it again; give it a __repr__ that "
            "names its settings, as torchvision's transforms and dataclasses have"
        )
    return {"model weights": weights_digest(model), "transform": repr(view), "grid": str(grid)}


def weights_digest(model: nn.Module) -> str:
    """Hash of all parameters and buffers, and of the model's class."""
    h = hashlib.blake2b(type(model).__qualname__.encode(), digest_size=16)
    for name, value in model.state_dict().items():
        t = torch.as_tensor(value).detach().cpu().contiguous()
        h.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        h.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()


def make_maps(model: nn.Module, images: Sequence[Tensor], labels: Sequence[int], grid: int) -> Tensor:
    """Saliency of a batch on a small grid, computed where the model is.

    Args:
        model: maps (B, C, H, W) to logits (B, K); left as it was (see ``input_gradient``).
        images: B normalised tensors (C, H, W).
        labels: B class ids.
        grid: rows and columns of a map.

    Returns:
        (B, grid, grid) float16 on the CPU; each map sums to one before it is rounded.

    Raises:
        ValueError: images of different shapes, or a label that is no class of the model.
    """
    shapes = {tuple(x.shape) for x in images}
    if len(shapes) > 1:
        raise ValueError(f"transform gives images of shapes {sorted(shapes)}; it must give one shape for all")
    if bad := [y for y in labels if isinstance(y, bool) or not isinstance(y, int | np.integer)]:
        raise ValueError(f"labels hold {bad[0]!r} where an integer class id belongs; leave unlabelled rows out")
    place = next((p.device for p in model.parameters()), torch.device("cpu"))

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        if y.min() < 0 or y.max() >= logits.shape[1]:
            raise ValueError(
                f"labels range from {int(y.min())} to {int(y.max())}, and the model knows the classes 0 to "
                f"{logits.shape[1] - 1}; give the model that was trained on these labels"
            )
        return F.cross_entropy(logits, y)

    x = torch.stack([image.as_subclass(Tensor) for image in images]).to(place)
    g = input_gradient(model, x, torch.tensor(list(labels), device=place), loss)
    return resample(saliency(g), (grid, grid)).half().cpu()


def as_tv_tensors(image: Any, s: Any) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """An image and its saliency, aligned, for the joint transforms of ``torchvision.transforms.v2``.

    Crops, flips and resizes move both alike; colour and normalisation leave the saliency alone.

    Args:
        image: PIL image, or (C, H, W) tensor.
        s: (h, w) saliency on any grid: a tensor, an array, or the nested lists of ``datasets``.

    Returns:
        the image as it was, and a float32 mask (H, W) of the image's size.
    """
    from torchvision import tv_tensors

    picture = tv_tensors.Image(image)
    height, width = picture.shape[-2:]
    return picture, tv_tensors.Mask(resample(torch.as_tensor(s, dtype=torch.float32), (height, width)))
