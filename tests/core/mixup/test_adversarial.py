"""Algorithm 2: who is perturbed, by how much, and where the perturbation ends up."""

import pytest
import torch
from dataopt.core.mixup import Adversarial, PuzzleMix
from dataopt.core.mixup.adversarial import Noise

from .conftest import smooth_saliency

EPS, STEP = 10 / 255, 12 / 255
MEAN, STD = [0.5, 0.4, 0.3], [0.25, 0.2, 0.3]


def seeded(n):
    return torch.Generator().manual_seed(n)


def pixels(x):
    return x * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)


@pytest.fixture
def x():
    return (torch.rand(6, 3, 16, 16, generator=seeded(0)) - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(
        3, 1, 1
    )


def mixer(**options):
    options = {"p": 1.0, "eps": EPS, "step": STEP, **options}
    return PuzzleMix(6, adversarial=Adversarial(**options), transport=None, mean=MEAN, std=STD)


def test_start_stays_in_the_ball_and_in_the_pixels(x):
    noisy, noise = mixer().adversarial.start(x, seeded(1))
    moved = pixels(noisy) - pixels(x)
    assert noise.on == (True, True)
    assert moved.abs().max() <= EPS + 1e-6 and moved.abs().mean() > 0.3 * EPS
    assert pixels(noisy).min() >= -1e-6 and pixels(noisy).max() <= 1 + 1e-6
    torch.testing.assert_close(moved, noise.kappa, atol=1e-6, rtol=0)


def test_draws_are_two_bernoullis_or_a_shared_one(x):
    free = [mixer(p=0.3).adversarial.start(x[:1], seeded(n))[1].on for n in range(400)]
    shared = [mixer(p=0.3, shared_draw=True).adversarial.start(x[:1], seeded(n))[1].on for n in range(400)]
    assert {(False, False), (True, False), (False, True), (True, True)} == set(free)
    assert {(False, False), (True, True)} == set(shared)
    for side in (0, 1):
        assert 0.22 < sum(on[side] for on in free) / 400 < 0.38
    same, noise = mixer(p=0.0).adversarial.start(x)
    assert same is x and noise.kappa is None


def run(x, on_seed, gradient, **options):
    mix = mixer(**options)
    _, noise = mix.adversarial.start(x, seeded(on_seed))
    arguments = {"partner": torch.arange(6).roll(1), "lam": 0.5, "grid": 4}
    s = smooth_saliency(6, 16, 16, 1)
    m = mix(x, torch.arange(6), s, noise=noise, gradient=gradient, generator=seeded(3), **arguments)
    plain = mix(x, torch.arange(6), s, generator=seeded(3), **arguments)
    return m, plain, noise


def test_full_step_without_decay_is_clipped_to_the_ball(x):
    gradient = torch.randn(x.shape, generator=seeded(5))
    m, plain, noise = run(x, 1, gradient, decay=False)
    assert torch.equal(m.mask, plain.mask) and torch.equal(m.targets, plain.targets)
    kappa = (noise.kappa + STEP * gradient.sign()).clamp(-EPS, EPS)
    sides = [(pixels(x) + kappa).clamp(0, 1), (pixels(x) + kappa).clamp(0, 1)[m.partner]]
    share = m.mask.unsqueeze(1)
    torch.testing.assert_close(pixels(m.inputs), share * sides[0] + (1 - share) * sides[1], atol=1e-6, rtol=0)


def test_only_the_drawn_side_is_perturbed(x):
    seed = next(n for n in range(50) if mixer(p=0.5).adversarial.start(x, seeded(n))[1].on == (False, True))
    m, plain, _ = run(x, seed, torch.ones_like(x), p=0.5, decay=False)
    changed = (m.inputs - plain.inputs).abs().amax(1)
    assert changed[m.mask == 1].max() == 0
    assert changed[m.mask < 1].mean() > 0


def test_decay_scales_by_one_draw_per_batch(x):
    m, plain, noise = run(x, 1, torch.ones_like(x))
    inside = (pixels(x) > EPS) & (pixels(x) < 1 - EPS)
    full = (noise.kappa + STEP).clamp(-EPS, EPS)
    only_first = (m.mask == 1).unsqueeze(1) & inside
    delta = ((pixels(m.inputs) - pixels(plain.inputs)) / full)[only_first]
    assert delta.max() - delta.min() < 1e-3 and 0 < delta.mean() < 1


@pytest.mark.parametrize("channels", [1, 3])
def test_sequences_are_perturbed_as_images_of_one_row(channels):
    x = torch.rand(6, channels, 32, generator=seeded(0))
    saliency, gradient = torch.rand(6, 32, generator=seeded(1)), torch.randn(x.shape, generator=seeded(2))
    mix = PuzzleMix(6, adversarial=Adversarial(1.0, EPS, STEP), transport=None, gamma=0.0)
    _, noise = mix.adversarial.start(x, seeded(3))
    found = mix(x, torch.arange(6), saliency, noise=noise, gradient=gradient, generator=seeded(4), grid=(1, 4))
    image = Noise(noise.on, noise.kappa.unsqueeze(2))
    wide = mix(
        x.unsqueeze(2), torch.arange(6), saliency.unsqueeze(1), noise=image, gradient=gradient.unsqueeze(2),
        generator=seeded(4), grid=(1, 4),
    )  # fmt: skip
    assert found.inputs.shape == x.shape and torch.equal(found.inputs, wide.inputs.squeeze(2))


@pytest.mark.parametrize(("name", "value"), [("p", 1.5), ("eps", -0.1), ("step", -1.0)])
def test_bad_arguments(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        Adversarial(**{"p": 0.1, "eps": EPS, "step": STEP, name: value})


def test_an_input_that_is_not_finite_is_refused():
    x = torch.rand(2, 3, 4, 4)
    x[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"x holds non-finite values in samples \[1\]"):
        Adversarial(p=0.5, eps=0.1, step=0.1).start(x)
