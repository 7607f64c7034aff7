"""How one training batch is mixed, and :class:`PuzzleMixup` and :class:`CoMixupFn`, called like ``timm.data.Mixup``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from dataopt.core.arguments import check_choice
from dataopt.core.mixup import CoMixup, PuzzleMix
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.nn import functional as F

from ..mixing import MixedBatch, Mixing, seeded

MODES = ("batch", "elem")


class BatchMixer(Mixing):
    """:class:`Mixing` as timm's mixup options say: each element by itself, label smoothing, and multi-hot labels.

    A batch of one is left to ``mix``: Puzzle Mix refuses it.

    Args:
        mix: how to mix; a PuzzleMix has the loader's ``mean`` and ``std``.
        mode: ``"batch"`` draws one expected share and one decision for all, ``"elem"`` one each. Co-Mixup mixes whole
            batches, so it has ``"batch"`` only.
        smoothing: label smoothing, by timm's rule: off = smoothing / K, on = 1 - smoothing + off.
        multi_label: accept (B, K) multi-hot targets. Their saliency is that of the binary
            cross-entropy, and smoothing moves each label towards 0.5.
        **settings: of :class:`Mixing`.

    Raises:
        ValueError: an argument outside its range, or two that do not go together.
        TypeError: ``mix`` is neither a :class:`PuzzleMix` nor a :class:`CoMixup`.
    """

    def __init__(
        self,
        mix: PuzzleMix | CoMixup,
        *,
        mode: str = "batch",
        smoothing: float = 0.0,
        multi_label: bool = False,
        **settings: Any,
    ):
        super().__init__(mix, **settings)
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing={smoothing} must lie in [0, 1); timm's default is 0.1")
        if mode == "pair":
            raise ValueError("mode='pair' mixes two inputs with each other; choose 'batch', or with Puzzle Mix 'elem'")
        check_choice(MODES, mode=mode)
        if mode == "elem" and isinstance(mix, CoMixup):
            raise ValueError(
                "mode='elem' decides for each input, but Co-Mixup mixes them jointly; leave mode at 'batch'"
            )
        if mode == "elem" and self.cutmix is not None:
            raise ValueError(
                f"mode='elem' with cutmix_alpha={self.cutmix.alpha}: switching to CutMix needs mode='batch'"
            )
        self.mode = mode
        self.smoothing = smoothing
        self.multi_label = multi_label
        self.soft_loss = F.binary_cross_entropy_with_logits
        self.decided = self.mixed = 0  # batches decided on and mixed, in this process

    def __call__(self, forward: nn.Module, x: Tensor, y: Tensor, epoch: int = 0, enabled: bool = True) -> MixedBatch:
        """One batch.

        Args:
            forward: the model, for the saliency; DDP and compile wrappers are taken off.
            x: (B, C, H, W), normalised.
            y: (B,) class ids, or (B, K) with ``multi_label``.
            epoch: counted from 0.
            enabled: False leaves the batch unmixed; then and from ``off_epoch`` on nothing is drawn.

        Raises:
            ValueError: what ``mix`` raises, or (B, K) targets without ``multi_label``.
        """
        if y.ndim == 2 and not self.multi_label:
            raise ValueError(
                f"target has the shape {tuple(y.shape)}: (B, K) targets need a binary cross-entropy criterion and, in "
                "PuzzleMixup and CoMixupFn, multi_label=True; otherwise give (B,) class ids"
            )
        labels = self.labels(x, y)
        batch = MixedBatch(x, labels)
        if enabled and self.active(epoch):
            chosen, switch, rng = self.decide()
            generator = seeded(rng)
            self.decided += 1
            given: dict[str, Tensor | None] = {}
            if self.mode == "elem":
                chosen, given = self.prob > 0, self._each(len(x), rng)
            if chosen:
                self.mixed += 1
                batch = self.make(unwrap_model(forward), x, y, labels, switch, generator, **given)
        off = 1 / self.mix.num_classes if y.ndim == 1 else 0.5
        smooth = batch.targets * (1 - self.smoothing) + off * self.smoothing
        return dataclasses.replace(batch, targets=smooth)

    def _each(self, n: int, rng: np.random.Generator) -> dict[str, Tensor | None]:
        """Of each of ``n`` elements a partner, itself where it is left alone, and an expected share."""
        if n == 1:
            return {}
        partner = torch.from_numpy(np.where(rng.random(n) < self.prob, rng.permutation(n), np.arange(n)))
        alpha = self.mix.alpha
        return {"partner": partner, "lam": torch.from_numpy(rng.beta(alpha, alpha, n)) if alpha > 0 else None}

    def state_dict(self) -> dict[str, int]:
        """What a resumed run, which gets its seed from the command line, needs to go on with the same draws."""
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
        batch = self.mixer(self.model, x, target, enabled=self.mixup_enabled)
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
        saliency_resolution, augment, seed: see :class:`Mixing`.
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
        augment: str | None = None,
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
            augment=augment,
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
        saliency_resolution, augment, mean, std, seed: see :class:`Mixing`.
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
        augment: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
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
            augment=augment,
            mean=mean,
            std=std,
            seed=seed,
        )
        super().__init__(model, mixer)
