"""Boxes stay untouched, everything else changes."""

import pytest
import torch
from dataopt.core.evaluation import background_error, noisy_background, replace_background, top1_error

from .conftest import quadrants, seeded


def outside(boxes, side=16):
    mask = torch.ones(len(boxes), 1, side, side, dtype=torch.bool)
    for i, (left, top, right, bottom) in enumerate(boxes.tolist()):
        mask[i, :, top:bottom, left:right] = False
    return mask


def test_replaced_backgrounds_are_whole_other_images():
    x, _, boxes = quadrants(9, 0)
    out = replace_background(x, boxes, seeded(1))
    mask = outside(boxes).expand_as(x)
    assert torch.equal(out[~mask], x[~mask])
    taken = []
    for i in range(9):
        here = mask[i]
        sources = [j for j in range(9) if torch.equal(out[i][here], x[j][here])]
        assert len(sources) == 1 and sources != [i]
        taken += sources
    assert sorted(taken) == list(range(9))
    assert torch.equal(out, replace_background(x, boxes, seeded(1)))
    assert not torch.equal(out, replace_background(x, boxes, seeded(2)))


def test_noise_stays_outside_the_boxes_and_in_the_pixels():
    x, _, boxes = quadrants(30, 1)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    shift, scale = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
    normalised = (x / 2 + 0.4 - shift) / scale
    out = noisy_background(normalised, boxes, 0.05, mean, std, seeded(0))
    mask = outside(boxes).expand_as(x)
    assert torch.equal(out[~mask], normalised[~mask])
    moved = (out - normalised) * scale
    assert float(moved[mask].std()) == pytest.approx(0.05, rel=0.03) and abs(float(moved[mask].mean())) < 0.002
    loud = noisy_background(normalised, boxes, 2.0, mean, std, seeded(0)) * scale + shift
    assert loud.min() >= -1e-5 and loud.max() <= 1 + 1e-5
    assert torch.equal(out, noisy_background(normalised, boxes, 0.05, mean, std, seeded(0)))


def test_several_boxes_and_fractions_of_pixels():
    x = torch.rand(2, 3, 8, 8)
    boxes = [torch.tensor([[0, 0, 2, 2], [5, 6, 8, 8]]), torch.tensor([[1.5, 2.5, 3.5, 4.5]])]
    changed = (noisy_background(x, boxes, 0.3, generator=seeded(0)) != x).any(1)
    expected = torch.ones(2, 8, 8, dtype=torch.bool)
    expected[0, :2, :2] = expected[0, 6:, 5:] = expected[1, 2:5, 1:4] = False
    assert torch.equal(changed, expected)


def test_errors_of_the_three_versions(trained):
    x, y, boxes = quadrants(200, 3)
    batches = [(x[:120], y[:120], boxes[:120]), (x[120:], y[120:], boxes[120:])]
    result = background_error(trained, iter(batches), sigma=0.5, generator=seeded(0))
    assert result.clean == top1_error(trained, [(x, y)])
    g = seeded(0)
    replaced, noisy = [], []
    for part, _, of_part in batches:
        replaced.append(replace_background(part, of_part, g))
        noisy.append(noisy_background(part, of_part, 0.5, generator=g))
    assert result.replaced == pytest.approx(top1_error(trained, [(torch.cat(replaced), y)]))
    assert result.noisy == pytest.approx(top1_error(trained, [(torch.cat(noisy), y)]))
    assert result.replaced > result.clean  # another image's square is as bright as one's own


def test_bad_input(trained):
    x, _, boxes = quadrants(4, 0)
    with pytest.raises(ValueError, match="boxes are those of 3 images, x holds 4"):
        replace_background(x, boxes[:3])
    for bad in ([5, 5, 5, 9], [-1, 0, 4, 4], [0, 0, 17, 4], [0, 9, 4, 8], [float("nan"), 0, 4, 4]):
        with pytest.raises(ValueError, match="16 by 16 pixels"):
            noisy_background(x, [torch.tensor(bad)] * 4)
    with pytest.raises(ValueError, match="16 by 16 pixels"):
        replace_background(x, torch.zeros(4, 5))
    with pytest.raises(ValueError, match="16 by 16 pixels"):
        replace_background(x, [torch.zeros(0, 4)] * 4)
    with pytest.raises(ValueError, match="batch of one"):
        replace_background(x[:1], boxes[:1])
    with pytest.raises(ValueError, match="sigma=-1"):
        noisy_background(x, boxes, -1)
    with pytest.raises(ValueError, match=r"not in \[0, 1\]"):
        noisy_background(3 * x, boxes)
    with pytest.raises(ValueError, match="batches is empty"):
        background_error(trained, [])
