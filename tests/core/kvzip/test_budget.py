"""Exact counts, fixed ties, nested ratios."""

import pytest
import torch
from dataopt.core.kvzip import head_selection, pair_selection, recent_window
from dataopt.core.kvzip.budget import BUDGETS, highest
from hypothesis import given, settings
from hypothesis import strategies as st

problems = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**20),
        "layers": st.integers(1, 4),
        "heads": st.integers(1, 4),
        "n": st.integers(1, 20),
        "levels": st.sampled_from([1, 3, 1000]),  # how many different scores there are
    }
)


def random_scores(seed, layers, heads, n, levels):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(levels, (heads * n,), generator=g).float() for _ in range(layers)]


def count_per(chosen, budget, n):
    """Pairs kept: of all layers, of each layer, or of each head."""
    parts = {"global": [torch.cat(chosen)], "layer": chosen, "uniform": [h for c in chosen for h in c.split(n)]}
    return [int(part.sum()) for part in parts[budget]]


@settings(max_examples=150, deadline=None)
@given(problem=problems, ratio=st.floats(0.01, 1), budget=st.sampled_from(BUDGETS))
def test_counts_are_exact_and_the_highest_stay(problem, ratio, budget):
    scores, n, heads = random_scores(**problem), problem["n"], problem["heads"]
    counts = [[n] * heads] * len(scores)
    chosen = pair_selection(scores, counts, n, ratio, budget)
    members = {"global": heads * len(scores), "layer": heads, "uniform": 1}[budget]
    assert set(count_per(chosen, budget, n)) == {round(ratio * n * members)}
    groups = {
        "global": [(torch.cat(scores), torch.cat(chosen))],
        "layer": list(zip(scores, chosen, strict=True)),
        "uniform": [p for s, c in zip(scores, chosen, strict=True) for p in zip(s.split(n), c.split(n), strict=True)],
    }[budget]
    for s, c in groups:
        if c.any() and not c.all():
            assert s[c].min() >= s[~c].max()


@settings(max_examples=100, deadline=None)
@given(problem=problems, ratios=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)), budget=st.sampled_from(BUDGETS))
def test_a_smaller_ratio_keeps_a_subset(problem, ratios, budget):
    scores, n = random_scores(**problem), problem["n"]
    counts = [[n] * problem["heads"]] * len(scores)
    few, many = (pair_selection(scores, counts, n, r, budget) for r in sorted(ratios))
    assert all((a <= b).all() for a, b in zip(few, many, strict=True))
    # Choosing again among those that are left, with the count of the whole, is the same as choosing at once.
    left = [s[m] for s, m in zip(scores, many, strict=True)]
    left_counts = [[int(h.sum()) for h in m.split(n)] for m in many]
    again = pair_selection(left, left_counts, n, min(ratios), budget)
    for f, m, a in zip(few, many, again, strict=True):
        assert torch.equal(f[m], a)


@settings(max_examples=100, deadline=None)
@given(values=st.lists(st.integers(0, 3), min_size=1, max_size=30), count=st.integers(-1, 31))
def test_among_equal_scores_the_first_stay(values, count):
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))[: max(count, 0)]
    expected = torch.zeros(len(values), dtype=torch.bool)
    expected[order] = True
    assert torch.equal(highest(torch.tensor(values).float(), count), expected)


def test_ties_go_by_layer_head_and_position():
    chosen = pair_selection([torch.zeros(6), torch.zeros(6)], [[3, 3], [3, 3]], 3, 4 / 12)
    assert chosen[0].tolist() == [True] * 4 + [False] * 2 and not chosen[1].any()


def test_infinite_scores():
    scores = torch.tensor([torch.inf, -torch.inf, 0.0, -torch.inf, torch.inf])
    assert highest(scores, 4).tolist() == [True, True, True, False, True]


def test_where_fewer_pairs_are_left_than_wanted_all_stay():
    """One head lost pairs before; its share is not given to the others."""
    chosen = pair_selection([torch.arange(7.0)], [[2, 5]], 5, 0.6, "uniform")
    assert chosen[0].tolist() == [True, True, False, False, True, True, True]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**20), layers=st.integers(1, 5), heads=st.integers(1, 5), ratio=st.floats(0.01, 1))
def test_heads(seed, layers, heads, ratio):
    scores = torch.rand(layers, heads, generator=torch.Generator().manual_seed(seed))
    chosen = head_selection(scores, ratio)
    assert chosen.shape == (layers, heads) and int(chosen.sum()) == round(ratio * layers * heads)
    if chosen.any() and not chosen.all():
        assert scores[chosen].min() >= scores[~chosen].max()


def test_recent_window():
    assert recent_window(5, 2).tolist() == [False, False, False, True, True]
    assert not recent_window(5, 0).any() and recent_window(5, 9).all()


@pytest.mark.parametrize("ratio", [0, -0.1, 1.1, float("nan"), True, "0.3", None])
def test_ratios_outside_are_refused(ratio):
    for choose in (
        lambda: pair_selection([torch.zeros(3)], [[3]], 3, ratio),
        lambda: head_selection(torch.zeros(2, 2), ratio),
    ):
        with pytest.raises(ValueError, match=r"ratio=.* must be above 0 and at most 1"):
            choose()


def test_an_unknown_budget_is_refused():
    with pytest.raises(ValueError, match="budget='heads' must be one of 'global', 'layer', 'uniform'"):
        pair_selection([torch.zeros(3)], [[3]], 3, 0.5, "heads")
