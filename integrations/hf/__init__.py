"""Hugging Face: caches for ``generate``, callbacks, and functions for ``datasets``; imported on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..cleanable import CleanableDataset, weighted_loss
    from ..saliency_maps import as_tv_tensors
    from ..snapshots import read_snapshots
    from .ccm import (
        CCMCache,
        CCMCollator,
        CCMConfig,
        CCMModel,
        CCMStream,
        CCMTrainer,
        Query,
        ccm_row,
        demonstration_rows,
        dialogue_rows,
        finetune_full_context,
        profile_rows,
        reserved_ids,
    )
    from .condensed import is_condensed, load_condensed, push_condensed, read_condensed, save_condensed
    from .condensed_images import decode_condensed
    from .data import add_saliency
    from .datalab import register_relation_issue
    from .features import ModelOutputs, model_outputs
    from .kvzip import KVzipCache
    from .label_cleaning import LabelCleaningCallback
    from .mixup import CoMixupTrainerMixin, PuzzleMixTrainerMixin, mixup_trainer
    from .relation import add_relation_scores, clean_dataset
    from .scores import load_relation_scores, push_relation_scores, save_relation_scores

__all__ = [
    "CCMCache",
    "CCMCollator",
    "CCMConfig",
    "CCMModel",
    "CCMStream",
    "CCMTrainer",
    "CleanableDataset",
    "CoMixupTrainerMixin",
    "KVzipCache",
    "LabelCleaningCallback",
    "ModelOutputs",
    "PuzzleMixTrainerMixin",
    "Query",
    "add_relation_scores",
    "add_saliency",
    "as_tv_tensors",
    "ccm_row",
    "clean_dataset",
    "decode_condensed",
    "demonstration_rows",
    "dialogue_rows",
    "finetune_full_context",
    "is_condensed",
    "load_condensed",
    "load_relation_scores",
    "mixup_trainer",
    "model_outputs",
    "profile_rows",
    "push_condensed",
    "push_relation_scores",
    "read_condensed",
    "read_snapshots",
    "register_relation_issue",
    "reserved_ids",
    "save_condensed",
    "save_relation_scores",
    "weighted_loss",
]

_MODULES = {
    "CCMCache": ".ccm",
    "CCMCollator": ".ccm",
    "CCMConfig": ".ccm",
    "CCMModel": ".ccm",
    "CCMStream": ".ccm",
    "CCMTrainer": ".ccm",
    "CleanableDataset": "..cleanable",
    "CoMixupTrainerMixin": ".mixup",
    "KVzipCache": ".kvzip",
    "LabelCleaningCallback": ".label_cleaning",
    "ModelOutputs": ".features",
    "PuzzleMixTrainerMixin": ".mixup",
    "Query": ".ccm",
    "add_relation_scores": ".relation",
    "add_saliency": ".data",
    "as_tv_tensors": "..saliency_maps",
    "ccm_row": ".ccm",
    "clean_dataset": ".relation",
    "decode_condensed": ".condensed_images",
    "demonstration_rows": ".ccm",
    "dialogue_rows": ".ccm",
    "finetune_full_context": ".ccm",
    "is_condensed": ".condensed",
    "load_condensed": ".condensed",
    "load_relation_scores": ".scores",
    "mixup_trainer": ".mixup",
    "model_outputs": ".features",
    "profile_rows": ".ccm",
    "push_condensed": ".condensed",
    "push_relation_scores": ".scores",
    "read_condensed": ".condensed",
    "read_snapshots": "..snapshots",
    "register_relation_issue": ".datalab",
    "reserved_ids": ".ccm",
    "save_condensed": ".condensed",
    "save_relation_scores": ".scores",
    "weighted_loss": "..cleanable",
}

_OF_EXTRAS = {"datasets", "pyarrow", "PIL", "huggingface_hub", "transformers", "xxhash", "cleanlab", "peft"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_MODULES[name], __name__), name)
    except ModuleNotFoundError as e:
        missing = (e.name or "").partition(".")[0]
        if missing not in _OF_EXTRAS:
            raise
        extra = "clean" if missing == "cleanlab" else "hf"
        raise ModuleNotFoundError(
            f'{name} needs {e.name}; get it with: pip install "dataopt[{extra}]"', name=e.name
        ) from e
