"""Edges, parts, explanations; and that order, storage and types of the inputs do not matter."""

import numpy as np
import pytest
import torch
from dataopt.core.relation import RelationGraph

from .reference import edges, kernel_matrix, problem


@pytest.fixture(scope="module")
def made():
    f, p, y = problem(n=120, seed=11, flips=0.15)
    return f, p, y, edges(kernel_matrix(f, p), y), RelationGraph(f, p, y, dtype=torch.float64)


@pytest.mark.parametrize("settings", [{}, {"kernel": "rbf"}, {"compatibility": False, "edge_cut": 0, "temperature": 2}])
def test_a_row_is_its_relations(settings):
    f, p, y = problem(n=80, seed=12)
    names = {"kernel": "similarity", "compatibility": "compatible", "temperature": "t", "edge_cut": "cut"}
    r = -edges(kernel_matrix(f, p, **{names[key]: value for key, value in settings.items()}), y)
    graph = RelationGraph(f, p, y, **settings)
    for i in (0, 41, 79):
        row = graph.row(i)
        assert row.shape == (80,) and row.dtype == torch.float32 and row[i] == 0
        torch.testing.assert_close(row.double(), r[i], rtol=0, atol=1e-6)
        exact = RelationGraph(f, p, y, **settings, dtype=torch.float64).row(i)
        torch.testing.assert_close(exact, r[i], rtol=0, atol=1e-12)


def test_relations_of_one_row(made):
    *_, w, graph = made
    for i in (0, 57, 119):
        r = -w[i]
        found = graph.relations(i, top=200)
        for index, values, mask in (
            (found.agreeing, found.agreeing_values, r > 0),
            (found.conflicting, found.conflicting_values, r < 0),
        ):
            assert index.ndim == 1 and index.dtype == torch.int64 and values.dtype == torch.float32
            assert sorted(index.tolist()) == mask.nonzero().squeeze(1).tolist()  # every edge, no other
            torch.testing.assert_close(values.double(), r[index], rtol=0, atol=1e-7)
            assert (values.abs().diff() <= 0).all()  # strongest first
        assert i not in found.agreeing and i not in found.conflicting
        few = graph.relations(i, top=3)
        assert torch.equal(few.agreeing, found.agreeing[:3]) and torch.equal(few.conflicting, found.conflicting[:3])


def test_relations_of_many_rows(made):
    *_, graph = made
    rows = [119, 3, 57, 3]
    for given in (rows, torch.tensor(rows), np.array(rows)):
        many = graph.relations(given, top=60)
        for at, i in enumerate(rows):
            one = graph.relations(i, top=60)
            for name in ("agreeing", "conflicting"):
                index, values = getattr(many, name)[at], getattr(many, f"{name}_values")[at]
                count = len(getattr(one, name))
                assert torch.equal(index[:count], getattr(one, name)) and (index[count:] == -1).all()
                torch.testing.assert_close(values[:count], getattr(one, f"{name}_values"), rtol=1e-6, atol=0)
                assert (values[count:] == 0).all()
    assert (many.conflicting == -1).any()  # some row has fewer
    assert graph.relations(rows, top=500).agreeing.shape == (4, 119)
    assert graph.relations([], top=5).agreeing.shape == (0, 5)


def test_one_row_may_be_any_integer(made):
    *_, graph = made
    expected = graph.relations(7)
    for i in (np.int64(7), torch.tensor(7)):
        assert torch.equal(graph.relations(i).agreeing, expected.agreeing)
        assert torch.equal(graph.row(i), graph.row(7))


def test_rows_that_are_not_there(made):
    *_, graph = made
    for rows in (120, -1, [3, 120]):
        with pytest.raises(IndexError, match="is not among the 120 rows"):
            graph.relations(rows)
    with pytest.raises(IndexError, match="row 120"):
        graph.row(120)
    with pytest.raises(ValueError, match="top=0"):
        graph.relations(0, top=0)


def test_class_sums(made):
    *_, y, w, graph = made
    k = w.abs()
    rows, without = torch.tensor([5, 0, 119, 60]), torch.tensor([1, 60, 80])
    kept = torch.ones(120, dtype=torch.float64)
    expected = torch.stack([(k * (y == c)).sum(1) for c in range(5)], 1)[rows]
    torch.testing.assert_close(graph.class_sums(rows), expected, rtol=0, atol=1e-10)
    kept[without] = 0
    expected = torch.stack([(k * kept * (y == c)).sum(1) for c in range(5)], 1)[rows]
    found = graph.class_sums(rows, without)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert found.dtype == torch.float64 and torch.equal(graph.suggest(rows, without), expected.argmax(1))


def test_a_row_of_many_chunks(monkeypatch, made):
    """Rows asked for in small pieces are the same rows."""
    *_, graph = made
    rows = torch.arange(120).flip(0)
    some = np.arange(0, 120, 3)
    whole, sums, (to_set, outside) = graph.relations(rows), graph.class_sums(rows), graph._to_set(some)
    monkeypatch.setattr("dataopt.core.relation.graph._EDGES", 250)
    for name, size in (("_FEW", 1), ("_MANY", 3), ("_ROWS", 7)):
        monkeypatch.setattr(f"dataopt.core.relation.pairs.{name}", size)
    pieces = graph.relations(rows)
    assert torch.equal(whole.agreeing, pieces.agreeing) and torch.equal(whole.conflicting, pieces.conflicting)
    torch.testing.assert_close(sums, graph.class_sums(rows), rtol=0, atol=1e-12)
    pieces_to_set, pieces_outside = graph._to_set(some)
    np.testing.assert_allclose(to_set, pieces_to_set, atol=1e-12)
    torch.testing.assert_close(outside, pieces_outside, rtol=0, atol=1e-12)
    members = graph.pairs.order[torch.from_numpy(some)]
    torch.testing.assert_close(outside, graph.class_sums(members, without=members), rtol=0, atol=1e-12)


@pytest.mark.parametrize("max_iter", [0, 1, None])
def test_suggestions_come_from_the_rows_outside_the_corrected_set(max_iter):
    """Rows that the last correction added to N, or took from it, get the suggestion that class_sums gives."""
    f, p, y = problem(n=150, seed=10)
    graph = RelationGraph(f, p, y, dtype=torch.float64)
    first = graph.label_noise(threshold=0.2, max_iter=0)
    found = graph.label_noise(threshold=0.2, max_iter=max_iter)
    before = first if max_iter is not None else found
    rows, without = (x.noisy.nonzero().squeeze(1) for x in (found, before))
    assert len(rows) and (max_iter != 1 or not torch.equal(rows, without))
    assert torch.equal(found.suggested[rows], graph.suggest(rows, without=without))
    kept = ~found.noisy
    assert torch.equal(found.suggested[kept], y[kept])


def test_parts_are_graphs_of_their_own():
    f, p, y = problem(n=301, seed=13)
    graph = RelationGraph(f, p, y, partitions=3, block=32, dtype=torch.float64)
    found = graph.label_noise(threshold=0.2)
    plain = graph.label_noise(max_iter=0)
    sizes = [stop - start for start, stop in graph.pairs.bounds]
    assert sorted(sizes) == [100, 100, 101]
    seen = []
    for start, stop in graph.pairs.bounds:
        rows = graph.pairs.order[start:stop].sort().values
        seen += rows.tolist()
        assert (torch.bincount(y[rows], minlength=5) - torch.bincount(y, minlength=5) / 3).abs().max() < 2
        alone = RelationGraph(f[rows], p[rows], y[rows], dtype=torch.float64)
        part = alone.label_noise(threshold=0.2)
        torch.testing.assert_close(found.noisiness[rows], part.noisiness, rtol=0, atol=1e-10)
        torch.testing.assert_close(plain.noisiness[rows], alone.label_noise(max_iter=0).noisiness, rtol=0, atol=1e-10)
        assert torch.equal(found.noisy[rows], part.noisy) and torch.equal(found.suggested[rows], part.suggested)
        i = 17
        row = graph.row(int(rows[i]))
        torch.testing.assert_close(row[rows], alone.row(i), rtol=0, atol=1e-12)
        row[rows] = 0
        assert (row == 0).all()  # no edges between parts
        conflicts = graph.relations(int(rows[i])).conflicting
        assert torch.equal(conflicts, rows[alone.relations(i).conflicting])
        torch.testing.assert_close(graph.outlier_scores()[rows], alone.outlier_scores(), rtol=1e-9, atol=0)
    assert sorted(seen) == list(range(301))
    assert found.noisy.any()
    single = graph.label_noise(threshold=0.2, update="single")
    assert torch.equal(single.noisy, found.noisy)
    one = RelationGraph(f, p, y, partitions=1, dtype=torch.float64)
    whole = RelationGraph(f, p, y, dtype=torch.float64)
    assert torch.equal(one.label_noise().noisiness, whole.label_noise().noisiness)


def test_parts_are_drawn():
    f, p, y = problem(n=60, seed=14)

    def parts(generator=None):
        graph = RelationGraph(f, p, y, partitions=2, generator=generator)
        return set(graph.pairs.order[:30].tolist())

    assert parts() == parts()  # a fixed seed
    assert parts() != parts(torch.Generator().manual_seed(5))


@pytest.mark.parametrize("settings", [{}, {"whiten": True, "temperature": 2}])
def test_the_order_of_the_rows_does_not_matter(settings):
    f, p, y = problem(seed=15)
    moved = torch.randperm(len(f), generator=torch.Generator().manual_seed(0))
    one = RelationGraph(f, p, y, **settings)
    other = RelationGraph(f[moved], p[moved], y[moved], **settings)
    a, b = one.label_noise(), other.label_noise()
    torch.testing.assert_close(a.noisiness[moved], b.noisiness, rtol=0, atol=1e-5 * float(a.noisiness.abs().max()))
    assert torch.equal(a.noisy[moved], b.noisy) and torch.equal(a.suggested[moved], b.suggested)
    torch.testing.assert_close(one.outlier_scores()[moved], other.outlier_scores(), rtol=1e-5, atol=0)
    torch.testing.assert_close(one.row(int(moved[9]))[moved], other.row(9), rtol=0, atol=1e-5)


def test_scale_of_a_row_does_not_matter():
    f, p, y = problem(seed=16)
    scale = torch.logspace(-18, 18, len(f))[:, None]
    a, b = (RelationGraph(x, p, y).label_noise().noisiness for x in (f, f * scale))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(a.abs().max()))


def test_whitened_features_are_white():
    f, p, y = problem(n=500, seed=17)
    graph = RelationGraph(f * torch.logspace(0, 2, 16), p, y, whiten=True, temperature=2, dtype=torch.float64)
    x = f.double() * torch.logspace(0, 2, 16).double()
    centred = x - x.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / 500)
    white = centred @ vectors / (values + (0.1 + 16 / 500) * values.mean()).sqrt()
    w = edges(kernel_matrix(white, p, t=2), y)
    s = graph.label_noise(max_iter=0).noisiness
    torch.testing.assert_close(s, w.sum(1), rtol=0, atol=1e-4 * float(s.abs().max()))


def test_inputs_of_every_kind_give_the_same(tmp_path):
    f, p, y = problem(seed=18)
    expected = RelationGraph(f, p, y).label_noise().noisiness
    big_endian = f.numpy().astype(">f4")
    read_only = p.numpy().copy()
    read_only.flags.writeable = False
    for features, probs, labels in [
        (f.numpy(), p.numpy(), y.numpy()),
        (big_endian, read_only, y.tolist()),
        (f.tolist(), p.double(), y.to(torch.uint8)),
        (f.T.contiguous().T, np.asfortranarray(p.numpy()), y.numpy().astype(np.int16)),
    ]:
        found = RelationGraph(features, probs, labels).label_noise().noisiness
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_memory_mapped_features(tmp_path, dtype):
    f, p, y = problem(n=2500, seed=19)
    stored = f.numpy().astype(dtype)
    stored.tofile(tmp_path / "features")
    mapped = np.memmap(tmp_path / "features", dtype, "r", shape=stored.shape)
    for settings in ({}, {"whiten": True, "temperature": 2}):
        there, here = RelationGraph(mapped, p, y, **settings), RelationGraph(stored, p, y, **settings)
        a, b = there.label_noise(), here.label_noise()
        assert torch.equal(a.noisiness, b.noisiness) and torch.equal(a.suggested, b.suggested)
        assert torch.equal(there.outlier_scores(), here.outlier_scores())
        assert torch.equal(there.row(9), here.row(9))
    assert (np.fromfile(tmp_path / "features", dtype).reshape(stored.shape) == stored).all()  # as it was
    assert [x.name for x in tmp_path.iterdir()] == ["features"]


def test_the_inputs_are_not_changed():
    f, p, y = problem(n=200, seed=20)
    before = [x.clone() for x in (f, p, y)]
    graph = RelationGraph(f, p, y, whiten=True)
    graph.label_noise()
    graph.outlier_scores(f, p)
    graph.relations([3, 4])
    assert all(torch.equal(a, b) for a, b in zip(before, (f, p, y), strict=True))


def test_the_long_pass_runs_once(monkeypatch):
    calls = []
    graph = RelationGraph(*problem(n=60))
    run = graph.sums
    monkeypatch.setattr("dataopt.core.relation.graph.pair_sums", lambda *a, **k: calls.append(a))
    graph.label_noise()
    graph.label_noise(update="single", threshold=0.3)
    graph.relations(3)
    assert not calls and graph.sums is run
    assert len(graph) == 60 and graph.device.type == "cpu"


def test_progress_is_shown_where_asked(capsys):
    f, p, y = problem(n=60)
    RelationGraph(f, p, y, progress=True).label_noise()
    assert "relations: 100%" in capsys.readouterr().err
    for quiet in (False, None):  # None: no terminal here
        RelationGraph(f, p, y, progress=quiet).label_noise()
    assert capsys.readouterr().err == ""
