"""The compiled decoding step against a softmax in float64."""

import importlib
import math

import pytest
import torch
from dataopt.core.kvzip import PackedHeads, ragged_attention
from dataopt.core.kvzip.decode import serves
from hypothesis import given, settings
from hypothesis import strategies as st

module = importlib.import_module("dataopt.core.kvzip.attention")  # the package has a function of this name


def parts(lengths, tail, groups=3, size=16, width=16, seed=0):
    """A query to each head, packed pairs and a tail."""
    g = torch.Generator().manual_seed(seed)
    heads, pairs = len(lengths), sum(lengths)
    keys, values = torch.randn(pairs, size, generator=g), torch.randn(pairs, width, generator=g)
    q = torch.randn(1, heads * groups, 1, size, generator=g)
    k, v = torch.randn(1, heads, tail, size, generator=g), torch.randn(1, heads, tail, width, generator=g)
    return q, PackedHeads(keys, values, tuple(lengths)), k, v


def plain(q, context, k, v, scale):
    """Outputs and log-sum-exps in float64, head by head."""
    groups, outs, lses = q.shape[1] // k.shape[1], [], []
    for i, row in enumerate(q[0, :, 0].double()):
        h = i // groups
        begin = sum(context.lengths[:h])
        mine = slice(begin, begin + context.lengths[h])
        keys, values = (torch.cat([a[mine], b[0, h]]).double() for a, b in ((context.keys, k), (context.values, v)))
        scores = keys @ row * scale
        outs.append(scores.softmax(0) @ values if len(scores) else values.new_zeros(values.shape[1]))
        lses.append(scores.logsumexp(0) if len(scores) else torch.tensor(-math.inf).double())
    return torch.stack(outs), torch.stack(lses)


@settings(max_examples=60, deadline=None)  # the first step compiles
@given(
    lengths=st.lists(st.integers(0, 600), min_size=1, max_size=4),
    tail=st.integers(0, 300),
    groups=st.integers(1, 16),
    size=st.sampled_from([1, 8, 64, 80]),
    width=st.sampled_from([1, 16, 64]),
    scale=st.sampled_from([0.125, 1.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_a_step_is_the_softmax_over_context_and_tail(lengths, tail, groups, size, width, scale, seed):
    q, context, k, v = parts(lengths, tail, groups, size, width, seed)
    assert serves(q, [context], k, None, None, False)
    out, lse = ragged_attention(q, [context], k, v, scale)
    expected, expected_lse = plain(q, context, k, v, scale)
    assert out.shape == (1, len(q[0]), 1, width) and lse.shape == (1, len(q[0]), 1)
    room = 1e-5 * max(1.0, scale)  # scores are rounded to float32
    torch.testing.assert_close(out[0, :, 0].double(), expected, rtol=room, atol=room)
    torch.testing.assert_close(lse[0, :, 0].double(), expected_lse, rtol=1e-5, atol=room)


def test_the_fused_operator_says_the_same(monkeypatch):
    q, context, k, v = parts([700, 0, 130], 40, size=64, width=64)
    sinks = torch.randn(9, generator=torch.Generator().manual_seed(1))
    compiled = ragged_attention(q, [context], k, v, 0.125, sinks=sinks)
    monkeypatch.setattr(module, "serves", lambda *args: False)
    monkeypatch.setattr(module, "decode", None)
    for mine, theirs in zip(compiled, ragged_attention(q, [context], k, v, 0.125, sinks=sinks), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_scores_that_lie_far_apart_and_a_highest_one_that_comes_late():
    q, context, k, v = parts([900], 1, groups=1)
    keys = context.keys.clone()
    keys[:300] = -1000 * q[0, 0, 0]  # weights of nothing
    keys[777] = 100 * q[0, 0, 0]  # a weight of all, in a later block
    out, lse = ragged_attention(q, [PackedHeads(keys, context.values, (900,))], k, v, 1.0)
    torch.testing.assert_close(out[0, 0, 0], context.values[777], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse[0, 0, 0], 100 * q.square().sum(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("where", ["q", "context key", "context value", "tail key", "tail value"])
def test_nan_stays_nan(where):
    q, context, k, v = parts([300], 5, groups=2)
    target = {"q": q, "context key": context.keys, "context value": context.values, "tail key": k, "tail value": v}
    target[where].view(-1)[0] = math.nan
    out, _ = ragged_attention(q, [context], k, v, 0.3)
    assert out[0, 0].isnan().any()


def test_what_it_leaves_to_the_other_operators():
    q, context, k, v = parts([40, 40], 3)
    assert serves(q, [context], k, None, None, False)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        many = parts([6000, 6000], 3)
        assert not serves(many[0], [many[1]], many[2], None, None, False)
        torch.set_num_threads(1)
        assert serves(many[0], [many[1]], many[2], None, None, False)
    finally:
        torch.set_num_threads(threads)
    mask = torch.ones(1, 1, 1, 3, dtype=torch.bool)
    assert not serves(q, [context], k, mask, None, False) and not serves(q, [context], k, None, 30.0, False)
    assert not serves(q.double(), [context], k, None, None, False)
    assert not serves(q.expand(2, -1, -1, -1), [context], k, None, None, False)
    assert not serves(q.expand(-1, -1, 2, -1), [context], k, None, None, False)
    q.requires_grad_()
    out, _ = ragged_attention(q, [context], k, v, 0.3)
    assert torch.autograd.grad(out.sum(), q)[0].abs().sum() > 0
