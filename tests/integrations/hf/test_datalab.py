"""The issue type `relation` in cleanlab's Datalab."""

import sys

import numpy as np
import pytest
from cleanlab import Datalab
from dataopt.core.relation import find_issues
from dataopt.integrations import hf
from dataopt.integrations.hf import register_relation_issue
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Features, probabilities, names of the given labels, and which of them are wrong."""
    pixels, truth = (a[:800] for a in load_digits(return_X_y=True))
    rng = np.random.default_rng(0)
    wrong = np.zeros(len(truth), bool)
    wrong[rng.choice(len(truth), 60, replace=False)] = True
    labels = np.where(wrong, (truth + rng.integers(1, 10, len(truth))) % 10, truth)
    model = LogisticRegression(C=0.05, max_iter=200)
    probs = cross_val_predict(model, pixels / 16, labels, cv=3, method="predict_proba")
    return pixels, probs, np.array([f"digit {y}" for y in labels]), wrong


def test_real_run(digits, capsys):
    features, probs, names, wrong = digits
    assert register_relation_issue() is register_relation_issue()
    assert "Overwriting" not in capsys.readouterr().out
    lab = Datalab({"y": names}, label_name="y", verbosity=0)
    lab.find_issues(pred_probs=probs, features=features, issue_types={"relation": {"top": 3}, "label": {}})
    issues = lab.get_issues("relation")
    assert list(issues.columns) == ["is_relation_issue", "relation_score"]
    expected = find_issues(features, probs, np.array([int(n[-1]) for n in names]), top=3).to_pandas()
    np.testing.assert_array_equal(issues["is_relation_issue"], expected["is_label_issue"])
    np.testing.assert_array_equal(issues["relation_score"], expected["label_score"])
    flagged = issues["is_relation_issue"].to_numpy()
    assert wrong[flagged].mean() > 0.8 and flagged[wrong].mean() > 0.4
    assert wrong[issues["relation_score"].argsort()[:60]].mean() > 0.8
    info = lab.get_info("relation")
    np.testing.assert_array_equal(info["given_label"], names)
    np.testing.assert_array_equal(info["predicted_label"], [f"digit {y}" for y in expected["predicted_label"]])
    worst = int(issues["relation_score"].argmin())
    assert info["conflicts"].shape == (800, 3)
    against = info["conflicts"][worst]
    assert against[0] >= 0 and all(names[j] != names[worst] for j in against[against >= 0])
    assert (info["conflicts"][int(issues["relation_score"].argmax())] == -1).all()
    summary = lab.get_issue_summary("relation")
    assert summary["num_issues"].item() == flagged.sum()
    lab.report(num_examples=3, verbosity=4)
    printed = capsys.readouterr().out
    assert "relation issues" in printed and f"Number of examples with this issue: {flagged.sum()}" in printed
    assert "A relation issue refers to" in printed


def test_saved_and_loaded(digits, tmp_path, capsys):
    features, probs, names, _ = digits
    register_relation_issue()
    lab = Datalab({"y": names}, label_name="y", verbosity=0)
    lab.find_issues(pred_probs=probs, features=features, issue_types={"relation": {}})
    lab.save(tmp_path, force=True)
    loaded = Datalab.load(tmp_path)
    np.testing.assert_array_equal(loaded.get_issues("relation"), lab.get_issues("relation"))


def test_what_is_missing_is_named(digits, capsys):
    features, probs, names, _ = digits
    register_relation_issue()
    lab = Datalab({"y": names}, label_name="y", verbosity=0)
    lab.find_issues(pred_probs=probs, issue_types={"relation": {}})
    assert "the issue type 'relation' needs features in find_issues" in capsys.readouterr().out
    Datalab({"x": names}, verbosity=0).find_issues(pred_probs=probs, features=features, issue_types={"relation": {}})
    assert "the issue type 'relation' needs a label_name in Datalab" in capsys.readouterr().out


def test_without_cleanlab_the_extra_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "cleanlab"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cleanlab", None)
    monkeypatch.delitem(sys.modules, "dataopt.integrations.hf.datalab")
    with pytest.raises(
        ModuleNotFoundError, match=r'register_relation_issue needs cleanlab.*pip install "dataopt\[clean\]"'
    ):
        hf.__getattr__("register_relation_issue")
