"""Training networks on real or condensed images, with augmentation and CutMix (thesis section 6.4.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..mixup.cutmix import CutMix
from .augment import Augment

BATCH, RATE = 64, 0.01  # of the released code, as are the momentum and the weight decay


def sgd(model: nn.Module, lr: float = RATE) -> torch.optim.SGD:
    """The optimiser of the released code."""
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)


def training_step(
    forward: Callable[[Tensor], Tensor],
    optimiser: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    augment: Augment | None,
    cutmix: float,
    generator: torch.Generator,
    classes: int,
) -> None:
    """One step on a batch, each image augmented by itself, then CutMix with probability ``cutmix``.

    Args:
        x: (B, C, H, W) normalised.
        y: (B,) class ids below ``classes``, or (B, ``classes``) soft labels.
    """
    if augment is not None:
        x = augment(x, generator=generator)
    if cutmix > float(torch.rand((), generator=generator)) and len(x) > 1:
        mixed = CutMix(classes)(x, y, generator=generator)
        x, y = mixed.inputs, mixed.targets.to(x.dtype)
    logits = forward(x)
    if y.ndim == 2:
        y = F.pad(y, (0, logits.shape[1] - classes))  # a network may have more outputs than there are classes
    optimiser.zero_grad()
    F.cross_entropy(logits, y).backward()
    optimiser.step()


def batches(n: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Row numbers without end, a new order each time all have been seen; the last batch of a round may be smaller."""
    while True:
        yield from torch.randperm(n, generator=generator).split(size)


def train_on(
    model: nn.Module,
    images: Callable[[Tensor], Tensor],
    labels: Tensor,
    steps: int,
    *,
    augment: Augment | None,
    cutmix: float = 0.5,
    lr: float = RATE,
    decay: bool = True,
    generator: torch.Generator,
) -> None:
    """SGD for a number of steps.

    Args:
        images: (B,) row numbers to normalised images.
        labels: (n,) class ids or (n, K) soft labels.
        decay: divide the rate by 5 after 2/3 and 5/6 of the steps.
    """
    model.train()
    optimiser = sgd(model, lr)
    classes = labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1
    seed = int(torch.randint(2**62, (), generator=generator))
    with own_random(seed, next((p.device for p in model.parameters()), None)):  # of dropout
        for step, rows in zip(range(steps), batches(len(labels), BATCH, generator), strict=False):
            if decay and step in (steps * 2 // 3, steps * 5 // 6):
                optimiser.param_groups[0]["lr"] *= 0.2
            y = labels[rows.to(labels.device)]
            training_step(model, optimiser, images(rows), y, augment, cutmix, generator, classes)


def check_network(model: nn.Module, x: Tensor, classes: int) -> Tensor:
    """Logits of a batch.

    Raises:
        ValueError: the network does not take the batch, or gives something else, or too few outputs.
    """
    try:
        logits = model(x)
    except ValueError as e:  # of batch statistics
        raise ValueError(
            f"model_fn's network does not take {len(x)} images of a class ({e}); give more images_per_class, or a "
            "network without batch statistics"
        ) from e
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as e:  # an assertion of timm's
        why = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise ValueError(
            f"model_fn's network does not take images of {tuple(x.shape[1:])} ({why}); give a network for this size"
        ) from e
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x) or logits.shape[1] < classes:
        raise ValueError(
            f"model_fn's network gives {shape} for {len(x)} images; give logits ({len(x)}, K) of K = {classes} classes "
            "or more"
        )
    return logits


def rows_of(x: Tensor) -> Callable[[Tensor], Tensor]:
    """Row numbers to rows of ``x``, for :func:`train_on`."""
    return lambda rows: x[rows.to(x.device)]


@torch.no_grad()
def accuracy(model: nn.Module, images: Callable[[Tensor], Tensor], labels: Tensor) -> float:
    """Share of the labels that have the highest logit, in evaluation mode."""
    model.eval()
    right = sum(
        int((model(images(rows)).argmax(1) == labels[rows.to(labels.device)]).sum())
        for rows in torch.arange(len(labels)).split(256)
    )
    return right / len(labels)


def fresh(model_fn: Callable[[], nn.Module], generator: torch.Generator) -> nn.Module:
    """A new network, its weights drawn from ``generator``; torch's own random state stays as it is."""
    with own_random(int(torch.randint(2**62, (), generator=generator)), None):
        return model_fn()


def any_network(model_fn: Callable[[], nn.Module]) -> nn.Module:
    """To look at; torch's own random state stays as it is."""
    return fresh(model_fn, torch.Generator().manual_seed(0))


def network_record(model_fn: Callable[[], nn.Module]) -> dict[str, Any]:
    """What ``made`` of a condensed set says of the network."""
    net = any_network(model_fn)
    return {"network": type(net).__name__, "parameters": sum(p.numel() for p in net.parameters())}


@contextmanager
def own_random(seed: int, device: torch.device | None) -> Iterator[None]:
    """Torch's own random states, which weights and dropout are drawn from, seeded here and put back afterwards."""
    with torch.random.fork_rng([device] if device is not None and device.type == "cuda" else []):
        torch.random.default_generator.manual_seed(seed)
        if device is not None and device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
