"""Where a classifier looks: class activation maps, and how well a box around them fits (thesis section 4.5.2)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import check_numbers, check_strings, check_tensors
from ..extras import optional
from ..mixup.saliency import check_batch
from .background import Boxes, check_boxes, check_count
from .predictions import check_labels, device_of, each, evaluating


@dataclass(frozen=True)
class Localisation:
    """Shares of the images in [0, 1].

    Attributes:
        top1: the class is right, and the box of its map overlaps a true box enough: what Table 4.2 reports.
        known: the box of the true class' map overlaps enough, whatever was predicted.
    """

    top1: float
    known: float


def class_activation_map(
    model: nn.Module, x: Tensor, features: str, head: str, classes: Tensor | None = None
) -> Tensor:
    """How much each place adds to a class' logit: the last feature maps, weighted as the linear head weights them.

    Args:
        model: a network that ends in feature maps, their global average, and a linear layer. It runs in evaluation
            mode on its own device; its flags are restored.
        x: (B, C, H, W).
        features: name of the module that gives the feature maps (B, D, h, w), such as ``"layer4"`` of a ResNet.
        head: name of the linear layer, such as ``"fc"``.
        classes: (B,) whose maps are wanted; None is the predicted ones.

    Returns:
        (B, h, w) float32; the mean of a map plus the head's bias is the class' logit.

    Raises:
        TypeError: no module, tensors or names.
        ValueError: no such modules, no finite images, logits that are not finite or not the linear head of the averaged
            features, or classes that the logits do not have.

    References:
        Zhou et al., "Learning deep features for discriminative localization", CVPR 2016.
    """
    maps, logits, weight = _forward(model, x, features, head)
    if classes is None:
        classes = logits.argmax(1)
    check_labels(logits, classes)
    return _activation(maps, weight, classes)


def box_of_map(activation: Tensor, size: tuple[int, int], threshold: float = 0.25) -> Tensor:
    """Box around the largest connected part of a map that lies above a share of its range.

    Args:
        activation: (h, w).
        size: (H, W) of the image; the map is brought to it bilinearly.
        threshold: share of the way from the map's lowest to its highest value; 0.25 in the thesis.

    Returns:
        (4,) int64: left, top, right and bottom in pixels, the last two exclusive. The whole image where the map is
        the same everywhere.

    Raises:
        TypeError: no tensor, or a threshold that is no number.
        ValueError: another shape, non-finite values, a size that is none, or a threshold outside [0, 1).
        ModuleNotFoundError: the extra ``eval`` is not installed.
    """
    check_tensors(activation=activation)
    small = activation.detach().float().cpu()
    if small.ndim != 2 or not small.numel() or not bool(torch.isfinite(small).all()):
        raise ValueError(f"activation has the shape {tuple(small.shape)}; give one finite map (h, w)")
    whole = isinstance(size, list | tuple) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
    if not whole:
        raise ValueError(f"size={size!r:.80} must be the height and width of the image, whole numbers above 0")
    check_numbers(threshold=threshold)
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold={threshold} must lie in [0, 1); the thesis uses 0.25")
    measure = optional("skimage.measure", "eval")
    # float64 holds the range of huge values and a share of a tiny one
    large = F.interpolate(small.double()[None, None], size=size, mode="bilinear")[0, 0]
    low, high = large.aminmax()
    if low == high:
        return torch.tensor([0, 0, size[1], size[0]])
    parts = measure.label((large - low > threshold * (high - low)).numpy(), connectivity=2)
    top, left, bottom, right = max(measure.regionprops(parts), key=lambda part: part.area).bbox
    return torch.tensor([left, top, right, bottom])


def localisation_accuracy(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor, Boxes]],
    features: str,
    head: str,
    threshold: float = 0.25,
    iou: float = 0.5,
) -> Localisation:
    """How often the box of a class activation map overlaps one of the true boxes (Table 4.2).

    Args:
        model, features, head: as of :func:`class_activation_map`.
        batches: of inputs (B, C, H, W), (B,) class ids and true boxes, (B, 4) or B tensors (n, 4) of left, top, right
            and bottom in pixels.
        threshold: as of :func:`box_of_map`.
        iou: least intersection over union.

    Raises:
        TypeError: as of the two functions, or batches of something else.
        ValueError: as of the two functions, boxes that do not fit the images, or no batches.
        ModuleNotFoundError: the extra ``eval`` is not installed.
    """
    check_numbers(iou=iou)
    if not 0 < iou <= 1:
        raise ValueError(f"iou={iou} must lie in (0, 1]; 0.5 is usual")
    box_iou = optional("torchvision.ops", "eval").box_iou
    total = top1 = known = 0
    for x, y, boxes in each(batches, boxes=True):
        maps, logits, weight = _forward(model, x, features, head)
        size = (x.shape[2], x.shape[3])
        y = y.to(logits.device)
        check_labels(logits, y)
        check_count(boxes, len(x))
        right = (logits.argmax(1) == y).tolist()
        for activation, is_right, of_image in zip(_activation(maps, weight, y), right, boxes, strict=True):
            found = box_of_map(activation, size, threshold).double()
            hit = bool(box_iou(found[None], check_boxes(of_image, *size)).max() >= iou)
            known += hit
            top1 += hit and is_right
        total += len(y)
    if not total:
        raise ValueError("batches is empty; give at least one batch (an iterator can be read only once)")
    return Localisation(top1 / total, known / total)


def _forward(model: nn.Module, x: Tensor, features: str, head: str) -> tuple[Tensor, Tensor, Tensor]:
    """Feature maps (B, D, h, w), logits (B, K) and the head's weight (K, D), all float32."""
    device = device_of(model)
    check_batch(x)
    if x.ndim != 4:
        raise ValueError(f"x has the shape {tuple(x.shape)}; give images (B, C, H, W)")
    check_strings(features=features, head=head)
    modules = dict(model.named_modules())
    for argument, name in (("features", features), ("head", head)):
        if name not in modules:
            raise ValueError(f"{argument}={name!r} is no module of the model; see model.named_modules()")
    linear = modules[head]
    if not isinstance(linear, nn.Linear):
        raise ValueError(f"head={head!r} is a {type(linear).__name__}; name the nn.Linear that gives the logits")
    seen: list[Tensor] = []
    hook = modules[features].register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        with evaluating(model):
            logits = model(x.to(device))
            check_tensors(logits=logits)
            if len(seen) != 1 or not isinstance(seen[0], Tensor) or seen[0].ndim != 4:
                raise ValueError(
                    f"features={features!r} must run once and give (B, D, h, w); name the last such module"
                )
            maps = seen[0]
            expected = linear(maps.mean((2, 3))) if maps.shape[1] == linear.in_features else None
    finally:
        hook.remove()
    scale = float(logits.float().abs().max())
    if not scale < math.inf:
        raise ValueError("logits hold non-finite values; look for the inputs x that make them")
    if (
        expected is None
        or expected.shape != logits.shape
        or not torch.allclose(expected.float(), logits.float(), rtol=0, atol=0.01 * scale)
    ):
        raise ValueError(
            f"the logits are not head={head!r} of the global average of features={features!r}; class activation maps "
            "need a network that ends so"
        )
    return maps.float(), logits.float(), linear.weight.detach().float()


def _activation(maps: Tensor, weight: Tensor, classes: Tensor) -> Tensor:
    return torch.einsum("bdhw,bd->bhw", maps, weight[classes.long().to(weight.device)])
