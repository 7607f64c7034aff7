"""Label cleaning as a callback of the transformers ``Trainer``."""

from __future__ import annotations

import math
from typing import Any

from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..cleanable import INDEX, WEIGHT, CleanableDataset, weighted_loss
from ..heads import unwrapped
from ..label_cleaning import LabelCleaner, to_device


class LabelCleaningCallback(LabelCleaner, TrainerCallback):
    """Finds wrong labels and outliers of the training set while the ``Trainer`` runs; may drop or correct them.

    For classifiers of text, images or sound that return ``logits``; see :class:`LabelCleaner` for the arguments, the
    files and the actions. A report only::

        Trainer(model, args, train_dataset=train, callbacks=[LabelCleaningCallback("cleaning")])

    With an action, the weights reach the loss through ``compute_loss_func``; the Trainer must keep their column::

        cleaning = LabelCleaningCallback("cleaning", action="drop", start=2)
        args = TrainingArguments("out", remove_unused_columns=False)
        train = CleanableDataset(train)
        Trainer(model, args, train_dataset=train, callbacks=[cleaning], compute_loss_func=cleaning.loss)

    Resumed training takes up labels and weights from ``out_dir``. With ``load_best_model_at_end``, ``epochs="last"``
    looks with the best model.

    Raises:
        TypeError: an action without :class:`CleanableDataset`, or training data without row numbers.
        ValueError: settings of the Trainer under which weights cannot reach the loss, or a sharded model.
    """

    _hook: Any = None
    _weights: Tensor | None = None
    _weighs = False
    _smoothing = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check, and take up what an earlier run did."""
        model, loader = unwrapped(kwargs["model"]), kwargs["train_dataloader"]
        train = loader.dataset
        if args.fsdp or args.deepspeed:
            raise ValueError("label cleaning needs the whole model in each process; train without fsdp and deepspeed")
        self._weighs = self.action in ("drop", "reweight")
        if self._weighs and isinstance(train, CleanableDataset):
            if args.remove_unused_columns:
                raise ValueError(
                    f"remove_unused_columns=True takes away the weights that action={self.action!r} needs; set it to "
                    "False in TrainingArguments"
                )
            if args.n_gpu > 1:
                raise ValueError(
                    f"action={self.action!r} does not work in DataParallel on {args.n_gpu} GPUs; start one process a "
                    "GPU with torchrun"
                )
        finished = math.floor(state.epoch or 0) if state.global_step else 0
        self._begin(train, state.global_step == 0, finished, math.ceil(state.num_train_epochs))
        self._smoothing = args.label_smoothing_factor
        self._unhook()
        if isinstance(train, CleanableDataset):
            self._hook = model.register_forward_pre_hook(self._take, with_kwargs=True)
        self._resume(finished, state.epoch == finished, lambda epoch: self._snapshot(args, model, loader, epoch))

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look, where this epoch is one to look after."""
        epoch = math.ceil(state.epoch or 0)
        if self.due(epoch):
            self._snapshot(args, unwrapped(kwargs["model"]), kwargs["train_dataloader"], epoch)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look, where the end of the training was asked for."""
        epoch = math.ceil(state.epoch or 0)
        if self.every is None and not self.listed:
            self._snapshot(args, unwrapped(kwargs["model"]), kwargs["train_dataloader"], epoch)
        self._unhook()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check that the weights have entered the loss."""
        if self._weighs and self._weights is not None:
            raise ValueError(
                f"action={self.action!r} weighs rows in the loss, and the Trainer's loss did not; give it "
                "compute_loss_func=callback.loss, or weighted_loss in a compute_loss of yours: callback.take_weights()"
            )

    on_substep_end = on_step_end

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """For ``Trainer(compute_loss_func=...)``: cross-entropy, each training row by its weight.

        The mean is over all rows of the step, dropped ones too, whatever the steps of accumulation. In evaluation rows
        count alike.
        """
        return weighted_loss(outputs, labels, self.take_weights(), num_items_in_batch, self._smoothing)

    def take_weights(self) -> Tensor | None:
        """(B,) weights of the batch whose forward ran last; None in evaluation."""
        weights, self._weights = self._weights, None
        return weights

    def _take(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Keep row numbers and weights from the model, and the weights for the loss."""
        kept = {key: value for key, value in kwargs.items() if key not in (WEIGHT, INDEX)}
        self._weights = kwargs.get(WEIGHT) if module.training else None
        if self._weighs and module.training and self._weights is None:
            raise ValueError(
                f"the batches hold no {WEIGHT!r}, which action={self.action!r} needs; let data_collator keep it"
            )
        return args, kept

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _snapshot(self, args: TrainingArguments, model: nn.Module, loader: Any, epoch: int) -> None:
        view = self.dataset
        if isinstance(view, Dataset) and isinstance(self._train, Dataset) and args.remove_unused_columns:
            # the Trainer did the same to its data
            view = view.select_columns([name for name in view.column_names if name in self._train.column_names])

        def forward(run: Any, batch: Any) -> Any:
            return run(to_device(batch, args.device))

        self._look(model, forward, epoch, loader, args.per_device_train_batch_size, view)
