"""A classifier's features: what enters its last layer, seen while the model runs as it always does."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn


def find_head(model: nn.Module, classes: int | None = None, name: str | None = None) -> tuple[str, nn.Module]:
    """The layer that makes the logits: the last one with ``classes`` outputs, or the one that ``name`` gives.

    Args:
        classes: None asks ``model.config.num_labels`` or ``model.num_classes``.
        name: as in ``model.named_modules()``.

    Raises:
        ValueError: no such layer, or a number of classes that nobody tells.
    """
    modules = dict(model.named_modules())
    if name is not None:
        if name not in modules or name == "":
            raise ValueError(f"head={name!r} is no layer of {type(model).__name__}; see model.named_modules()")
        return name, modules[name]
    if classes is None:
        classes = getattr(getattr(model, "config", None), "num_labels", None) or getattr(model, "num_classes", None)
    if classes is None:
        raise ValueError(
            f"{type(model).__name__} does not tell its number of classes; give head=, the last layer's name"
        )
    found = [key for key, module in modules.items() if getattr(module, "out_features", None) == classes]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no layer with {classes} outputs; give head=, the name of the layer that makes "
            "the logits, or a model for these classes"
        )
    return found[-1], modules[found[-1]]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``DistributedDataParallel``, ``DataParallel`` or ``torch.compile``."""
    while True:
        inner = getattr(model, "_orig_mod", None) or (
            model.module if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel) else None
        )
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def logits_of(output: Any) -> Tensor:
    """The (B, K) logits in what a model returns: a tensor, an output with ``.logits``, a dict or a tuple.

    Raises:
        ValueError: none are there, or of another shape.
    """
    logits: Any = None
    if isinstance(output, Tensor):
        logits = output
    elif getattr(output, "logits", None) is not None:
        logits = output.logits
    elif isinstance(output, dict):
        logits = output.get("logits")
    elif isinstance(output, tuple | list):
        logits = next((x for x in output if isinstance(x, Tensor) and x.ndim == 2), None)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else None
        raise ValueError(f"the model returned logits of shape {shape}; give a classifier with (B, K) logits, K >= 2")
    return logits


class Tap:
    """Reads the features of a classifier while it runs.

    Args:
        model: maps a batch to logits (B, K); not changed, and unhooked at the end of the block.
        classes, head: for :func:`find_head`.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from dataopt.integrations.heads import Tap
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> with Tap(model, classes=2) as tap:
        ...     features, probs = tap.read(model(torch.rand(5, 3)))
        >>> features.shape, probs.sum(1).round()
        (torch.Size([5, 4]), tensor([1., 1., 1., 1., 1.]))
    """

    def __init__(self, model: nn.Module, classes: int | None = None, head: str | None = None) -> None:
        self.name, self._head = find_head(unwrapped(model), classes, head)
        self._seen: tuple[Tensor, Tensor] | None = None

    def __enter__(self) -> Tap:
        self._handle = self._head.register_forward_hook(self._keep)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.remove()
        self._seen = None

    def _keep(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            self._seen = args[0].detach(), output.detach()

    @torch.no_grad()
    def read(self, output: Any) -> tuple[Tensor, Tensor]:
        """Features (B, d) and probabilities (B, K), float32, of the batch whose forward returned ``output``.

        Where the head runs on every token, the token whose logits the model returned is taken.

        Raises:
            ValueError: the head did not run, or does not make these logits.
        """
        logits = logits_of(output).detach().float()
        if self._seen is None:
            raise ValueError(f"head={self.name!r} did not run in this forward; name the layer that makes the logits")
        (features, made), self._seen = self._seen, None
        features, made = features.float(), made.float().reshape(len(logits), -1, made.shape[-1])
        if made.shape[-1] != logits.shape[-1]:
            raise ValueError(
                f"head={self.name!r} makes {made.shape[-1]} values and the model {logits.shape[-1]} logits; name the "
                "layer that makes the logits"
            )
        apart = (made - logits[:, None]).abs().amax(-1)
        nearest = apart.min(1)
        if nearest.values.max() > 1e-2 * logits.abs().max() + 1e-4:
            raise ValueError(f"head={self.name!r} does not make the model's logits; name the layer that does")
        features = features.reshape(len(logits), made.shape[1], -1)[torch.arange(len(logits)), nearest.indices]
        return features, logits.softmax(1)
