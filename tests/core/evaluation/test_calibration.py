"""Calibration error and reliability by hand, and their picture."""

import numpy as np
import pytest
import torch
from dataopt.core.evaluation import expected_calibration_error, reliability
from dataopt.plots import show_reliability, to_png

from .conftest import seeded

# confidences .95, .85, .85, .55, right only in the second and the last; five bins of .2
P = torch.tensor([[0.95, 0.05], [0.85, 0.15], [0.15, 0.85], [0.55, 0.45]])
LOGITS, LABELS = P.log(), torch.tensor([1, 0, 0, 0])


def test_by_hand():
    r = reliability(LOGITS, LABELS, 5)
    assert r.share.tolist() == [0, 0, 0.25, 0, 0.75]
    assert r.confidence[[2, 4]].tolist() == pytest.approx([0.55, 2.65 / 3], abs=1e-6)
    assert r.accuracy[[2, 4]].tolist() == pytest.approx([1, 1 / 3])
    assert torch.isnan(r.confidence[[0, 1, 3]]).all() and torch.isnan(r.accuracy[[0, 1, 3]]).all()
    expected = 0.25 * (1 - 0.55) + 0.75 * (2.65 / 3 - 1 / 3)
    assert expected_calibration_error(LOGITS, LABELS, 5) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("scale", [0.3, 3, 100])
def test_error_is_the_weighted_gap_of_the_diagram(scale):
    logits = scale * torch.randn(500, 7, generator=seeded(0))
    labels = torch.randint(0, 7, (500,), generator=seeded(1))
    r = reliability(logits, labels)
    gap = (r.share * (r.accuracy - r.confidence).abs()).nansum()
    assert float(r.share.sum()) == pytest.approx(1)
    assert expected_calibration_error(logits, labels) == pytest.approx(float(gap), abs=1e-6)


def test_labels_drawn_from_the_probabilities_are_calibrated():
    logits = 2 * torch.randn(20000, 5, generator=seeded(2))
    labels = torch.multinomial(logits.softmax(1), 1, generator=seeded(3)).flatten()
    assert expected_calibration_error(logits, labels) < 0.02
    assert expected_calibration_error(3 * logits, labels) > 0.1  # over-confident
    r = reliability(logits / 3, labels)  # under-confident
    assert (r.accuracy > r.confidence)[r.share > 0.01].all()


def test_certain_predictions_belong_to_the_last_bin():
    logits = torch.tensor([[1000.0, 0], [1000.0, 0], [3.0, 0], [3.0, 0]])  # 1 and .953
    labels = torch.tensor([0, 1, 0, 0])
    r = reliability(logits, labels, 10)
    assert r.share.tolist() == [0] * 9 + [1]
    gap = abs(3 / 4 - (1 + 1 + 2 * float(torch.tensor(3.0).sigmoid())) / 4)
    assert expected_calibration_error(logits, labels, 10) == pytest.approx(gap, abs=1e-6)


def test_the_picture_shows_full_bins_only():
    r = reliability(LOGITS, LABELS, 5)
    curve = tuple(v.numpy() for v in (r.confidence, r.accuracy, r.share))
    figure = show_reliability({"plain": curve, "mixed": curve}, {"plain": 0.0389, "mixed": 0.019})
    assert [ax.get_title() for ax in figure.axes] == ["plain, ECE 3.9%", "mixed, ECE 1.9%"]
    dots = figure.axes[0].collections[0]
    np.testing.assert_allclose(dots.get_offsets(), [[0.55, 1], [2.65 / 3, 1 / 3]], atol=1e-6)
    assert dots.get_sizes()[1] > dots.get_sizes()[0]
    assert to_png(figure)[:4] == b"\x89PNG"
    assert show_reliability({"plain": curve}).axes[0].get_title() == "plain"


def test_bad_input():
    for function in (expected_calibration_error, reliability):
        with pytest.raises(ValueError, match="bins=0"):
            function(LOGITS, LABELS, 0)
        with pytest.raises(ValueError, match="class ids"):
            function(LOGITS, LABELS[:3])
        with pytest.raises(ValueError, match="labels range from 0 to 2"):
            function(LOGITS, LABELS * 2)
        with pytest.raises(ValueError, match="non-finite"):
            function(LOGITS / 0, LABELS)
