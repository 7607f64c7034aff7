"""The parallel forward pass of one layer: memory update, then attention with the mask of figure 7.3 b."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from .layout import Layout
from .rotation import Rotation


def memory_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    rotate: Rotation | None,
    scale: float,
    dropout: float = 0.0,
    implementation: str = "sdpa",
) -> Tensor:
    """Attention of whole rows, each segment over the prefix, its memory and itself.

    Args:
        query: (B, Hq, L, d), rotated. key, value: (B, H, L, d) and (B, H, L, dv), H a divisor of Hq.
        layout: of the rows.
        rotate: moves COMP keys to their slots, where ``layout.shift`` asks for it.
        scale: of the scores.
        dropout: of the attention weights.
        implementation: "sdpa"; "eager" forms the weights; "flex" builds a block mask (CUDA, or CPU without gradients).

    Returns:
        (B, Hq, L, dv).
    """
    memory_keys, memory_values = memory_columns(key, value, layout, rotate)
    if implementation == "flex":
        return _flex(query, torch.cat([memory_keys, key], 2), torch.cat([memory_values, value], 2), layout, scale)
    attend = _eager if implementation == "eager" else _sdpa
    if not pays_to_fold(layout):
        keys, values = torch.cat([memory_keys, key], 2), torch.cat([memory_values, value], 2)
        return attend(query, keys, values, layout.mask, scale, dropout)
    # Segments in the batch: L (M + W) scores instead of L (M + L), in matrices that fit the caches.
    batch, segments, width = layout.fold.shape
    keys = torch.cat([_prefix(key, layout, segments), _spread(memory_keys, segments), _folded(key, layout)], 2)
    values = torch.cat([_prefix(value, layout, segments), _spread(memory_values, segments), _folded(value, layout)], 2)
    out = attend(_folded(query, layout), keys, values, layout.folded_mask, scale, dropout)
    out = out.view(batch, segments, -1, width, out.shape[-1]).transpose(1, 2).flatten(2, 3)
    return out.gather(2, _index(layout.unfold, out))


def memory_columns(key: Tensor, value: Tensor, layout: Layout, rotate: Rotation | None) -> tuple[Tensor, Tensor]:
    """(B, H, M, d) keys and values of Mem(1) to Mem(T); see :class:`Layout` for their order."""
    keys = key.gather(2, _index(layout.comp_index, key))
    values = value.gather(2, _index(layout.comp_index, value))
    if layout.shift is not None and rotate is not None:
        # Before the average: then all terms of a slot share one frame.
        keys = rotate(keys, layout.shift)
    if layout.weights is None or not layout.columns:
        return keys, values
    return _averaged(keys, layout), _averaged(values, layout)


def pays_to_fold(layout: Layout) -> bool:
    """Whether equal places for all segments form fewer scores than one matrix over the row."""
    length, columns = layout.segment_ids.shape[1], layout.columns
    places = layout.sees_to.shape[1] * layout.width
    return places * (layout.prefix.shape[1] + columns + layout.width) < length * (columns + length)


def _averaged(pairs: Tensor, layout: Layout) -> Tensor:
    assert layout.weights is not None
    dtype = torch.promote_types(pairs.dtype, torch.float32)
    by_step = pairs.to(dtype).unflatten(2, (-1, layout.slots))
    return torch.einsum("tj,bhjsd->bhtsd", layout.weights.to(dtype), by_step).flatten(2, 3).to(pairs.dtype)


def _index(index: Tensor, like: Tensor) -> Tensor:
    """(B, m) -> (B, H, m, d), to gather along the tokens."""
    return index[:, None, :, None].expand(-1, like.shape[1], -1, like.shape[3])


def _folded(states: Tensor, layout: Layout) -> Tensor:
    """(B, H, L, d) -> (B S, H, W, d)."""
    segments, width = layout.fold.shape[1:]
    padded = pad(states, (0, 0, 0, 1))
    folded = padded.gather(2, _index(layout.fold.flatten(1), padded)).unflatten(2, (segments, width))
    return folded.transpose(1, 2).flatten(0, 1)


def _spread(states: Tensor, segments: int) -> Tensor:
    """(B, H, m, d) -> (B S, H, m, d), the same for every segment."""
    return states.unsqueeze(1).expand(-1, segments, -1, -1, -1).flatten(0, 1)


def _prefix(states: Tensor, layout: Layout, segments: int) -> Tensor:
    return _spread(states.gather(2, _index(layout.prefix, states)), segments)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, dropout: float) -> Tensor:
    key, value = _grouped(key, query), _grouped(value, query)
    return scaled_dot_product_attention(query, key, value, mask, dropout_p=dropout, scale=scale)


def _eager(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, dropout: float) -> Tensor:
    key, value = _grouped(key, query), _grouped(value, query)
    scores = (query @ key.transpose(2, 3) * scale).masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    return torch.nn.functional.dropout(weights, dropout) @ value


def _grouped(pairs: Tensor, query: Tensor) -> Tensor:
    groups = query.shape[1] // pairs.shape[1]
    return pairs if groups == 1 else pairs.repeat_interleave(groups, 1)


@cache
def _compiled() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[..., Tensor] = torch.compile(flex_attention)
    return compiled


def _flex(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    run: Any = _compiled() if query.is_cuda else flex_attention
    out = run(query, key, value, block_mask=layout.block_mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
    assert isinstance(out, Tensor)
    return out
