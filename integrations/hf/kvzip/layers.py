"""Cache layers of transformers: one that scores while it attends, and one that holds a packed context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from dataopt.core.kvzip import PackedHeads, attention, merge, pair_scores, ragged_attention
from dataopt.core.kvzip.attention import packed_attention, with_sinks
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from ..attention import mark


@dataclass(frozen=True)
class SlidingState:
    """What a sliding-window layer holds after the context: (B, H, n, d) pairs, the window and the tokens seen."""

    keys: Tensor
    values: Tensor
    window: int
    seen: int

    @classmethod
    def of(cls, layer: DynamicSlidingWindowLayer) -> SlidingState:
        assert layer.keys is not None and layer.values is not None
        return cls(layer.keys, layer.values, layer.sliding_window, layer.cumulative_length)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def layer(self) -> DynamicSlidingWindowLayer:
        """A layer that goes on from here; the tensors are shared, since layers replace them and never write to them."""
        layer = DynamicSlidingWindowLayer(self.window)
        layer.lazy_initialization(self.keys, self.values)
        self.restore(layer)
        return layer

    def restore(self, layer: DynamicSlidingWindowLayer) -> None:
        layer.keys, layer.values, layer.cumulative_length = self.keys, self.values, self.seen
        layer.record_past = False


class _FixedContextLayer(CacheLayerMixin):
    """What both layers share: a context of ``seen`` tokens that no update changes."""

    is_sliding = False
    is_compileable = False
    is_croppable = True
    seen: int

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.13


class ScoringLayer(_FixedContextLayer):
    """Attends from a reconstruction input to the whole context, keeps the scores of one chunk, and stores nothing.

    Args:
        keys, values: (1, H, n, d), dense, that may be evicted or are the prefix.
        seen: context tokens, those of ``packed`` included.
        packed: pairs before the dense ones, kept earlier.
        norm: "full" or "subset"; see :func:`dataopt.core.kvzip.pair_scores`.
        prefix: dense pairs at the start that are never scored.
    """

    def __init__(
        self, keys: Tensor, values: Tensor, seen: int, packed: PackedHeads | None, norm: str, prefix: int
    ) -> None:
        super().__init__()
        self.dense_keys, self.dense_values = keys, values
        self.seen, self.packed, self.norm, self.prefix = seen, packed, norm, prefix
        self.chunk = slice(0, 0)  # of the dense pairs
        self.scores = keys.new_full(keys.shape[1:3], torch.inf, dtype=torch.float32)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return mark(key_states, self), value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, self.seen

    def get_seq_length(self) -> int:
        return self.seen

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        own = attention(query, key, value, scale, causal=True, softcap=softcap)
        part = merge(attention(query, self.dense_keys, self.dense_values, scale, softcap=softcap), own)
        if self.packed is not None:
            part = merge(packed_attention(query, self.packed, scale, softcap), part)
        out, lse = with_sinks(part, sinks)
        chunk_keys = self.dense_keys[:, :, self.chunk]
        if self.norm == "subset":
            keys, values = chunk_keys, self.dense_values[:, :, self.chunk]
            start_keys, start_values = self._prefix_pairs(query.dtype)
            near = attention(
                query, torch.cat([start_keys, keys], 2), torch.cat([start_values, values], 2), scale, softcap=softcap
            )
            lse = with_sinks(merge(near, own), sinks)[1]
        self.scores[:, self.chunk] = pair_scores(query[0], chunk_keys[0], lse[0], scale, softcap)
        return out

    def _prefix_pairs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self.packed is not None:
            keys, values = self.packed.prefix_pairs(dtype)
            return keys.unsqueeze(0), values.unsqueeze(0)
        return self.dense_keys[:, :, : self.prefix], self.dense_values[:, :, : self.prefix]


class PackedLayer(_FixedContextLayer):
    """A packed context, shared and never changed, and a dense tail for question and answer.

    Args:
        contexts: one for all rows of a batch, or one for each run of equally many rows.
        seen: tokens of the longest context.
        modules: ids of the modules of the model that the pairs belong to.

    Attributes:
        keys, values: (B, H, T, d), the tail; None while it is empty.
        waiting: pairs were given out and no attention was computed from them yet.
    """

    def __init__(self, contexts: list[PackedHeads], seen: int, modules: frozenset[int]) -> None:
        super().__init__()
        self.contexts, self.seen, self.modules = contexts, seen, modules
        self.waiting = False
        self.is_initialized = True

    @property
    def tail(self) -> int:
        return 0 if self.keys is None else int(self.keys.shape[2])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._check(key_states)
        if self.keys is None or self.values is None:
            self.keys, self.values = key_states, value_states
        else:
            rows = len(key_states) // len(self.keys)
            if rows > 1:  # a kept conversation, now asked for beams or several answers
                self.batch_repeat_interleave(rows)
            self.keys = torch.cat([self.keys, key_states], 2)
            self.values = torch.cat([self.values, value_states], 2)
        self.waiting = True
        return mark(self.keys, self), self.values

    def _check(self, key_states: Tensor) -> None:
        heads, size = len(self.contexts[0].lengths), self.contexts[0].head_dim
        if key_states.shape[1] != heads or key_states.shape[3] != size:
            raise ValueError(
                f"the cache holds {heads} heads of size {size} and was given {key_states.shape[1]} of size "
                f"{key_states.shape[3]}: it belongs to another model; compress the context with this one"
            )
        if len(key_states) % len(self.contexts):
            raise ValueError(
                f"a batch of {len(key_states)} rows does not fit {len(self.contexts)} stacked contexts; ask one "
                "question for each context"
            )

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        self.waiting = False
        if id(module) not in self.modules:
            raise ValueError(
                "the cache belongs to another model object; compress the context, or load it, with this one"
            )
        if mask is not None and query.shape[2] > 1:
            newest = mask[:, :, -1, -1]
            if not (newest if mask.dtype == torch.bool else newest == 0).all():
                raise ValueError(
                    "attention_mask hides the newest token: it is shorter than context and question, or padded on the "
                    "right; pass **cache.inputs(question). Assisted decoding cuts the mask before transformers 5.23: "
                    "update, or decode without it"
                )
        return ragged_attention(query, self.contexts, key, value, scale, mask, softcap, sinks)[0]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if query_length == 0:
            raise ValueError(
                "the model was given no tokens: an attention_mask that is missing, or only as long as the question, "
                "makes generate() cut the question away; pass **cache.inputs(question)"
            )
        return self.tail + query_length, self.seen

    def get_seq_length(self) -> int:
        return self.seen + self.tail

    def cut(self, tail: int) -> None:
        """Only the first ``tail`` tokens after the context stay."""
        self.waiting = False
        if tail == 0 or self.keys is None or self.values is None:
            self.keys = self.values = None
        else:
            self.keys, self.values = self.keys[:, :, :tail], self.values[:, :, :tail]

    def restore(self, kept: int) -> None:
        """Only the context and a kept conversation of ``kept`` tokens stay; beams of it were equal rows."""
        self.cut(kept)
        self._rows(lambda t: t[:1])

    def crop(self, tokens_to_remove: int) -> None:
        length = self.tail + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove - self.seen
        if length < 0:
            raise ValueError(
                f"crop({tokens_to_remove}) reaches into the compressed context, which cannot be cut; the question and "
                f"answer after it have {self.tail} tokens"
            )
        self.cut(min(length, self.tail))

    def reset(self) -> None:
        self.cut(0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        if len(self.contexts) > 1:
            raise ValueError("rows of stacked contexts cannot be selected; stack the contexts that are wanted")
        self._rows(lambda t: t[indices])

    def _rows(self, change: Any) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = change(self.keys), change(self.values)

    def offload(self) -> None:
        raise NotImplementedError("a compressed cache stays on the device of its model; it cannot be offloaded")
