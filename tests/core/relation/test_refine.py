"""Rounds of cleaning and training."""

import numpy as np
import pytest
import torch
from dataopt.core.relation import find_issues, refine
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression


@pytest.fixture(scope="module")
def digits():
    """Features, labels with 8 % wrong ones, and which: 600 digits."""
    data = load_digits()
    x, truth = torch.from_numpy(data.data[:600] / 16).float(), data.target[:600]
    g = np.random.default_rng(0)
    wrong = g.permutation(600) < 48
    given = np.where(wrong, (truth + g.integers(1, 10, 600)) % 10, truth)
    return x, torch.from_numpy(given), torch.from_numpy(truth).long(), torch.from_numpy(wrong)


class Learner:
    """Logistic regression on the pixels, with a note of what it was trained on."""

    def __init__(self, x):
        self.x, self.calls = x, []

    def __call__(self, rows, labels):
        self.calls.append((rows, labels))
        model = LogisticRegression(C=1.0, max_iter=500).fit(self.x[rows].numpy(), labels.numpy())
        return self.x, torch.from_numpy(model.predict_proba(self.x.numpy()))


@pytest.mark.parametrize("action", ["drop", "relabel"])
def test_rounds_until_nothing_changes(digits, action):
    x, given, truth, wrong = digits
    fit = Learner(x)
    result = refine(fit, given, action=action, max_rounds=8)
    assert len(fit.calls) == len(result.rounds) > 1
    assert torch.equal(fit.calls[0][0], torch.arange(600)) and torch.equal(fit.calls[0][1], given)
    before = given
    for made, (rows, labels) in zip(result.rounds[:-1], fit.calls[1:], strict=True):
        assert torch.equal(rows, made.rows) and torch.equal(labels, made.labels)
    for made in result.rounds:
        called = made.issues.is_label_issue
        assert torch.equal(made.issues.given_label, given)  # judged by what was given, not by what a round made of it
        new = torch.where(called, made.issues.predicted_label if action == "relabel" else -1, given)
        assert made.changed == int((new != before).sum())
        assert torch.equal(made.rows, (new >= 0).nonzero().squeeze(1)) and torch.equal(made.labels, new[made.rows])
        before = new
    assert result.stable == (result.rounds[-1].changed == 0)
    assert (result.labels != truth[result.rows]).sum() < 0.5 * wrong.sum()
    found = [int((r.issues.is_label_issue & wrong).sum()) for r in result.rounds]
    assert found[1] > found[0]


def test_one_round_is_find_issues(digits):
    x, given, _, _ = digits
    result = refine(Learner(x), given, max_rounds=1)
    expected = find_issues(*Learner(x)(torch.arange(600), given), given)
    assert torch.equal(result.rounds[0].issues.label_score, expected.label_score)
    assert torch.equal(result.rows, (~expected.is_label_issue).nonzero().squeeze(1)) and not result.stable


def test_a_sample_comes_back(digits):
    """The first model calls other rows wrong than the second, which sees the truth."""
    x, given, truth, _ = digits
    probs = []
    for labels in ((truth + 5 * (torch.arange(600) < 40)) % 10, truth, truth):
        probs.append(torch.nn.functional.one_hot(labels, 10) * 0.98 + 0.002)
    features = [p.float() + 0.01 * x[:, :10] for p in probs]
    calls = iter(zip(features, probs, strict=True))
    result = refine(lambda rows, labels: next(calls), given, max_rounds=3)
    first, second = (set(r.rows.tolist()) for r in result.rounds[:2])
    assert second - first and result.stable and len(result.rounds) == 3


def test_rounds_that_turn_in_a_circle_end(digits):
    x, given, truth, _ = digits
    seen = []

    def fit(rows, labels):
        seen.append(0)
        guess = (truth + 5 * (torch.arange(600) % 12 == len(seen) % 2)) % 10
        probs = torch.nn.functional.one_hot(guess, 10) * 0.98 + 0.002
        return probs.float() + 0.01 * x[:, :10], probs

    result = refine(fit, given, max_rounds=9)
    assert len(result.rounds) == 3 and not result.stable and result.rounds[-1].changed > 0


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"action": "keep"}, ValueError, "action='keep' must be one of 'drop', 'relabel'"),
        ({"max_rounds": 0}, ValueError, "max_rounds=0 must be at least 1"),
        ({"resume": "x"}, ValueError, "resume= keeps the sums of one model"),
        ({"labels": []}, ValueError, "labels is empty"),
        ({"labels": [0.5, 1.5]}, TypeError, "give integer class ids"),
        ({"labels": [[0, 1]]}, ValueError, "give one class a row"),
        ({"labels": [1, 1, 1]}, ValueError, "labels is 1 in every row"),
        ({"labels": [0, -1, 1]}, ValueError, "labels is -1 in row 1"),
        ({"fit": lambda rows, labels: torch.ones(3, 2)}, TypeError, r"return the pair \(features, probs\)"),
        ({"fit": lambda rows, labels: (torch.ones(2, 2), torch.ones(3, 2) / 2)}, ValueError, "features of 2 rows"),
        ({"fit": lambda rows, labels: (torch.ones(3, 2), torch.ones(1, 2) / 2)}, ValueError, "probs of 1 rows"),
        ({"fit": lambda rows, labels: (torch.ones(3, 2), torch.ones(3, 2))}, ValueError, "probs is no distribution"),
    ],
)
def test_refusals(arguments, error, match):
    given = {"fit": lambda rows, labels: None, "labels": [0, 1, 1]} | arguments
    with pytest.raises(error, match=match):
        refine(given.pop("fit"), given.pop("labels"), **given)
