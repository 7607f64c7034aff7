"""Bad input: one clear error, before any work."""

import warnings

import numpy as np
import pytest
import torch
from dataopt.core.relation import Outliers, RelationGraph, find_issues, near_duplicates
from dataopt.core.relation.checks import ROWS, as_features, as_probs, as_tensor, chunks

from .reference import problem

F, P, Y = problem(n=60)


def put(x: torch.Tensor, at, value) -> torch.Tensor:
    x = x.clone()
    x[at] = value
    return x


BAD = {
    "NaN feature": ((put(F, (7, 2), torch.nan), P, Y), ValueError, "features holds non-finite values, first in row 7"),
    "infinite feature": ((put(F, (0, 0), -torch.inf), P, Y), ValueError, "features holds non-finite values.*row 0"),
    "NaN probability": ((F, put(P, (9, 0), torch.nan), Y), ValueError, "probs holds non-finite values, first in row 9"),
    "logits": ((F, P * 5, Y), ValueError, r"probs is no distribution in row 0 .*sum 5.*softmax outputs, not logits"),
    "negative": ((F, put(P, 3, torch.tensor([-0.5, 1.5, 0, 0, 0])), Y), ValueError, "row 3 .smallest value -0.5"),
    "no sum": ((F, put(P, 59, 0.0), Y), ValueError, "probs is no distribution in row 59 .*sum 0"),
    "one column": ((F, torch.ones(60, 1), torch.zeros(60).long()), ValueError, "probs has one class"),
    "label too large": ((F, P, put(Y, 5, 5)), ValueError, "labels is 5 in row 5; give class ids of probs, 0 to 4"),
    "label -1": ((F, P, put(Y, 8, -1)), ValueError, "labels is -1 in row 8; give class ids"),
    "one class": ((F, P, torch.full((60,), 2)), ValueError, "labels is 2 in every row; .*two classes"),
    "few rows": ((F[:4], P[:4], torch.arange(4)), ValueError, "labels has 4 rows for 5 classes"),
    "short probs": ((F, P[:59], Y), ValueError, "probs has 59 rows where 60 were expected"),
    "short labels": ((F, P, Y[:59]), ValueError, r"labels has the shape \(59,\) where \(60,\) was expected"),
    "one-hot labels": ((F, P, torch.eye(5)[Y].long()), ValueError, r"labels has the shape \(60, 5\)"),
    "flat features": ((F[:, 0], P, Y), ValueError, r"features has the shape \(60,\); give \(n, d\)"),
    "images": ((F.view(60, 4, 2, 2), P, Y), ValueError, r"features has the shape \(60, 4, 2, 2\)"),
    "no rows": ((F[:0], P[:0], Y[:0]), ValueError, r"features has the shape \(0, 16\)"),
    "no columns": ((F[:, :0], P, Y), ValueError, r"features has the shape \(60, 0\)"),
    "float labels": ((F, P, Y.float()), TypeError, "labels holds torch.float32; give integer class ids"),
    "bool labels": ((F, P, Y > 2), TypeError, "labels holds torch.bool; give integer class ids"),
    "names": ((F, P, [f"class {int(c)}" for c in Y]), TypeError, "labels holds <U7; give .*numbers"),
    "text features": (([["a"]] * 60, P, Y), TypeError, "features holds <U1"),
    "objects": ((np.array([None] * 60), P, Y), TypeError, "features holds object"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_data_is_refused(what):
    data, error, words = BAD[what]
    for call in (RelationGraph, find_issues):
        with pytest.raises(error, match=words):
            call(*data)


@pytest.mark.parametrize("what", [name for name, (data, *_) in BAD.items() if data[2] is Y and name != "short probs"])
def test_bad_data_is_refused_without_labels_too(what):
    (features, probs, _), error, words = BAD[what]
    with pytest.raises(error, match=words):
        Outliers().fit(features, probs)
    fitted = Outliers().fit(F, P)
    with pytest.raises(error, match=words):
        fitted.score(features, probs)
    if probs is P:
        with pytest.raises(error, match=words):
            near_duplicates(features)


def test_nothing_is_written_for_bad_data(tmp_path):
    with pytest.raises(ValueError, match="non-finite"):
        find_issues(*BAD["NaN feature"][0], resume=tmp_path / "sums")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kernel": "linear"}, "kernel='linear' must be one of 'cosine', 'rbf'"),
        ({"temperature": 0}, "temperature=0 must be a positive number"),
        ({"temperature": -1.0}, "temperature=-1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"edge_cut": -0.1}, r"edge_cut=-0.1 must lie in \[0, 1\)"),
        ({"edge_cut": 1}, "edge_cut=1 "),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        RelationGraph(F, P, Y, **settings)
    with pytest.raises(ValueError, match=words):
        Outliers(**settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"block": 0}, "block=0 must be at least 1"),
        ({"dtype": torch.float16}, "dtype=torch.float16 must be"),
        ({"partitions": 0}, "partitions=0 must be a whole number between 1 and 30"),
        ({"partitions": 31}, "partitions=31 must be a whole number between 1 and 30"),
        ({"partitions": 2.5}, "partitions=2.5 must be a whole number"),
    ],
)
def test_settings_of_the_graph_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        RelationGraph(F, P, Y, **settings)


def test_zero_rows_are_told_and_finite():
    zero = put(F, [4, 9], 0.0)
    with pytest.warns(
        UserWarning, match="2 of 60 rows of features are zero, first row 4; look at what the model makes of them"
    ):
        graph = RelationGraph(zero, P, Y)
    found = graph.label_noise()
    assert found.noisiness[[4, 9]].tolist() == [0, 0] and found.noisiness.isfinite().all()
    assert graph.relations(4).agreeing.tolist() == graph.relations(4).conflicting.tolist() == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RelationGraph(F, P, Y)


def test_rows_are_looked_at_in_pieces():
    n = 3 * ROWS + 5
    f, p = torch.ones(n, 2), torch.full((n, 2), 0.5)
    f[2 * ROWS + 3, 1] = torch.nan
    p[3 * ROWS + 1] = 0.9
    with pytest.raises(ValueError, match=f"first in row {2 * ROWS + 3}"):
        as_features(f)
    with pytest.raises(ValueError, match=f"in row {3 * ROWS + 1} "):
        as_probs(p)
    assert [(s.start, s.stop) for s in chunks(5, 2)] == [(0, 2), (2, 4), (4, 5)]


def test_tensors_share_memory_where_they_can():
    array = np.ones((3, 2), np.float32)
    assert as_tensor(array, "x").data_ptr() == array.ctypes.data
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert as_tensor(array, "x").data_ptr() == array.ctypes.data
    x = torch.ones(3, requires_grad=True)
    assert not as_tensor(x, "x").requires_grad
    assert as_features(np.ones((3, 2), np.int32)).dtype == torch.float32
    assert as_features(np.ones((3, 2), np.float16)).dtype == torch.float16


def test_rounded_distributions_pass():
    as_probs(P.half())
    as_probs((P * 1000).round() / 1000)
    with pytest.raises(ValueError, match="no distribution"):
        as_probs(P * 0.95)
