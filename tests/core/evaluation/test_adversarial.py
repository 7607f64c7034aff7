"""FGSM against its formula, PGD's ball and strength."""

import pytest
import torch
import torch.nn.functional as F
from dataopt.core.evaluation import fgsm, fgsm_error, pgd, pgd_error, top1_error
from torch import nn

from .conftest import quadrants, seeded

EPS, STEP = 8 / 255, 2 / 255
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)


def channel(values):
    return torch.tensor(values).view(3, 1, 1)


def normalised(pixels):
    return (pixels - channel(MEAN)) / channel(STD)


def pixels_of(x):
    return x * channel(STD) + channel(MEAN)


def test_fgsm_on_a_linear_model_is_the_sign_of_the_weights():
    # two classes: the gradient of the cross-entropy is (p_other) * (w_other - w_y), of known sign
    linear = nn.Linear(3 * 4 * 4, 2)
    model = nn.Sequential(nn.Flatten(), linear)
    pixels = torch.rand(5, 3, 4, 4, generator=seeded(0))
    y = torch.tensor([0, 1, 1, 0, 1])
    moved = pixels_of(fgsm(model, normalised(pixels), y, EPS, MEAN, STD))
    direction = (linear.weight[1 - y] - linear.weight[y]).sign().view_as(pixels)
    torch.testing.assert_close(moved, (pixels + EPS * direction).clamp(0, 1), atol=1e-6, rtol=0)


def test_fgsm_without_normalisation_and_with_eps_zero(trained):
    x, y, _ = quadrants(8, 1)
    moved = fgsm(trained, x, y, EPS)
    assert moved.min() >= 0 and 0 < (moved - x).abs().max() <= EPS + 1e-6
    assert torch.equal(fgsm(trained, x, y, 0.0), x)
    assert fgsm_error(trained, [(x, y)], 0.0) == top1_error(trained, [(x, y)])


@pytest.mark.parametrize("steps", [1, 7])
def test_pgd_stays_in_the_ball_and_in_the_pixels(trained, steps):
    pixels, y, _ = quadrants(16, 2)
    moved = pixels_of(pgd(trained, normalised(pixels), y, EPS, STEP, steps, MEAN, STD, seeded(0)))
    assert (moved - pixels).abs().max() <= EPS + 1e-6
    assert (moved - pixels).abs().mean() > EPS / 4
    assert moved.min() >= -1e-6 and moved.max() <= 1 + 1e-6


def test_pgd_takes_the_steps_of_its_definition(trained):
    x, y, _ = quadrants(6, 3)
    trained.eval()
    moved = (x + torch.empty(x.shape).uniform_(-EPS, EPS, generator=seeded(4))).clamp(0, 1)
    for _ in range(3):
        moved.requires_grad_()
        gradient = torch.autograd.grad(F.cross_entropy(trained(moved), y), moved)[0]
        moved = (moved.detach() + STEP * gradient.sign()).minimum(x + EPS).maximum(x - EPS).clamp(0, 1)
    torch.testing.assert_close(pgd(trained, x, y, EPS, STEP, 3, generator=seeded(4)), moved)


def test_pgd_is_no_weaker_than_fgsm_and_both_hurt(trained):
    x, y, _ = quadrants(200, 5)
    batches = [(x[:128], y[:128]), (x[128:], y[128:])]
    clean = top1_error(trained, batches)
    eps = 0.15
    one = fgsm_error(trained, batches, eps)
    several = pgd_error(trained, batches, eps, eps / 4, 10, generator=seeded(0))
    assert clean < 0.02 < 0.1 < one <= several
    trained.eval()
    with torch.no_grad():
        losses = [
            F.cross_entropy(trained(z), y)
            for z in (x, fgsm(trained, x, y, eps), pgd(trained, x, y, eps, eps / 4, 10, generator=seeded(0)))
        ]
    assert losses[0] < losses[1] < losses[2]


def test_the_start_comes_from_the_generator(trained):
    x, y, _ = quadrants(4, 6)
    a, b, c = (pgd(trained, x, y, steps=1, generator=seeded(n)) for n in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_bad_input(trained):
    x, y, _ = quadrants(4, 0)
    with pytest.raises(ValueError, match=r"eps=8 must lie in \[0, 1\]"):
        fgsm(trained, x, y, 8)
    with pytest.raises(ValueError, match=r"eps=-0\.1"):
        fgsm_error(trained, [(x, y)], -0.1)
    with pytest.raises(ValueError, match="step=-1"):
        pgd(trained, x, y, step=-1)
    with pytest.raises(ValueError, match="steps=0"):
        pgd(trained, x, y, steps=0)
    with pytest.raises(ValueError, match="give the mean= and std="):
        fgsm(trained, normalised(x), y)
    with pytest.raises(ValueError, match="go together"):
        fgsm(trained, x, y, mean=MEAN)
    with pytest.raises(ValueError, match="non-finite"):
        fgsm(trained, x / 0, y)
