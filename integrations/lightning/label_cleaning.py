"""Label cleaning as a callback of the Lightning ``Trainer``."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch.utils.data import DataLoader

from ..cleanable import CleanableDataset
from ..label_cleaning import LabelCleaner, to_device


class LabelCleaningCallback(LabelCleaner, Callback):
    """Finds wrong labels and outliers of the training set while the ``Trainer`` runs; may drop or correct them.

    For modules whose ``forward`` maps the inputs of a batch to logits; see :class:`LabelCleaner` for the arguments, the
    files and the actions. Hooks around the transfer of a batch are not run. A report only::

        Trainer(callbacks=[LabelCleaningCallback("cleaning")]).fit(module, DataLoader(train, 32, shuffle=True))

    With an action, ``training_step`` weighs the rows::

        def training_step(self, batch, batch_idx):
            x, y, weight, _ = batch                          # of CleanableDataset
            return weighted_loss(self(x), y, weight)

        cleaning = LabelCleaningCallback("cleaning", action="drop", start=2)
        Trainer(callbacks=[cleaning]).fit(module, DataLoader(CleanableDataset(train), 32, shuffle=True))

    Resumed training takes up labels and weights from ``out_dir``.

    Raises:
        TypeError: an action without :class:`CleanableDataset`, training data without row numbers, several loaders.
        ValueError: a module without ``forward``, or a sharded one.
    """

    _resumed = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check, and take up what an earlier run did."""
        loader = trainer.train_dataloader
        if not isinstance(loader, DataLoader):
            raise TypeError(
                f"label cleaning needs one DataLoader to train with, and there is a {type(loader).__name__}; give one"
            )
        if type(pl_module).forward is LightningModule.forward:
            raise ValueError(f"{type(pl_module).__name__} has no forward(); define it to map inputs to logits")
        if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
            raise ValueError(
                f"label cleaning needs the whole model in each process; train without {type(trainer.strategy).__name__}"
            )
        limit = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs > 0 else None
        finished, fresh = trainer.current_epoch, trainer.global_step == 0
        self._begin(loader.dataset, fresh, finished, limit)
        self._resumed = not fresh and self.action is not None
        boundary = trainer.fit_loop.epoch_progress.current.ready == finished
        self._resume(finished, boundary, lambda epoch: self._snapshot(trainer, pl_module, epoch))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Correct batches that loader workers have made before the checkpoint's labels were put back."""
        if self._resumed and isinstance(self._train, CleanableDataset):
            self._train.refresh(batch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look, where this epoch is one to look after."""
        self._resumed = False
        epoch = trainer.current_epoch + 1
        if self.due(epoch):
            self._snapshot(trainer, pl_module, epoch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look, where the end of the training was asked for."""
        if self.every is None and not self.listed:
            self._snapshot(trainer, pl_module, trainer.current_epoch)

    def _snapshot(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> None:
        def forward(run: Any, batch: Any) -> Any:
            with trainer.precision_plugin.forward_context():
                return run(trainer.precision_plugin.convert_input(to_device(batch, pl_module.device)))

        self._look(pl_module, forward, epoch, trainer.train_dataloader, None)
