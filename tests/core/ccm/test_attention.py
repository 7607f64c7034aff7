import pytest
import torch
from dataopt.core.ccm import Rotation, layout, memory_attention
from dataopt.core.ccm import attention as module
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from .reference import Row, attend, marks, rows

FREQUENCIES = torch.tensor([1.0, 0.3, 0.05], dtype=torch.float64)


def rotated(states: Tensor, positions: Tensor) -> Tensor:
    return Rotation(FREQUENCIES)(states, positions)


def by_loops(some: list[Row], slots: int, states: tuple[Tensor, Tensor, Tensor], **options: object) -> Tensor:
    """(B, Hq, L, d), a head at a time; key heads serve several query heads."""
    query, key, value = states
    groups = query.shape[1] // key.shape[1]
    out = torch.zeros(*query.shape[:3], value.shape[3], dtype=value.dtype)
    for b, row in enumerate(some):
        for h in range(query.shape[1]):
            one = (query[b, h], key[b, h // groups], value[b, h // groups])
            out[b, h] = attend(row, slots, *one, FREQUENCIES, 0.4, **options)[0]  # type: ignore[arg-type]
    return out


def states(batch: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, 4, length, 6, dtype=torch.float64, generator=draw)
    k, v = (torch.randn(batch, 2, length, 6, dtype=torch.float64, generator=draw) for _ in range(2))
    return q, k, v


@given(
    rows(), st.integers(1, 3), st.sampled_from(["concat", "merge"]), st.booleans(), st.sampled_from(["cache", "abs"]),
    st.sampled_from([None, 0.4]), st.booleans(), st.booleans(), st.sampled_from(["sdpa", "eager", "flex"]),
)  # fmt: skip
@settings(max_examples=120, deadline=None)
def test_equals_the_recursion_in_loops(
    some: list[Row], slots: int, mode: str, recurrent: bool, positions: str, ema: float | None, left: bool, fold: bool,
    implementation: str,
) -> None:  # fmt: skip
    ema = ema if mode == "merge" else None
    options = {"mode": mode, "recurrent": recurrent, "positions": positions, "ema": ema}
    segments, places = marks(some, slots, left)
    made = layout(segments, places, slots, **options)  # type: ignore[arg-type]
    for b, row in enumerate(some):
        q = torch.zeros(segments.shape[1], 6, dtype=torch.float64)
        assert attend(row, slots, q, q, q, FREQUENCIES, 1.0, **options)[1] == made.position_ids[b].tolist()  # type: ignore[arg-type]
    q, k, v = states(*segments.shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "pays_to_fold", lambda layout: fold)
        rotate = Rotation(FREQUENCIES) if positions == "cache" else None
        turned = (rotated(q, made.position_ids), rotated(k, made.position_ids))
        out = memory_attention(*turned, v, made, rotate, 0.4, implementation=implementation)
    expected = by_loops(some, slots, (q, k, v), **options)
    real = (segments >= 0)[:, None, :, None]
    assert ((out - expected) * real).abs().max() < 1e-12


def test_gradients_are_those_of_the_dense_mask() -> None:
    some = [Row([("prefix", 1), ("context", 5), ("context", 3), ("query", 4)]), Row([("context", 7), ("query", 2)])]
    segments, places = marks(some, 2)
    made = layout(segments, places, 2, mode="merge")
    inputs = [t.requires_grad_() for t in states(*segments.shape)]
    weight = (segments >= 0)[:, None, :, None].double()
    gradients = []
    for fold in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "pays_to_fold", lambda layout, fold=fold: fold)
            out = memory_attention(*inputs, made, Rotation(FREQUENCIES), 0.4)
        gradients.append(torch.autograd.grad((out * weight).square().sum(), inputs))
    for one, other in zip(*gradients, strict=True):
        assert (one - other).abs().max() < 1e-12
        assert one.abs().max() > 0.1


def test_long_rows_are_folded_and_one_long_segment_is_not() -> None:
    chat = marks([Row([("context", 30)] * 16 + [("query", 30)])], 2)
    assert module.pays_to_fold(layout(*chat, 2))
    document = marks([Row([("context", 2)] * 16 + [("query", 600)])], 2)
    assert not module.pays_to_fold(layout(*document, 2))


def test_a_dropped_memory_column_is_noticed() -> None:
    segments, places = marks([Row([("context", 4), ("context", 4), ("query", 3)])], 1)
    made = layout(segments, places, 1)
    q, k, v = states(*segments.shape)
    out = memory_attention(q, k, v, made, Rotation(FREQUENCIES), 0.4)
    v[:, :, made.comp_index[0, 0]] += 1
    changed = memory_attention(q, k, v, made, Rotation(FREQUENCIES), 0.4)
    assert (changed - out)[:, :, -1].abs().max() > 1e-2


def test_half_precision_averages_in_float32() -> None:
    segments, places = marks([Row([("context", 1)] * 40 + [("query", 1)])], 1)
    made = layout(segments, places, 1, mode="merge", positions="abs")
    key = torch.full((1, 1, segments.shape[1], 2), 1.0, dtype=torch.bfloat16)
    keys, _ = module.memory_columns(key, key, made, None)
    assert (keys == 1).all()  # a running sum of 1 / 40 in bfloat16 is not 1
