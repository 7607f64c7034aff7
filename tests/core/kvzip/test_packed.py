"""The ragged store."""

import copy
import dataclasses

import pytest
import torch
from dataopt.core.kvzip import PackedHeads, Quantised
from hypothesis import given, settings
from hypothesis import strategies as st

from .reference import normal, random_keep


def make(heads=3, n=12, d=32, prefix=2, share=0.5, seed=0, with_scores=True):
    """Packed, and the dense keys, values, mask and scores behind it."""
    k, v = normal(heads, n, d, seed=seed), normal(heads, n, d, seed=seed + 1)
    keep, scores = random_keep(heads, n, share, seed), normal(heads, n, seed=seed + 2)
    keep[:, :prefix], scores[:, :prefix] = True, torch.inf
    return PackedHeads.pack(k, v, keep, prefix, scores if with_scores else None), k, v, keep, scores


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    heads=st.integers(1, 4),
    n=st.integers(1, 15),
    share=st.floats(0, 1),
    with_scores=st.booleans(),
)
def test_pack_keeps_each_heads_pairs_in_order(seed, heads, n, share, with_scores):
    prefix = min(2, n)
    p, k, v, keep, scores = make(heads, n, 4, prefix, share, seed, with_scores)
    assert p.lengths == tuple(keep.sum(1).tolist())
    assert p.starts.tolist() == [0, *torch.tensor(p.lengths).cumsum(0).tolist()] and p.starts.dtype == torch.int32
    for h, (head_k, head_v) in enumerate(p.heads(torch.float32)):
        assert torch.equal(head_k, k[h, keep[h]]) and torch.equal(head_v, v[h, keep[h]])
    keys, values = p.prefix_pairs(torch.float32)
    assert torch.equal(keys, k[:, :prefix]) and torch.equal(values, v[:, :prefix])
    total = sum(p.lengths)
    assert p.nbytes == total * (4 + 4) * 4 + (4 * total if with_scores else 0)
    assert (p.scores is not None) == with_scores and (not with_scores or torch.equal(p.scores, scores[keep]))


def test_select_is_packing_the_smaller_mask():
    p, k, v, keep, scores = make()
    fewer = keep & random_keep(3, 12, 0.4, 9)
    fewer[:, :2] = True
    got, expected = p.select(fewer[keep]), PackedHeads.pack(k, v, fewer, 2, scores)
    assert got.lengths == expected.lengths and got.prefix == 2
    for name in ("keys", "values", "scores"):
        assert torch.equal(getattr(got, name), getattr(expected, name))
    assert p.lengths == tuple(keep.sum(1).tolist())  # the first one is as it was


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_append_puts_each_heads_parts_side_by_side(bits):
    first, k1, v1, keep1, s1 = make()
    second, k2, v2, keep2, s2 = make(n=7, prefix=0, seed=5)
    if bits:
        first, second = first.quantise(bits), second.quantise(bits)
    got = first.append(second)
    whole = PackedHeads.pack(
        torch.cat([k1, k2], 1), torch.cat([v1, v2], 1), torch.cat([keep1, keep2], 1), 2, torch.cat([s1, s2], 1)
    )
    whole = whole.quantise(bits) if bits else whole  # groups lie within a pair, so the order of the steps is free
    assert got.lengths == whole.lengths and got.prefix == 2 and torch.equal(got.scores, whole.scores)
    for a, b in zip(got.tensors(torch.float32), whole.tensors(torch.float32), strict=True):
        assert torch.equal(a, b)


def test_scores_are_dropped_where_one_part_has_none():
    first, second = make()[0], make(n=7, prefix=0, with_scores=False)[0]
    assert first.append(second).scores is None


def test_nbytes_when_quantised():
    p, *_ = make(with_scores=False)
    total = sum(p.lengths)
    assert p.nbytes == 2 * total * 32 * 4
    assert p.quantise(8).nbytes == 2 * total * (32 + 4) and p.quantise(4).nbytes == 2 * total * (16 + 4)
    assert (p.quantise(8).head_dim, p.quantise(4).head_dim, p.quantise(4).value_dim) == (32, 32, 32)


def test_quantising_twice_and_joining_different_widths_are_refused():
    p, *_ = make()
    with pytest.raises(ValueError, match=r"quantised already.*bits="):
        p.quantise(8).quantise(4)
    with pytest.raises(ValueError, match=r"8-bit and 4-bit.*same bits"):
        p.quantise(8).append(p.quantise(4))


def test_copies_share_the_pairs_and_nothing_can_be_replaced():
    p, *_ = make()
    assert copy.deepcopy(p) is p and copy.deepcopy([p])[0].keys is p.keys
    with pytest.raises(dataclasses.FrozenInstanceError):
        p.keys = p.values


def test_to_moves_every_part():
    p, *_ = make()
    for part in (p.to("meta"), p.quantise(4).to("meta")):
        assert {part.keys.device.type, part.values.device.type, part.scores.device.type} == {"meta"}
        assert part.lengths == p.lengths
    assert isinstance(p.quantise(4).to("meta").keys, Quantised)
