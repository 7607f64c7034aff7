"""How a training batch is mixed, whichever host trains: the decision, the saliency, the plan, and what to log of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from dataopt.core.mixup import CoMixed, CoMixup, CutMix, Mixed, PuzzleMix, clean_loss, input_gradient, saliency
from dataopt.core.mixup.mixed import one_hot
from torch import Tensor, nn

SoftLoss = Callable[[Tensor, Tensor], Tensor]
_GAP = 2  # white pixels between the pictures


@dataclass(frozen=True)
class MixedBatch:
    """What to train on.

    Attributes:
        inputs: like the loader's.
        targets: (B, K) float32, soft where mixed, else one-hot.
        method: ``"puzzle"``, ``"comixup"`` or ``"cutmix"``; None where the batch was left alone.
        mixed: the plan, or None.
        clean_loss: scalar to be added to the loss with its weight, or None.
        seconds: spent on the saliency and the plan.
    """

    inputs: Tensor
    targets: Tensor
    method: str | None = None
    mixed: Mixed | CoMixed | None = None
    clean_loss: Tensor | None = None
    seconds: float = 0.0

    def statistics(self) -> dict[str, float]:
        """Of one batch: ``mixed`` (0 or 1), ``seconds`` and, where mixed, ``inputs_per_output`` and
        ``largest_share``, the mean share of each output's main input."""
        out = {"mixed": float(self.mixed is not None), "seconds": self.seconds}
        if self.mixed is not None:
            shares = source_shares(self.mixed)
            out["inputs_per_output"] = float((shares > 0).sum(1).float().mean())
            out["largest_share"] = float(shares.amax(1).mean())
        return out


class Mixing:
    """Decides per batch between mixing, CutMix and nothing, and does it.

    Every draw follows from (``seed``, ``step``, rank), so a resumed run goes on with the draws that it would have made
    on any rank. Ranks decide alike whether to mix, their masks differ, and nothing is exchanged between them. A batch
    of one has nobody to mix with and stays as it is.

    Args:
        mix: how to mix.
        prob: probability that a batch is mixed.
        cutmix_alpha: above 0, CutMix takes the method's place with probability ``switch_prob``.
        switch_prob: see ``cutmix_alpha``.
        off_epoch: no mixing from this epoch on; 0 never stops.
        clean_weight: weight of the loss on the unmixed batch (thesis 3.5), from the pass that gives the saliency,
            which then runs in training mode.
        saliency_resolution: below 1, the saliency comes from downsized inputs.
        seed: not negative.

    Raises:
        TypeError: ``mix`` is neither a PuzzleMix nor a CoMixup.
        ValueError: an argument outside its range, or two that do not go together.
    """

    def __init__(
        self,
        mix: PuzzleMix | CoMixup,
        *,
        prob: float = 1.0,
        cutmix_alpha: float = 0.0,
        switch_prob: float = 0.5,
        off_epoch: int = 0,
        clean_weight: float = 0.0,
        saliency_resolution: float = 1.0,
        seed: int = 0,
    ):
        if not isinstance(mix, PuzzleMix | CoMixup):
            raise TypeError(f"mix is a {type(mix).__name__}; give a PuzzleMix or a CoMixup of dataopt.core.mixup")
        for name, value in (("prob", prob), ("switch_prob", switch_prob)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value} is a probability; give a value in [0, 1]")
        amounts = dict(cutmix_alpha=cutmix_alpha, off_epoch=off_epoch, clean_weight=clean_weight, seed=seed)
        for name, value in amounts.items():
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name}={value} must be finite and not negative")
        if not 0 < saliency_resolution <= 1:
            raise ValueError(f"saliency_resolution={saliency_resolution} must lie in (0, 1]; 0.5 halves each side")
        if clean_weight > 0 and saliency_resolution < 1:
            raise ValueError(
                f"saliency_resolution={saliency_resolution} with clean_weight={clean_weight}: the clean loss needs the "
                "full inputs, so leave saliency_resolution at 1"
            )
        self.mix = mix
        self.cutmix = CutMix(mix.num_classes, cutmix_alpha) if cutmix_alpha > 0 else None
        self.prob = prob
        self.switch_prob = switch_prob
        self.off_epoch = off_epoch
        self.clean_weight = clean_weight
        self.saliency_resolution = saliency_resolution
        self.seed = seed
        self.step = 0  # batches decided on, over the whole run

    def __call__(self, forward: nn.Module, x: Tensor, y: Tensor, epoch: int = 0) -> MixedBatch:
        """One batch.

        Args:
            forward: the bare module, inputs to (B, K) logits; under the autocast that it trains with.
            x: (B, C, H, W) or (B, C, L).
            y: (B,) class ids or (B, K) weights.
            epoch: counted from 0.

        Raises:
            ValueError: what :class:`PuzzleMix` and :class:`CoMixup` raise.
        """
        labels = one_hot(y, self.mix.num_classes, len(x)).to(x.device)
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        # whether to mix is the same on all ranks, so that none waits for another's saliency
        shared = np.random.default_rng([self.seed, self.step])
        chosen = bool(shared.random() < self.prob)
        switch = bool(shared.random() < self.switch_prob)
        generator = batch_generator(self.seed, self.step, rank)
        self.step += 1
        if not chosen or len(x) == 1 or (self.off_epoch and epoch >= self.off_epoch):
            return MixedBatch(x, labels)

        start = time.perf_counter()
        mixed: Mixed | CoMixed
        clean = None
        if self.cutmix is not None and switch:
            method, mixed = "cutmix", self.cutmix(x.detach(), labels, generator=generator)
        else:
            method = "puzzle" if isinstance(self.mix, PuzzleMix) else "comixup"
            mixed, clean = self._mix(forward, x.detach(), y, labels, generator)
        return MixedBatch(mixed.inputs, mixed.targets, method, mixed, clean, time.perf_counter() - start)

    def _mix(
        self, forward: nn.Module, x: Tensor, y: Tensor, labels: Tensor, generator: torch.Generator
    ) -> tuple[Mixed | CoMixed, Tensor | None]:
        adversarial = self.mix.adversarial if isinstance(self.mix, PuzzleMix) else None
        seen, noise = adversarial.start(x, generator) if adversarial is not None else (x, None)
        target = y if y.is_floating_point() else y.long()
        clean = None
        if self.clean_weight > 0:
            clean, gradient = clean_loss(forward, seen, target)
        else:
            gradient = input_gradient(forward, seen, target, resolution=self.saliency_resolution)
        s = saliency(gradient)
        with torch.autocast(x.device.type, enabled=False):  # the forward's precision; targets stay float32
            if isinstance(self.mix, CoMixup):
                return self.mix(x, labels, s, generator), clean
            return self.mix(x, labels, s, noise, None if noise is None else gradient, generator), clean

    def state_dict(self) -> dict[str, int]:
        """What a resumed run needs to go on with the same draws."""
        return {"seed": self.seed, "step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seed, self.step = int(state["seed"]), int(state["step"])


def batch_generator(seed: int, step: int, rank: int = 0) -> torch.Generator:
    """The CPU generator of all draws of one batch on one rank, but whether to mix it."""
    drawn = np.random.default_rng([seed, step, 1 + rank]).integers(2**62)
    return torch.Generator().manual_seed(int(drawn))


def source_shares(mixed: Mixed | CoMixed) -> Tensor:
    """(B', B) share of each input in each output."""
    if isinstance(mixed, CoMixed):
        return mixed.sources
    share = mixed.mask.flatten(1).mean(1)
    return torch.diag(share).scatter_add_(1, mixed.partner.unsqueeze(1), (1 - share).unsqueeze(1))


def check_soft_loss(loss_fn: SoftLoss, num_classes: int) -> None:
    """Raise unless ``loss_fn(logits, targets)`` takes soft (B, K) targets and averages, by trying it.

    Raises:
        ValueError: it does not.
    """
    device = next((t.device for t in loss_fn.buffers()), None) if isinstance(loss_fn, nn.Module) else None
    logits = torch.zeros(2, num_classes, device=device)
    name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
    try:
        loss = loss_fn(logits, torch.full_like(logits, 1 / num_classes))
    except (RuntimeError, ValueError, IndexError, AssertionError, TypeError) as e:
        raise ValueError(
            f"loss_fn={name} does not take soft targets of shape (B, {num_classes}) ({e}); "
            "torch.nn.functional.cross_entropy does"
        ) from e
    if loss.ndim:
        raise ValueError(f"loss_fn={name} gives a loss of shape {tuple(loss.shape)}; it must average over the batch")


@dataclass
class Means:
    """Running means of the statistics of batches; ``take`` starts anew."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, statistics: dict[str, float]) -> None:
        for name, value in statistics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        out = {name: value / self.counts[name] for name, value in self.sums.items()}
        self.sums.clear()
        self.counts.clear()
        return out


def picture(x: Tensor, mixed: Mixed | CoMixed, count: int = 8) -> Tensor:
    """Inputs above, what became of them below; between them the partners, where there is one each.

    Args:
        x: (B, C, H, W) or (B, C, L), before mixing; a 1-d input is drawn as an image of C rows.
        mixed: the plan of the same batch.
        count: columns at most.

    Returns:
        (3, height, width) float32 on the CPU in [0, 1], scaled from the least to the greatest value shown. Inputs of
        other than 3 channels are averaged to grey.
    """
    count = min(count, len(x), len(mixed.inputs))
    lines = [x[:count], mixed.inputs[:count]]
    if isinstance(mixed, Mixed):
        lines.insert(1, x[mixed.partner[:count]])
    t = torch.stack(lines).detach().float().cpu()  # (rows, count, C, H, W)
    if t.ndim == 4:
        t = t.unsqueeze(2)
    if t.shape[2] != 3:
        t = t.mean(2, keepdim=True).expand(-1, -1, 3, -1, -1)
    low, high = t.aminmax()
    t = (t - low) / (high - low).clamp(min=1e-12)
    t = nn.functional.pad(t, (0, _GAP, 0, _GAP), value=1.0)
    rows, columns, channels, height, width = t.shape
    joined = t.permute(2, 0, 3, 1, 4).reshape(channels, rows * height, columns * width)
    return joined[:, :-_GAP, :-_GAP].contiguous()


def log_picture(logger: Any, tag: str, image: Tensor, step: int) -> bool:
    """Give (3, H, W) to a logger that takes images: ``log_image`` (wandb's way), or ``add_image`` (TensorBoard's).

    Returns:
        Whether the logger takes images.
    """
    if hasattr(logger, "log_image"):
        logger.log_image(key=tag, images=[image.permute(1, 2, 0).numpy()], step=step)
        return True
    writer: Any = logger if hasattr(logger, "add_image") else getattr(logger, "experiment", None)
    if not hasattr(writer, "add_image"):
        return False
    writer.add_image(tag, image, step)
    return True
