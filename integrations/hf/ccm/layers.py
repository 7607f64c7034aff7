"""A cache layer with a memory at its front and a running turn behind it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer


class MemoryLayer(DynamicLayer):
    """transformers' dynamic layer that goes back to its memory.

    Attributes:
        start: (B, H, m, d) keys and values of prefix and memory; None before anything was read. Layers replace their
            tensors and never write into them, so the memory is shared and not copied.
    """

    start: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        rows = len(self.keys) if self.keys is not None and self.keys.numel() else len(key_states)
        if len(key_states) > rows:  # generate expands its inputs, not a given cache
            self.batch_repeat_interleave(len(key_states) // rows)
        return super().update(key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if query_length == 0:
            raise ValueError(
                "the model was given no tokens: an attention_mask that is missing, or only as long as the question, "
                "makes generate() cut the question away; pass **memory.inputs(question)"
            )
        return super().get_mask_sizes(query_length)

    def restore(self) -> None:
        """Only the memory stays."""
        if self.start is None:
            self.keys = self.values = None
            self.is_initialized = False
            return
        if not self.is_initialized:
            self.lazy_initialization(*self.start)
        self.keys, self.values = self.start

    def crop(self, tokens_to_remove: int) -> None:
        memory = 0 if self.start is None else self.start[0].shape[2]
        length = self.get_seq_length()
        left = length + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove
        if left < memory:
            raise ValueError(
                f"crop({tokens_to_remove}) reaches into the memory of {memory} pairs, which cannot be cut; the turn "
                f"behind it has {length - memory} tokens"
            )
        if left < length:
            assert self.keys is not None and self.values is not None
            self.keys, self.values = self.keys[:, :, :left], self.values[:, :, :left]

    def reset(self) -> None:
        self.restore()

    def newest(self, count: int) -> tuple[Tensor, Tensor]:
        """(B, H, count, d) keys and values that were read last."""
        assert self.keys is not None and self.values is not None
        return self.keys[:, :, -count:], self.values[:, :, -count:]
