"""Puzzle Mix and Co-Mixup as timm training tasks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from dataopt.core.mixup import CoMixup, PuzzleMix
from timm.loss import BinaryCrossEntropy
from timm.task import ClassificationTask
from torch import Tensor, nn

from ..mixing import check_soft_loss
from .mixup import BatchMixer

_logger = logging.getLogger(__name__)
_SOFT = "use timm's SoftTargetCrossEntropy or BinaryCrossEntropy, or torch's CrossEntropyLoss"


class MixTask(ClassificationTask):
    """What :class:`PuzzleMixTask` and :class:`CoMixupTask` share.

    Takes the loader's batches (normalised inputs, class ids), mixes them in training, and returns
    timm's ``{"loss", "output"}``. The saliency comes from the bare module under the wrappers, so
    DDP hooks, compiled graphs and parameter gradients are not touched. In evaluation mode and from
    ``off_epoch`` on, targets stay soft and nothing is mixed.

    Args:
        model: the model to train.
        criterion: takes (logits, soft targets (B, K)); None builds timm's from ``criterion_kwargs``.
        mix: how to mix.
        criterion_kwargs: for ``timm.loss.create_classification_loss``; ``soft_targets`` is set.
        prob, cutmix_alpha, switch_prob, clean_weight, saliency_resolution, augment, mean, std, seed: see
            :class:`Mixing`. mode, smoothing: see :class:`BatchMixer`.
        off_epoch: no mixing from this epoch on, as timm's ``--mixup-off-epoch``; 0 never stops. The
            training loop calls :meth:`set_epoch`.
        device, dtype, verbose: as in timm.

    Raises:
        TypeError: ``mix`` is missing or of the other method.
        ValueError: a criterion that takes class indices only, or what :class:`BatchMixer` raises.
    """

    method: ClassVar[type]
    state_key: ClassVar[str]  # of the step in a checkpoint

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | Callable[[Tensor, Tensor], Tensor] | None = None,
        mix: PuzzleMix | CoMixup | None = None,
        *,
        criterion_kwargs: dict[str, Any] | None = None,
        prob: float = 1.0,
        cutmix_alpha: float = 0.0,
        switch_prob: float = 0.5,
        mode: str = "batch",
        smoothing: float = 0.0,
        off_epoch: int = 0,
        clean_weight: float = 0.0,
        saliency_resolution: float = 1.0,
        augment: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        seed: int = 0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ):
        name = self.method.__name__
        if mix is None:
            raise TypeError(f"mix is missing; give dataopt.core.mixup.{name}(num_classes, ...)")
        if not isinstance(mix, self.method):
            raise TypeError(f"mix is a {type(mix).__name__}; give dataopt.core.mixup.{name}(num_classes, ...)")
        if criterion is None:
            from timm.loss import create_classification_loss

            criterion = create_classification_loss(**{**(criterion_kwargs or {}), "soft_targets": True})
        elif criterion_kwargs:
            raise ValueError(f"criterion_kwargs={criterion_kwargs} with a criterion; give one of the two")
        check_soft_loss(criterion, mix.num_classes, "criterion", _SOFT)
        if isinstance(criterion, nn.Module) and device is not None:
            criterion = criterion.to(device)
        super().__init__(model, criterion, device=device, dtype=dtype, verbose=verbose)
        self.mixer = BatchMixer(
            mix,
            prob=prob,
            cutmix_alpha=cutmix_alpha,
            switch_prob=switch_prob,
            mode=mode,
            smoothing=smoothing,
            multi_label=isinstance(criterion, BinaryCrossEntropy | nn.BCEWithLogitsLoss),
            off_epoch=off_epoch,
            clean_weight=clean_weight,
            saliency_resolution=saliency_resolution,
            augment=augment,
            mean=mean,
            std=std,
            seed=seed,
        )
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Tell the task which epoch runs; only ``off_epoch`` depends on it."""
        self.epoch = epoch

    @property
    def off_epoch(self) -> int:
        """The epoch from which on nothing is mixed; 0 is none."""
        return self.mixer.off_epoch

    @property
    def mixing(self) -> bool:
        """Whether the next batch may be mixed."""
        return self.training and self.trainable_module.training and self.mixer.active(self.epoch)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Any]:
        """Mix, run the model, and compute the loss.

        Args:
            input: (B, C, H, W), normalised.
            target: (B,) class ids; (B, K) multi-hot floats with a binary cross-entropy criterion.

        Returns:
            ``loss`` (scalar), ``output`` (B, K) logits of the mixed inputs, ``target`` (B, K) what
            they were trained towards, ``mixed`` (:class:`Mixed`, :class:`CoMixed` or None), and
            ``clean_loss`` where it was computed.

        Raises:
            ValueError: what ``mix`` raises; Puzzle Mix does on a batch of one.
        """
        batch = self.mixer(self.trainable_module, input, target, enabled=self.mixing)
        result: dict[str, Any] = {**super().forward(batch.inputs, batch.targets)}
        result.update(target=batch.targets, mixed=batch.mixed)
        if batch.clean_loss is not None:
            result["loss"] = result["loss"] + self.mixer.clean_weight * batch.clean_loss
            result["clean_loss"] = batch.clean_loss.detach()
        return result

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> MixTask:
        """As timm, but DDP on the CPU (gloo) must not be given device ids, and timm's train.py does."""
        if self.device.type == "cpu":
            device_ids = None
        super().prepare_distributed(device_ids=device_ids, **ddp_kwargs)
        return self

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """The step, so that a resumed run goes on with the same draws on every rank."""
        return {} if ema else {self.state_key: self.mixer.state_dict()}

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Take up the step of a checkpoint; one written without this method starts at step 0."""
        if ema:
            return
        if state and self.state_key in state:
            self.mixer.load_state_dict(state[self.state_key])
        elif self.verbose:
            _logger.warning("The checkpoint was written without %s: its draws start from step 0", self.method.__name__)


class PuzzleMixTask(MixTask):
    """Classification on batches mixed by Puzzle Mix.

    All arguments are those of :class:`MixTask`; ``mix`` is a PuzzleMix with the loader's ``mean`` and ``std``.

    Examples:
        >>> import timm, torch
        >>> from dataopt.core.mixup import PuzzleMix
        >>> from dataopt.integrations.timm import PuzzleMixTask
        >>> model = timm.create_model("test_resnet", num_classes=10)
        >>> task = PuzzleMixTask(model, mix=PuzzleMix(10), smoothing=0.1, verbose=False)
        >>> task(torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]))["output"].shape
        torch.Size([4, 10])
    """

    method = PuzzleMix
    state_key = "puzzle_mix"


class CoMixupTask(MixTask):
    """Classification on batches mixed by Co-Mixup.

    All arguments are those of :class:`MixTask`; ``mix`` is a CoMixup, and ``mode`` is ``"batch"``.

    Examples:
        >>> import timm, torch
        >>> from dataopt.core.mixup import CoMixup
        >>> from dataopt.integrations.timm import CoMixupTask
        >>> model = timm.create_model("test_resnet", num_classes=10)
        >>> task = CoMixupTask(model, mix=CoMixup(10), smoothing=0.1, verbose=False)
        >>> task(torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]))["mixed"].sources.shape
        torch.Size([4, 4])
    """

    method = CoMixup
    state_key = "comixup"


TASKS: dict[str, type[MixTask]] = {"puzzle": PuzzleMixTask, "comixup": CoMixupTask}  # by the value of --mixup
