"""How much a model needs each pair to repeat its context (eq. 8.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import check_tensors
from .attention import check_scale

BLOCK = 1 << 20  # score entries that are held at once


def pair_scores(q: Tensor, k: Tensor, lse: Tensor, scale: float, softcap: float | None = None) -> Tensor:
    """Log of the largest attention that each key receives from any query of its group (eq. 8.2).

    The softmax is never formed: ``max_i exp(q_i k_j scale - lse_i)``, with the log-sum-exp that flash attention
    gives beside its output. The keys behind ``lse`` decide the normalisation: all keys (norm "full"), or the
    prefix, the chunk and the input only, as the released code has it (norm "subset").

    Args:
        q: (Hq, n, d) queries of the reconstruction, after position encoding.
        k: (H, m, d) keys to be scored.
        lse: (Hq, n) float32, over the scaled scores of each query.
        scale: of the scores.
        softcap: as in :func:`dataopt.core.kvzip.attention`.

    Returns:
        (H, m) float32, at most 0 where the keys are among those of the log-sum-exp.
    """
    check_tensors(q=q, k=k, lse=lse)
    check_scale(scale, softcap)
    fits = q.ndim == k.ndim == 3 and lse.shape == q.shape[:2] and q.shape[2] == k.shape[2] and q.numel() and k.numel()
    if not fits or q.shape[0] % k.shape[0] or q.dtype != k.dtype or not q.is_floating_point():
        raise ValueError(
            f"q {tuple(q.shape)} {q.dtype}, k {tuple(k.shape)} {k.dtype} and lse {tuple(lse.shape)} must be floating "
            "(Hq, n, d), (H, m, d) and (Hq, n), Hq a multiple of H"
        )
    q, k, lse = q.detach(), k.detach(), lse.detach().float()
    heads, m, d = k.shape
    rows = q.reshape(heads, -1, d)
    lse = lse.reshape(heads, -1, 1)
    best = torch.full((heads, m), -torch.inf, dtype=torch.float32, device=q.device)
    size = max(32, BLOCK // (heads * m))
    for start in range(0, rows.shape[1], size):
        part = slice(start, start + size)
        if softcap is None and q.dtype == torch.float32:
            scores = torch.baddbmm(lse[:, part].expand(-1, -1, m), rows[:, part], k.mT, beta=-1, alpha=scale)
        else:
            scores = torch.bmm(rows[:, part], k.mT).float().mul_(scale)
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            scores.sub_(lse[:, part])
        torch.maximum(best, scores.amax(1), out=best)
    return best
