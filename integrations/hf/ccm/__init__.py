"""CCM for transformers (thesis chapter 7): a PEFT adapter that compresses contexts, and the cache of their memory."""

from .cache import CCMCache
from .config import CCMConfig
from .data import demonstration_rows, dialogue_rows, profile_rows
from .model import CCMModel
from .reserved import reserved_ids
from .rows import CCMCollator, Query, ccm_row
from .stream import CCMStream
from .trainer import CCMTrainer, finetune_full_context

__all__ = [
    "CCMCache",
    "CCMCollator",
    "CCMConfig",
    "CCMModel",
    "CCMStream",
    "CCMTrainer",
    "Query",
    "ccm_row",
    "demonstration_rows",
    "dialogue_rows",
    "finetune_full_context",
    "profile_rows",
    "reserved_ids",
]
