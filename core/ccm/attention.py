"""The parallel forward pass of one layer: memory update, then attention with the mask of figure 7.3 b."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..arguments import check_choice, check_numbers, check_tensors
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

    Raises:
        TypeError: no tensors, layout or rotation.
        ValueError: shapes that do not go together, several dtypes, or an option outside its range.
    """
    _check(query, key, value, layout, rotate)
    check_numbers(scale=scale, dropout=dropout)
    check_choice(("sdpa", "eager", "flex"), implementation=implementation)
    if not math.isfinite(scale) or not 0 <= dropout < 1:
        raise ValueError(f"scale={scale} must be finite, and dropout={dropout} in [0, 1)")
    memory_keys, memory_values = memory_columns(key, value, layout, rotate)
    if implementation == "flex":
        return _flex(query, torch.cat([memory_keys, key], 2), torch.cat([memory_values, value], 2), layout, scale)
    attend = _eager if implementation == "eager" else _sdpa
    if not pays_to_fold(layout):
        keys, values = torch.cat([memory_keys, key], 2), torch.cat([memory_values, value], 2)
        return attend(query, keys, values, layout.mask, scale, dropout)
    # Segments in the batch: L (M + W) scores instead of L (M + L), in matrices that fit the caches. Tokens are moved as
    # rows of all their heads, which is how models lay them out.
    batch, segments, width = layout.fold.shape
    shape = (batch, segments, -1)
    queries = _tokens(query, layout.fold.flatten(1)).unflatten(1, (segments, width)).flatten(0, 1)
    parts = []
    for memory, states in ((memory_keys, key), (memory_values, value)):
        prefix = _tokens(states, layout.prefix).unsqueeze(1)
        slots = memory.transpose(1, 2).unsqueeze(1)
        own = _tokens(states, layout.fold.flatten(1)).unflatten(1, (segments, width))
        expanded = [t.expand(*shape, *t.shape[3:]) for t in (prefix, slots)]
        parts.append(torch.cat([*expanded, own], 2).flatten(0, 1).transpose(1, 2))
    keys, values = parts
    out = attend(queries.transpose(1, 2), keys, values, layout.folded_mask, scale, dropout)
    out = out.transpose(1, 2).reshape(batch, segments * width, *out.shape[1::2])
    return _tokens(out.transpose(1, 2), layout.unfold).transpose(1, 2)


def _check(query: Tensor, key: Tensor, value: Tensor, layout: Layout, rotate: Rotation | None) -> None:
    check_tensors(query=query, key=key, value=value)
    for name, given, kind in (("layout", layout, Layout), ("rotate", rotate, Rotation | None)):
        if not isinstance(given, kind):
            raise TypeError(f"{name} is a {type(given).__name__}; give what dataopt.core.ccm makes")
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)}"
    rows = tuple(layout.segment_ids.shape)
    fits = query.ndim == key.ndim == value.ndim == 4 and key.shape[:3] == value.shape[:3] and 0 not in value.shape
    fits = fits and all((len(t), t.shape[2]) == rows for t in (query, key)) and query.shape[3] == key.shape[3] > 0
    if not fits or not query.shape[1] or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"{shapes} must be (B, Hq, L, d), (B, H, L, d) and (B, H, L, dv), Hq a multiple of H, with the (B, L) of "
            f"the layout, {rows}"
        )
    if not (query.dtype == key.dtype == value.dtype and query.is_floating_point()):
        raise ValueError(f"query is {query.dtype}, key {key.dtype} and value {value.dtype}; give one floating type")


def memory_columns(key: Tensor, value: Tensor, layout: Layout, rotate: Rotation | None) -> tuple[Tensor, Tensor]:
    """(B, H, M, d) keys and values of Mem(1) to Mem(T); see :class:`Layout` for their order."""
    keys = _tokens(key, layout.comp_index).transpose(1, 2)
    values = _tokens(value, layout.comp_index).transpose(1, 2)
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


def _tokens(states: Tensor, index: Tensor) -> Tensor:
    """(B, H, L, d) and (B, m) -> (B, m, H, d), the chosen tokens."""
    batch, heads, length, size = states.shape
    rows = states.transpose(1, 2).reshape(batch * length, heads * size)
    start = torch.arange(batch, device=index.device).unsqueeze(1) * length
    return rows.index_select(0, (index + start).flatten()).view(batch, -1, heads, size)


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
