"""Exact attention in parts: every part returns its log-sum-exp, and parts are merged by it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..arguments import check_flags, check_numbers, check_tensors
from .decode import decode, serves
from .packed import PackedHeads

# Private to torch; where a version lacks it, attention is computed in blocks.
_CPU_FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
try:
    import torch.nn.attention.varlen as _VARLEN
except ImportError:  # a torch without it, or built without flash attention
    _VARLEN = None  # type: ignore[assignment]

_BLOCK = 1 << 21  # score entries that are held at once where no fused operator serves


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention with its log-sum-exp, without holding the whole score matrix.

    Args:
        q: (B, Hq, Q, d).
        k: (B, H, K, d), Hq a multiple of H.
        v: (B, H, K, dv).
        scale: of the products, before the softmax.
        causal: query i sees keys up to K - Q + i (aligned at the last key).
        mask: (B or 1, Hq or 1, Q, K); bool, True where a key is seen, or float, added to the scores.
        softcap: scores become ``softcap * tanh(score / softcap)``.

    Returns:
        (B, Hq, Q, dv) like q, and (B, Hq, Q) float32, -inf where a query sees nothing (its output is 0).
    """
    _check(q, k, v, mask)
    check_scale(scale, softcap)
    check_flags(causal=causal)
    if k.shape[2] == 0:
        shape = q.shape[:3]
        return q.new_zeros(*shape, v.shape[-1]), q.new_full(shape, -torch.inf, dtype=torch.float32)
    causal = causal and q.shape[2] > 1
    square = q.shape[2] == k.shape[2]
    one = q.shape[2] == 1 and mask is not None and mask.shape[1] == 1  # the mask of a decoding step
    if softcap is None and (square or not causal) and q.shape[-1] == v.shape[-1] and (mask is None or one):
        fused = _fused(q, k, v, scale, causal, mask)
        if fused is not None:
            return fused
    if causal:
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
        mask = (
            seen if mask is None else (mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -torch.inf))
        )
    return _in_blocks(q, k, v, scale, mask, softcap)


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    """Shapes that do not go together end in a segmentation fault inside the fused operator."""
    check_tensors(q=q, k=k, v=v)
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"
    fits = q.ndim == k.ndim == v.ndim == 4 and k.shape[:3] == v.shape[:3]
    if not fits or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"{shapes} must be (B, Hq, Q, d), (B, H, K, d) and (B, H, K, dv), Hq a multiple of H")
    if not (q.numel() and v.shape[3]):
        raise ValueError(f"{shapes} hold nothing; give at least one query")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise ValueError(f"q is {q.dtype}, k {k.dtype} and v {v.dtype}; give one floating type")
    if mask is None:
        return
    check_tensors(mask=mask)
    full = (*q.shape[:3], k.shape[2])
    if mask.ndim != 4 or any(m not in (1, n) for m, n in zip(mask.shape, full, strict=True)):
        raise ValueError(f"mask has the shape {tuple(mask.shape)}; give one that expands to {full}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"mask is {mask.dtype}; give bool, True where a key is seen, or floating values to add")


def check_scale(scale: float, softcap: float | None) -> None:
    """Raise for a scale or a softcap that would make every score NaN."""
    check_numbers(scale=scale, softcap=1 if softcap is None else softcap)
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale} must be finite")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap={softcap} must be above 0 and finite; None is off")


def _fused(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """The flash operator of the device with its log-sum-exp, or None where it does not serve."""
    groups = q.shape[1] // k.shape[1]
    if q.device.type == "cpu" and _CPU_FLASH is not None:
        if not q.dtype.is_floating_point or q.dtype == torch.float16 or q.dtype != k.dtype:
            return None
        if causal:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
            rows = q
        else:  # without a causal order the queries of a group are rows of one head: nothing is repeated
            rows = q.reshape(q.shape[0], k.shape[1], groups * q.shape[2], q.shape[3])
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
        out, lse = _CPU_FLASH.default(rows, k, v, 0.0, causal, attn_mask=mask, scale=scale)
        return out.reshape(*q.shape[:3], -1), lse.float().reshape(q.shape[:3])
    half = q.dtype in (torch.float16, torch.bfloat16)
    if q.device.type == "cuda" and half and mask is None and q.shape[-1] <= 256:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
        return out, lse[..., : q.shape[2]].float()
    return None


def _in_blocks(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    b, heads, n, _ = q.shape
    groups = heads // k.shape[1]
    size = max(1, _BLOCK // (b * heads * k.shape[2]))
    outs, lses = [], []
    keys, values = k.unsqueeze(2).mT, v.unsqueeze(2)  # (B, H, 1, d, K), (B, H, 1, K, dv)
    for start in range(0, n, size):
        rows = q[:, :, start : start + size].unflatten(1, (-1, groups))
        scores = torch.matmul(rows, keys).float() * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is not None:
            part = (mask[..., start : start + size, :] if mask.shape[-2] > 1 else mask).expand(b, heads, -1, -1)
            part = part.unflatten(1, (-1, groups))
            scores = scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part
        lse = scores.logsumexp(-1)
        weights = (scores - lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1)).exp_()
        outs.append(torch.matmul(weights.to(v.dtype), values).flatten(1, 2))
        lses.append(lse.flatten(1, 2))
    return (outs[0], lses[0]) if len(outs) == 1 else (torch.cat(outs, 2), torch.cat(lses, 2))


def merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the attention over each.

    Args:
        first, second: outputs (..., dv) and log-sum-exps (...) float32, as :func:`attention` returns them.

    Raises:
        TypeError: something else than two pairs of tensors.
        ValueError: shapes that do not go together.
    """
    for name, part in (("first", first), ("second", second)):
        if not (isinstance(part, tuple) and len(part) == 2 and all(isinstance(t, Tensor) for t in part)):
            raise TypeError(f"{name} is a {type(part).__name__}; give (output, log-sum-exp), as attention returns them")
        out, lse = part
        fits = out.ndim and out.shape == first[0].shape and out.shape[:-1] == lse.shape
        if not (fits and out.is_floating_point() and lse.is_floating_point()):
            raise ValueError(
                f"{name} holds {tuple(out.shape)} {out.dtype} and {tuple(lse.shape)} {lse.dtype}; give floating "
                "(..., dv) and (...), both parts alike"
            )
    (a, lse_a), (b, lse_b) = first, second
    # both empty: -inf - -inf is not a number
    share = torch.sigmoid((lse_a - lse_b).float()).nan_to_num_(1.0).unsqueeze(-1)
    return torch.lerp(b.float(), a.float(), share).to(a.dtype), torch.logaddexp(lse_a, lse_b)


def with_sinks(part: tuple[Tensor, Tensor], sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Add one learned logit per query head to the denominator.

    Args:
        part: (B, Hq, Q, dv) and (B, Hq, Q).
        sinks: (Hq,) logits, or None.

    Raises:
        TypeError, ValueError: sinks that are no such tensor.
    """
    if sinks is None:
        return part
    out, lse = part
    check_tensors(sinks=sinks)
    if sinks.shape != out.shape[1:2]:
        raise ValueError(f"sinks has the shape {tuple(sinks.shape)}; give one logit for each of {out.shape[1]} heads")
    total = torch.logaddexp(lse, sinks.float().view(1, -1, 1))
    return (out.float() * (lse - total).exp().unsqueeze(-1)).to(out.dtype), total


def ragged_attention(
    q: Tensor,
    contexts: list[PackedHeads],
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over packed contexts, whose heads differ in length, and a dense tail.

    Args:
        q: (B, Hq, Q, d); row r reads context r // (B / len(contexts)).
        contexts: one for all rows, or one for each run of equally many rows.
        k, v: (B, H, T, d) and (B, H, T, dv), the tail; its last Q keys belong to the queries.
        mask: over the tail, as in :func:`attention`; None is causal.
        softcap, sinks: as in :func:`attention` and :func:`with_sinks`.

    Returns:
        As :func:`attention`.

    Raises:
        TypeError: something else than tensors and packed contexts.
        ValueError: shapes, heads or types that do not go together, or rows that the contexts do not divide.
    """
    _check(q, k, v, mask)
    check_scale(scale, softcap)
    if not isinstance(contexts, list | tuple) or not contexts or len(q) % len(contexts):
        what = f"{len(contexts)}" if isinstance(contexts, list | tuple) else f"a {type(contexts).__name__}"
        raise ValueError(f"contexts is {what} for {len(q)} rows of q; give a list of one, or one for each run of rows")
    for context in contexts:
        _check_context(q, context)
        if (len(context.lengths), context.value_dim) != (v.shape[1], v.shape[3]):
            found, wanted = (len(context.lengths), context.value_dim), (v.shape[1], v.shape[3])
            raise ValueError(f"contexts has heads and a value size of {found}; those of v are {wanted}")
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if serves(q, contexts, k, mask, softcap, grad):
        return with_sinks(decode(q, contexts[0], k, v, scale), sinks)
    tail = attention(q, k, v, scale, causal=mask is None, mask=mask, softcap=softcap)
    if len(contexts) == 1:
        packed = packed_attention(q, contexts[0], scale, softcap)
    else:
        rows = q.split(q.shape[0] // len(contexts))
        parts = [packed_attention(part, c, scale, softcap) for part, c in zip(rows, contexts, strict=True)]
        packed = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    return with_sinks(merge(packed, tail), sinks)


def packed_attention(
    q: Tensor, context: PackedHeads, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over one packed context that every row of q shares and sees in full.

    All rows, query heads of a group and positions are folded into the rows of their key head, so the
    context is read once, however many questions there are.

    Args:
        q: (B, Hq, Q, d).

    Returns:
        As :func:`attention`.

    Raises:
        TypeError: no packed context.
        ValueError: heads, sizes or types that are not those of the context.
    """
    _check_context(q, context)
    (b, heads, n, d), key_heads = q.shape, len(context.lengths)
    groups = heads // key_heads
    rows = q.unflatten(1, (key_heads, groups)).permute(1, 0, 2, 3, 4).reshape(key_heads, b * groups * n, d)
    if softcap is None and _varlen_serves(rows, context):
        out, lse = _varlen(rows, context, scale)
    else:
        out, lse = _per_head(rows, context, scale, softcap)
    out = out.view(key_heads, b, groups, n, -1).permute(1, 0, 2, 3, 4)
    return out.flatten(1, 2), lse.view(key_heads, b, groups, n).permute(1, 0, 2, 3).flatten(1, 2)


def _check_context(q: Tensor, context: PackedHeads) -> None:
    if not isinstance(context, PackedHeads):
        raise TypeError(f"contexts holds a {type(context).__name__}; give PackedHeads")
    key_heads = len(context.lengths)
    if q.shape[1] % key_heads or q.shape[3] != context.head_dim:
        raise ValueError(
            f"q {tuple(q.shape)} does not fit contexts of {key_heads} heads of size {context.head_dim}; they belong to "
            "another model"
        )
    if any(isinstance(t, Tensor) and t.dtype != q.dtype for t in (context.keys, context.values)):
        raise ValueError(f"q is {q.dtype} and contexts holds pairs of another type; give one floating type")


def _per_head(rows: Tensor, context: PackedHeads, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    if len(set(context.lengths)) == 1:  # nothing was evicted, or the same everywhere
        k, v = (t.view(1, len(rows), -1, t.shape[1]) for t in context.tensors(rows.dtype))
        out, lse = attention(rows.unsqueeze(0), k, v, scale, softcap=softcap)
        return out[0], lse[0]
    parts = [
        attention(q, k.view(1, 1, *k.shape), v.view(1, 1, *v.shape), scale, softcap=softcap)
        for q, (k, v) in zip(rows[:, None, None], context.heads(rows.dtype), strict=True)
    ]
    return torch.cat([out for out, _ in parts], 1)[0], torch.cat([lse for _, lse in parts], 1)[0]


def _varlen_serves(rows: Tensor, context: PackedHeads) -> bool:
    if _VARLEN is None:
        return False
    half = rows.dtype in (torch.float16, torch.bfloat16)
    return rows.is_cuda and half and context.head_dim == context.value_dim <= 256 and min(context.lengths) > 0


def _varlen(rows: Tensor, context: PackedHeads, scale: float) -> tuple[Tensor, Tensor]:
    """One variable-length flash call: key heads are the sequences of the batch."""
    assert _VARLEN is not None
    heads, n, d = rows.shape
    k, v = context.tensors(rows.dtype)
    starts = torch.arange(0, heads * n + 1, n, dtype=torch.int32, device=rows.device)
    out, lse = _VARLEN.varlen_attn(
        rows.reshape(heads * n, 1, d),
        k.unsqueeze(1),
        v.unsqueeze(1),
        starts,
        context.starts,
        n,
        max(context.lengths),
        return_aux=_VARLEN.AuxRequest(lse=True),
        scale=scale,
    )
    return out.view(heads, n, -1), lse.float().reshape(heads, n)
