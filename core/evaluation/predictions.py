"""What a model says about batches of inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Batches = Iterable[tuple[Tensor, Tensor]]


def predict(model: nn.Module, batches: Batches) -> tuple[Tensor, Tensor]:
    """Logits of a model in evaluation mode.

    Args:
        model: maps (B, C, H, W) to logits (B, K); its training flags are afterwards what they were.
        batches: of inputs as the model takes them and (B,) class ids; a DataLoader will do.

    Returns:
        (N, K) float32 and (N,) int64, both on the CPU.

    Raises:
        ValueError: no batches, logits of another shape, or class ids that the logits do not have.
    """
    logits, labels = [], []
    with evaluating(model):
        for x, y in batches:
            logits.append(model(x.to(device_of(model))).float().cpu())
            labels.append(y.long().cpu())
            check_labels(logits[-1], labels[-1])
    if not logits:
        raise ValueError("batches is empty; give at least one batch (an iterator can be read only once)")
    return torch.cat(logits), torch.cat(labels)


def top1_error(model: nn.Module, batches: Batches) -> float:
    """Share of the inputs whose highest logit is not the label's, in [0, 1]; arguments as of :func:`predict`."""
    logits, labels = predict(model, batches)
    return error_of(logits, labels)


def error_of(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) != labels).double().mean())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's flag is restored, whatever it was."""
    flags = [(m, m.training) for m in model.modules()]
    try:
        for m, _ in flags:
            m.training = False
        with torch.no_grad():
            yield
    finally:
        for m, flag in flags:
            m.training = flag


def device_of(model: nn.Module) -> torch.device:
    """Of the first parameter; the CPU for a model that has none."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def check_labels(logits: Tensor, labels: Tensor) -> None:
    """Raise unless logits are (B, K) and labels (B,) ids below K."""
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} and labels {tuple(labels.shape)}; give (B, K) and (B,) class ids"
        )
    low, high = (int(v) for v in labels.aminmax())
    if low < 0 or high >= logits.shape[1]:
        raise ValueError(
            f"labels range from {low} to {high}; {logits.shape[1]} logits allow 0 to {logits.shape[1] - 1}"
        )
