"""KVzip and CCM on scores, pairs and segments that make no sense."""

import torch
from dataopt.core.ccm import Layout, layout
from dataopt.core.kvzip import (
    PackedHeads,
    Quantised,
    attention,
    head_selection,
    pair_scores,
    pair_selection,
    recent_window,
)
from hypothesis import given
from hypothesis import strategies as st

from .budget import tries
from .spoiled import answer, finite, spoil

G = torch.Generator().manual_seed(0)
H, N, D = 2, 6, 8
KEYS, VALUES_ = torch.randn(H, N, D, generator=G), torch.randn(H, N, D, generator=G)
KEEP = torch.rand(H, N, generator=G) > 0.3
PACKED = PackedHeads.pack(KEYS, VALUES_, KEEP)
Q = torch.randn(1, 2 * H, 3, D, generator=G)
SEGMENTS = torch.tensor([[1, 1, 1, 2, 2, 2, 3, 3]])
SLOTS = torch.tensor([[-1, -1, 0, -1, -1, 0, -1, -1]])


@tries(60)
@given(st.data())
def test_budget(data):
    call = {"scores": [torch.rand(6), torch.rand(4)], "counts": [[3, 3], [2, 2]], "total": 3, "ratio": 0.5,
            "budget": "global"}  # fmt: skip
    kept = answer(pair_selection, spoil(data, call))
    if kept is not None:
        assert [len(k) for k in kept] == [6, 4] and all(k.dtype == torch.bool for k in kept)
    scores = spoil(data, {"scores": torch.rand(3, 2), "ratio": 0.5})
    heads = answer(head_selection, scores)
    assert heads is None or int(heads.sum()) == round(scores["ratio"] * heads.numel())
    recent = answer(recent_window, spoil(data, {"length": 5, "recent": 2}))
    assert recent is None or recent.dtype == torch.bool


@tries(80)
@given(st.data())
def test_packed(data):
    call = {"keys": KEYS, "values": VALUES_, "keep": KEEP, "prefix": 0, "scores": torch.rand(H, N)}
    packed = answer(PackedHeads.pack, spoil(data, call))
    if packed is not None:
        assert sum(packed.lengths) == len(packed.keys) == len(packed.values)
        fewer = answer(packed.select, spoil(data, {"keep": torch.ones(len(packed.keys), dtype=torch.bool)}))
        assert fewer is None or sum(fewer.lengths) == len(fewer.keys)


@tries(80)
@given(st.data())
def test_quantise(data):
    arguments = spoil(data, {"x": torch.randn(5, 8, generator=G), "bits": 4, "group": 4})
    q = answer(Quantised.of, arguments)
    if q is not None:
        x = arguments["x"]
        assert q.shape == tuple(x.shape) and finite(q)
        if len(x):
            step = (x.float().max() - x.float().min()) / (2 ** arguments["bits"] - 1)
            assert (
                float((q.dequantise(torch.float32) - x.float()).abs().max())
                <= 0.6 * float(step) + 0.01 * float(x.float().abs().max()) + 1e-6
            )


@tries(80)
@given(st.data())
def test_attention(data):
    call = {"q": Q, "k": KEYS[None], "v": VALUES_[None], "scale": 0.3, "causal": False, "mask": None, "softcap": None}
    arguments = spoil(data, call)
    found = answer(attention, arguments)
    if found is not None:
        out, lse = found
        assert out.shape[:3] == arguments["q"].shape[:3] == lse.shape
        usual = all(finite(arguments[n]) and float(arguments[n].abs().sum()) < 1e6 for n in ("q", "k", "v"))
        assert finite(out) or not usual


@tries(60)
@given(st.data())
def test_scores(data):
    call = {"q": Q[0], "k": KEYS, "lse": torch.zeros(2 * H, 3), "scale": 0.3, "softcap": None}
    arguments = spoil(data, call)
    scores = answer(pair_scores, arguments)
    assert scores is None or scores.shape == arguments["k"].shape[:2]


@tries(80)
@given(st.data())
def test_layout(data):
    call = {"segment_ids": SEGMENTS, "comp_slot": SLOTS, "slots": 1, "mode": "concat", "recurrent": True,
            "positions": "cache", "ema": None}  # fmt: skip
    arguments = spoil(data, call)
    found = answer(layout, arguments, [*call, "comp_tokens"])
    if found is not None:
        assert isinstance(found, Layout) and found.position_ids.shape == arguments["segment_ids"].shape
        assert bool((found.position_ids >= 0).all()) and found.mask.dtype == torch.bool
