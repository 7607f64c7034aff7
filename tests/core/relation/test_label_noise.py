"""Algorithm 4 in its three forms."""

import warnings

import numpy as np
import pytest
import torch
from dataopt.core.relation import RelationGraph
from dataopt.core.relation.label_noise import MOST, Cut, by_sets, by_single_moves
from hypothesis import given, settings
from hypothesis import strategies as st

from . import reference
from .reference import algorithm_4, edges, kernel_matrix, objective, problem


def from_matrix(w: torch.Tensor) -> Cut:
    """The search's view of a written-out graph."""
    m = w.double().numpy()
    return Cut(m.sum(1), lambda rows: m[:, rows].sum(1), lambda rows: m[rows])


@pytest.mark.parametrize("t", [1, 2, 4, 6, 8, 2.5])
@pytest.mark.parametrize("corrections", [0, 1, 3])
def test_scores_are_those_of_the_printed_algorithm(t, corrections):
    f, p, y = problem()
    w = edges(kernel_matrix(f, p, t=t, cut=0), y)
    first = w.sum(1)
    threshold = 0.05 * float(first.abs().max())
    s, noisy = algorithm_4(w, threshold, corrections)
    for block in (7, 64, 400):
        graph = RelationGraph(f, p, y, temperature=t, edge_cut=0, block=block, dtype=torch.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for given_threshold in (None, threshold):
                found = graph.label_noise(given_threshold, max_iter=corrections)
                torch.testing.assert_close(found.noisiness, s, rtol=0, atol=1e-10)
                assert torch.equal(found.noisy, noisy) and 5 < noisy.sum() < 100
                assert found.threshold == pytest.approx(threshold, abs=1e-10)
    found = RelationGraph(f, p, y, temperature=t, edge_cut=0).label_noise(max_iter=corrections)
    torch.testing.assert_close(found.noisiness, s, rtol=0, atol=1e-6 * float(s.abs().max()))
    assert torch.equal(found.noisy, noisy)


@pytest.mark.parametrize("kernel", ["cosine", "rbf"])
@pytest.mark.parametrize("compatible", [True, False])
@pytest.mark.parametrize("cut", [0, 0.03])
def test_every_kernel(kernel, compatible, cut):
    f, p, y = problem(seed=1)
    w = edges(kernel_matrix(f, p, kernel, compatible, cut=cut), y)
    s, noisy = algorithm_4(w, 0.3, 1)
    graph = RelationGraph(f, p, y, kernel=kernel, compatibility=compatible, edge_cut=cut, block=64, dtype=torch.float64)
    found = graph.label_noise(threshold=0.3)
    torch.testing.assert_close(found.noisiness, s, rtol=0, atol=1e-10)
    assert torch.equal(found.noisy, noisy) and noisy.any()


@pytest.mark.parametrize("t", [1, 4])
@pytest.mark.parametrize("iterations", [1, 2, 4])
def test_released_mode_is_the_authors_arithmetic(t, iterations):
    f, p, y = problem(seed=2, flips=0.15)
    score, noisy = reference.released(f, p, y, t=t, iterations=iterations)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-6 * float(score.abs().max()))):
        graph = RelationGraph(f, p, y, temperature=t, dtype=dtype)
        found = graph.label_noise(mode="released", max_iter=iterations - 1)
        torch.testing.assert_close(found.noisiness, -score, rtol=0, atol=tolerance)
        assert torch.equal(found.noisy, noisy) and noisy.any()
    if iterations == 2:
        assert torch.equal(graph.label_noise(mode="released").noisiness, found.noisiness)  # the default
        thesis = graph.label_noise()
        assert not torch.allclose(thesis.noisiness, found.noisiness, atol=1e-3)  # the diagonal counts
    share = reference.released(f, p, y, t=t, iterations=iterations, share=0.2)
    found = graph.label_noise(0.2, mode="released", max_iter=iterations - 1)
    assert torch.equal(found.noisy, share[1]) and found.threshold == 0.2


@st.composite
def graphs(draw):
    """Signed graphs of every density and size, and a threshold."""
    n, seed = draw(st.integers(2, 40)), draw(st.integers(0, 2**31))
    density, shift = draw(st.floats(0.05, 1)), draw(st.floats(-0.5, 0.5))
    g = torch.Generator().manual_seed(seed)
    w = torch.rand(n, n, generator=g, dtype=torch.float64) - 0.5 + shift
    w = torch.where(torch.rand(n, n, generator=g) < density, w, 0.0).triu(1)
    return w + w.T, draw(st.floats(0, 2))


class Row:
    """The edges of one row, which notes when the search uses them: that is a move."""

    __array_ufunc__ = None

    def __init__(self, edges, note):
        self.edges, self.note = edges, note

    def __rmul__(self, factor):
        self.note()
        return factor * self.edges


@settings(max_examples=50, deadline=None)
@given(graphs())
def test_single_moves_never_lower_the_objective_and_end_in_a_local_optimum(graph):
    w, threshold = graph
    cut = from_matrix(w)
    moves: list[int] = []

    def watched(rows):
        return [Row(w[int(row)].numpy(), lambda row=int(row): moves.append(row)) for row in rows]

    scores, noisy = by_single_moves(Cut(cut.first, cut.to_set, watched), threshold)
    member = torch.zeros(len(w), dtype=torch.bool)
    value = 0.0  # of the empty set
    for row in moves:
        member[row] = ~member[row]
        before, value = value, objective(w, member, threshold)
        assert value > before
    assert torch.equal(member, torch.from_numpy(noisy))
    np.testing.assert_allclose(scores, w.sum(1) - 2 * w[:, member].sum(1), atol=1e-9)
    for row in range(len(w)):  # no single move helps
        moved = member.clone()
        moved[row] = ~moved[row]
        assert objective(w, moved, threshold) <= value + 1e-7
    assert bool(moves) == bool((w.sum(1) - threshold > 1e-9 * max(1, float(w.sum(1).abs().max()))).any())


def test_single_moves_on_a_data_set_agree_with_the_whole_matrix():
    f, p, y = problem(seed=3, flips=0.15)
    w = edges(kernel_matrix(f, p), y)
    graph = RelationGraph(f, p, y, dtype=torch.float64)
    found = graph.label_noise(update="single")
    torch.testing.assert_close(found.noisiness, w.sum(1) - 2 * w[:, found.noisy].sum(1), rtol=0, atol=1e-9)
    side = torch.where(found.noisy, -1.0, 1.0)
    assert (side * (found.noisiness - found.threshold)).max() <= 1e-7
    best_by_sets = graph.label_noise(max_iter=None)
    assert objective(w, found.noisy, found.threshold) >= objective(w, best_by_sets.noisy, found.threshold) - 1e-9
    single = RelationGraph(f, p, y).label_noise(update="single")
    assert torch.equal(single.noisy, found.noisy)


def test_single_moves_in_several_rounds():
    """More moves than one round holds."""
    g = torch.Generator().manual_seed(0)
    w = (torch.rand(900, 900, generator=g, dtype=torch.float64) - 0.48).triu(1)
    w = w + w.T
    asked = []
    cut = from_matrix(w)
    scores, noisy = by_single_moves(
        Cut(cut.first, cut.to_set, lambda rows: asked.append(len(rows)) or cut.edges(rows)), 0
    )
    assert len(asked) > 2 and max(asked) == 256
    side = np.where(noisy, -1, 1)
    assert (side * scores).max() < 1e-6
    assert objective(w, torch.from_numpy(noisy), 0) > 0


def jumping() -> torch.Tensor:
    """Two rows that conflict with each other more than with the rest, among many that mind nobody.

    Each alone is worth moving; both moved together gain nothing, and then each is worth moving back.
    """
    w = torch.zeros(20, 20, dtype=torch.float64)
    w[0, 1] = w[1, 0] = 4.0
    w[0, 2] = w[2, 0] = w[1, 3] = w[3, 1] = 1.0
    w[2, 4] = w[4, 2] = w[3, 5] = w[5, 3] = -3.0
    return w


def test_set_updates_that_go_in_a_circle_stop_with_the_best_set():
    w = jumping()
    sets = [algorithm_4(w, 0.5, count)[1] for count in range(4)]
    assert torch.equal(sets[0], sets[2]) and torch.equal(sets[1], sets[3]) and not torch.equal(sets[0], sets[1])
    values = [objective(w, noisy, 0.5) for noisy in sets[:2]]
    for max_iter in (2, 10, None):
        with pytest.warns(UserWarning, match=r"Algorithm 4 (came back|found a worse cut).*best set.*'single'"):
            scores, noisy = by_sets(from_matrix(w), 0.5, max_iter)
        assert torch.equal(torch.from_numpy(noisy), sets[int(np.argmax(values))])
        assert objective(w, torch.from_numpy(noisy), 0.5) == max(values)
        np.testing.assert_allclose(scores, w.sum(1) - 2 * w[:, noisy].sum(1))
    single = by_single_moves(from_matrix(w), 0.5)[1]
    assert objective(w, torch.from_numpy(single), 0.5) > max(values)


def two_cycle() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A data set with t = 1 on which sets jump: a small group of two labels, beside a large one that is clean.

    Ten rows point one way, five with each label; every row of them conflicts with five and agrees with four.
    """
    f = torch.zeros(100, 2)
    f[:90, 0], f[90:, 1] = 1, 1
    p = torch.zeros(100, 2)
    p[:90, 0], p[90:, 1] = 1, 1
    y = torch.zeros(100, dtype=torch.int64)
    y[90:95] = 1
    return f, p, y


def test_a_data_set_on_which_set_updates_jump():
    f, p, y = two_cycle()
    w = edges(kernel_matrix(f, p, t=1), y)
    assert w[90:].sum(1).tolist() == [1.0] * 10
    graph = RelationGraph(f, p, y, temperature=1, dtype=torch.float64)
    with pytest.warns(UserWarning, match="best set is returned"):
        found = graph.label_noise(threshold=0.5, max_iter=50)
    assert sorted(found.noisy.nonzero().squeeze(1).tolist()) in ([], list(range(90, 100)))
    best = max(objective(w, algorithm_4(w, 0.5, count)[1], 0.5) for count in range(3))
    assert objective(w, found.noisy, 0.5) == best
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        single = graph.label_noise(threshold=0.5, update="single", max_iter=50)
    assert objective(w, single.noisy, 0.5) > best


def test_set_updates_end_where_nothing_changes():
    f, p, y = problem(seed=4)
    w = edges(kernel_matrix(f, p), y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = RelationGraph(f, p, y, dtype=torch.float64).label_noise(max_iter=None)
    assert torch.equal(found.noisy, found.noisiness > found.threshold)
    torch.testing.assert_close(found.noisiness, w.sum(1) - 2 * w[:, found.noisy].sum(1), rtol=0, atol=1e-10)


def test_more_than_a_quarter_noisy_is_not_corrected():
    f, p, y = problem(seed=5, flips=0.75)
    graph = RelationGraph(f, p, y)
    plain = graph.label_noise(threshold=0, max_iter=0)
    assert plain.noisy.double().mean() > MOST
    for max_iter in (1, 5, None):
        with pytest.warns(UserWarning, match="of the labels .* more than a noisy set can hold"):
            found = graph.label_noise(threshold=0, max_iter=max_iter)
        assert torch.equal(found.noisiness, plain.noisiness) and torch.equal(found.noisy, plain.noisy)


def test_a_quarter_and_one_row_is_the_limit():
    """25 rows of 100 are corrected, 26 are not."""
    for count, corrected in ((25, True), (26, False)):
        w = torch.zeros(100, 100, dtype=torch.float64)
        for i in range(count):
            w[i, 99 - i] = w[99 - i, i] = 3.0  # a conflict
            w[99 - i, 50] += -9.0
            w[50, 99 - i] += -9.0
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scores, noisy = by_sets(from_matrix(w), 0.0, 1)
        assert noisy.sum() == count and bool(caught) != corrected
        assert np.array_equal(scores, w.sum(1).numpy()) != corrected


def test_suggested_labels_come_from_the_clean_rows():
    f, p, y = problem(seed=6, flips=0.1)
    k = kernel_matrix(f, p).fill_diagonal_(0)
    found = RelationGraph(f, p, y, dtype=torch.float64).label_noise()
    clean = (~found.noisy).double()
    sums = torch.stack([(k * clean * (y == c)).sum(1) for c in range(5)], 1)
    expected = torch.where(found.noisy & (sums.max(1).values > 0), sums.argmax(1), y)
    assert torch.equal(found.suggested, expected) and found.suggested.dtype == torch.int64
    assert (found.suggested != y).sum() >= 20
    assert torch.equal(found.given, y)


def test_suggested_labels_repair_flips():
    f, p, y = problem(n=600, d=24, seed=7, flips=0.0, sharp=6.0)
    wrong = torch.arange(0, 600, 15)
    noisy = y.clone()
    noisy[wrong] = (y[wrong] + 1) % 5
    found = RelationGraph(f, p, noisy).label_noise()
    assert found.noisy[wrong].double().mean() > 0.9
    assert (found.suggested == y).double().mean() > 0.98


def test_a_noisy_row_without_clean_company_keeps_its_label():
    f = torch.eye(4)[[0, 0, 1, 1, 2, 2, 3, 3, 3, 3]]
    p = torch.eye(2)[[0, 0, 0, 0, 1, 1, 1, 1, 1, 1]]
    y = torch.tensor([0, 1, 0, 0, 1, 1, 1, 1, 1, 1])  # rows 0 and 1 have but each other
    found = RelationGraph(f, p, y).label_noise(threshold=0.5, max_iter=0)
    assert found.noisy.nonzero().squeeze(1).tolist() == [0, 1]
    assert torch.equal(found.suggested, y)


def test_label_score_and_table():
    f, p, y = problem(seed=8)
    found = RelationGraph(f, p, y).label_noise()
    score = found.label_score
    assert score.dtype == torch.float64 and score.min() >= 0 and score.max() <= 1
    assert torch.equal(score.argsort(stable=True), (-found.noisiness).argsort(stable=True))  # low is bad
    assert score[found.noisy].max() < 0.5 < score.max()
    table = found.to_pandas()
    assert list(table.columns) == [
        "is_label_issue", "label_score", "given_label", "predicted_label", "relation_noisiness",
    ]  # fmt: skip
    assert [str(t) for t in table.dtypes] == ["bool", "float64", "int64", "int64", "float64"]
    assert table["is_label_issue"].sum() == found.noisy.sum()
    assert (table["relation_noisiness"].to_numpy() == found.noisiness.numpy()).all()


def test_no_edges_at_all():
    f, p, y = torch.eye(6), torch.full((6, 2), 0.5), torch.tensor([0, 1, 0, 1, 0, 1])
    for settings_of in ({}, {"update": "single"}, {"mode": "released"}):
        found = RelationGraph(f, p, y).label_noise(**settings_of)
        assert found.noisiness.isfinite().all() and not found.noisy.any()
        assert torch.equal(found.suggested, y)
        assert found.label_score.isfinite().all()


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"threshold": -0.1}, "threshold=-0.1 .* at least 0"),
        ({"threshold": float("nan")}, "threshold=nan"),
        ({"threshold": float("inf")}, "threshold=inf"),
        ({"update": "all"}, "update='all' must be one of 'set', 'single'"),
        ({"mode": "paper"}, "mode='paper' must be one of 'thesis', 'released'"),
        ({"max_iter": -1}, "max_iter=-1"),
        ({"max_iter": 1.5}, "max_iter=1.5"),
        ({"mode": "released", "update": "single"}, "mode='released' has update='set'"),
        ({"mode": "released", "max_iter": None}, "mode='released'"),
    ],
)
def test_settings_that_mean_nothing_are_refused_before_the_work(bad, words):
    graph = RelationGraph(*problem(n=40))
    with pytest.raises(ValueError, match=words):
        graph.label_noise(**bad)
    assert "sums" not in vars(graph)
