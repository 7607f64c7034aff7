"""KVzip (thesis chapter 8): keep the key-value pairs that a model needs to repeat its context."""

from .attention import attention, merge, ragged_attention
from .budget import head_selection, pair_selection, recent_window
from .packed import PackedHeads
from .quantise import Quantised
from .scoring import pair_scores

__all__ = [
    "PackedHeads",
    "Quantised",
    "attention",
    "head_selection",
    "merge",
    "pair_scores",
    "pair_selection",
    "ragged_attention",
    "recent_window",
]
