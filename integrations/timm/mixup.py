"""How one training batch is mixed, and :class:`PuzzleMixup`, called like ``timm.data.Mixup``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from dataopt.core.mixup import CutMix, Mixed, PuzzleMix, clean_loss, input_gradient, saliency
from dataopt.core.mixup.mixed import one_hot
from timm.utils import unwrap_model
from torch import Tensor, nn

MODES = ("batch", "elem")


@dataclass(frozen=True)
class Batch:
    """What to train on.

    Attributes:
        inputs: like the loader's.
        targets: (B, K) float32, mixed and smoothed.
        mixed: the plan, or None where the batch was left alone.
        clean_loss: scalar to be added to the loss with its weight, or None.
    """

    inputs: Tensor
    targets: Tensor
    mixed: Mixed | None = None
    clean_loss: Tensor | None = None


class BatchMixer:
    """Decides per batch between Puzzle Mix, CutMix and nothing, as timm's mixup options say, and does it.

    Every draw follows from (``seed``, ``step``, rank), so a run that is resumed with its ``step``
    goes on with the draws it would have made. Nothing is exchanged between ranks: they decide alike
    whether to mix, and their masks differ.

    Args:
        mix: how to mix; its ``mean`` and ``std`` are the loader's.
        prob: probability of mixing, per batch or per element.
        cutmix_alpha: above 0, CutMix takes the place of Puzzle Mix with probability ``switch_prob``.
        switch_prob: see ``cutmix_alpha``.
        mode: ``"batch"`` draws one expected share and one decision for all, ``"elem"`` one each.
        smoothing: label smoothing, by timm's rule: off = smoothing / K, on = 1 - smoothing + off.
        multi_label: accept (B, K) multi-hot targets. Their saliency is that of the binary
            cross-entropy, and smoothing moves each label towards 0.5.
        clean_weight: weight of the loss on the unmixed batch (thesis 3.5), from the pass that gives
            the saliency, which then runs in training mode.
        saliency_resolution: below 1, the saliency comes from downsized inputs.
        seed: not negative.

    Raises:
        ValueError: an argument outside its range, or two that do not go together.
        TypeError: ``mix`` is not a :class:`PuzzleMix`.
    """

    def __init__(
        self,
        mix: PuzzleMix,
        *,
        prob: float = 1.0,
        cutmix_alpha: float = 0.0,
        switch_prob: float = 0.5,
        mode: str = "batch",
        smoothing: float = 0.0,
        multi_label: bool = False,
        clean_weight: float = 0.0,
        saliency_resolution: float = 1.0,
        seed: int = 0,
    ):
        if not isinstance(mix, PuzzleMix):
            raise TypeError(f"mix is {type(mix).__name__}; give dataopt.core.mixup.PuzzleMix(num_classes, ...)")
        for name, value in (("prob", prob), ("switch_prob", switch_prob)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value} is a probability; give a value in [0, 1]")
        for name, value in (("cutmix_alpha", cutmix_alpha), ("clean_weight", clean_weight), ("seed", seed)):
            if value < 0:
                raise ValueError(f"{name}={value} must not be negative")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing={smoothing} must lie in [0, 1); timm's default is 0.1")
        if not 0 < saliency_resolution <= 1:
            raise ValueError(f"saliency_resolution={saliency_resolution} must lie in (0, 1]; 0.5 halves each side")
        if mode == "pair":
            raise ValueError("mode='pair' mixes two inputs with each other; Puzzle Mix has 'batch' and 'elem'")
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} is unknown; choose 'batch' or 'elem'")
        if mode == "elem" and cutmix_alpha > 0:
            raise ValueError(f"mode='elem' with cutmix_alpha={cutmix_alpha}: switching to CutMix needs mode='batch'")
        if clean_weight > 0 and saliency_resolution < 1:
            raise ValueError(
                f"saliency_resolution={saliency_resolution} with clean_weight={clean_weight}: the clean loss needs the "
                "full inputs, so leave saliency_resolution at 1"
            )
        self.mix = mix
        self.cutmix = CutMix(mix.num_classes, cutmix_alpha) if cutmix_alpha > 0 else None
        self.prob = prob
        self.switch_prob = switch_prob
        self.mode = mode
        self.smoothing = smoothing
        self.multi_label = multi_label
        self.clean_weight = clean_weight
        self.saliency_resolution = saliency_resolution
        self.seed = seed
        self.step = 0  # batches decided on, over the whole run
        self.decided = self.mixed = 0  # batches decided on and mixed, in this process

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, enabled: bool = True) -> Batch:
        """One batch.

        Args:
            model: for the saliency; DDP and compile wrappers are taken off.
            x: (B, C, H, W), normalised.
            y: (B,) class ids, or (B, K) with ``multi_label``.
            enabled: False leaves the batch unmixed and draws nothing.

        Raises:
            ValueError: what :class:`PuzzleMix` raises, or (B, K) targets without ``multi_label``.
        """
        if y.ndim == 2 and not self.multi_label:
            raise ValueError(
                f"target has shape {tuple(y.shape)}: (B, K) targets need a binary cross-entropy criterion and, in "
                "PuzzleMixup, multi_label=True; otherwise give (B,) class ids"
            )
        labels = one_hot(y, self.mix.num_classes, len(x)).to(x.device)  # checked before the model sees them
        if not enabled:
            return Batch(x, self._smooth(labels, y))
        # whether to mix is the same on all ranks: none waits for another's saliency, and passes that synchronise
        # (clean loss with SyncBN) meet; how to mix differs
        shared = np.random.default_rng([self.seed, self.step])
        rng = np.random.default_rng([self.seed, self.step, 1 + _rank()])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        self.step += 1
        self.decided += 1

        lam = partner = None
        chosen = self.prob > 0
        switch = False
        if self.mode == "batch":
            chosen = bool(shared.random() < self.prob)
            switch = bool(shared.random() < self.switch_prob) and self.cutmix is not None
        elif len(x) > 1:  # a batch of one is refused by the core, as in "batch"
            partner = torch.from_numpy(
                np.where(rng.random(len(x)) < self.prob, rng.permutation(len(x)), np.arange(len(x)))
            )
            lam = torch.from_numpy(rng.beta(self.mix.alpha, self.mix.alpha, len(x))) if self.mix.alpha > 0 else None
        if not chosen:
            return Batch(x, self._smooth(labels, y))

        self.mixed += 1
        if switch and self.cutmix is not None:
            mixed, clean = self.cutmix(x, labels, generator=generator), None
        else:
            mixed, clean = self._puzzle(model, x, y, labels, generator, partner, lam)
        return Batch(mixed.inputs, self._smooth(mixed.targets, y), mixed, clean)

    def _puzzle(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        labels: Tensor,
        generator: torch.Generator,
        partner: Tensor | None,
        lam: Tensor | None,
    ) -> tuple[Mixed, Tensor | None]:
        bare = unwrap_model(model)
        adversarial = self.mix.adversarial
        seen, noise = adversarial.start(x, generator) if adversarial is not None else (x, None)
        label, loss_fn = (y.long(), F.cross_entropy) if y.ndim == 1 else (labels, F.binary_cross_entropy_with_logits)
        clean = None
        if self.clean_weight > 0:
            clean, gradient = clean_loss(bare, seen, label, loss_fn)
        else:
            gradient = input_gradient(bare, seen, label, loss_fn, self.saliency_resolution)
        step = None if noise is None else gradient
        mixed = self.mix(x, labels, saliency(gradient), noise, step, generator, partner=partner, lam=lam)
        return mixed, clean

    def _smooth(self, targets: Tensor, y: Tensor) -> Tensor:
        off = 1 / self.mix.num_classes if y.ndim == 1 else 0.5
        return targets * (1 - self.smoothing) + off * self.smoothing

    def state_dict(self) -> dict[str, int]:
        """What a resumed run needs to go on with the same draws."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = int(state["step"])


class PuzzleMixup:
    """Puzzle Mix for a training loop of your own, called like ``timm.data.Mixup``.

    Keywords that ``timm.data.Mixup`` has mean the same here. The saliency needs the model, so this
    runs on the device, after the loader: a collate function for loader workers is
    :class:`PuzzleCollate`.

    Args:
        model: the model being trained, wrapped or not.
        num_classes: K, columns of the targets.
        cutmix_alpha, prob, switch_prob, mode, label_smoothing, multi_label: as in timm;
            ``mode="pair"`` is not offered.
        saliency_resolution, seed: see :class:`BatchMixer`.
        **puzzle: arguments of :class:`PuzzleMix`: ``alpha``, ``beta``, ``mean``, ``std``, ...

    Attributes:
        mixup_enabled: set it to False to stop mixing; targets stay soft.

    Examples:
        >>> import timm, torch
        >>> from dataopt.integrations.timm import PuzzleMixup
        >>> model = timm.create_model("test_resnet", num_classes=10)
        >>> mixup_fn = PuzzleMixup(model, num_classes=10)
        >>> x, target = mixup_fn(torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]))
        >>> target.shape
        torch.Size([4, 10])
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int = 1000,
        *,
        cutmix_alpha: float = 0.0,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        mode: str = "batch",
        label_smoothing: float = 0.1,
        multi_label: bool = False,
        saliency_resolution: float = 1.0,
        seed: int = 0,
        **puzzle: Any,
    ):
        self.model = model
        self.mixer = BatchMixer(
            PuzzleMix(num_classes, **puzzle),
            prob=prob,
            cutmix_alpha=cutmix_alpha,
            switch_prob=switch_prob,
            mode=mode,
            smoothing=label_smoothing,
            multi_label=multi_label,
            saliency_resolution=saliency_resolution,
            seed=seed,
        )
        self.mixup_enabled = True

    def __call__(self, x: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mix a batch.

        Args:
            x: (B, C, H, W), normalised as ``mean`` and ``std`` say.
            target: (B,) class ids, or (B, K) multi-hot with ``multi_label=True``.

        Returns:
            (inputs like ``x``, targets (B, K) float32).

        Raises:
            TypeError: called with a list of samples, as a collate function is.
            ValueError: what :class:`PuzzleMix` raises.
        """
        if target is None or not isinstance(x, Tensor):
            raise TypeError(
                f"PuzzleMixup got {type(x).__name__} where a batch (x, target) of tensors belongs; in a DataLoader's "
                "collate_fn use dataopt.integrations.timm.PuzzleCollate"
            )
        batch = self.mixer(self.model, x, target, self.mixup_enabled)
        return batch.inputs, batch.targets

    def state_dict(self) -> dict[str, int]:
        """Save it with the model, so that a resumed run goes on with the same draws."""
        return self.mixer.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.mixer.load_state_dict(state)


def _rank() -> int:
    started = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if started else 0
