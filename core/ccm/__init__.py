"""CCM (thesis chapter 7): a language model's contexts compressed one after another into a small key-value memory."""

from .attention import memory_attention
from .conditional_lora import add_lora_rows
from .layout import Layout, layout
from .memory import concatenated, merged, without_oldest
from .rotation import Rotation

__all__ = [
    "Layout",
    "Rotation",
    "add_lora_rows",
    "concatenated",
    "layout",
    "memory_attention",
    "merged",
    "without_oldest",
]
