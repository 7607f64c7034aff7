"""The softmax written out in float64, and random problems."""

import torch
from dataopt.core.kvzip import PackedHeads
from torch import Tensor


def naive(q, k, v, scale, seen=None, added=None, softcap=None, sinks=None) -> tuple[Tensor, Tensor]:
    """Attention over (B, H, K, d) keys; `seen` bool and `added` float masks broadcast to (B, Hq, Q, K)."""
    groups = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(groups, 1), v.double().repeat_interleave(groups, 1)
    scores = q @ k.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if added is not None:
        scores = scores + added.double()
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        sink = sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], -1)
        v = torch.cat([v, torch.zeros_like(v[:, :, :1])], 2)
    weights = scores.softmax(-1).nan_to_num(0)  # a query that sees nothing
    return weights @ v, scores.logsumexp(-1)


def causal(queries: int, keys: int) -> Tensor:
    """(Q, K) bool: the last query sees every key."""
    return torch.arange(keys) <= torch.arange(queries).unsqueeze(1) + keys - queries


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_keep(heads: int, n: int, share: float, seed: int = 0, empty: tuple[int, ...] = ()) -> Tensor:
    keep = torch.rand(heads, n, generator=torch.Generator().manual_seed(seed)) < share
    keep[list(empty)] = False
    return keep


def packed(heads: int, n: int, d: int, share: float, seed: int, empty: tuple[int, ...] = (), dv: int | None = None):
    """A packed context, and the dense (H, n, d) keys, (H, n, dv) values and (H, n) bool that it was packed from."""
    k, v = normal(heads, n, d, seed=seed), normal(heads, n, dv or d, seed=seed + 1)
    keep = random_keep(heads, n, share, seed, empty)
    return PackedHeads.pack(k, v, keep), k, v, keep
