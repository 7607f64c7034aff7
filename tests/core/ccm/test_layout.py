import pytest
import torch
from dataopt.core.ccm import layout
from dataopt.core.ccm.layout import merge_weights
from hypothesis import given, settings
from hypothesis import strategies as st

from .reference import Row, marks, rows


def test_a_row_by_hand() -> None:
    # [p | a b C | c C | x y]
    segments = torch.tensor([[0, 1, 1, 1, 2, 2, 3, 3]])
    slots = torch.tensor([[-1, -1, -1, 0, -1, 0, -1, -1]])
    made = layout(segments, slots, 1)
    assert made.position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 3, 4]]  # prefix, memory of 0, 1, 2 slots, own tokens
    assert made.comp_index.tolist() == [[3, 5]]
    assert made.shift is not None and made.shift.tolist() == [[1 - 3, 2 - 3]]
    assert made.comp_rows.tolist() == [3, 5]
    mask = made.mask[0, 0].int().tolist()
    assert mask[0] == [0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    assert mask[3] == [0, 0, 1, 1, 1, 1, 0, 0, 0, 0]
    assert mask[4] == [1, 0, 1, 0, 0, 0, 1, 0, 0, 0]
    assert mask[7] == [1, 1, 1, 0, 0, 0, 0, 0, 1, 1]
    merge = layout(segments, slots, 1, mode="merge")
    assert merge.mask[0, 0, 7, :2].tolist() == [False, True]
    assert merge.position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 2, 3]]
    far = layout(segments, slots, 1, positions="abs")
    assert far.position_ids.tolist() == [[0, 1, 2, 3, 3, 4, 4, 5]] and far.shift is None
    apart = layout(segments, slots, 1, recurrent=False)
    assert not apart.mask[0, 0, 4, :2].any() and apart.mask[0, 0, 6, :2].all()


@given(rows(), st.integers(1, 3), st.sampled_from(["concat", "merge"]), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_folding_is_a_bijection_of_the_tokens(
    some: list[Row], slots: int, mode: str, recurrent: bool, left: bool
) -> None:
    segments, places = marks(some, slots, left)
    made = layout(segments, places, slots, mode=mode, recurrent=recurrent)
    folded = made.fold.flatten(1)
    assert made.first == int(segments[segments >= 0].min())
    for b in range(len(some)):
        tokens = [i for i in range(segments.shape[1]) if segments[b, i] >= 0]
        places = [int(made.unfold[b, i]) for i in tokens]
        assert folded[b, places].tolist() == tokens
        others = set(range(folded.shape[1])) - set(places)
        assert all(folded[b, i] == 0 for i in others) and len(set(places)) == len(tokens)
        # Empty places come last in their segment.
        for i in others:
            assert i % made.width == 0 or i - 1 in others or i - 1 in places
            assert i + 1 in others or (i + 1) % made.width == 0


@given(rows(), st.integers(1, 3), st.sampled_from(["concat", "merge"]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_positions_stay_within_memory_context_and_slots(
    some: list[Row], slots: int, mode: str, recurrent: bool
) -> None:
    segments, places = marks(some, slots)
    made = layout(segments, places, slots, mode=mode, recurrent=recurrent)
    for b, row in enumerate(some):
        contexts = sum(kind == "context" for kind, _ in row.pieces)
        memory = slots * (contexts if mode == "concat" else min(contexts, 1))
        prefix = sum(count for kind, count in row.pieces if kind == "prefix")
        longest = max(count + slots * (kind == "context") for kind, count in row.pieces)
        assert int(made.position_ids[b].max()) < max(prefix + memory + longest, longest)


@pytest.mark.parametrize("ema", [None, 0.3, 1.0])
def test_merge_weights_are_the_closed_form(ema: float | None) -> None:
    weights = merge_weights(9, ema)
    rate = [1.0] + [1 / t if ema is None else ema for t in range(2, 10)]
    for t in range(9):
        for j in range(9):
            product = 1.0
            for k in range(j + 1, t + 1):
                product *= 1 - rate[k]
            assert weights[t, j].item() == pytest.approx(rate[j] * product if j <= t else 0.0, abs=1e-14)
    if ema is None:
        assert torch.allclose(weights[8], torch.full((9,), 1 / 9, dtype=torch.float64), atol=1e-15)


@pytest.mark.parametrize(
    ("segments", "slots", "n", "says"),
    [
        ([2, 2, 1], [-1, -1, -1], 1, "descends"),
        ([1, -1, 1], [-1, -1, -1], 1, "between tokens"),
        ([-1, -1, -1], [-1, -1, -1], 1, "without any token"),
        ([1, 1, 1], [-1, 0, -1], 1, "end its segment"),
        ([1, 1, 1], [-1, 0, 0], 1, "in order"),
        ([1, 1, 1], [-1, 1, 0], 2, "in order"),
        ([1, 1, 1], [-1, -1, 0], 2, "in order"),
        ([1, 1, 1], [-1, 0, 1], 1, "slots count from 0"),
        ([1, 1, 2], [-1, 0, 0], 1, "COMP tokens only"),
        ([0, 0, 1], [-1, 0, -1], 1, "prefix or the padding"),
    ],
)
def test_torn_rows_are_refused(segments: list[int], slots: list[int], n: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        layout(torch.tensor([segments]), torch.tensor([slots]), n)


@pytest.mark.parametrize(
    "wrong", [{"mode": "sum"}, {"positions": "relative"}, {"ema": 0.0, "mode": "merge"}, {"ema": 0.5}, {"slots": 0}]
)
def test_bad_options_are_refused(wrong: dict[str, object]) -> None:
    options = {"slots": 1} | wrong
    with pytest.raises(ValueError, match=r"must (be|lie in)"):
        layout(torch.tensor([[1, 1]]), torch.tensor([[-1, 0]]), **options)  # type: ignore[arg-type]


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"must both be \(B, L\)"):
        layout(torch.zeros(1, 3), torch.zeros(1, 2), 1)
