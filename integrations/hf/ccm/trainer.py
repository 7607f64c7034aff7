"""Training the compression (Algorithm 6) with the Trainer of transformers, and the optional stage before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from .. import decoder, hub
from .architecture import attention_targets
from .config import CCMConfig
from .model import WEIGHTS, CCMModel, read_weights
from .rows import CCMCollator

_COLUMNS = ["input_ids", "labels", "segment_ids", "comp_slot"]


class CCMTrainer(Trainer):
    """transformers' Trainer on rows of contexts and queries; everything else is its own.

    Args:
        model: the adapter to train.
        args: its ``remove_unused_columns`` needs no change.
        data_collator: None pads rows as :func:`dataopt.integrations.hf.ccm_row` makes them.
        distill: weight of the divergence KL(full context || memory) at the labelled tokens, beside the loss of eq.
            7.4. The teacher is the base model without the adapter; 0 trains as the thesis does.
        kwargs: for Trainer.

    Raises:
        TypeError: a model that is no CCMModel.
        ValueError: a negative ``distill``, or one process with several GPUs, where Trainer would take ``DataParallel``.
    """

    def __init__(
        self,
        model: CCMModel,
        args: TrainingArguments | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        *,
        distill: float = 0.0,
        **kwargs: Any,
    ) -> None:
        if not isinstance(model, CCMModel):
            raise TypeError(f"model: {type(model).__name__} is not a CCMModel; wrap the base model in one")
        if distill < 0:
            raise ValueError(f"distill={distill} must be at least 0")
        if data_collator is None:
            data_collator = CCMCollator(decoder.pad_id(kwargs.get("processing_class"), model.config))
        super().__init__(model, args, data_collator, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"args sees {self.args.n_gpu} GPUs in one process, and which its segments cannot share; start one "
                "process a GPU with torchrun, or let it see one with CUDA_VISIBLE_DEVICES=0"
            )
        self.distill = distill
        self.label_names = ["labels"]

    def _set_signature_columns_if_needed(self) -> None:
        # Trainer reads the signature of the base model, which knows nothing of segments.
        self._signature_columns: Any = [*_COLUMNS, *self.label_names]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Cross-entropy of the labelled tokens, and the divergence from the full context where it is asked for."""
        inputs = {**inputs, "distill": self.distill} if self.distill else inputs
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        inner: Any = self.model if model is None else model
        folder = Path(resume_from_checkpoint)
        config, _, checksum = CCMConfig.load(folder)
        for name, now in vars(inner.ccm_config).items():
            if getattr(config, name) != now:
                raise ValueError(
                    f"{folder} was trained with {name}={getattr(config, name)!r} and the model has {now!r}; resume "
                    "with the same options"
                )
        path = hub.member(folder, WEIGHTS)
        inner._load(read_weights(path, checksum), path)


def finetune_full_context(
    base: PreTrainedModel,
    args: TrainingArguments,
    train_dataset: Any,
    *,
    r: int = 8,
    lora_alpha: int = 16,
    lora_dropout: float = 0.05,
    target_modules: Sequence[str] | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """The thesis' first stage: LoRA on full contexts, merged into the weights (section 7.4, "Training setup").

    Args:
        base: the model; chat models skip this stage in the released code.
        train_dataset: the same rows as for :class:`CCMTrainer`; COMP tokens are left out.
        r, lora_alpha, lora_dropout, target_modules: of the LoRA, as in :class:`CCMConfig`.
        kwargs: for Trainer.

    Returns:
        The model with the LoRA merged in, in eval mode.
    """
    targets = list(target_modules or attention_targets(base))
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, target_modules=targets
    )
    columns, args.remove_unused_columns = args.remove_unused_columns, False
    try:
        collator = CCMCollator(decoder.pad_id(kwargs.get("processing_class"), base.config), full_context=True)
        trainer = Trainer(get_peft_model(base, lora), args, collator, train_dataset=train_dataset, **kwargs)
        trainer.train()
    finally:
        args.remove_unused_columns = columns
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    merged: PreTrainedModel = model.merge_and_unload()
    return merged.eval()
