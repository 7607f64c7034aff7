"""Puzzle Mix and Co-Mixup as callbacks of the Lightning ``Trainer``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from dataopt.core.mixup import Adversarial, CoMixup, PuzzleMix
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from ..cleanable import WEIGHT, CleanableDataset
from ..mixing import MixedBatch, Mixing, log_picture, picture, weights_error

_HOOK = "on_after_batch_transfer"


class MixupCallback(Callback):
    """What both callbacks do; give it a :class:`Mixing`.

    Training batches are mixed on the device, after every hook around their transfer; validation, test and the sanity
    check see clean data. The saliency comes from the module's own ``forward`` under the trainer's precision, outside
    DDP.

    Args:
        mixing: decides and mixes.
        input_key, target_key: where a batch holds inputs (B, C, H, W) or (B, C, L) and class ids: places in a tuple
            or list, names in a dict. Other entries stay as they are.
        log_every: a picture of mixed examples goes to the loggers that take images at the first mixed batch and every
            that many mixed batches; 0 never.

    Raises:
        ValueError, TypeError: at the start of training, a module, a strategy or data that this cannot work with, such
            as :class:`CleanableDataset` with its weights of samples; at the first batch, a ``training_step`` that
            cannot take soft targets.
    """

    def __init__(self, mixing: Mixing, input_key: int | str, target_key: int | str, log_every: int):
        if log_every < 0:
            raise ValueError(f"log_every={log_every} must be at least 0, which logs no pictures")
        self.mixing = mixing
        self.input_key = input_key
        self.target_key = target_key
        self.log_every = log_every
        self._batch: MixedBatch | None = None
        self._clean: Tensor | None = None  # inputs before mixing, where a picture is due
        self._mixed = 0  # batches of this process
        self._proven = False  # training_step has taken soft targets
        self._wrapped: list[tuple[Any, str, Any]] = []  # owner, name, what the instance itself had there

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check, and take hold of the batches."""
        check_strategy(trainer.strategy)
        name = type(pl_module).__name__
        if type(pl_module).forward is LightningModule.forward:
            raise ValueError(f"{name} has no forward(); define it to map inputs to logits, for the saliency")
        if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
            raise ValueError(
                f"{name}.training_step takes dataloader_iter, whose batches no hook sees; take (batch, batch_idx)"
            )
        if self.mixing.clean_weight > 0 and not pl_module.automatic_optimization:
            raise ValueError(
                f"clean_weight={self.mixing.clean_weight} needs automatic optimization, and {name} has turned it off; "
                "set clean_weight=0"
            )
        for loader in CombinedLoader(trainer.train_dataloader).flattened:
            if _is_cleanable(getattr(loader, "dataset", None)):
                raise weights_error("the training data is a CleanableDataset")
        datamodule = getattr(trainer, "datamodule", None)
        owner = datamodule if datamodule is not None and is_overridden(_HOOK, datamodule) else pl_module
        self._wrap(owner, _HOOK, functools.partial(self._after_transfer, trainer, pl_module))
        self._wrap(pl_module, "training_step", self._training_step)
        self._proven = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log."""
        done, clean = self._batch, self._clean
        self._batch = self._clean = None
        if done is None:
            return
        statistics = {f"mixup/{name}": value for name, value in done.statistics().items()}
        pl_module.log_dict(statistics, on_step=True, on_epoch=False, batch_size=len(done.targets))
        if clean is not None and done.mixed is not None and trainer.is_global_zero:
            image = picture(clean, done.mixed)
            for logger in trainer.loggers:
                log_picture(logger, "mixup/examples", image, trainer.global_step)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go."""
        self._restore()

    def state_dict(self) -> dict[str, Any]:
        """The seed and the step that all draws follow from, on every rank."""
        return dict(self.mixing.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.mixing.load_state_dict(state_dict)

    def _wrap(self, owner: Any, name: str, around: Any) -> None:
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def call(*args: Any, **kwargs: Any) -> Any:
            return around(inner, *args, **kwargs)

        self._wrapped.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, call)

    def _restore(self) -> None:
        for owner, name, own in self._wrapped:
            delattr(owner, name)
            if own is not None:
                setattr(owner, name, own)
        self._wrapped.clear()
        self._batch = self._clean = None

    def _after_transfer(
        self, trainer: Trainer, pl_module: LightningModule, inner: Any, batch: Any, dataloader_idx: int
    ) -> Any:
        batch = inner(batch, dataloader_idx)
        if not trainer.training:
            return batch
        if isinstance(batch, Mapping) and WEIGHT in batch:
            raise weights_error(f"the batch holds {WEIGHT!r}")
        x, y = (_entry(batch, key) for key in (self.input_key, self.target_key))
        with trainer.precision_plugin.forward_context():
            done = self.mixing(pl_module, x, y, trainer.current_epoch)
        self._batch = done
        if done.mixed is not None:
            self._clean = x if self.log_every and self._mixed % self.log_every == 0 else None
            self._mixed += 1
        return _replaced(batch, {self.input_key: done.inputs, self.target_key: done.targets})

    def _training_step(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            out = inner(*args, **kwargs)
        except (RuntimeError, ValueError, TypeError, IndexError) as e:
            if self._proven or isinstance(e, torch.OutOfMemoryError):
                raise
            raise ValueError(
                f"training_step failed on its first batch, whose targets are soft, (B, {self.mixing.mix.num_classes}) "
                "floats; its loss must take them, as torch.nn.functional.cross_entropy does, and metrics that want "
                f"class ids need targets.argmax(1): {e}"
            ) from e
        self._proven = True
        clean = self._batch.clean_loss if self._batch is not None else None
        if clean is None or out is None:
            return out
        extra = self.mixing.clean_weight * clean
        return {**out, "loss": out["loss"] + extra} if isinstance(out, Mapping) else out + extra


class PuzzleMixCallback(MixupCallback):
    """Puzzle Mix in the Lightning ``Trainer``: pairs of inputs, mixed where the module looks (thesis chapter 3).

    ``training_step`` gets soft targets (B, K) in place of class ids, mixed or not, from the first batch on::

        def training_step(self, batch, batch_idx):
            x, targets = batch
            return F.cross_entropy(self(x), targets)

        Trainer(callbacks=[PuzzleMixCallback(num_classes=10, mean=MEAN, std=STD)]).fit(module, loader)

    Arguments up to ``std`` are those of :class:`PuzzleMix`, those from ``prob`` to ``seed`` of :class:`Mixing`, and the
    others of :class:`MixupCallback`.

    Raises:
        ValueError: an argument outside its range; at the start of training FSDP, model parallelism, DeepSpeed's ZeRO-3,
            a module without ``forward`` or with ``dataloader_iter``.
    """

    def __init__(
        self,
        num_classes: int,
        alpha: float = 1.0,
        beta: float = 1.2,
        gamma: float = 0.5,
        eta: float = 0.2,
        labels: int = 3,
        grids: Sequence[int | tuple[int, int]] = (2, 4, 8, 16),
        neigh_size: int = 4,
        data_term: str = "released",
        transport: str | None = "iterative",
        transport_cost: float = 0.8,
        transport_patch: int | None = None,
        adversarial: Adversarial | None = None,
        solver: str = "auto",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        prob: float = 1.0,
        cutmix_alpha: float = 0.0,
        switch_prob: float = 0.5,
        off_epoch: int = 0,
        clean_weight: float = 0.0,
        saliency_resolution: float = 1.0,
        augment: str | None = None,
        seed: int = 0,
        input_key: int | str = 0,
        target_key: int | str = 1,
        log_every: int = 500,
    ):
        mix = PuzzleMix(
            num_classes, alpha, beta, gamma, eta, labels, grids, neigh_size, data_term, transport, transport_cost,
            transport_patch, adversarial, solver, mean, std,
        )  # fmt: skip
        mixing = Mixing(
            mix,
            prob=prob,
            cutmix_alpha=cutmix_alpha,
            switch_prob=switch_prob,
            off_epoch=off_epoch,
            clean_weight=clean_weight,
            saliency_resolution=saliency_resolution,
            augment=augment,
            seed=seed,
        )
        super().__init__(mixing, input_key, target_key, log_every)


class CoMixupCallback(MixupCallback):
    """Co-Mixup in the Lightning ``Trainer``: whole batches, mixed jointly (thesis chapter 4).

    Used as :class:`PuzzleMixCallback`.

    Arguments up to ``threshold`` are those of :class:`CoMixup`. With ``outputs`` other entries of a batch no longer fit
    the mixed inputs.

    Raises:
        ValueError: as :class:`PuzzleMixCallback`.
    """

    def __init__(
        self,
        num_classes: int,
        alpha: float = 2.0,
        beta: float = 0.32,
        gamma: float = 1.0,
        eta: float = 0.05,
        tau: float = 0.83,
        omega: float = 0.001,
        grid: int | tuple[int, int] = 4,
        partition: int = 20,
        outputs: int | None = None,
        n_iter: int = 4,
        restarts: int = 1,
        threshold: str = "hard",
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
        input_key: int | str = 0,
        target_key: int | str = 1,
        log_every: int = 500,
    ):
        mix = CoMixup(
            num_classes, alpha, beta, gamma, eta, tau, omega, grid, partition, outputs, n_iter, restarts, threshold
        )
        mixing = Mixing(
            mix,
            prob=prob,
            cutmix_alpha=cutmix_alpha,
            switch_prob=switch_prob,
            off_epoch=off_epoch,
            clean_weight=clean_weight,
            saliency_resolution=saliency_resolution,
            augment=augment,
            mean=mean,
            std=std,
            seed=seed,
        )
        super().__init__(mixing, input_key, target_key, log_every)


def check_strategy(strategy: Strategy) -> None:
    """Raise where no process holds the whole module.

    Raises:
        ValueError: FSDP, model parallelism or DeepSpeed's ZeRO-3.
    """
    zero_3 = isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3
    if zero_3 or isinstance(strategy, FSDPStrategy | ModelParallelStrategy):
        name = "DeepSpeed ZeRO-3" if zero_3 else type(strategy).__name__
        raise ValueError(
            f"strategy={name} splits the module over processes, and the saliency needs it whole; train with ddp"
            + (" or ZeRO-2" if zero_3 else "")
        )


def _is_cleanable(dataset: Any) -> bool:
    while dataset is not None and not isinstance(dataset, CleanableDataset):
        dataset = getattr(dataset, "dataset", None)  # of a Subset
    return dataset is not None


def _entry(batch: Any, key: int | str) -> Tensor:
    if isinstance(batch, Mapping):
        found, has = batch.get(key), f"the keys {list(batch)}"
    elif isinstance(batch, tuple | list):
        found, has = (
            batch[key] if isinstance(key, int) and -len(batch) <= key < len(batch) else None,
            f"{len(batch)} entries",
        )
    else:
        found, has = None, "neither entries nor keys"
    if not isinstance(found, Tensor):
        raise TypeError(
            f"the batch ({type(batch).__name__}, with {has}) holds no tensor at {key!r}; give input_key=, target_key="
        )
    return found


def _replaced(batch: Any, values: dict[int | str, Tensor]) -> Any:
    if isinstance(batch, Mapping):
        return {**batch, **values}
    values = {key % len(batch) if isinstance(key, int) else key: value for key, value in values.items()}
    new = [values.get(place, entry) for place, entry in enumerate(batch)]
    return type(batch)(*new) if hasattr(batch, "_fields") else type(batch)(new)
