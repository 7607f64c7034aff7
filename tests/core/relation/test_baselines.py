"""The scores everybody compares with: each against its formula in plain loops, hand cases, bad input."""

import math

import numpy as np
import pytest
import torch
from dataopt.core.relation import baselines as b
from dataopt.core.relation.checks import ROWS
from hypothesis import given, settings
from hypothesis import strategies as st

N, D, C = 60, 5, 4


@pytest.fixture(scope="module")
def data():
    """Features, probabilities, labels and logits that belong to one linear layer; a reference set beside them."""
    rng = np.random.default_rng(0)
    out = {"weight": rng.normal(size=(C, D)), "bias": rng.normal(size=C)}
    for prefix, n in (("", N), ("reference_", 45)):
        f = rng.normal(size=(n, D)) + 2 * rng.normal(size=(3, D))[rng.integers(3, size=n)]
        logits = f @ out["weight"].T + out["bias"]
        p = np.exp(logits - logits.max(1, keepdims=True))
        out |= {f"{prefix}features": f, f"{prefix}logits": logits, f"{prefix}probs": p / p.sum(1, keepdims=True)}
        out[f"{prefix}labels"] = rng.integers(C, size=n)
    return out


CALLS = {
    "loss": ("probs", "labels"),
    "margin": ("probs", "labels"),
    "entropy": ("probs",),
    "least_confidence": ("probs",),
    "cwe": ("probs", "labels"),
    "tracin": ("features", "probs", "labels"),
    "knn_disagreement": ("features", "labels"),
    "msp": ("probs",),
    "max_logit": ("logits",),
    "energy": ("logits",),
    "react": ("features", "weight", "bias", "reference_features"),
    "kl_matching": ("probs", "reference_probs"),
    "mahalanobis": ("features", "reference_features", "reference_labels"),
    "knn_distance": ("features",),
    "iterative_sampling": ("features",),
    "local_outlier_factor": ("features",),
}


def call(name, data, **more):
    if name == "iterative_sampling":
        more.setdefault("generator", torch.Generator().manual_seed(1))
    return getattr(b, name)(*(data[x] for x in CALLS[name]), **more)


def unit(f):
    return f / np.linalg.norm(f, axis=1, keepdims=True)


def direct_label_scores(d):
    out = {name: [] for name in ("loss", "margin", "entropy", "least_confidence", "cwe", "tracin")}
    for f, p, y in zip(d["features"], d["probs"], d["labels"], strict=True):
        h = -sum(x * math.log(x) for x in p)
        out["loss"].append(-math.log(p[y]))
        out["margin"].append(max(x for c, x in enumerate(p) if c != y) - p[y])
        out["entropy"].append(h)
        out["least_confidence"].append(1 - max(p))
        out["cwe"].append(-p[y] / h)
        out["tracin"].append(sum(x * x for x in f) * sum((x - (c == y)) ** 2 for c, x in enumerate(p)))
    return out


@pytest.mark.parametrize("name", ["loss", "margin", "entropy", "least_confidence", "cwe", "tracin"])
def test_label_scores_are_their_formulas(data, name):
    np.testing.assert_allclose(call(name, data), direct_label_scores(data)[name], rtol=1e-12, atol=1e-14)


def test_tracin_is_the_squared_gradient_of_the_last_layer(data):
    f, y = torch.tensor(data["features"]), torch.tensor(data["labels"])
    for i in range(5):
        weight = torch.tensor(data["weight"], requires_grad=True)
        logits = f[i] @ weight.T + torch.tensor(data["bias"])
        torch.nn.functional.cross_entropy(logits, y[i]).backward()
        assert float(call("tracin", data)[i]) == pytest.approx(float(weight.grad.square().sum()), rel=1e-10)


@pytest.mark.parametrize("k", [1, 7, N - 1])
def test_knn_disagreement(data, k):
    f, y = unit(data["features"]), data["labels"]
    found = call("knn_disagreement", data, k=k)
    for i in range(N):
        others = sorted((j for j in range(N) if j != i), key=lambda j: -f[i] @ f[j])
        assert float(found[i]) == pytest.approx(np.mean([y[j] != y[i] for j in others[:k]]))


def test_logit_scores(data):
    z = data["logits"]
    np.testing.assert_allclose(call("max_logit", data), [-max(row) for row in z])
    np.testing.assert_allclose(call("energy", data), [-math.log(sum(math.exp(x) for x in row)) for row in z])
    assert torch.equal(call("msp", data), call("least_confidence", data))


@pytest.mark.parametrize("percentile", [30, 90, 100])
def test_react(data, percentile):
    ceiling = np.percentile(data["reference_features"], percentile)
    assert (data["features"] > ceiling).any() or percentile == 100
    want = []
    for f in data["features"]:
        logits = [sum(w * min(x, ceiling) for w, x in zip(row, f, strict=True)) for row in data["weight"]] + data[
            "bias"
        ]
        want.append(-math.log(sum(math.exp(z) for z in logits)))
    np.testing.assert_allclose(call("react", data, percentile=percentile), want, rtol=1e-10)


def test_react_without_effect_is_energy_and_bias_may_be_missing(data):
    d = data | {"reference_features": np.full((1, D), 1e6)}
    np.testing.assert_allclose(call("react", d), call("energy", data), rtol=1e-10)
    without = call("energy", {"logits": data["features"] @ data["weight"].T})
    np.testing.assert_allclose(call("react", d | {"bias": None}), without, rtol=1e-10)


def test_kl_matching(data):
    reference, guess = data["reference_probs"], data["reference_probs"].argmax(1)
    templates = [reference[guess == c].mean(0) for c in range(C) if (guess == c).any()]
    want = [min(sum(x * math.log(x / t) for x, t in zip(p, d, strict=True)) for d in templates) for p in data["probs"]]
    np.testing.assert_allclose(call("kl_matching", data), want, rtol=1e-9)


def test_kl_matching_leaves_out_classes_never_predicted_and_stays_finite():
    """Zero entries of a template would make the divergence infinite; class 2 has no template at all."""
    reference = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    found = b.kl_matching([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], reference)
    assert found.isfinite().all()
    assert found[0] == 0
    assert found.argsort().tolist() == [0, 1, 2]


def test_mahalanobis(data):
    reference, y = data["reference_features"], data["reference_labels"]
    means = {c: reference[y == c].mean(0) for c in np.unique(y)}
    residual = np.stack([f - means[c] for f, c in zip(reference, y, strict=True)])
    inverse = np.linalg.inv(residual.T @ residual / len(reference))
    want = [min((f - m) @ inverse @ (f - m) for m in means.values()) for f in data["features"]]
    np.testing.assert_allclose(call("mahalanobis", data), want, rtol=1e-4)  # the ridge


def test_mahalanobis_of_dependent_and_constant_features(data):
    """Its covariance has no inverse; a step off the plane of the reference is worse than any inside it."""
    f = data["reference_features"]
    flat = np.column_stack([f, f[:, 0] + f[:, 1], np.ones(len(f))])
    off = flat[:1] + np.eye(7)[5]
    found = b.mahalanobis(np.concatenate([flat, off]), flat, data["reference_labels"])
    assert found.isfinite().all()
    assert found.argmax() == len(flat)
    still = b.mahalanobis([[1.0, 1.0], [2.0, 1.0]], np.ones((4, 2)), [0, 1, 0, 1])
    assert still.isfinite().all()
    assert still[0] == 0 < still[1]


@pytest.mark.parametrize("k", [1, 7, 45])
def test_knn_distance(data, k):
    f, reference = unit(data["features"]), unit(data["reference_features"])
    want = [sorted(math.dist(x, r) for r in reference)[k - 1] for x in f]
    np.testing.assert_allclose(b.knn_distance(data["features"], data["reference_features"], k), want, atol=1e-5)
    want = [sorted(math.dist(f[i], f[j]) for j in range(N) if j != i)[k - 1] for i in range(N)]
    np.testing.assert_allclose(b.knn_distance(data["features"], k=k), want, atol=1e-5)


def test_iterative_sampling(data):
    drawn = torch.randperm(N, generator=torch.Generator().manual_seed(1))[:9].tolist()
    f = data["features"]
    want = [min(math.dist(f[i], f[j]) for j in drawn if j != i) for i in range(N)]
    np.testing.assert_allclose(call("iterative_sampling", data, size=9), want, rtol=1e-12)
    torch.manual_seed(1)
    np.testing.assert_allclose(b.iterative_sampling(f, size=9), want, rtol=1e-12)  # the global state, seeded alike


def test_local_outlier_factor(data):
    """Breunig et al., definitions 5 to 7, in loops."""
    f, k = data["features"], 6
    distance = np.array([[math.dist(x, z) for z in f] for x in f])
    near = [[j for j in np.argsort(distance[i], kind="stable") if j != i][:k] for i in range(N)]
    reach = [distance[i, near[i][-1]] for i in range(N)]
    density = [1 / np.mean([max(reach[j], distance[i, j]) for j in near[i]]) for i in range(N)]
    want = [np.mean([density[j] for j in near[i]]) / density[i] for i in range(N)]
    np.testing.assert_allclose(call("local_outlier_factor", data, k=k), want, rtol=1e-6)


def test_local_outlier_factor_of_a_huge_row():
    x = torch.randn(12, 4)
    x[6, 0] = 3e38
    found = b.local_outlier_factor(x, 3)
    assert found.isfinite().all() and int(found.argmax()) == 6


# What holds for all of them


@pytest.mark.parametrize("name", CALLS)
def test_tensors_arrays_and_precision(data, name):
    more = {"k": 5} if name.startswith("knn") or name == "local_outlier_factor" else {}
    found = call(name, data, **more)
    assert found.shape == (N,) and found.dtype == torch.float64 and found.isfinite().all()
    tensors = {key: torch.tensor(x) for key, x in data.items()}
    assert torch.equal(call(name, tensors, **more), found)
    singles = {key: x.float() if x.is_floating_point() else x.int() for key, x in tensors.items()}
    rtol = 0.02 if name == "cwe" else 2e-4  # the entropy of a sure prediction hangs on the last digits of 1 - p
    np.testing.assert_allclose(call(name, singles, **more), found, rtol=rtol, atol=1e-5)
    halves = {key: x.bfloat16() if x.is_floating_point() else x for key, x in tensors.items()}
    assert call(name, halves, **more).isfinite().all()


@pytest.mark.parametrize("name", [name for name in CALLS if name != "iterative_sampling"])
def test_the_order_of_the_rows_does_not_matter(data, name):
    more = {"k": 5} if name.startswith("knn") or name == "local_outlier_factor" else {}
    order = np.random.default_rng(3).permutation(N)
    shuffled = data | {key: data[key][order] for key in ("features", "probs", "logits", "labels")}
    np.testing.assert_allclose(call(name, shuffled, **more), call(name, data, **more)[order], rtol=1e-9, atol=1e-12)


def test_many_rows_are_scored_in_parts_and_stay_in_order(tmp_path):
    """More rows than one part holds, features mapped from a file."""
    rng = np.random.default_rng(5)
    n = 2 * ROWS + 3
    f = np.memmap(tmp_path / "f", np.float32, "w+", shape=(n, 3))
    f[:] = rng.normal(size=(n, 3))
    p = rng.dirichlet(np.ones(3), size=n)
    y = rng.integers(3, size=n)
    want = (f.astype(float) ** 2).sum(1) * ((p - np.eye(3)[y]) ** 2).sum(1)
    np.testing.assert_allclose(b.tracin(f, p, y), want, rtol=1e-10)
    means = np.stack([f[y == c].astype(float).mean(0) for c in range(3)])
    residual = f - means[y]
    inverse = np.linalg.inv(residual.T @ residual / n)
    off = f[:, None] - means
    want = np.einsum("ncd,de,nce->nc", off, inverse, off).min(1)
    np.testing.assert_allclose(b.mahalanobis(f, f, y), want, rtol=1e-4)


# Hand cases


@pytest.mark.parametrize("name", ["loss", "margin", "cwe", "tracin"])
def test_a_wrong_label_ranks_first(name):
    p = np.full((6, 3), 0.05)
    labels = np.array([0, 1, 2, 0, 1, 2])
    p[range(6), labels] = 0.9
    labels[4] = 2
    assert call(name, {"probs": p, "labels": labels, "features": np.ones((6, 2))}).argmax() == 4


def test_a_label_among_others_disagrees():
    f = np.array([[1, 0.1 * i] for i in range(4)] + [[-1, 0.1 * i] for i in range(4)])
    found = b.knn_disagreement(f, [0, 0, 1, 0, 1, 1, 1, 1], k=3)
    np.testing.assert_allclose(found, [1 / 3, 1 / 3, 1, 1 / 3, 0, 0, 0, 0])


def test_more_duplicates_than_neighbours_never_count_the_row_itself():
    """With all other rows labelled otherwise, a row that counted itself would fall below one."""
    found = b.knn_disagreement(np.ones((9, 3)), range(9), k=4)
    assert (found == 1).all()


def test_certain_predictions():
    p = [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    labels = [0, 1, 2]
    np.testing.assert_allclose(b.loss(p, labels), [0, 87.3365, 87.3365], rtol=1e-5)
    assert b.margin(p, labels).tolist() == [-1, 1, 1]
    assert b.entropy(p).tolist() == [0, 0, 0]
    cwe = b.cwe(p, labels)
    assert cwe.isfinite().all() and cwe[0] < cwe[1] == cwe[2] == 0
    assert b.tracin(np.ones((3, 2)), p, labels).tolist() == [0, 4, 4]


def test_ties_have_margin_zero_and_an_even_prediction_the_largest_entropy():
    p = [[0.4, 0.4, 0.2], [0.4, 0.4, 0.2], [1 / 3, 1 / 3, 1 / 3]]
    assert b.margin(p, [0, 1, 2]).tolist() == [0, 0, 0]
    assert b.entropy(p)[2] == pytest.approx(math.log(3))
    assert b.entropy(p).argmax() == 2


def test_energy_of_large_logits_does_not_overflow():
    np.testing.assert_allclose(
        b.energy([[1000.0, 1000.0], [-1000.0, -1000.0]]), [-1000 - math.log(2), 1000 - math.log(2)]
    )


@pytest.mark.parametrize("name", ["knn_distance", "mahalanobis", "iterative_sampling", "local_outlier_factor"])
def test_a_far_outlier_ranks_first(name):
    rng = np.random.default_rng(2)
    reference = np.array([20.0, 0, 0]) + rng.normal(size=(80, 3))
    d = {"features": np.concatenate([reference, [[-40.0, 50, 0]]]), "reference_features": reference}
    d["reference_labels"] = rng.integers(2, size=80)
    assert call(name, d).argmax() == 80


def test_an_activation_that_reacts_alone_is_cut_off():
    """One huge unit makes plain energy sure of an outlier; rectified, the row falls behind the known ones."""
    rng = np.random.default_rng(4)
    reference = rng.uniform(0.5, 1, size=(50, 8))
    outlier = np.zeros((1, 8))
    outlier[0, 3] = 30
    both, weight, bias = np.concatenate([reference, outlier]), np.ones((2, 8)), np.zeros(2)
    assert b.energy(both @ weight.T + bias).argmin() == 50
    assert b.react(both, weight, bias, reference).argmax() == 50


def test_a_zero_row_gets_a_number():
    f = np.concatenate([np.eye(3), np.zeros((1, 3))])
    np.testing.assert_allclose(b.knn_distance(f, k=3), [math.sqrt(2)] * 3 + [1], rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(3, 20), sharp=st.sampled_from([0.0, 1.0, 30.0, 1e4]))
def test_bounds_and_orders_of_the_label_scores(seed, n, sharp):
    """Whatever the confidence, zeros and ones included."""
    rng = np.random.default_rng(seed)
    logits = torch.tensor(rng.normal(size=(n, 3)) * sharp, dtype=torch.float32)
    p, y = logits.softmax(1), np.append(rng.integers(3, size=n - 2), [0, 1])
    loss, margin, entropy, cwe = b.loss(p, y), b.margin(p, y), b.entropy(p), b.cwe(p, y)
    assert all(x.isfinite().all() for x in (loss, margin, entropy, cwe))
    assert (loss >= -1e-6).all() and (loss < 87.4).all()
    assert (margin.abs() <= 1 + 1e-6).all()
    assert ((p.argmax(1) == torch.tensor(y)) == (margin < 0))[margin != 0].all()
    assert (entropy >= -1e-6).all() and (entropy <= math.log(3) + 1e-6).all()
    assert (cwe <= 0).all()
    p_y = p.gather(1, torch.tensor(y)[:, None]).squeeze(1)
    assert (loss[p_y.argsort(descending=True)].diff() >= 0).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), shift=st.floats(-50, 50))
def test_what_the_outlier_scores_do_not_see(seed, shift):
    """Energy and max logit move with the logits; Mahalanobis ignores any invertible map; kNN ignores lengths."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(9, 4))
    np.testing.assert_allclose(b.energy(z + shift), b.energy(z) - shift, atol=1e-9)
    np.testing.assert_allclose(b.max_logit(z + shift), b.max_logit(z) - shift, atol=1e-9)
    f, y = rng.normal(size=(30, 3)), rng.integers(2, size=30)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0] * rng.uniform(0.5, 2, size=3)
    np.testing.assert_allclose(b.mahalanobis(f @ turn + shift, f @ turn + shift, y), b.mahalanobis(f, f, y), rtol=1e-4)
    scaled = f * rng.uniform(0.1, 10, size=(30, 1))
    np.testing.assert_allclose(b.knn_distance(scaled, k=4), b.knn_distance(f, k=4), atol=1e-5)


# Bad input


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_named(data, name, value):
    for argument in CALLS[name]:
        if data[argument].dtype.kind != "f":
            continue
        spoilt = data | {argument: data[argument].copy()}
        spoilt[argument].flat[7 if argument != "bias" else 1] = value
        with pytest.raises(ValueError, match=argument):
            call(name, spoilt)


@pytest.mark.parametrize("name", [name for name, arguments in CALLS.items() if arguments[-1].endswith("labels")])
def test_labels_are_checked(data, name):
    argument = CALLS[name][-1]
    with pytest.raises(TypeError, match=f"{argument} holds .*float64; give integer"):
        call(name, data | {argument: data[argument] * 1.0})
    with pytest.raises(ValueError, match=rf"{argument} has the shape \(3,\)"):
        call(name, data | {argument: data[argument][:3]})
    if "probs" in CALLS[name]:
        with pytest.raises(ValueError, match="labels is 4 in row 0; give class ids of probs, 0 to 3"):
            call(name, data | {argument: np.append(4, data[argument][1:])})


@pytest.mark.parametrize(
    "name", ["loss", "margin", "entropy", "least_confidence", "cwe", "tracin", "msp", "kl_matching"]
)
def test_logits_are_no_probabilities(data, name):
    with pytest.raises(ValueError, match="probs is no distribution"):
        call(name, data | {"probs": data["logits"]})


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("react", "weight"),
        ("react", "reference_features"),
        ("kl_matching", "reference_probs"),
        ("mahalanobis", "reference_features"),
    ],
)
def test_columns_that_differ_are_named(data, name, argument):
    fewer = data[argument][:, 1:]
    fewer = fewer / fewer.sum(1, keepdims=True) if argument.endswith("probs") else fewer
    with pytest.raises(ValueError, match=rf"{argument} has {fewer.shape[1]} columns"):
        call(name, data | {argument: fewer})


def test_rows_that_differ_are_named(data):
    with pytest.raises(ValueError, match="features has 59 rows where 60"):
        call("tracin", data | {"features": data["features"][1:]})
    with pytest.raises(ValueError, match="reference has 4 columns"):
        b.knn_distance(data["features"], data["reference_features"][:, 1:])


@pytest.mark.parametrize("name", ["knn_disagreement", "knn_distance", "local_outlier_factor"])
def test_k_must_leave_the_row_itself_out(data, name):
    call(name, data, k=N - 1)
    for k in (0, N):
        with pytest.raises(ValueError, match=rf"k={k} must lie in \[1, 59\]"):
            call(name, data, k=k)


def test_other_numbers_out_of_range(data):
    with pytest.raises(ValueError, match=r"k=46 must lie in \[1, 45\]"):
        b.knn_distance(data["features"], data["reference_features"], k=46)
    for size in (1, N + 1):
        with pytest.raises(ValueError, match=rf"size={size} must lie in \[2, 60\]"):
            b.iterative_sampling(data["features"], size=size)
    for percentile in (0, 101):
        with pytest.raises(ValueError, match=f"percentile={percentile} must lie"):
            call("react", data, percentile=percentile)
    with pytest.raises(ValueError, match=r"bias of shape \(3,\) must be 4 finite numbers"):
        call("react", data | {"bias": data["bias"][1:]})
