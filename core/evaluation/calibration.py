"""Whether a classifier is right as often as it says (thesis section 4.5.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import check_whole
from ..extras import optional
from .predictions import check_labels


@dataclass(frozen=True)
class Reliability:
    """Predictions in bins of their confidence, (bins,) float64 each.

    Attributes:
        confidence: mean of the highest probability; NaN in an empty bin.
        accuracy: share of right predictions; NaN in an empty bin.
        share: of all predictions; sums to one.
    """

    confidence: Tensor
    accuracy: Tensor
    share: Tensor


def expected_calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Mean distance between confidence and accuracy over bins of equal width, weighted by their predictions.

    Args:
        logits: (N, K).
        labels: (N,) class ids.

    Returns:
        In [0, 1]; torchmetrics computes it.

    Raises:
        TypeError: no tensors, class ids or bins that are no integers.
        ValueError: other shapes, one class only, class ids that the logits do not have, non-finite logits, or bins
            outside 1 to 10,000.
        ModuleNotFoundError: the extra ``eval`` is not installed.

    References:
        Guo et al., "On calibration of modern neural networks", ICML 2017.
    """
    functional = optional("torchmetrics.functional.classification", "eval")
    probabilities = _probabilities(logits, labels, bins)
    # torchmetrics, which counts in float32, would put a probability of one into a bin of its own
    probabilities = probabilities.clamp_max(1 - 2**-24)
    error = functional.multiclass_calibration_error(probabilities, labels.long(), probabilities.shape[1], n_bins=bins)
    return float(error)


def reliability(logits: Tensor, labels: Tensor, bins: int = 15) -> Reliability:
    """What a reliability diagram shows (Figure 4.4); ``dataopt.plots.show_reliability`` draws it.

    Args:
        logits: (N, K).
        labels: (N,) class ids.
        bins: of equal width.

    Raises:
        TypeError, ValueError: as of :func:`expected_calibration_error`.
    """
    confidence, predicted = _probabilities(logits, labels, bins).max(1)
    place = (confidence * bins).long().clamp_max(bins - 1)
    count = torch.bincount(place, minlength=bins).double()
    total_confidence = torch.bincount(place, confidence, bins)
    right = torch.bincount(place, (predicted == labels).double(), bins)
    return Reliability(total_confidence / count, right / count, count / len(labels))


def _probabilities(logits: Tensor, labels: Tensor, bins: int) -> Tensor:
    check_labels(logits, labels)
    check_whole(bins=bins)
    if not 1 <= bins <= 10_000:
        raise ValueError(f"bins={bins} must lie in 1 to 10000; 15 is usual")
    if logits.shape[1] < 2:
        raise ValueError("logits are those of one class, which is always right; give two or more")
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("logits hold non-finite values; look for the inputs that make them")
    return logits.detach().double().softmax(1)
