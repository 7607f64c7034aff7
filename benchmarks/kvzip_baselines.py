"""Scores of other methods for the same selection, so that only what scores the pairs differs.

Each function returns, as KVzip's scoring does, (H, n) scores for every layer. All compare pairs of all heads and layers
and keep the prefix; none is the authors' release: the names end in "-like" wherever they are shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from dataopt.core.kvzip import attention, merge
from dataopt.integrations.hf import decoder
from dataopt.integrations.hf.kvzip.layers import ScoringLayer
from kvzip_task import Reading
from torch import Tensor
from transformers import Cache

WINDOW, POOL = 32, 7  # SnapKV: queries at the end that vote, and the width of the pooling over positions
BLOCK = 1 << 21  # attention weights that are held at once


@dataclass(frozen=True)
class Received:
    """Attention that each pair of a layer receives from some queries, each (H, n).

    Attributes:
        total: summed over queries and the heads of a group.
        most: the maximum.
        window: summed over the last queries.
    """

    total: Tensor
    most: Tensor
    window: Tensor


class WatchingLayer(ScoringLayer):
    """Attends to the context and adds up what its pairs receive; new pairs count as part of it if ``own``."""

    def __init__(self, keys: Tensor, values: Tensor, seen: int, own: bool, window: int) -> None:
        super().__init__(keys, values, seen, None, "full", 0)
        self.own, self.window = own, window
        self.received: Received | None = None

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float, *rest: Any):
        own = attention(query, key, value, scale, causal=True)
        out, lse = merge(attention(query, self.dense_keys, self.dense_values, scale), own)
        keys = torch.cat([self.dense_keys, key], 2) if self.own else self.dense_keys
        self.received = _received(query[0], keys[0], lse[0], scale, self.dense_keys.shape[2], self.window)
        return out


def _received(q: Tensor, k: Tensor, lse: Tensor, scale: float, before: int, window: int) -> Received:
    heads, n, _ = k.shape
    count = q.shape[1]
    total, most, last = (q.new_zeros(heads, n) for _ in range(3))
    size = max(1, BLOCK // (len(q) * n))
    where = torch.arange(n, device=q.device)
    for start in range(0, count, size):
        rows = slice(start, min(start + size, count))
        grouped = q[:, rows].unflatten(0, (heads, -1))
        weights = torch.matmul(grouped, k.unsqueeze(1).mT).float().mul_(scale)
        weights = weights.sub_(lse[:, rows].unflatten(0, (heads, -1)).unsqueeze(-1)).exp_()
        at = torch.arange(count, device=q.device)[rows]
        weights.masked_fill_(where > at.unsqueeze(1) + before, 0)
        total += weights.sum((1, 2))
        torch.maximum(most, weights.amax((1, 2)), out=most)
        late = at >= count - window
        if late.any():
            last += weights[:, :, late].sum((1, 2))
    return Received(total, most, last)


@torch.no_grad()
def prefill_attention(reading: Reading, window: int = WINDOW) -> list[Received]:
    """What each pair receives while the context is read."""
    layers = [WatchingLayer(p.keys[:, :, :0], p.values[:, :, :0], 0, True, window) for p in reading.layers]
    return _watch(reading, layers, reading.ids)


@torch.no_grad()
def question_attention(reading: Reading, ids: Sequence[int], window: int = WINDOW) -> list[Received]:
    """What the pairs of the context receive from a question behind it."""
    layers = [WatchingLayer(p.keys, p.values, len(reading.ids), False, window) for p in reading.layers]
    return _watch(reading, layers, ids)


def _watch(reading: Reading, layers: list[WatchingLayer], ids: Sequence[int]) -> list[Received]:
    decoder.forward(reading.model, torch.tensor([list(ids)]), Cache(layers=layers))
    assert all(layer.received is not None for layer in layers)
    return [layer.received for layer in layers if layer.received is not None]


@torch.no_grad()
def log_maxima(reading: Reading, ids: Sequence[int]) -> list[Tensor]:
    """Log of the largest attention of all pairs of the context while the model reads ``ids`` behind it (eq. 8.2)."""
    layers = [ScoringLayer(p.keys, p.values, len(reading.ids), None, "full", reading.prefix) for p in reading.layers]
    for layer in layers:
        layer.chunk = slice(reading.prefix, len(reading.ids))
    decoder.forward(reading.model, torch.tensor([list(ids)]), Cache(layers=layers))
    return [layer.scores for layer in layers]


def snapkv(received: Sequence[Received], window: int = WINDOW) -> list[Tensor]:
    """SnapKV: the attention of the last queries, pooled over positions; the window itself stays (2404.14469).

    Args:
        window: pairs at the end of the context that stay; 0 where the queries were a question behind it.
    """
    scores = []
    for part in received:
        pooled = torch.nn.functional.avg_pool1d(part.window.unsqueeze(0), POOL, 1, POOL // 2, count_include_pad=False)[
            0
        ]
        if window:
            pooled[:, -window:] = torch.inf
        scores.append(pooled)
    return scores


def pyramid(scores: Sequence[Tensor], prefix: int, steepness: float = 0.6) -> list[Tensor]:
    """PyramidKV: the same scorer, more pairs for the first layers and fewer for the last (2406.02069).

    A pair's score becomes minus its rank within the layer over the layer's share, so that one threshold for all layers
    keeps of each its share, which falls linearly from ``1 + steepness`` to ``1 - steepness`` times the mean.
    """
    shares = torch.linspace(1 + steepness, 1 - steepness, len(scores))
    out = []
    for share, part in zip(shares.tolist(), scores, strict=True):
        flat = part[:, prefix:].flatten()
        rank = torch.empty_like(flat)
        rank[flat.argsort(descending=True, stable=True)] = torch.arange(len(flat), dtype=flat.dtype)
        new = part.clone()
        new[:, prefix:] = (-rank / share).view(len(part), -1)
        out.append(new)
    return out


def h2o(received: Sequence[Received]) -> list[Tensor]:
    """H2O: attention accumulated over the prefill, without its window of recent pairs (2306.14048)."""
    return [part.total for part in received]


def prefill_maximum(received: Sequence[Received]) -> list[Tensor]:
    """The maximum instead of the sum: KVzip's score, but of the prefill (figures 8.5 and 8.6)."""
    return [part.most for part in received]


def recent(reading: Reading) -> list[Tensor]:
    """The last tokens of every head."""
    return [torch.arange(p.keys.shape[2]).float().expand(p.keys.shape[1], -1) for p in reading.layers]


def random(reading: Reading, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(p.keys.shape[1:3], generator=generator) for p in reading.layers]
