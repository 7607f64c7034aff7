"""The relation graph and the scores that it is compared with, on features, probabilities and labels that are none."""

import inspect
import warnings

import pytest
import torch
from dataopt.core.relation import RelationGraph, average_scores, baselines, find_issues, near_duplicates, relation_map
from hypothesis import given
from hypothesis import strategies as st

from .budget import tries
from .spoiled import answer, finite, spoil

N, D, K = 12, 4, 3
G = torch.Generator().manual_seed(0)
DATA = {
    "features": torch.randn(N, D, generator=G),
    "probs": torch.rand(N, K, generator=G).softmax(1),
    "labels": torch.arange(N) % K,
}
ROWS = (ValueError, TypeError, IndexError)  # documented for rows that are not there
GRAPH = RelationGraph(**DATA)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def of_rows(x, arguments) -> None:
    """A finite score for each sample."""
    rows = len(next(iter(arguments.values())))
    assert x.shape == (rows,) and finite(x)


@tries(120)
@given(st.data())
def test_graph(data):
    call = DATA | {"kernel": "cosine", "compatibility": True, "temperature": 4, "whiten": False, "edge_cut": 0.03,
                   "partitions": None, "block": None, "generator": None}  # fmt: skip
    arguments = spoil(data, call)
    graph = answer(RelationGraph, arguments)
    if graph is None:
        return
    found = graph.label_noise()
    of_rows(found.noisiness, arguments)
    assert found.suggested.dtype == torch.int64 and bool(((found.suggested >= 0) & (found.suggested < K)).all())
    of_rows(graph.outlier_scores(), arguments)
    assert finite(graph.relations(0))


@tries(60)
@given(st.data())
def test_label_noise(data):
    call = {"threshold": 0.1, "update": "set", "max_iter": 1, "mode": "thesis"}
    found = answer(GRAPH.label_noise, spoil(data, call))
    if found is not None:
        of_rows(found.noisiness, DATA)


@tries(60)
@given(st.data())
def test_outlier_scores(data):
    call = {"features": DATA["features"], "probs": DATA["probs"], "subset": None, "temperature": 1, "generator": None}
    arguments = spoil(data, call)
    found = answer(GRAPH.outlier_scores, arguments)
    if found is not None:
        rows = N if arguments["features"] is None else len(arguments["features"])
        assert found.shape == (rows,) and finite(found) and bool((found >= 0).all())


@tries(60)
@given(st.data())
def test_relations(data):
    arguments = spoil(data, {"rows": torch.tensor([0, 3]), "top": 4})
    found = answer(GRAPH.relations, arguments, ["row", "rows", "top"], ROWS)
    if found is not None:
        assert finite(found) and bool((found.agreeing < N).all())
    i = spoil(data, {"i": 3})
    assert (row := answer(GRAPH.row, i, ["row"], ROWS)) is None or (row.shape == (N,) and finite(row))
    shown = answer(relation_map, {"checkpoints": [GRAPH, GRAPH]} | i, ["row", "checkpoints"], ROWS)
    assert shown is None or finite(shown)


@tries(60)
@given(st.data())
def test_issues(data):
    arguments = spoil(data, DATA | {"top": 3, "partitions": None})
    found = answer(find_issues, arguments)
    if found is not None:
        of_rows(found.label_score, arguments)
        of_rows(found.outlier_score, arguments)
        assert finite(found)
    pairs = spoil(data, {"features": DATA["features"], "threshold": 0.13})
    twins = answer(near_duplicates, pairs)
    assert twins is None or finite(twins)
    mean = answer(average_scores, spoil(data, {"scores": [torch.rand(N), torch.rand(N)]}))
    assert mean is None or finite(mean)


OTHER = torch.randn(9, D, generator=G)
BASELINES = {
    "loss": ("probs", "labels"), "margin": ("probs", "labels"), "cwe": ("probs", "labels"),
    "least_confidence": ("probs",), "entropy": ("probs",), "msp": ("probs",), "max_logit": ("logits",),
    "energy": ("logits",), "tracin": ("features", "probs", "labels"), "knn_disagreement": ("features", "labels", "k"),
    "react": ("features", "weight", "bias", "reference_features", "percentile"),
    "kl_matching": ("probs", "reference_probs"),
    "mahalanobis": ("features", "reference_features", "reference_labels"),
    "knn_distance": ("features", "reference", "k"),
    "iterative_sampling": ("features", "size"), "local_outlier_factor": ("features", "k"),
}  # fmt: skip
VALID = DATA | {
    "logits": torch.randn(N, K, generator=G), "k": 3, "size": 4, "weight": torch.randn(K, D, generator=G),
    "bias": torch.randn(K, generator=G), "percentile": 90, "reference_features": OTHER, "reference": OTHER,
    "reference_probs": torch.rand(9, K, generator=G).softmax(1), "reference_labels": torch.arange(9) % K,
}  # fmt: skip


@pytest.mark.parametrize("name", [n for n in BASELINES if hasattr(baselines, n)])
@tries(25)
@given(data=st.data())
def test_baselines(name, data):
    arguments = spoil(data, {key: VALID[key] for key in BASELINES[name]})
    found = answer(getattr(baselines, name), arguments)
    if found is not None:
        of_rows(found, arguments)


def test_all_baselines_are_here():
    public = {n for n, f in vars(baselines).items() if inspect.isfunction(f) and f.__module__ == baselines.__name__}
    assert {n for n in public if not n.startswith("_")} == set(BASELINES)
