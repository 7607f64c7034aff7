"""What a model says about batches of inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_tensors

Batches = Iterable[tuple[Tensor, Tensor]]


def predict(model: nn.Module, batches: Batches) -> tuple[Tensor, Tensor]:
    """Logits of a model in evaluation mode.

    Args:
        model: maps (B, C, H, W) to logits (B, K); its training flags are afterwards what they were.
        batches: of inputs as the model takes them and (B,) class ids; a DataLoader will do.

    Returns:
        (N, K) float32 and (N,) int64, both on the CPU.

    Raises:
        ValueError: no batches, logits of another shape or with NaN, or class ids that the logits do not have.
        TypeError: no module, no batches of inputs and integer class ids, or a model that does not return a tensor.
    """
    logits, labels = [], []
    with evaluating(model):
        for x, y in each(batches):
            logits.append(logits_of(model, x, y))
            labels.append(y.long().cpu())
    if not logits:
        raise ValueError("batches is empty; give at least one batch (an iterator can be read only once)")
    return torch.cat(logits), torch.cat(labels)


def top1_error(model: nn.Module, batches: Batches) -> float:
    """Share of the inputs whose highest logit is not the label's, in [0, 1]; arguments as of :func:`predict`."""
    logits, labels = predict(model, batches)
    return error_of(logits, labels)


def error_of(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) != labels).double().mean())


def each(batches: Any, boxes: bool = False) -> Iterator[Any]:
    """Inputs, class ids and, where asked for, boxes of one batch after the other.

    Raises:
        TypeError: something else than batches of tensors.
    """
    parts = "inputs, class ids and boxes" if boxes else "inputs and class ids"
    if not isinstance(batches, Iterable) or isinstance(batches, Tensor):
        raise TypeError(f"batches is a {type(batches).__name__}; give an iterable of ({parts}), as a DataLoader is")
    for batch in batches:
        if not isinstance(batch, list | tuple) or len(batch) != 2 + boxes:
            size = f" of {len(batch)}" if isinstance(batch, list | tuple) else ""
            raise TypeError(f"batches holds a {type(batch).__name__}{size}; each must be a tuple of {parts}")
        check_tensors(x=batch[0], y=batch[1])
        yield batch


def logits_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """(B, K) float32 on the CPU, of inputs whose labels they suit.

    Raises:
        TypeError, ValueError: as of :func:`check_labels`, or logits that are NaN: their highest would be no class.
    """
    logits = model(x.to(device_of(model)))
    check_labels(logits, y)
    logits = logits.float().cpu()
    if bool(logits.isnan().any()):
        raise ValueError("logits hold NaN; look for the inputs x that make them, or run the model in float32")
    return logits


def check_model(model: Any) -> None:
    """Raise TypeError unless it is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; give an nn.Module that maps inputs to logits")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's flag is restored, whatever it was."""
    check_model(model)
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
    check_model(model)
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def check_labels(logits: Tensor, labels: Tensor) -> None:
    """Raise unless logits are (B, K) and labels (B,) integer ids below K."""
    check_tensors(logits=logits, labels=labels)
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels holds {labels.dtype}; give integer class ids")
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(
            f"logits have the shape {tuple(logits.shape)} and labels {tuple(labels.shape)}; give (B, K) and (B,) class "
            "ids"
        )
    low, high = (int(v) for v in labels.aminmax())
    if low < 0 or high >= logits.shape[1]:
        raise ValueError(
            f"labels range from {low} to {high}; {logits.shape[1]} logits allow 0 to {logits.shape[1] - 1}"
        )
