"""The scores that label cleaning and outlier detection are compared with (thesis sections 5.4.2 and 5.4.3).

Every function takes tensors or arrays (memory-mapped ones too) and returns a float64 tensor of shape (n,) on the CPU,
**high = bad**. Most work through a few thousand rows at a time; none holds an n x n matrix. Inputs that are not finite,
of another shape, no distributions, or with labels outside the classes raise a ValueError that names them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import check_numbers, check_whole
from .checks import as_features, as_labels, as_probs, as_tensor, chunks
from .pairs import unit

_TINY = torch.finfo(torch.float32).tiny  # 1.2e-38: below it float32 probabilities lose digits
_RIDGE = 1e-6  # of the mean variance


# Label scores: how badly the given label fits


def loss(probs: Any, labels: Any) -> Tensor:
    """-log p_y, the cross entropy of each row; p_y below 1.2e-38 counts as 1.2e-38, so that it is at most 87.4.

    probs: (n, C); labels: (n,) class ids.
    Chong et al., Detecting label errors using pre-trained language models, arXiv:2205.12702, 2022.
    """
    p, y = _given(probs, labels)
    return _by_rows(lambda p, y: -_of_label(p, y).clamp(min=_TINY).log(), p, y)


def margin(probs: Any, labels: Any) -> Tensor:
    """max_{c != y} p_c - p_y, in [-1, 1]; 0 where the given label ties with the best other one.

    probs: (n, C); labels: (n,) class ids.
    Northcutt et al., Confident learning, JAIR 2021, normalised margin.
    """
    p, y = _given(probs, labels)
    return _by_rows(lambda p, y: p.scatter(1, y[:, None], -torch.inf).amax(1) - _of_label(p, y), p, y)


def entropy(probs: Any) -> Tensor:
    """-sum_c p_c log p_c of probs (n, C), in [0, log C]; the label is not looked at."""
    return _by_rows(lambda p: torch.special.entr(p).sum(1), as_probs(probs))


def least_confidence(probs: Any) -> Tensor:
    """1 - max_c p_c of probs (n, C); the label is not looked at."""
    return _by_rows(lambda p: 1 - p.amax(1), as_probs(probs))


def cwe(probs: Any, labels: Any) -> Tensor:
    """Confidence-weighted entropy, -p_y / H(p), at most 0. An entropy below 1e-12 counts as 1e-12.

    probs: (n, C); labels: (n,) class ids.
    Kuan and Mueller, Model-agnostic label quality scoring to detect real-world label errors, ICML DataPerf 2022; this
    form is the one released with Neural Relation Graph, whose entropy can turn negative for a certain prediction.
    """
    p, y = _given(probs, labels)
    return _by_rows(lambda p, y: -_of_label(p, y) / torch.special.entr(p).sum(1).clamp(min=1e-12), p, y)


def tracin(features: Any, probs: Any, labels: Any) -> Tensor:
    """Squared length of f times that of onehot(y) - p: the influence of a row on its own loss, by the last layer.

    features: (n, d) what enters the last layer, not normalised. probs: (n, C); labels: (n,) class ids.
    Pruthi et al., Estimating training data influence by tracing gradient descent, NeurIPS 2020.
    """

    def rows(f: Tensor, p: Tensor, y: Tensor) -> Tensor:
        gradient = p - F.one_hot(y, p.shape[1])
        return f.square().sum(1) * gradient.square().sum(1)

    p, y = _given(probs, labels)
    return _by_rows(rows, as_features(features, rows=len(p)), p, y)


def knn_disagreement(features: Any, labels: Any, k: int = 50) -> Tensor:
    """Share of the k nearest other rows, by cosine, that carry another label; in [0, 1].

    Args:
        features: (n, d); a zero row is equally far from every other. labels: (n,) integers.
        k: in [1, n - 1].
    """
    x = as_features(features)
    y = _integers(labels, len(x), "labels")
    nearest = torch.from_numpy(_neighbours(x, None, k)[1])
    return (y[nearest] != y[:, None]).double().mean(1)


# Outlier scores: how badly the row fits the data, whatever its label


def msp(probs: Any) -> Tensor:
    """One minus the maximum softmax probability of probs (n, C); the same number as :func:`least_confidence`.

    Hendrycks and Gimpel, A baseline for detecting misclassified and out-of-distribution examples, ICLR 2017.
    """
    return least_confidence(probs)


def max_logit(logits: Any) -> Tensor:
    """-max_c z_c of logits z (n, C).

    Hendrycks et al., Scaling out-of-distribution detection for real-world settings, ICML 2022.
    """
    return _by_rows(lambda z: -z.amax(1), as_features(logits, "logits"))


def energy(logits: Any) -> Tensor:
    """-log sum_c exp(z_c) of logits z (n, C).

    Liu et al., Energy-based out-of-distribution detection, NeurIPS 2020, at temperature 1.
    """
    return _by_rows(lambda z: -z.logsumexp(1), as_features(logits, "logits"))


def react(features: Any, weight: Any, bias: Any, reference_features: Any, percentile: float = 90) -> Tensor:
    """The energy of W min(f, c) + b, with c the percentile of all activations of the reference together.

    Args:
        features: (n, d) what enters the last layer. weight: (C, d) and bias: (C,) or None, of the last layer.
        reference_features: (m, d) of data known to belong.
        percentile: in (0, 100]; the paper takes 90.

    Sun et al., ReAct: Out-of-distribution detection with rectified activations, NeurIPS 2021.
    """
    x = as_features(features)
    w = _same_width(as_features(weight, "weight"), x, "weight").double().cpu()
    reference = _same_width(as_features(reference_features, "reference_features"), x, "reference_features")
    b = torch.zeros(len(w)) if bias is None else as_tensor(bias, "bias").cpu()
    if b.shape != (len(w),) or not b.isfinite().all():
        raise ValueError(f"bias of shape {tuple(b.shape)} must be {len(w)} finite numbers, one for each row of weight")
    check_numbers(percentile=percentile)
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile={percentile} must lie in (0, 100]; the paper takes 90")
    ceiling = float(np.percentile(_array(reference), percentile))
    return _by_rows(lambda f: -(f.clamp(max=ceiling) @ w.T + b.double()).logsumexp(1), x)


def kl_matching(probs: Any, reference_probs: Any) -> Tensor:
    """Least Kullback-Leibler divergence of p from the d_k, d_k being the mean prediction of the reference rows that are
    predicted as class k.

    A class that no reference row is predicted as is left out. Entries of d_k below 1.2e-38 count as 1.2e-38.

    probs: (n, C). reference_probs: (m, C) of data known to belong.
    Hendrycks et al., Scaling out-of-distribution detection for real-world settings, ICML 2022.
    """
    p = as_probs(probs)
    reference = _same_width(as_probs(reference_probs, "reference_probs"), p, "reference_probs")
    typical = _class_means(reference, reference.argmax(1).cpu(), p.shape[1])
    log_typical = typical.clamp(min=_TINY).log()  # the zeros of a class never predicted: as far as any other can be

    def rows(p: Tensor) -> Tensor:
        return (-torch.special.entr(p).sum(1, keepdim=True) - p @ log_typical.T).amin(1).clamp(min=0)

    return _by_rows(rows, p)


def mahalanobis(features: Any, reference_features: Any, reference_labels: Any) -> Tensor:
    """min_c (f - mu_c)^T S^-1 (f - mu_c), with the class means and the covariance around them of the reference.

    S gets a ridge of 1e-6 of its mean variance, so that constant or dependent features do not break it.

    features: (n, d). reference_features: (m, d) of data known to belong. reference_labels: (m,) integers.
    Lee et al., A simple unified framework for detecting out-of-distribution samples, NeurIPS 2018.
    """
    x = as_features(features)
    reference = _same_width(as_features(reference_features, "reference_features"), x, "reference_features")
    ids, y = _integers(reference_labels, len(reference), "reference_labels").unique(return_inverse=True)
    means = _class_means(reference, y, len(ids))
    covariance = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for part in chunks(len(reference)):
        residual = reference[part].cpu().double() - means[y[part]]
        covariance += residual.T @ residual / len(reference)
    covariance.diagonal().add_(_RIDGE * covariance.diagonal().mean().clamp(min=_TINY))
    factor = torch.linalg.cholesky(covariance)

    def white(f: Tensor) -> Tensor:  # here S is the identity
        return torch.linalg.solve_triangular(factor, (f - means[0]).T, upper=False).T

    centres = white(means)
    return _by_rows(lambda f: torch.cdist(white(f), centres).amin(1).square(), x)


def knn_distance(features: Any, reference: Any = None, k: int = 50) -> Tensor:
    """Euclidean distance of unit rows to the k-th nearest row of the reference; in [0, 2].

    Args:
        features: (n, d); a zero row stays zero.
        reference: (m, d) of data known to belong; None compares the rows with each other, each without itself.
        k: in [1, m], or [1, n - 1] without a reference.

    Sun et al., Out-of-distribution detection with deep nearest neighbors, ICML 2022.
    """
    x = as_features(features)
    other = None if reference is None else _same_width(as_features(reference, "reference"), x, "reference")
    return torch.from_numpy(_neighbours(x, other, k)[0][:, -1]).double()


def iterative_sampling(features: Any, size: int = 20, generator: torch.Generator | None = None) -> Tensor:
    """Euclidean distance to the nearest of ``size`` rows, drawn once without replacement; never to itself.

    The name is the thesis'; the paper's own scheme draws one sample for all rows, as here.

    Args:
        features: (n, d).
        size: in [2, n]; the paper takes 20.
        generator: on the CPU; None draws from torch's global state.

    Sugiyama and Borgwardt, Rapid distance-based outlier detection via sampling, NeurIPS 2013.
    """
    x = as_features(features)
    check_whole(size=size)
    if not 2 <= size <= len(x):
        raise ValueError(f"size={size} must lie in [2, {len(x)}], the number of rows; the paper takes 20")
    drawn = torch.randperm(len(x), generator=generator)[:size]
    sample = x[drawn.to(x.device)].cpu().double()

    def rows(f: Tensor, row: Tensor) -> Tensor:
        distance = torch.cdist(f, sample, compute_mode="donot_use_mm_for_euclid_dist")
        return distance.masked_fill(row[:, None] == drawn, torch.inf).amin(1)

    return _by_rows(rows, x, torch.arange(len(x)))


def local_outlier_factor(features: Any, k: int = 20) -> Tensor:
    """Mean density of the k nearest neighbours over the row's own density; about 1 inside a cluster.

    Args:
        features: (n, d), compared by Euclidean distance.
        k: in [1, n - 1].

    Breunig et al., LOF: Identifying density-based local outliers, SIGMOD 2000; scikit-learn's ``LocalOutlierFactor``.
    """
    from sklearn.neighbors import LocalOutlierFactor  # half a second

    x = as_features(features)
    _check_k(k, len(x) - 1)
    # float64: squares of large features overflow
    return torch.from_numpy(-LocalOutlierFactor(n_neighbors=k).fit(_array(x.double())).negative_outlier_factor_)


def _given(probs: Any, labels: Any) -> tuple[Tensor, Tensor]:
    p = as_probs(probs)
    return p, as_labels(labels, len(p), p.shape[1])


def _integers(labels: Any, rows: int, name: str) -> Tensor:
    """(rows,) int64 on the CPU. Without probabilities any integers can name the classes."""
    y = as_tensor(labels, name).cpu()
    if y.is_floating_point() or y.dtype == torch.bool:
        raise TypeError(f"{name} holds {y.dtype}; give integer class ids")
    if y.shape != (rows,):
        raise ValueError(f"{name} has the shape {tuple(y.shape)} where ({rows},) was expected; give one class a row")
    return y.long()


def _same_width(x: Tensor, features: Tensor, name: str) -> Tensor:
    if x.shape[1] != features.shape[1]:
        raise ValueError(f"{name} has {x.shape[1]} columns, the scored rows {features.shape[1]}; give the same columns")
    return x


def _check_k(k: int, most: int) -> None:
    check_whole(k=k)
    if not 1 <= k <= most:
        raise ValueError(f"k={k} must lie in [1, {most}], the rows that there are to compare with; give a smaller k")


def _by_rows(score: Callable[..., Tensor], *columns: Tensor) -> Tensor:
    """(n,) scores of a few rows at a time, floating columns as float64."""

    def load(x: Tensor, part: slice) -> Tensor:
        return x[part].cpu().double() if x.is_floating_point() else x[part].cpu()

    return torch.cat([score(*(load(x, part) for x in columns)) for part in chunks(len(columns[0]))])


def _of_label(p: Tensor, y: Tensor) -> Tensor:
    return p.gather(1, y[:, None]).squeeze(1)


def _array(x: Tensor) -> np.ndarray:
    """A NumPy array; half precision, which NumPy or scikit-learn lack, as float32."""
    return (x if x.dtype in (torch.float32, torch.float64) else x.float()).cpu().numpy()


def _class_means(x: Tensor, y: Tensor, classes: int) -> Tensor:
    """(C, d) float64 means, zero for an empty class."""
    total = torch.zeros(classes, x.shape[1], dtype=torch.float64)
    for part in chunks(len(x)):
        total.index_add_(0, y[part], x[part].cpu().double())
    return total / y.bincount(minlength=classes).clamp(min=1)[:, None]


def _neighbours(x: Tensor, reference: Tensor | None, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(n, k) distances and rows of the nearest unit rows, nearest first; without a reference never itself."""
    from sklearn.neighbors import NearestNeighbors

    _check_k(k, len(x) - 1 if reference is None else len(reference))
    search = NearestNeighbors(n_neighbors=k, algorithm="brute")  # on unit rows, in the order of the cosine
    search.fit(unit(x if reference is None else reference, None).cpu().numpy())
    return search.kneighbors(None if reference is None else unit(x, None).cpu().numpy())
