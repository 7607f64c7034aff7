"""Attention in parts against the softmax written out in float64."""

import pytest
import torch
from dataopt.core.kvzip import attention, merge, ragged_attention
from dataopt.core.kvzip.attention import packed_attention, with_sinks
from hypothesis import given, settings
from hypothesis import strategies as st

from .reference import causal, naive, normal, packed

SCALE = 0.7  # larger than 1 / sqrt(d), so that the weights are far from uniform
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def problem(b=2, heads=6, key_heads=2, q=5, k=9, d=8, dv=None, dtype=torch.float32, seed=0):
    return (
        normal(b, heads, q, d, seed=seed, dtype=dtype),
        normal(b, key_heads, k, d, seed=seed + 1, dtype=dtype),
        normal(b, key_heads, k, dv or d, seed=seed + 2, dtype=dtype),
    )


def assert_same(got, expected, dtype=torch.float32):
    out, lse = got
    assert out.dtype == dtype and lse.dtype == torch.float32
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(out.double(), expected[0], **tolerance)
    torch.testing.assert_close(lse.double(), expected[1], **tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("key_heads", [6, 2, 1])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize(("q", "k"), [(5, 9), (1, 9), (7, 7), (1, 1)])
def test_full_and_causal(dtype, key_heads, softcap, q, k):
    given = problem(q=q, k=k, key_heads=key_heads, dtype=dtype)
    assert_same(attention(*given, SCALE, softcap=softcap), naive(*given, SCALE, softcap=softcap), dtype)
    expected = naive(*given, SCALE, seen=causal(q, k), softcap=softcap)
    assert_same(attention(*given, SCALE, causal=True, softcap=softcap), expected, dtype)


def test_values_of_another_size():
    given = problem(dv=3)
    assert_same(attention(*given, SCALE), naive(*given, SCALE))


@pytest.mark.parametrize("shape", [(2, 6, 5, 9), (2, 1, 5, 9), (1, 1, 5, 9), (2, 1, 1, 9)])
def test_masks(shape):
    given = problem()
    seen = normal(*shape, seed=7) > -0.3
    seen[..., 4] = True  # each query sees something
    assert_same(attention(*given, SCALE, mask=seen), naive(*given, SCALE, seen=seen))
    added = normal(*shape, seed=8)
    assert_same(attention(*given, SCALE, mask=added), naive(*given, SCALE, added=added))
    if shape[2] == 5:
        expected = naive(*given, SCALE, seen=seen & causal(5, 9))
        assert_same(attention(*given, SCALE, causal=True, mask=seen), expected)
        expected = naive(*given, SCALE, seen=causal(5, 9), added=added)
        assert_same(attention(*given, SCALE, causal=True, mask=added), expected)


def test_a_query_that_sees_nothing():
    q, k, v = problem()
    seen = torch.ones(1, 1, 5, 9, dtype=torch.bool)
    seen[..., 2, :] = False
    out, lse = attention(q, k, v, SCALE, mask=seen)
    assert (out[:, :, 2] == 0).all() and (lse[:, :, 2] == -torch.inf).all()
    assert_same((out, lse), naive(q, k, v, SCALE, seen=seen))
    out, lse = attention(q, k[:, :, :0], v[:, :, :0], SCALE)
    assert out.shape == q.shape and (out == 0).all() and (lse == -torch.inf).all()


def test_many_rows_go_in_blocks():
    """More score entries than are held at once."""
    given = problem(b=1, heads=3, key_heads=1, q=700, k=1500, d=4)
    expected = naive(*given, SCALE, seen=causal(700, 1500))
    assert_same(attention(*given, SCALE, causal=True), expected)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    sizes=st.lists(st.integers(0, 6), min_size=2, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_merge_of_parts_is_attention_over_the_union(seed, sizes, dtype):
    q, k, v = problem(q=3, k=sum(sizes), dtype=dtype, seed=seed)
    parts = [attention(q, a, b, SCALE) for a, b in zip(k.split(sizes, 2), v.split(sizes, 2), strict=True)]
    got = parts[0]
    for part in parts[1:]:
        got = merge(got, part)
    expected = naive(q, k, v, SCALE) if sum(sizes) else (torch.zeros(2, 6, 3, 8).double(), parts[0][1].double())
    assert_same(got, expected, dtype)


def test_merge_takes_sums_of_another_precision():
    a, b = ((torch.randn(2, 3, 4), torch.randn(2, 3)) for _ in range(2))
    out, lse = merge((a[0], a[1].double()), b)
    torch.testing.assert_close(out, merge(a, b)[0])
    torch.testing.assert_close(lse.float(), merge(a, b)[1])


def test_merge_keeps_nothing_where_both_are_empty():
    q, k, v = problem()
    nothing = attention(q, k[:, :, :0], v[:, :, :0], SCALE)
    out, lse = merge(nothing, nothing)
    assert (out == 0).all() and (lse == -torch.inf).all()
    something = attention(q, k, v, SCALE)
    for got in (merge(nothing, something), merge(something, nothing)):
        assert torch.equal(got[0], something[0]) and torch.equal(got[1], something[1])


def test_sinks_enter_the_denominator():
    given, sinks = problem(), normal(6, seed=9) + 2
    assert_same(with_sinks(attention(*given, SCALE), sinks), naive(*given, SCALE, sinks=sinks))
    part = attention(*given, SCALE)
    assert with_sinks(part, None) is part
    assert (with_sinks(part, sinks)[0] - part[0]).abs().max() > 0.05


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("with_sink", [False, True])
@pytest.mark.parametrize("queries", [1, 4, 30])  # 30 * 2 rows * 3 heads of a group take the fused operator
@pytest.mark.parametrize("contexts", [1, 2])
def test_ragged_is_dense_with_a_mask_per_head(softcap, with_sink, queries, contexts):
    """Heads of any length, one of them empty; a tail behind the context; several contexts in a batch of four."""
    n, tail, key_heads, d = 23, queries + 3, 3, 8
    q = normal(4, 9, queries, d, seed=3)
    k, v = normal(4, key_heads, tail, d, seed=4), normal(4, key_heads, tail, d, seed=5)
    sinks = normal(9, seed=6) if with_sink else None
    made = [packed(key_heads, n + 5 * i, d, 0.4, 10 * i, empty=(1,)) for i in range(contexts)]
    assert all(max(p.lengths) > 0 and min(p.lengths) == 0 for p, *_ in made)
    out, lse = ragged_attention(q, [p for p, *_ in made], k, v, SCALE, softcap=softcap, sinks=sinks)
    rows = 4 // contexts
    for i, (_, ck, cv, keep) in enumerate(made):
        mine = slice(i * rows, (i + 1) * rows)
        keys = torch.cat([ck.expand(rows, -1, -1, -1), k[mine]], 2)
        values = torch.cat([cv.expand(rows, -1, -1, -1), v[mine]], 2)
        context_seen = keep.repeat_interleave(3, 0).unsqueeze(1).expand(9, queries, keep.shape[1])
        seen = torch.cat([context_seen, causal(queries, tail).expand(9, -1, -1)], -1)
        expected = naive(q[mine], keys, values, SCALE, seen=seen, softcap=softcap, sinks=sinks)
        assert_same((out[mine], lse[mine]), expected)


def test_ragged_with_a_mask_over_the_tail():
    """A padded question: the mask covers the tail, never the context."""
    context, ck, cv, keep = packed(2, 11, 8, 0.5, 0)
    q, k, v = problem(q=4, k=6)
    seen = causal(4, 6).expand(2, 1, 4, 6).clone()
    seen[1, :, :, :3] = False
    got = ragged_attention(q, [context], k, v, SCALE, mask=seen)
    keys, values = torch.cat([ck.expand(2, -1, -1, -1), k], 2), torch.cat([cv.expand(2, -1, -1, -1), v], 2)
    before = keep.repeat_interleave(3, 0).view(1, 6, 1, 11).expand(2, 6, 4, 11)
    expected = naive(q, keys, values, SCALE, seen=torch.cat([before, seen.expand(2, 6, 4, 6)], -1))
    assert_same(got, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, 40])
def test_packed_in_half_precision(dtype, queries):
    context, k, v, keep = packed(2, 30, 16, 0.5, 1)
    context = type(context).pack(k.to(dtype), v.to(dtype), keep)
    q = normal(2, 6, queries, 16, dtype=dtype)
    got = packed_attention(q, context, 0.25)
    k, v = (t.to(dtype).expand(2, -1, -1, -1) for t in (k, v))
    assert_same(got, naive(q, k, v, 0.25, seen=keep.repeat_interleave(3, 0).unsqueeze(1)), dtype)


def test_quantised_pairs_are_read_as_they_dequantise():
    context, *_ = packed(2, 30, 32, 0.5, 2)
    small = context.quantise(8)
    q = normal(1, 6, 2, 32)
    k, v = small.tensors(torch.float32)
    as_float = type(context)(k, v, small.lengths)
    torch.testing.assert_close(packed_attention(q, small, 0.2), packed_attention(q, as_float, 0.2))
    assert (packed_attention(q, small, 0.2)[0] - packed_attention(q, context, 0.2)[0]).abs().max() > 0


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    key_heads=st.integers(1, 4),
    groups=st.integers(1, 3),
    queries=st.integers(1, 5),
    before=st.integers(0, 4),
    share=st.floats(0, 1),
    n=st.integers(1, 12),
)
def test_ragged_on_any_shape(seed, key_heads, groups, queries, before, share, n):
    context, ck, cv, keep = packed(key_heads, n, 4, share, seed)
    tail = queries + before
    q, k, v = problem(2, key_heads * groups, key_heads, queries, tail, 4, seed=seed)
    got = ragged_attention(q, [context], k, v, SCALE)
    keys, values = torch.cat([ck.expand(2, -1, -1, -1), k], 2), torch.cat([cv.expand(2, -1, -1, -1), v], 2)
    context_seen = keep.repeat_interleave(groups, 0).unsqueeze(1).expand(-1, queries, n)
    seen = torch.cat([context_seen, causal(queries, tail).expand(key_heads * groups, -1, -1)], -1)
    assert_same(got, naive(q, keys, values, SCALE, seen=seen))
