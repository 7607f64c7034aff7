"""Chapter 5 written out in float64 with whole n x n matrices, and random problems."""

import torch
from torch import Tensor


def kernel_matrix(features, probs, similarity="cosine", compatible=True, t=4.0, cut=0.03) -> Tensor:
    """(n, n) eq. 5.4, diagonal included; products of at most `cut` are no edge. Zero rows have no direction."""
    f, p = features.double(), probs.double()
    length = f.norm(dim=1, keepdim=True)
    f = torch.where(length > 0, f / length, 0.0)
    if similarity == "cosine":
        s = (f @ f.T).clamp(min=0)
    else:
        s = torch.exp(-(torch.cdist(f, f, compute_mode="donot_use_mm_for_euclid_dist") ** 2))
    k = s * (p @ p.T) if compatible else s
    return torch.where(k > cut, k, 0.0) ** t


def edges(k: Tensor, labels: Tensor) -> Tensor:
    """(n, n) w = -r of eq. 5.1, w(i, i) = 0."""
    w = torch.where(labels[:, None] == labels[None], -k, k)
    return w.fill_diagonal_(0)


def algorithm_4(w: Tensor, threshold: float, corrections: int) -> tuple[Tensor, Tensor]:
    """Scores and set, loop by loop as printed."""
    first = w.sum(1)
    s = first
    for _ in range(corrections):
        noisy = s > threshold
        s = torch.stack([first[i] - 2 * w[i][noisy].sum() for i in range(len(w))])
    return s, s > threshold


def objective(w: Tensor, noisy: Tensor, threshold: float) -> float:
    """Eq. 5.2: the cut between the set and the rest, less lambda for each member."""
    return float(w[noisy][:, ~noisy].sum()) - threshold * int(noisy.sum())


def released(features, probs, labels, t=4, cut=0.03, share=0.05, iterations=2) -> tuple[Tensor, Tensor]:
    """The authors' form: reliability (low is bad) with the diagonal, and the set of the last scores."""
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    base = unit @ unit.T * (probs.double() @ probs.double().T)
    base = base * (base.abs() > cut)
    sign = (labels[:, None] == labels).double() * 2 - 1
    relation = sign * base.clamp(min=0) ** t
    start = score = relation.sum(1)
    for step in range(iterations):
        noisy = score / score.abs().max() < -share
        if step + 1 < iterations:
            score = start - 2 * relation[:, noisy].sum(1)
    return score, noisy


def problem(n=400, d=16, classes=5, seed=0, sharp=3.0, flips=0.08) -> tuple[Tensor, Tensor, Tensor]:
    """Features around one centre a class, a classifier's probabilities, and labels of which a share is wrong."""
    g = torch.Generator().manual_seed(seed)
    truth = torch.randint(classes, (n,), generator=g)
    centres = torch.randn(classes, d, generator=g)
    features = centres[truth] + 0.8 * torch.randn(n, d, generator=g)
    logits = sharp * torch.nn.functional.one_hot(truth, classes) + torch.randn(n, classes, generator=g)
    moved = torch.rand(n, generator=g) < flips
    labels = torch.where(moved, (truth + torch.randint(1, classes, (n,), generator=g)) % classes, truth)
    return features, logits.softmax(1), labels
