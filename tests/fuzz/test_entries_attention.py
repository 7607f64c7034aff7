"""CCM's layer, memory, rotation and adapter, and attention over ragged pairs, on states that do not go together."""

import math

import pytest
import torch
from dataopt.core.ccm import (
    Rotation,
    add_lora_rows,
    concatenated,
    layout,
    memory_attention,
    merged,
    without_oldest,
)
from dataopt.core.kvzip import PackedHeads, merge, ragged_attention
from hypothesis import given
from hypothesis import strategies as st

from .budget import tries
from .spoiled import VALUES, answer, finite, spoil, vary

G = torch.Generator().manual_seed(0)
B, H, D = 2, 2, 6
FREQUENCIES = torch.tensor([1.0, 0.3, 0.05])
ROTATE = Rotation(FREQUENCIES)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=G)


def forms(t: torch.Tensor) -> list[torch.Tensor]:
    """Other forms of states that are as good."""
    mixed = t.transpose(-1, -2).contiguous().transpose(-1, -2)
    return [t.double(), t.to(torch.bfloat16), mixed, t.clone().requires_grad_(), t * 0]


def room(*tensors: torch.Tensor) -> float:
    """What rounding may cost."""
    return 0.05 if any(t.dtype in (torch.float16, torch.bfloat16) for t in tensors) else 1e-4


def usual(*tensors: torch.Tensor) -> bool:
    return all(finite(t) and (not t.numel() or float(t.detach().abs().max()) < 1e6) for t in tensors)


@tries(80)
@given(st.data())
def test_adapter(data):
    """COMP tokens get the update, the others keep every bit."""
    weight = randn(5, D)
    call = {"output": randn(B, 4, 5), "hidden": randn(B, 4, D), "rows": torch.tensor([1, 6]),
            "update": lambda rows: rows.float() @ weight.T, "in_place": True}  # fmt: skip
    updates = [lambda rows: 0, lambda rows: rows, lambda rows: randn(5), lambda rows: randn(7, 5)]
    others = {"output": forms(call["output"]), "hidden": forms(call["hidden"]), "in_place": [False],
              "rows": [torch.tensor([7]), torch.zeros(0, dtype=torch.long), torch.tensor([0, 1], dtype=torch.int32)],
              "update": [call["update"], *updates]}  # fmt: skip
    given_ = vary(data, call, others)
    output, hidden, rows = given_["output"], given_["hidden"], given_["rows"]
    before = output.detach().clone() if isinstance(output, torch.Tensor) else output
    both = isinstance(output, torch.Tensor) and isinstance(hidden, torch.Tensor)
    if both and hidden.ndim and hidden.shape[-1] != D and hidden.shape[:-1] == output.shape[:-1]:
        return  # the error of the adapter itself, which is given
    out = answer(add_lora_rows, given_)
    if out is not None:
        assert out.shape == before.shape and out.dtype == before.dtype
        expected = before.flatten(0, -2).double()
        for row in rows.tolist():
            expected[row] += hidden.flatten(0, -2)[row].double() @ weight.double().T
        if usual(before, hidden):
            torch.testing.assert_close(out.flatten(0, -2).double(), expected, atol=room(before, hidden), rtol=0.02)
        untouched = [i for i in range(len(expected)) if i not in rows.tolist()]
        assert torch.equal(out.flatten(0, -2)[untouched].nan_to_num(), before.flatten(0, -2)[untouched].nan_to_num())


@tries(120)
@given(st.data())
def test_rotation(data):
    """Pairs of dimensions turn, by hand; the others stay."""
    settings = {"frequencies": FREQUENCIES, "interleaved": False}
    frequencies = [FREQUENCIES[:2], FREQUENCIES.double(), FREQUENCIES.half()]
    chosen = vary(data, settings, {"frequencies": frequencies, "interleaved": [True]})
    rotate = answer(Rotation, chosen)
    if rotate is None:
        return
    shift = torch.tensor([3, -2, 0, 100])
    call = {"keys": randn(B, H, 4, D), "shift": shift}
    shifts = [shift.expand(1, 4), torch.stack([shift, -shift]), shift.int(), shift[:1]]
    given_ = vary(data, call, {"keys": forms(call["keys"]), "shift": shifts})
    out = answer(rotate, given_, [*call, "frequencies"])
    if out is not None:
        keys = given_["keys"]
        assert out.shape == keys.shape and out.dtype == keys.dtype
        by = given_["shift"].expand(len(keys), keys.shape[2]).tolist()
        half = len(rotate.frequencies)
        for i, frequency in enumerate(rotate.frequencies.tolist()):
            a, b = (2 * i, 2 * i + 1) if rotate.interleaved else (i, i + half)
            for row in range(len(keys)):
                for place in range(keys.shape[2]):
                    c, s = math.cos(by[row][place] * frequency), math.sin(by[row][place] * frequency)
                    x, y = keys[row, :, place, a].double(), keys[row, :, place, b].double()
                    if usual(keys):
                        off = (out[row, :, place, a].double() - (c * x - s * y)).abs().max()
                        off = torch.maximum(off, (out[row, :, place, b].double() - (c * y + s * x)).abs().max())
                        assert float(off) <= room(keys) * (1 + float(keys.abs().max()))
        assert torch.equal(out[..., 2 * half :].nan_to_num(), keys[..., 2 * half :].nan_to_num())


@tries(120)
@given(st.data())
def test_memory_of_steps(data):
    """The average of the contexts so far, and one after the other."""
    call = {"memory": randn(B, H, 3, D), "new": randn(B, H, 3, D), "step": torch.tensor([1, 4]), "ema": None}
    others = {"memory": forms(call["memory"]), "new": forms(call["new"]), "ema": [0.5, 1],
              "step": [torch.tensor([2, 3], dtype=torch.int32), torch.tensor([10**6, 1])]}  # fmt: skip
    given_ = vary(data, call, others)
    out = answer(merged, given_)
    if out is not None:
        memory, new, ema = given_["memory"], given_["new"], given_["ema"]
        assert out.shape == memory.shape and out.dtype == memory.dtype
        for row, t in enumerate(given_["step"].tolist()):
            a = 1 if t == 1 else 1 / t if ema is None else ema
            if usual(memory, new):
                expected = (1 - a) * memory[row].double() + a * new[row].double()
                torch.testing.assert_close(out[row].double(), expected, atol=room(memory, new), rtol=0.02)
            assert t != 1 or finite(out[row]) or not usual(new)  # what was there before does not matter
    pair = vary(data, {"memory": randn(B, H, 3, D), "new": randn(B, H, 1, D)}, {"memory": forms(call["memory"])})
    joined = answer(concatenated, pair)
    if joined is not None:
        memory, new = pair["memory"], pair["new"]
        assert joined.dtype == memory.dtype and joined.shape[2] == memory.shape[2] + new.shape[2]
        assert torch.equal(joined[:, :, : memory.shape[2]].nan_to_num(), memory.nan_to_num())


@tries(100)
@given(st.data())
def test_oldest_slots_leave(data):
    keys = randn(B, H, 5, D)
    call = {"keys": keys, "values": randn(B, H, 5, 3), "drop": 2, "rotate": ROTATE}
    given_ = vary(data, call, {"keys": forms(keys), "drop": [0, 1, 5], "rotate": [None]})
    found = answer(without_oldest, given_)
    if found is not None:
        drop, rotate = given_["drop"], given_["rotate"]
        assert torch.equal(found[1].nan_to_num(), given_["values"][:, :, drop:].nan_to_num())
        rest = given_["keys"][:, :, drop:]
        assert found[0].shape == rest.shape and found[0].dtype == rest.dtype
        if rotate is not None and rest.numel() and drop:  # what nothing leaves stays as it is
            rest = rotate(rest, torch.full((rest.shape[2],), -drop))
        assert torch.equal(found[0].nan_to_num(), rest.nan_to_num())


SEGMENTS = torch.tensor([[0, 1, 1, 1, 2, 2, 2, 3, 3], [1, 1, 1, 2, 2, 3, 3, -1, -1]])
SLOTS = torch.tensor([[-1, -1, -1, 0, -1, -1, 0, -1, -1], [-1, -1, 0, -1, 0, -1, -1, -1, -1]])
ROWS = {mode: layout(SEGMENTS, SLOTS, 1, mode=mode) for mode in ("concat", "merge")}


def in_full(q, k, v, rows, rotate, scale) -> torch.Tensor:
    """One matrix over the memory and the row, a head at a time, in float64."""
    b, heads, length, _ = q.shape
    memory = []
    for states, turns in ((k, rotate is not None), (v, False)):
        columns = torch.stack([states[i][:, rows.comp_index[i]] for i in range(b)]).double()
        columns = rotate(columns, rows.shift) if turns else columns
        memory.append(columns if rows.weights is None else torch.einsum("tj,bhjd->bhtd", rows.weights, columns))
    keys, values = torch.cat([memory[0], k.double()], 2), torch.cat([memory[1], v.double()], 2)
    out = torch.zeros(b, heads, length, v.shape[3], dtype=torch.float64)
    for h in range(heads):
        g = h // (heads // k.shape[1])
        scores = (q[:, h].double() @ keys[:, g].mT * scale).masked_fill(~rows.mask[:, 0], -torch.inf)
        out[:, h] = scores.softmax(-1) @ values[:, g]
    return out


@tries(120)
@given(st.data())
def test_memory_attention(data):
    length = SEGMENTS.shape[1]
    call = {"query": randn(B, 2 * H, length, D), "key": randn(B, H, length, D), "value": randn(B, H, length, 4),
            "layout": ROWS["concat"], "rotate": ROTATE, "scale": 0.4, "dropout": 0.0,
            "implementation": "sdpa"}  # fmt: skip
    others = {"layout": [ROWS["merge"], SEGMENTS], "rotate": [None], "implementation": ["eager"],
              "query": [call["query"][:, :3], call["query"].clone().requires_grad_()], "scale": [0, -1],
              "value": [call["value"].mT.contiguous().mT, randn(B, H, length, D)]}  # fmt: skip
    given_ = vary(data, call, others)
    if data.draw(st.booleans(), "double"):
        given_ |= {n: t.double() for n in ("query", "key", "value") if isinstance(t := given_[n], torch.Tensor)}
    out = answer(memory_attention, given_)
    if out is not None:
        q, k, v, rows = (given_[name] for name in ("query", "key", "value", "layout"))
        assert out.shape == (*q.shape[:3], v.shape[3]) and out.dtype == q.dtype
        if usual(q, k, v) and abs(given_["scale"]) < 100 and not given_["dropout"]:
            expected = in_full(q, k, v, rows, given_["rotate"], given_["scale"])
            real = (SEGMENTS >= 0)[:, None, :, None]
            assert float(((out.double() - expected) * real).abs().max()) <= room(q) * (1 + float(v.abs().max()))


KEYS, PAIRS = randn(H, 5, D), randn(H, 5, D)
KEEP = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 0, 0]]).bool()
PACKED = PackedHeads.pack(KEYS, PAIRS, KEEP)
EVEN = PackedHeads.pack(KEYS, PAIRS, torch.ones(H, 5, dtype=torch.bool))
EMPTY = PackedHeads.pack(KEYS, PAIRS, torch.zeros(H, 5, dtype=torch.bool))
CODED = PACKED.quantise(8, 3)
OTHERS = [
    PackedHeads.pack(KEYS[:1], PAIRS[:1], KEEP[:1]), PackedHeads.pack(KEYS[..., :4], PAIRS, KEEP),
    PackedHeads.pack(KEYS, PAIRS[..., :4], KEEP), PackedHeads.pack(KEYS.double(), PAIRS.double(), KEEP),
]  # fmt: skip


def one_by_one(q, context, k, v, scale, mask, softcap, sink) -> torch.Tensor:
    """(Q, dv) of one row and query head, over the pairs of its key head."""
    scores = torch.cat([q @ context[0].T, q @ k.T], 1).double() * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    n, tail = len(q), len(k)
    seen = torch.ones(n, tail, dtype=torch.bool).tril(tail - n) if mask is None else mask.expand(n, tail)
    seen = torch.cat([torch.ones(n, len(context[0]), dtype=torch.bool), seen], 1)
    weights = scores.masked_fill(~seen, -torch.inf).exp()
    total = weights.sum(1, keepdim=True) + (0 if sink is None else math.exp(sink))
    return (weights / total).nan_to_num(0) @ torch.cat([context[1], v]).double()


@tries(160)
@given(st.data())
def test_ragged_attention(data):
    call = {"q": randn(2, 2 * H, 2, D) / 2, "contexts": [PACKED], "k": randn(2, H, 3, D), "v": randn(2, H, 3, D),
            "scale": 0.4, "mask": None, "softcap": None, "sinks": None}  # fmt: skip
    mask = torch.tensor([True, False, True]).view(1, 1, 1, 3)
    contexts = [[EVEN], [PACKED, EVEN], [EMPTY], [CODED], (PACKED, PACKED), [PACKED] * 3, [], [None], PACKED, None]
    others = {"contexts": [*contexts, *([c] for c in OTHERS)], "mask": [mask, mask.float().log()], "softcap": [2.0],
              "sinks": [torch.tensor([0.0, 1, -1, 0.5]), torch.full((4,), -torch.inf), torch.zeros(3)],
              "q": [randn(2, 2 * H, 1, D), randn(2, 3, 2, D)], "scale": [-0.4, 0]}  # fmt: skip
    given_ = vary(data, call, others)
    found = answer(ragged_attention, given_)
    if found is None:
        return
    q, k, v, sinks = (given_[n] for n in ("q", "k", "v", "sinks"))
    out, lse = found
    assert out.shape == (*q.shape[:3], v.shape[3]) and out.dtype == q.dtype and lse.shape == q.shape[:3]
    if not usual(q, k, v) or (given_["softcap"] or 1) < 1e-6 or abs(given_["scale"]) > 10:
        return
    mask = given_["mask"]
    if mask is not None and (mask.dtype != torch.bool and not bool(((mask == 0) | (mask == -torch.inf)).all())):
        return
    if sinks is not None and not bool((sinks < 100).all()):
        return
    every = len(q) // len(given_["contexts"])
    for b in range(len(q)):
        context = list(given_["contexts"][b // every].heads(q.dtype))
        for h in range(q.shape[1]):
            g = h // (q.shape[1] // k.shape[1])
            seen = None if mask is None else (mask if mask.dtype == torch.bool else mask == 0)
            seen = None if seen is None else seen.expand(*q.shape[:3], k.shape[2])[b, h]
            pairs = (q[b, h], context[g], k[b, g], v[b, g], given_["scale"], seen, given_["softcap"])
            expected = one_by_one(*pairs, None if sinks is None else float(sinks[h]))
            assert float((out[b, h].double() - expected).abs().max()) <= room(q) * (1 + float(v.abs().max()))


@tries(80)
@given(st.data())
def test_merged_parts(data):
    """Two parts are what the sum of their exponentials says."""
    parts = {"first": (randn(2, 3, D), randn(2, 3)), "second": (randn(2, 3, D), randn(2, 3))}
    for name in parts:
        if data.draw(st.booleans(), f"spoil {name}"):
            both = spoil(data, dict(zip(("out", "lse"), parts[name], strict=True)))
            whole = (both["out"], both["lse"])
            parts[name] = data.draw(st.sampled_from([whole, whole, whole, whole[:1], (*whole, 1), *VALUES]), name)
    empty = data.draw(st.sampled_from([None, "first", "second"]), "empty")
    if empty:
        parts[empty] = (torch.zeros(2, 3, D), torch.full((2, 3), -torch.inf))
    found = answer(merge, parts)
    if found is not None:
        (a, la), (b, lb) = parts["first"], parts["second"]
        assert found[0].dtype == a.dtype and found[0].shape == a.shape and found[1].shape == la.shape
        sizes = [t.float().clamp_min(-1e5) for t in (la, lb)]
        if usual(a, b) and usual(*sizes) and float(torch.cat(sizes).max()) < 80:
            wa, wb = la.double().exp().unsqueeze(-1), lb.double().exp().unsqueeze(-1)
            expected = torch.where(wa + wb > 0, (wa * a.double() + wb * b.double()) / (wa + wb), a.double())
            if float((wa + wb).min()) > 0:
                torch.testing.assert_close(found[0].double(), expected, atol=room(a, b), rtol=0.02)


@tries(60)
@given(st.data())
def test_packed_heads_as_given(data):
    """Lengths that are not those of the pairs are refused, when made and when joined."""
    call = {"keys": PACKED.keys, "values": PACKED.values, "lengths": PACKED.lengths, "prefix": 0, "scores": None}
    others = {"lengths": [(1, 1), (4,), [3, 1], (5, -1), (2, 2)], "prefix": [1, 2], "scores": [torch.zeros(4)],
              "keys": [CODED.keys, PACKED.keys.half()]}  # fmt: skip
    packed = answer(PackedHeads, vary(data, call, others))
    if packed is not None:
        assert sum(packed.lengths) == len(packed.keys) == len(packed.values)
        assert [len(k) for k, _ in packed.heads(torch.float32)] == list(packed.lengths)
        assert packed.prefix_pairs(torch.float32)[0].shape[:2] == (len(packed.lengths), packed.prefix)
    other = data.draw(st.sampled_from([PACKED, EVEN, EMPTY, CODED, *OTHERS, *VALUES]), "other")
    joined = answer(PACKED.append, {"other": other}, ["other", "bits"])
    if joined is not None:
        assert joined.lengths == tuple(a + b for a, b in zip(PACKED.lengths, other.lengths, strict=True))
        heads = (p.heads(torch.float32) for p in (joined, PACKED, other))
        for (k, _), (first, _), (second, _) in zip(*heads, strict=True):
            assert torch.equal(k, torch.cat([first, second]))
    with pytest.raises(ValueError, match="prefix"):
        PackedHeads.pack(KEYS, PAIRS, KEEP, prefix=2)
