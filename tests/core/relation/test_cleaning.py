"""The table of the cleaning commands, on digits of which 8 % have a wrong label."""

import json
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from dataopt.core.relation import RelationGraph, baselines, find_issues
from scipy.stats import rankdata
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.model_selection import cross_val_predict

from .reference import problem


@pytest.fixture(scope="module")
def digits():
    """Features, out-of-fold probabilities, given labels, and which of them are wrong: 1797 digits."""
    data = load_digits()
    x, truth = data.data / 16, data.target
    g = np.random.default_rng(0)
    wrong = g.permutation(len(x)) < round(0.08 * len(x))
    given = np.where(wrong, (truth + g.integers(1, 10, len(x))) % 10, truth)
    model = LogisticRegression(C=0.1, max_iter=40)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        probs = cross_val_predict(model, x, given, cv=3, method="predict_proba")
    return x.astype(np.float32), probs.astype(np.float32), given, truth, wrong


@pytest.fixture(scope="module")
def issues(digits):
    return find_issues(*digits[:3])


def test_relation_finds_flipped_labels(digits):
    x, p, y, _, wrong = digits
    base = wrong.mean()
    margin = average_precision_score(wrong, baselines.margin(p, y))
    plain = average_precision_score(wrong, RelationGraph(x, p, y).label_noise().noisiness)
    white = average_precision_score(wrong, RelationGraph(x, p, y, whiten=True, temperature=2).label_noise().noisiness)
    assert plain >= 3 * base and white >= 3 * base
    assert white >= margin


def test_the_ranking_finds_flipped_labels(digits, issues):
    *_, truth, wrong = digits
    assert average_precision_score(wrong, -issues.label_score) >= 0.9
    assert roc_auc_score(wrong, -issues.label_score) >= 0.98
    assert issues.is_label_issue.numpy()[wrong].mean() >= 0.7
    assert wrong[issues.is_label_issue.numpy()].mean() >= 0.8
    found = issues.is_label_issue.numpy() & wrong
    assert (issues.predicted_label.numpy() == truth)[found].mean() >= 0.9


def test_the_ranking_is_the_mean_of_two_ranks(digits, issues):
    x, p, y, *_ = digits
    relation = RelationGraph(x, p, y, whiten=True, temperature=2).label_noise()
    loss = baselines.loss(p, y)
    assert torch.equal(issues.relation_noisiness, relation.noisiness) and torch.equal(issues.loss, loss)
    np.testing.assert_allclose(issues.loss, -np.log(p[np.arange(len(y)), y]), rtol=1e-5)
    mean = (rankdata(relation.noisiness.numpy()) + rankdata(loss.numpy())) / 2  # 1 is the best label
    np.testing.assert_allclose(issues.label_score, (len(y) - mean) / (len(y) - 1), atol=1e-12)
    assert issues.is_label_issue.sum() == RelationGraph(x, p, y).label_noise().noisy.sum()
    assert issues.label_score[issues.is_label_issue].max() <= issues.label_score[~issues.is_label_issue].min()
    assert torch.equal(issues.predicted_label[~issues.is_label_issue], torch.from_numpy(y)[~issues.is_label_issue])


def test_the_table(digits, issues):
    y = digits[2]
    names = pd.Index([f"digit-{i}" for i in range(len(y))], name="name")
    table = issues.to_pandas(index=names)
    types = {name: str(kind) for name, kind in table.dtypes.items()}
    assert types == {
        "is_label_issue": "bool",
        "label_score": "float64",
        "given_label": "int64",
        "predicted_label": "int64",
        "relation_noisiness": "float64",
        "loss": "float64",
        "outlier_score": "float64",
        "is_outlier_issue": "bool",
        "near_duplicate_score": "float64",
        "is_near_duplicate_issue": "bool",
        "nearest_neighbor": "int64",
    }
    assert len(table) == len(y) and table.index.equals(names)
    assert issues.to_pandas().index.tolist() == list(range(len(y)))
    assert (table["given_label"].to_numpy() == y).all()
    for score in ("label_score", "outlier_score", "near_duplicate_score"):
        assert table[score].between(0, 1).all() and table[score].nunique() > 1000
    for kind in ("outlier", "near_duplicate", "label"):  # low is bad
        bad = table[f"is_{kind}_issue"]
        assert bad.any() or kind != "label"  # no digit is strange, and no two are drawn alike
        if bad.any():
            assert table.loc[bad, f"{kind}_score"].max() <= table.loc[~bad, f"{kind}_score"].min()
    assert table["label_score"].corr(table["loss"], method="spearman") < -0.9
    assert table["label_score"].corr(table["relation_noisiness"], method="spearman") < -0.9
    json.dumps(table.head(3).to_dict("records"))


def test_suspects_come_worst_label_first_with_their_neighbours(digits, issues):
    x, p, y, *_ = digits
    labels = int(issues.is_label_issue.sum())
    outliers = int((issues.is_outlier_issue & ~issues.is_label_issue).sum())
    assert issues.suspects.dtype == torch.int64 and len(issues.suspects) == labels + outliers
    assert len(issues.suspects.unique()) == len(issues.suspects)
    assert issues.is_label_issue[issues.suspects[:labels]].all()
    assert (issues.label_score[issues.suspects[:labels]].diff() >= 0).all()
    assert (issues.outlier_score[issues.suspects[labels:]].diff() >= 0).all()
    found = issues.relations
    assert found.conflicting.shape == found.agreeing.shape == (len(issues.suspects), 8)
    graph = RelationGraph(x, p, y, whiten=True, temperature=2)
    worst = graph.relations(int(issues.suspects[0]), top=8)
    assert torch.equal(found.conflicting[0], worst.conflicting)
    given = torch.from_numpy(y)[issues.suspects]
    there = found.conflicting >= 0
    assert (torch.from_numpy(y)[found.conflicting] != given[:, None])[there].all()
    assert (torch.from_numpy(y)[found.agreeing] == given[:, None])[found.agreeing >= 0].all()
    assert find_issues(x, p, y, top=3).relations.agreeing.shape[1] == 3


def test_planted_outliers_and_twins_are_named():
    f, p, y = problem(n=600, d=32, seed=1, sharp=6.0)
    g = torch.Generator().manual_seed(1)
    strange, twins = [5, 100, 333], [(40, 41), (70, 500)]
    f[strange] = 5 * torch.randn(3, 32, generator=g)
    p[strange] = torch.full((5,), 0.2)
    for a, b in twins:
        f[b] = 2 * f[a]
    found = find_issues(f, p, y)
    assert set(strange) <= set(found.is_outlier_issue.nonzero().squeeze(1).tolist())
    assert set(found.outlier_score.argsort()[:3].tolist()) == set(strange)
    assert found.is_outlier_issue.sum() < 30
    assert found.is_near_duplicate_issue.nonzero().squeeze(1).tolist() == sorted(sum(twins, ()))
    assert all(found.nearest_neighbor[a] == b and found.nearest_neighbor[b] == a for a, b in twins)
    assert set(strange) <= set(found.suspects.tolist())
    similarity = 1 / RelationGraph(f, p, y).outlier_scores()
    torch.testing.assert_close(found.outlier_score, similarity / (similarity + similarity.median()))


def test_parts_and_memory_mapped_features(tmp_path):
    f, p, y = problem(n=400, seed=2)
    f.numpy().tofile(tmp_path / "features")
    mapped = np.memmap(tmp_path / "features", np.float32, "r", shape=tuple(f.shape))
    here, there = find_issues(f, p, y, partitions=2), find_issues(mapped, p.numpy(), y.tolist(), partitions=2)
    pd.testing.assert_frame_equal(here.to_pandas(), there.to_pandas())
    whole = find_issues(f, p, y)
    assert not torch.equal(whole.relation_noisiness, here.relation_noisiness)
    ranks = np.corrcoef(rankdata(whole.label_score), rankdata(here.label_score))[0, 1]
    assert ranks > 0.95


def test_nothing_wrong():
    """No suspects: empty, not broken."""
    f, p, y = problem(n=60, d=32, seed=3, sharp=30.0, flips=0)
    found = find_issues(f, p, y)
    assert not found.is_label_issue.any()
    assert len(found.suspects) == int(found.is_outlier_issue.sum())
    assert found.relations.agreeing.shape == (len(found.suspects), 8)
    assert torch.equal(found.predicted_label, y)
