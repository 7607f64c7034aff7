"""What is matched between real and synthetic images of a class: network gradients, or features (thesis section 6.4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..arguments import check_choice, check_tensors
from .networks import ConvNet

METRICS = ("mse", "l1", "cosine")
LAYERS = ("conv", "all")
GROUPED = 8  # images of a class up to which grouped convolution is faster than a loop over the classes
Params = Mapping[str, Tensor]
Forward = Callable[[Tensor], Tensor]


def distance(synthetic: Sequence[Tensor], real: Sequence[Tensor], metric: str = "mse") -> Tensor:
    """D of Algorithm 5 between two lists of stacked tensors, for each class, summed over layers.

    Args:
        synthetic, real: tensors (C, ...), one for each layer, row c of class c.
        metric: ``"mse"``, the sum of squared differences; ``"l1"``; or ``"cosine"``, one minus the cosine similarity of
            each output channel, summed, as in DSA.

    Returns:
        (C,).
    """
    for name, tensors in (("synthetic", synthetic), ("real", real)):
        if not isinstance(tensors, list | tuple) or not tensors:
            raise TypeError(f"{name} is a {type(tensors).__name__} or empty; give a list with a tensor for each layer")
        for tensor in tensors:
            check_tensors(**{name: tensor})
    if [s.shape for s in synthetic] != [r.shape for r in real] or synthetic[0].ndim < 2:
        raise ValueError(
            f"synthetic has tensors of {[tuple(s.shape) for s in synthetic]}, real of "
            f"{[tuple(r.shape) for r in real]}; give the same shapes (C, ...)"
        )
    check_choice(METRICS, metric=metric)
    total = synthetic[0].new_zeros(len(synthetic[0]))
    for s, r in zip(synthetic, real, strict=True):
        if metric == "mse":
            total = total + (s - r).flatten(1).square().sum(1)
        elif metric == "l1":
            total = total + (s - r).flatten(1).abs().sum(1)
        else:
            a, b = (t.flatten(2) if t.ndim > 2 else t[:, None] for t in (s, r))  # a vector is one channel
            total = total + (1 - F.cosine_similarity(a, b, dim=2, eps=1e-6)).sum(1)
    return total


def matched_layers(model: nn.Module, layers: str = "conv") -> list[str]:
    """Names of the parameters whose gradients are matched: those of convolutions, or all.

    Raises:
        ValueError: a network without convolution, or another choice.
    """
    names = {name: p.ndim for name, p in model.named_parameters() if p.requires_grad}
    check_choice(LAYERS, layers=layers)
    found = [name for name, ndim in names.items() if ndim > 2 or layers == "all"]
    if not found:
        shown = ", ".join(list(names)[:6]) + (", ..." if len(names) > 6 else "")
        raise ValueError(
            f"layers='conv' matches no layer of {type(model).__name__}: none of its {len(names)} parameters ({shown}) "
            "has more than two dimensions; give layers='all' to match those"
        )
    return found


class Objective(Protocol):
    """A signature of images under a network, which real and synthetic images of a class are to share."""

    def real(self, forward: Forward, model: nn.Module, x: Tensor, c: int) -> tuple[list[Tensor], list[Tensor] | None]:
        """The signature of a class' real images (B, C, H, W), and gradients of all parameters or None."""

    def match(
        self, model: nn.Module, params: Params, xs: Tensor, classes: Sequence[int], real: Sequence[Tensor], metric: str
    ) -> tuple[Tensor, Tensor]:
        """(G, B, C, H, W) synthetic images of G classes: the distance of each class, and its gradient like ``xs``."""


class Gradients:
    """Gradients of the mean cross entropy of a class (Algorithm 5).

    Args:
        model: what gradients are of.
        layers: ``"conv"``, or ``"all"`` parameters.
    """

    def __init__(self, model: nn.Module, layers: str = "conv"):
        self.names = matched_layers(model, layers)
        self.grouped = type(model) is ConvNet and layers == "conv"  # a subclass may have a forward of its own

    def real(self, forward: Forward, model: nn.Module, x: Tensor, c: int) -> tuple[list[Tensor], list[Tensor] | None]:
        params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        loss = F.cross_entropy(forward(x), torch.full((len(x),), c, device=x.device))
        found = torch.autograd.grad(loss, list(params.values()))
        by_name = dict(zip(params, found, strict=True))
        return [by_name[name] for name in self.names], list(found)

    def match(
        self, model: nn.Module, params: Params, xs: Tensor, classes: Sequence[int], real: Sequence[Tensor], metric: str
    ) -> tuple[Tensor, Tensor]:
        if self.grouped and xs.shape[1] <= GROUPED:
            return self._match_grouped(model, params, xs, classes, real, metric)
        losses, slopes = [], []
        for i, (x, c) in enumerate(zip(xs, classes, strict=True)):
            x = x.detach().requires_grad_()
            weights = {name: p.detach().requires_grad_(name in self.names) for name, p in params.items()}
            logits = functional_call(model, weights, (x,))
            loss = F.cross_entropy(logits, torch.full((len(x),), c, device=x.device))
            found = torch.autograd.grad(loss, [weights[name] for name in self.names], create_graph=True)
            gap = distance([g[None] for g in found], [r[i : i + 1] for r in real], metric)[0]
            slopes.append(torch.autograd.grad(gap, x)[0])
            losses.append(gap.detach())
        return torch.stack(losses), torch.stack(slopes)

    def _match_grouped(
        self, model: nn.Module, params: Params, xs: Tensor, classes: Sequence[int], real: Sequence[Tensor], metric: str
    ) -> tuple[Tensor, Tensor]:
        assert isinstance(model, ConvNet)
        groups, n = xs.shape[:2]
        xs = xs.detach().requires_grad_()
        weights = [params[name].detach().expand(groups, *params[name].shape).requires_grad_() for name in self.names]
        logits = model.grouped(xs, weights, params)
        y = torch.tensor(classes, device=xs.device).repeat_interleave(n)
        loss = F.cross_entropy(logits.flatten(0, 1), y, reduction="sum") / n
        found = torch.autograd.grad(loss, weights, create_graph=True)
        gaps = distance(found, real, metric)
        return gaps.detach(), torch.autograd.grad(gaps.sum(), xs)[0]


class Features:
    """Mean inputs of the last linear layer, of a class: distribution matching (Zhao and Bilen, WACV 2023), the rival of
    section 6.4.1.

    Args:
        model: any network with a linear layer.

    Raises:
        ValueError: a network without one.
    """

    def __init__(self, model: nn.Module):
        last_linear(model)
        # statistics of a batch would mix the classes
        self.alone = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())

    def real(self, forward: Forward, model: nn.Module, x: Tensor, c: int) -> tuple[list[Tensor], list[Tensor] | None]:
        with torch.no_grad(), inputs_of(last_linear(model)) as seen:
            model(x)
        return [seen[0].mean(0)], None

    def match(
        self, model: nn.Module, params: Params, xs: Tensor, classes: Sequence[int], real: Sequence[Tensor], metric: str
    ) -> tuple[Tensor, Tensor]:
        if self.alone and len(xs) > 1:
            found = [
                self.match(model, params, xs[i : i + 1], classes[i : i + 1], [r[i : i + 1] for r in real], metric)
                for i in range(len(xs))
            ]
            losses, slopes = zip(*found, strict=True)
            return torch.cat(losses), torch.cat(slopes)
        xs = xs.detach().requires_grad_()
        with inputs_of(last_linear(model)) as seen:
            functional_call(model, dict(params), (xs.flatten(0, 1),))
        means = seen[0].unflatten(0, xs.shape[:2]).mean(1)
        gaps = distance([means], real, metric)
        return gaps.detach(), torch.autograd.grad(gaps.sum(), xs)[0]


def last_linear(model: nn.Module) -> nn.Linear:
    """The linear layer that makes the logits.

    Raises:
        ValueError: none there.
    """
    found = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no linear layer, whose inputs would be its features; use "
            "objective='gradients' and init='centres', 'mix', 'random' or 'noise'"
        )
    return found[-1]


@contextmanager
def inputs_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    """A list that takes the layer's input at every call, (B, d)."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(1)))
    try:
        yield seen
    finally:
        handle.remove()
