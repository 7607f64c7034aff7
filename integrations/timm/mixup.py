"""How one training batch is mixed, and :class:`PuzzleMixup` and :class:`CoMixupFn`, called like ``timm.data.Mixup``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from dataopt.core.mixup import CoMixed, CoMixup, CutMix, Mixed, PuzzleMix, clean_loss, input_gradient, saliency
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
    mixed: Mixed | CoMixed | None = None
    clean_loss: Tensor | None = None


class BatchMixer:
    """Decides per batch between mixing, CutMix and nothing, as timm's mixup options say, and does it.

    Every draw follows from (``seed``, ``step``, rank), so a run that is resumed with its ``step``
    goes on with the draws it would have made. Nothing is exchanged between ranks: they decide alike
    whether to mix, and their masks differ.

    Args:
        mix: how to mix; a PuzzleMix has the loader's ``mean`` and ``std``.
        prob: probability of mixing, per batch or per element.
        cutmix_alpha: above 0, CutMix takes the place of ``mix`` with probability ``switch_prob``.
        switch_prob: see ``cutmix_alpha``.
        mode: ``"batch"`` draws one expected share and one decision for all, ``"elem"`` one each. Co-Mixup mixes whole
            batches, so it has ``"batch"`` only.
        smoothing: label smoothing, by timm's rule: off = smoothing / K, on = 1 - smoothing + off.
        multi_label: accept (B, K) multi-hot targets. Their saliency is that of the binary
            cross-entropy, and smoothing moves each label towards 0.5.
        clean_weight: weight of the loss on the unmixed batch (thesis 3.5), from the pass that gives
            the saliency, which then runs in training mode.
        saliency_resolution: below 1, the saliency comes from downsized inputs.
        seed: not negative.

    Raises:
        ValueError: an argument outside its range, or two that do not go together.
        TypeError: ``mix`` is neither a :class:`PuzzleMix` nor a :class:`CoMixup`.
    """

    def __init__(
        self,
        mix: PuzzleMix | CoMixup,
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
        if not isinstance(mix, PuzzleMix | CoMixup):
            raise TypeError(
                f"mix is {type(mix).__name__}; give PuzzleMix or CoMixup(num_classes, ...) of dataopt.core.mixup"
            )
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
            raise ValueError("mode='pair' mixes two inputs with each other; choose 'batch', or with Puzzle Mix 'elem'")
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} is unknown; choose 'batch' or 'elem'")
        if mode == "elem" and isinstance(mix, CoMixup):
            raise ValueError(
                "mode='elem' decides for each input, but Co-Mixup mixes them jointly; leave mode at 'batch'"
            )
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
            ValueError: what ``mix`` raises, or (B, K) targets without ``multi_label``.
        """
        if y.ndim == 2 and not self.multi_label:
            raise ValueError(
                f"target has shape {tuple(y.shape)}: (B, K) targets need a binary cross-entropy criterion and, in "
                "PuzzleMixup and CoMixupFn, multi_label=True; otherwise give (B,) class ids"
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
            alpha = self.mix.alpha
            lam = torch.from_numpy(rng.beta(alpha, alpha, len(x))) if alpha > 0 else None
        if not chosen:
            return Batch(x, self._smooth(labels, y))

        self.mixed += 1
        mixed: Mixed | CoMixed
        if switch and self.cutmix is not None:
            mixed, clean = self.cutmix(x, labels, generator=generator), None
        else:
            mixed, clean = self._salient(model, x, y, labels, generator, partner, lam)
        return Batch(mixed.inputs, self._smooth(mixed.targets, y), mixed, clean)

    def _salient(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        labels: Tensor,
        generator: torch.Generator,
        partner: Tensor | None,
        lam: Tensor | None,
    ) -> tuple[Mixed | CoMixed, Tensor | None]:
        bare = unwrap_model(model)
        adversarial = self.mix.adversarial if isinstance(self.mix, PuzzleMix) else None
        seen, noise = adversarial.start(x, generator) if adversarial is not None else (x, None)
        label, loss_fn = (y.long(), F.cross_entropy) if y.ndim == 1 else (labels, F.binary_cross_entropy_with_logits)
        clean = None
        if self.clean_weight > 0:
            clean, gradient = clean_loss(bare, seen, label, loss_fn)
        else:
            gradient = input_gradient(bare, seen, label, loss_fn, self.saliency_resolution)
        s = saliency(gradient)
        if isinstance(self.mix, CoMixup):
            return self.mix(x, labels, s, generator), clean
        step = None if noise is None else gradient
        return self.mix(x, labels, s, noise, step, generator, partner=partner, lam=lam), clean

    def _smooth(self, targets: Tensor, y: Tensor) -> Tensor:
        off = 1 / self.mix.num_classes if y.ndim == 1 else 0.5
        return targets * (1 - self.smoothing) + off * self.smoothing

    def state_dict(self) -> dict[str, int]:
        """What a resumed run needs to go on with the same draws."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = int(state["step"])


class MixupFn:
    """What :class:`PuzzleMixup` and :class:`CoMixupFn` share: a mixer, and the model that its saliency needs.

    Attributes:
        mixup_enabled: set it to False to stop mixing; targets stay soft.
    """

    collate: ClassVar[str]  # the method's class for a collate_fn

    def __init__(self, model: nn.Module, mixer: BatchMixer):
        self.model = model
        self.mixer = mixer
        self.mixup_enabled = True

    def __call__(self, x: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mix a batch.

        Args:
            x: (B, C, H, W), normalised.
            target: (B,) class ids, or (B, K) multi-hot with ``multi_label=True``.

        Returns:
            (inputs like ``x``, targets (B, K) float32).

        Raises:
            TypeError: called with a list of samples, as a collate function is.
            ValueError: what the method raises.
        """
        if target is None or not isinstance(x, Tensor):
            raise TypeError(
                f"{type(self).__name__} got {type(x).__name__} where a batch (x, target) of tensors belongs; in a "
                f"DataLoader's collate_fn use dataopt.integrations.timm.{self.collate}"
            )
        batch = self.mixer(self.model, x, target, self.mixup_enabled)
        return batch.inputs, batch.targets

    def state_dict(self) -> dict[str, int]:
        """Save it with the model, so that a resumed run goes on with the same draws."""
        return self.mixer.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.mixer.load_state_dict(state)


class PuzzleMixup(MixupFn):
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

    Examples:
        >>> import timm, torch
        >>> from dataopt.integrations.timm import PuzzleMixup
        >>> model = timm.create_model("test_resnet", num_classes=10)
        >>> mixup_fn = PuzzleMixup(model, num_classes=10)
        >>> x, target = mixup_fn(torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]))
        >>> target.shape
        torch.Size([4, 10])
    """

    collate = "PuzzleCollate"

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
        mixer = BatchMixer(
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
        super().__init__(model, mixer)


class CoMixupFn(MixupFn):
    """Co-Mixup for a training loop of your own, called like ``timm.data.Mixup``.

    As :class:`PuzzleMixup`, but for ``mode``: all inputs of a batch are mixed jointly.

    Args:
        model: the model being trained, wrapped or not.
        num_classes: K, columns of the targets.
        cutmix_alpha, prob, switch_prob, label_smoothing, multi_label: as in timm.
        saliency_resolution, seed: see :class:`BatchMixer`.
        **comixup: arguments of :class:`CoMixup`: ``grid``, ``partition``, ``tau``, ...

    Examples:
        >>> import timm, torch
        >>> from dataopt.integrations.timm import CoMixupFn
        >>> model = timm.create_model("test_resnet", num_classes=10)
        >>> mixup_fn = CoMixupFn(model, num_classes=10)
        >>> x, target = mixup_fn(torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]))
        >>> target.shape
        torch.Size([4, 10])
    """

    collate = "CoMixupCollate"

    def __init__(
        self,
        model: nn.Module,
        num_classes: int = 1000,
        *,
        cutmix_alpha: float = 0.0,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        label_smoothing: float = 0.1,
        multi_label: bool = False,
        saliency_resolution: float = 1.0,
        seed: int = 0,
        **comixup: Any,
    ):
        mixer = BatchMixer(
            CoMixup(num_classes, **comixup),
            prob=prob,
            cutmix_alpha=cutmix_alpha,
            switch_prob=switch_prob,
            smoothing=label_smoothing,
            multi_label=multi_label,
            saliency_resolution=saliency_resolution,
            seed=seed,
        )
        super().__init__(model, mixer)


def _rank() -> int:
    started = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if started else 0
