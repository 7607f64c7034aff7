"""Outlier scores of the data, and of new data."""

import warnings

import numpy as np
import pytest
import torch
from dataopt.core.relation import Outliers, RelationGraph
from dataopt.core.relation.outliers import check_subset
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from .reference import kernel_matrix, problem


def cross(f, p, g, q, **settings):
    """(m, n) k of new rows to the data."""
    return kernel_matrix(torch.cat([f, g]), torch.cat([p, q]), **settings)[len(f) :, : len(f)]


@pytest.mark.parametrize(
    ("kernel", "compatible", "t"), [("cosine", True, 1), ("cosine", True, 2), ("cosine", False, 4), ("rbf", True, 1)]
)
def test_scores_of_the_data(kernel, compatible, t):
    f, p, y = problem(seed=1)
    k = kernel_matrix(f, p, kernel, compatible, t).fill_diagonal_(0)
    graph = RelationGraph(f, p, y, kernel=kernel, compatibility=compatible, block=64, dtype=torch.float64)
    scores = graph.outlier_scores(temperature=t)
    torch.testing.assert_close(scores, 1 / (k.sum(1) + 1e-6), rtol=1e-10, atol=0)
    assert scores.shape == (400,) and scores.dtype == torch.float64
    rows = torch.tensor([399, 0, 50, 51, 52])
    some = graph.outlier_scores(temperature=t, subset=rows)
    torch.testing.assert_close(some, 1 / (k[:, rows].sum(1) + 1e-6), rtol=1e-10, atol=0)
    single = RelationGraph(f, p, y, kernel=kernel, compatibility=compatible).outlier_scores(temperature=t)
    torch.testing.assert_close(single, scores, rtol=1e-5, atol=0)


@pytest.mark.parametrize("t", [1, 2])
@pytest.mark.parametrize("kernel", ["cosine", "rbf"])
def test_scores_of_new_data(t, kernel):
    f, p, y = problem(n=1500, seed=2)
    g, q, _ = problem(n=70, seed=3)
    k = cross(f, p, g, q, similarity=kernel, t=t)
    expected = 1 / (k.sum(1) + 1e-6)
    graph = RelationGraph(f, p, y, kernel=kernel, dtype=torch.float64)
    torch.testing.assert_close(graph.outlier_scores(g, q, temperature=t), expected, rtol=1e-10, atol=0)
    fitted = Outliers(kernel=kernel, temperature=t).fit(f.numpy(), p.numpy())
    torch.testing.assert_close(fitted.score(g, q), expected, rtol=1e-5, atol=0)
    rows = torch.arange(0, 1500, 7)
    some = 1 / (k[:, rows].sum(1) + 1e-6)
    torch.testing.assert_close(graph.outlier_scores(g, q, rows, t), some, rtol=1e-10, atol=0)
    part = Outliers(kernel=kernel, temperature=t, subset=rows.tolist()).fit(f, p)
    torch.testing.assert_close(part.score(g, q), some, rtol=1e-5, atol=0)


def test_the_temperature_of_the_graph_is_another():
    f, p, y = problem(seed=4)
    one, four = (RelationGraph(f, p, y, temperature=t).outlier_scores() for t in (1, 4))
    torch.testing.assert_close(one, four)
    assert Outliers().temperature == 1


def test_whitened_graphs_whiten_new_rows_alike():
    f, p, y = problem(seed=5)
    graph = RelationGraph(f, p, y, whiten=True, dtype=torch.float64)
    within = 1 / graph.outlier_scores() - 1e-6
    anew = 1 / graph.outlier_scores(f, p) - 1e-6
    own = torch.from_numpy(RelationGraph(f, p, y, whiten=True, temperature=1, dtype=torch.float64)._own())
    torch.testing.assert_close(anew, within + own[graph.pairs.place], rtol=1e-6, atol=0)


def test_subsets():
    assert check_subset(None, 10, None) is None
    assert check_subset(10, 10, None) is None and check_subset(1.0, 10, None) is None
    for subset, count in ((0.25, 250), (250, 250), (np.int64(3), 3), (np.float32(0.5), 500), (1, 1), (0.0011, 1)):
        rows = check_subset(subset, 1000, None)
        assert len(rows) == count == len(rows.unique()) and rows.min() >= 0 and rows.max() < 1000
        assert torch.equal(rows, check_subset(subset, 1000, None))  # a fixed seed
    drawn = check_subset(500, 1000, torch.Generator().manual_seed(3))
    assert not torch.equal(drawn, check_subset(500, 1000, None))
    assert abs(float(drawn.double().mean()) - 499.5) < 40  # over all of it, no stride or head
    assert torch.equal(check_subset([5, 2], 10, None), torch.tensor([5, 2]))


@pytest.mark.parametrize(
    "subset", [0, -1, 11, 0.0, 0.01, -0.5, 2.5, float("nan"), float("inf"), [], [0, 10], [-1], [3, 3], [[1, 2]]]
)
def test_subsets_that_are_none(subset):
    f, p, _ = problem(n=10, classes=3)
    with pytest.raises(ValueError, match=r"^subset"):
        Outliers(subset=subset).fit(f, p)


def test_a_share_of_the_data():
    f, p, y = problem(seed=6)
    graph = RelationGraph(f, p, y)
    rows = check_subset(0.1, 400, torch.Generator().manual_seed(1))
    share = graph.outlier_scores(subset=0.1, generator=torch.Generator().manual_seed(1))
    assert torch.equal(share, graph.outlier_scores(subset=rows))
    assert not torch.equal(share, graph.outlier_scores())


def test_zero_features_and_no_similarity_are_finite():
    f, p, y = problem(n=50, seed=7)
    f[3] = 0
    with pytest.warns(UserWarning, match="rows of features are zero"):
        graph = RelationGraph(f, p, y)
    scores = graph.outlier_scores()
    assert scores.isfinite().all() and scores.argmax() == 3 and scores[3] == pytest.approx(1e6)
    with pytest.warns(UserWarning, match="1 of 1 rows of features are zero"):
        assert graph.outlier_scores(torch.zeros(1, 16), p[:1]).item() == pytest.approx(1e6)
    nothing = RelationGraph(torch.eye(6), torch.full((6, 2), 0.5), torch.tensor([0, 1, 0, 1, 0, 1]))
    assert nothing.outlier_scores().tolist() == pytest.approx([1e6] * 6)
    fitted = Outliers().fit(torch.eye(6)[:5], torch.full((5, 2), 0.5))
    assert fitted.score(torch.eye(6)[5:], torch.full((1, 2), 0.5)).item() == pytest.approx(1e6)


def test_misuse_is_told():
    f, p, y = problem(n=50)
    with pytest.raises(RuntimeError, match="score was called before fit"):
        Outliers().score(f, p)
    fitted = Outliers().fit(f, p)
    with pytest.raises(ValueError, match="features has 15 columns where the data has 16"):
        fitted.score(f[:, :15], p)
    with pytest.raises(ValueError, match="probs has 2 columns where the data has 5"):
        fitted.score(f, torch.full((50, 2), 0.5))
    with pytest.raises(ValueError, match="probs has 49 rows where 50"):
        fitted.score(f, p[:49])
    graph = RelationGraph(f, p, y)
    with pytest.raises(ValueError, match="probs=None while the other is given"):
        graph.outlier_scores(f)
    with pytest.raises(ValueError, match="features=None while the other is given"):
        graph.outlier_scores(probs=p)
    with pytest.raises(ValueError, match="temperature=0"):
        graph.outlier_scores(temperature=0)


def test_progress_is_shown_for_new_data(capsys):
    f, p, _ = problem(n=50)
    Outliers().fit(f, p).score(f, p, progress=True)
    assert "100%" in capsys.readouterr().err
    Outliers().fit(f, p).score(f, p)
    assert capsys.readouterr().err == ""


def far_outliers(n: int, count: int, seed: int):
    """A data set, and rows in directions of their own, of which the model is not sure."""
    f, p, y = problem(n=n, d=48, classes=8, seed=seed, sharp=5.0)
    g = torch.Generator().manual_seed(seed)
    f[:count] = torch.randn(count, 48, generator=g).abs() * 3 - 1.5
    p[:count] = (0.7 * torch.randn(count, 8, generator=g)).softmax(1)
    return f, p, y, torch.arange(n) < count


def test_far_outliers_are_found_with_few_rows_of_the_data():
    f, p, y, truth = far_outliers(6000, 300, 0)
    graph = RelationGraph(f, p, y)
    whole = roc_auc_score(truth, graph.outlier_scores())
    share = roc_auc_score(truth, graph.outlier_scores(subset=0.05))
    assert whole >= 0.95 and abs(whole - share) <= 0.02


def test_pictures_that_are_no_digits():
    """1 % of other drawings among the digits: turned by a quarter, and white where digits are black."""
    digits = load_digits()
    x, y = digits.data.astype("float32") / 16, digits.target
    g = np.random.default_rng(0)
    count = 18
    strange = x[g.choice(len(x), count)].reshape(-1, 8, 8)[:, ::-1].transpose(0, 2, 1)
    strange = 1 - strange.reshape(count, 64)
    x, y = np.concatenate([x, strange]), np.concatenate([y, g.integers(10, size=count)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LogisticRegression(max_iter=60).fit(x, y)
    scores = RelationGraph(x, model.predict_proba(x), y).outlier_scores()
    assert roc_auc_score(np.arange(len(x)) >= len(x) - count, scores) >= 0.80
