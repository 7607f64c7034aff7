"""How a training batch is mixed, whichever host trains: the decision, the saliency, the plan, and what to log of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from dataopt.core.arguments import check_channels, check_choice, check_numbers, check_whole
from dataopt.core.extras import optional
from dataopt.core.mixup import CoMixed, CoMixup, CutMix, Mixed, PuzzleMix, augmix, clean_loss, input_gradient, saliency
from dataopt.core.mixup.adversarial import normalise, unnormalise
from dataopt.core.mixup.mixed import one_hot
from torch import Tensor, nn
from torch.nn import functional as F

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
        augment: ``"augmix"``: what is mixed are AugMix images of the batch (thesis 3.6.2), so is what the saliency and
            the clean loss see; a batch that is not mixed stays as it is. For images of 1 or 3 channels, by torchvision,
            on the CPU.
        mean, std: per channel, how images are normalised, for ``augment``; a PuzzleMix that has its own needs none.
        seed: not negative.

    Raises:
        TypeError: ``mix`` is neither a PuzzleMix nor a CoMixup.
        ValueError: an argument outside its range, or two that do not go together.
        ModuleNotFoundError: ``augment`` without torchvision.
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
        augment: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        seed: int = 0,
    ):
        if not isinstance(mix, PuzzleMix | CoMixup):
            raise TypeError(f"mix is a {type(mix).__name__}; give a PuzzleMix or a CoMixup of dataopt.core.mixup")
        check_numbers(
            prob=prob, cutmix_alpha=cutmix_alpha, switch_prob=switch_prob, off_epoch=off_epoch,
            clean_weight=clean_weight, saliency_resolution=saliency_resolution,
        )  # fmt: skip
        check_whole(seed=seed)
        for name, value in (("prob", prob), ("switch_prob", switch_prob)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value} must lie in [0, 1]")
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
        check_choice(("augmix", None), augment=augment)
        if augment is not None:
            optional("torchvision.transforms.v2", "eval")  # now, not at the first batch
        check_channels(mean, std)
        if isinstance(mix, PuzzleMix) and mix.mean is not None:
            mean, std = mix.mean, mix.std
        self.mix = mix
        self.cutmix = CutMix(mix.num_classes, cutmix_alpha) if cutmix_alpha > 0 else None
        self.prob = prob
        self.switch_prob = switch_prob
        self.off_epoch = off_epoch
        self.clean_weight = clean_weight
        self.saliency_resolution = saliency_resolution
        self.augment = augment
        self.mean = mean
        self.std = std
        self.seed = seed
        self.step = 0  # batches decided on, over the whole run
        self.soft_loss: SoftLoss = F.cross_entropy  # of (B, K) labels, whose gradient is the saliency

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
        labels = self.labels(x, y)
        chosen, switch, rng = self.decide()
        if not chosen or len(x) == 1 or not self.active(epoch):
            return MixedBatch(x, labels)
        return self.make(forward, x, y, labels, switch, seeded(rng))

    def active(self, epoch: int) -> bool:
        """Whether ``off_epoch`` lets batches of this epoch be mixed."""
        return not self.off_epoch or epoch < self.off_epoch

    def labels(self, x: Tensor, y: Tensor) -> Tensor:
        """(B, K) float32 labels, checked before the model sees anything, as is what ``augment`` takes.

        Raises:
            ValueError: labels out of range, or inputs that ``augment`` does not take.
        """
        if self.augment is not None and (x.ndim != 4 or x.shape[1] not in (1, 3)):
            raise ValueError(
                f"augment={self.augment!r} is for images (B, 1, H, W) or (B, 3, H, W), and the inputs have the shape "
                f"{tuple(x.shape)}; leave augment out"
            )
        return one_hot(y, self.mix.num_classes, len(x)).to(x.device)

    def decide(self) -> tuple[bool, bool, np.random.Generator]:
        """Go one step on: whether to mix the batch, whether by CutMix, and what draws the rest on this rank.

        The first two are the same on all ranks: none waits for another's saliency, and passes that synchronise (the
        clean loss with SyncBN) meet.
        """
        started = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if started else 0
        shared = np.random.default_rng([self.seed, self.step])
        chosen = bool(shared.random() < self.prob)
        switch = bool(shared.random() < self.switch_prob) and self.cutmix is not None
        rng = _rank_rng(self.seed, self.step, rank)
        self.step += 1
        return chosen, switch, rng

    def make(
        self,
        forward: nn.Module,
        x: Tensor,
        y: Tensor,
        labels: Tensor,
        switch: bool,
        generator: torch.Generator,
        **given: Any,
    ) -> MixedBatch:
        """Mix a batch that was decided on; ``given`` are draws that the method is not to make itself."""
        start = time.perf_counter()
        x = x.detach()
        if self.augment is not None:
            x = self._augmented(x, generator)
        mixed: Mixed | CoMixed
        clean = None
        if self.cutmix is not None and switch:
            method, mixed = "cutmix", self.cutmix(x, labels, generator=generator)
        else:
            method = "puzzle" if isinstance(self.mix, PuzzleMix) else "comixup"
            mixed, clean = self._salient(forward, x, y, labels, generator, given)
        return MixedBatch(mixed.inputs, mixed.targets, method, mixed, clean, time.perf_counter() - start)

    def _augmented(self, x: Tensor, generator: torch.Generator) -> Tensor:
        pixels = unnormalise(x.float(), self.mean, self.std)
        if self.mean is not None:
            pixels = pixels.clamp(0, 1)  # random erasing may leave the range a little
        images = normalise(augmix(pixels, generator), self.mean, self.std)
        return torch.empty_like(x).copy_(images)  # its dtype and memory format

    def _salient(
        self, forward: nn.Module, x: Tensor, y: Tensor, labels: Tensor, generator: torch.Generator, given: dict
    ) -> tuple[Mixed | CoMixed, Tensor | None]:
        adversarial = self.mix.adversarial if isinstance(self.mix, PuzzleMix) else None
        seen, noise = adversarial.start(x, generator) if adversarial is not None else (x, None)
        target, loss_fn = (y.long(), F.cross_entropy) if y.ndim == 1 else (labels, self.soft_loss)
        clean = None
        if self.clean_weight > 0:
            clean, gradient = clean_loss(forward, seen, target, loss_fn)
        else:
            gradient = input_gradient(forward, seen, target, loss_fn, self.saliency_resolution)
        s = saliency(gradient)
        with torch.autocast(x.device.type, enabled=False):  # the forward's precision; targets stay float32
            if isinstance(self.mix, CoMixup):
                return self.mix(x, labels, s, generator), clean
            return self.mix(x, labels, s, noise, None if noise is None else gradient, generator, **given), clean

    def state_dict(self) -> dict[str, int]:
        """What a resumed run needs to go on with the same draws."""
        return {"seed": self.seed, "step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Raises ValueError where the state holds no seed and step."""
        values: Any = [state.get(name) if isinstance(state, dict) else None for name in ("seed", "step")]
        if not all(isinstance(v, int) and 0 <= v < 1 << 63 for v in values):
            raise ValueError(f"state={state!r:.80} holds no seed and step of mixing; resume from another checkpoint")
        self.seed, self.step = values


def batch_generator(seed: int, step: int, rank: int = 0) -> torch.Generator:
    """The CPU generator of all draws of one batch on one rank, but whether to mix it."""
    return seeded(_rank_rng(seed, step, rank))


def _rank_rng(seed: int, step: int, rank: int) -> np.random.Generator:
    return np.random.default_rng([seed, step, 1 + rank])


def seeded(rng: np.random.Generator) -> torch.Generator:
    """A CPU generator whose seed is the next draw of ``rng``."""
    return torch.Generator().manual_seed(int(rng.integers(2**62)))


def source_shares(mixed: Mixed | CoMixed) -> Tensor:
    """(B', B) share of each input in each output."""
    if isinstance(mixed, CoMixed):
        return mixed.sources
    share = mixed.mask.flatten(1).mean(1)
    return torch.diag(share).scatter_add_(1, mixed.partner.unsqueeze(1), (1 - share).unsqueeze(1))


def weights_error(found: str) -> ValueError:
    """What to raise where samples have weights; ``found`` says where."""
    return ValueError(
        f"{found}: a mixed input is of several samples, and the weight of one does not fit it. Find and drop wrong "
        "labels in a training of its own, by LabelCleaningCallback or clean_dataset, and mix the rows that are left"
    )


def check_soft_loss(
    loss_fn: SoftLoss,
    num_classes: int,
    argument: str = "loss_fn",
    remedy: str = "torch.nn.functional.cross_entropy does",
) -> None:
    """Raise unless ``loss_fn(logits, targets)`` takes soft (B, K) targets and averages, by trying it.

    Args:
        loss_fn: the loss.
        num_classes: K.
        argument: what the caller calls the loss.
        remedy: what to use instead, for the message.

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
            f"{argument}={name} does not take soft targets of shape (B, {num_classes}) ({e}); {remedy}"
        ) from e
    if loss.ndim:
        raise ValueError(f"{argument}={name} gives a loss of shape {tuple(loss.shape)}; it must average over the batch")


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
