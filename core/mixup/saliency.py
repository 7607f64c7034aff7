"""Saliency of an input: the norm of the loss gradient at each position (thesis 3.4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import check_numbers, check_tensors

Forward = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]

# float16 loses gradients below 6e-8; the loss is scaled up by the first of these that stays finite.
_HALF_SCALES = (2.0**14, 2.0**7, 1.0)


def input_gradient(
    forward: Forward,
    x: Tensor,
    y: Tensor,
    loss_fn: Loss = F.cross_entropy,
    resolution: float = 1.0,
) -> Tensor:
    """Gradient of the loss with respect to the input, without a trace on the model.

    An ``nn.Module`` runs in evaluation mode; afterwards every module's training flag, every
    buffer, every parameter's ``.grad`` and the random state are what they were. Pass the bare
    module: not the DDP wrapper and not the compiled one. Any other callable runs as it is.

    Args:
        forward: maps ``x`` to logits.
        x: inputs, (B, C, H, W) or (B, C, L), any floating dtype.
        y: what ``loss_fn`` takes as target, (B,) class ids or (B, K).
        loss_fn: ``loss_fn(logits, y)`` averaged over the batch; logits arrive in float32.
        resolution: in (0, 1]; below 1 the gradient is taken on an input downsized by this factor
            (antialiased bilinear) and repeated up to the size of ``x``. Cheaper, and the model must
            accept the smaller size.

    Returns:
        float32 tensor of the shape of ``x``: B times the gradient of the batch mean, so that a
        sample's gradient does not depend on the batch size.

    Raises:
        ValueError: ``x`` is no floating batch of one of these shapes, holds non-finite values, has
            no part in the loss, the loss is no single number, or ``resolution`` is outside (0, 1].

    References:
        Thesis section 3.4; Simonyan et al., "Deep inside convolutional networks", 2014.
    """
    check_batch(x)
    check_numbers(resolution=resolution)
    if not 0 < resolution <= 1:
        raise ValueError(f"resolution={resolution} must lie in (0, 1]; 0.5 halves each side")
    small = x.detach()
    if resolution < 1:
        size = [max(1, round(n * resolution)) for n in x.shape[2:]]
        small = _downsize(small, size)
    with torch.enable_grad(), _untouched(forward, x.device):
        small = small.detach().requires_grad_()
        loss = _loss(forward, small, y, loss_fn) * len(x)
        g = _scaled_grad(loss, small)[0].float()
    if g.shape != x.shape:
        g = F.interpolate(g, size=x.shape[2:], mode="nearest")
    return g


def clean_loss(forward: nn.Module, x: Tensor, y: Tensor, loss_fn: Loss = F.cross_entropy) -> tuple[Tensor, Tensor]:
    """The loss on unmixed inputs, and the input gradient from the same pass.

    The regulariser of thesis 3.5: the mixed loss plus ``weight * loss`` trains on both. The model
    runs in the mode it is in (training mode updates batch-norm statistics). The graph is freed
    before this returns, so two graphs never live at once, and the loss can be added to one that
    was computed through ``DistributedDataParallel``: its gradients arrive at the parameters in the
    same backward pass and are reduced with the others. A parameter without a part in the loss gets
    no gradient from it.

    Args:
        forward: the bare module.
        x: inputs, (B, C, H, W) or (B, C, L).
        y: what ``loss_fn`` takes as target.
        loss_fn: ``loss_fn(logits, y)``, averaged over the batch.

    Returns:
        (loss, gradient): a scalar whose backward adds d loss / d parameter, and the gradient as
        :func:`input_gradient` gives it.

    Raises:
        TypeError: ``forward`` is no module, or does not return a tensor.
        ValueError: as :func:`input_gradient`.
    """
    if not isinstance(forward, nn.Module):
        raise TypeError(f"forward is a {type(forward).__name__}; give the bare nn.Module")
    check_batch(x)
    parameters = [p for p in forward.parameters() if p.requires_grad]
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        loss = _loss(forward, x, y, loss_fn)
        g, *grads = _scaled_grad(loss, x, parameters)
    used = {p: grad for p, grad in zip(parameters, grads, strict=True) if grad is not None}
    return _KnownGradient.apply(loss.detach(), list(used.values()), *used), g.float() * len(x)


def saliency(gradient: Tensor) -> Tensor:
    """Saliency map: root mean square of the gradient over channels, normalised to sum to one.

    Args:
        gradient: (B, C, H, W) or (B, C, L), any floating dtype.

    Returns:
        (B, H, W) or (B, L), float32, non-negative. A sample whose gradient is zero or not finite
        gets the uniform map.

    Raises:
        ValueError: ``gradient`` has another number of dimensions.

    References:
        Thesis section 3.4, s(x); the released code's ``sqrt(mean_c g_c^2)``.
    """
    check_tensors(gradient=gradient)
    if gradient.ndim not in (3, 4) or not gradient.numel():
        raise ValueError(f"gradient has the shape {tuple(gradient.shape)}; give (B, C, H, W) or (B, C, L)")
    g = gradient.float()
    axes = tuple(range(1, g.ndim))
    peak = g.abs().amax(axes, keepdim=True)
    s = (g / peak).square_().mean(1).sqrt_()  # the peak first: squares of tiny gradients underflow
    s = s / s.sum(axes[:-1], keepdim=True)
    usable = (torch.isfinite(peak) & (peak > 0)).view(-1, *[1] * (s.ndim - 1))
    return torch.where(usable, s, torch.full_like(s, 1 / s[0].numel()))


def check_batch(x: Tensor) -> None:
    """Raise unless ``x`` is a finite floating batch (B, C, H, W) or (B, C, L)."""
    check_tensors(x=x)
    if x.ndim not in (3, 4) or not x.is_floating_point() or not x.numel():
        raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}; give floating (B, C, H, W) or (B, C, L)")
    if not torch.isfinite(x).all():
        bad = (~torch.isfinite(x)).flatten(1).any(1).nonzero().flatten().tolist()
        raise ValueError(f"x holds non-finite values in samples {bad[:8]}; clean the input or its normalisation")


def check_saliency(s: Tensor, x: Tensor) -> Tensor:
    """(B, H, W) float32 saliency of a batch on its device; 1-d inputs become images of one row.

    Raises:
        ValueError: another shape than the inputs', negative or non-finite values, or a sample without any saliency.
    """
    check_tensors(s=s)
    expected = (len(x), *x.shape[2:])
    if s.shape != expected:
        raise ValueError(f"s has the shape {tuple(s.shape)}; give the saliency as {expected}")
    s = s.detach().to(x.device, torch.float32)
    if not bool((torch.isfinite(s) & (s >= 0)).all()):
        raise ValueError("s holds negative or non-finite values; saliency(gradient) guards against them")
    total = s.flatten(1).sum(1)
    if not bool(torch.isfinite(total).all()):
        raise ValueError("s is so large that its sum overflows; normalise it, as saliency(gradient) does")
    if not bool((total > 0).all()):
        raise ValueError("s is zero everywhere in some samples; give them the uniform map, as saliency(gradient) does")
    return s.unsqueeze(1) if s.ndim == 2 else s


def _downsize(x: Tensor, size: list[int]) -> Tensor:
    if len(size) == 1:
        return F.interpolate(x.unsqueeze(2), size=[1, *size], mode="bilinear", antialias=True).squeeze(2)
    return F.interpolate(x, size=size, mode="bilinear", antialias=True)


def _loss(forward: Forward, x: Tensor, y: Tensor, loss_fn: Loss) -> Tensor:
    logits = forward(x)
    if not isinstance(logits, Tensor) or not callable(loss_fn):
        raise TypeError(
            f"forward gives a {type(logits).__name__} and loss_fn is a {type(loss_fn).__name__}; give a forward that "
            "returns a tensor of logits, and a function of logits and y"
        )
    with torch.autocast(x.device.type, enabled=False):
        loss = loss_fn(logits.float(), y)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError("loss_fn must give one number, averaged over the batch; leave out reduction='none'")
    return loss


def _scaled_grad(loss: Tensor, x: Tensor, parameters: Sequence[Tensor] = ()) -> list[Any]:
    """``torch.autograd.grad`` with the loss scaled where float16 takes part; None for a parameter without a part."""
    device, inputs = x.device.type, [x, *parameters]
    lost = ValueError("x has no part in the loss; forward must compute its logits from x, with gradients on")
    if not loss.requires_grad:
        raise lost
    half = x.dtype == torch.float16 or (
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    )
    for scale in _HALF_SCALES if half else (1.0,):
        last = scale == 1
        grads = torch.autograd.grad(loss * scale, inputs, retain_graph=not last, allow_unused=True)
        if last or all(torch.isfinite(g).all() for g in grads if g is not None):
            break
    if grads[0] is None:
        raise lost
    # float32, or the division would bring the underflow back
    return [g.float() / scale if half and g is not None else g for g in grads]


@contextmanager
def _untouched(forward: Forward, device: torch.device) -> Iterator[None]:
    """Evaluation mode for an ``nn.Module``; flags and random state restored on exit."""
    modules = list(forward.modules()) if isinstance(forward, nn.Module) else []
    flags = [m.training for m in modules]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            for m in modules:
                m.training = False
            yield
        finally:
            for m, flag in zip(modules, flags, strict=True):
                m.training = flag


class _KnownGradient(torch.autograd.Function):
    """A scalar whose gradient with respect to the parameters is already known."""

    @staticmethod
    def forward(ctx, loss: Tensor, grads: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.grads = grads
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream: Tensor):  # type: ignore[override]
        return None, None, *[g * upstream.to(g.dtype) for g in ctx.grads]
