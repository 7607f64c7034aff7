"""AugMix images, and the loss that AugMix trains on."""

import math

import pytest
import torch
from dataopt.core.mixup import PuzzleMix, augmix, jensen_shannon_loss
from torchvision.transforms import v2

from .conftest import smooth_saliency

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)


def seeded(n):
    return torch.Generator().manual_seed(n)


@pytest.fixture
def x():
    """Smooth colour, uint8."""
    return (255 * smooth_saliency(6 * 3, 16, 16, 0).view(6, 3, 16, 16) * 40).clamp(0, 255).to(torch.uint8)


def test_each_image_has_draws_of_its_own_and_the_generator_decides(x):
    same = x[:1].expand(6, -1, -1, -1)
    state = torch.get_rng_state()
    out = augmix(same, seeded(0))
    assert torch.equal(torch.get_rng_state(), state)
    assert out.shape == same.shape and out.dtype == torch.uint8
    assert len({tuple(o.flatten().tolist()) for o in out}) == 6
    assert torch.equal(out, augmix(same, seeded(0)))
    assert not torch.equal(out, augmix(same, seeded(1)))


def test_severity_is_how_far_images_move(x):
    distances = [
        float(torch.stack([augmix(x, seeded(n), severity=s).float() - x for n in range(8)]).square().mean())
        for s in (1, 4, 10)
    ]
    assert 0 < distances[0] < distances[1] < distances[2]


def test_operations_and_severity_are_those_of_torchvision(x):
    for severity, all_ops in ((3, False), (3, True), (7, False)):
        transform = v2.AugMix(severity=severity, all_ops=all_ops)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=seeded(5))))
            expected = torch.stack([transform(image) for image in x])
        assert torch.equal(augmix(x, seeded(5), severity=severity, all_ops=all_ops), expected)
    assert torch.equal(augmix(x, seeded(5)), augmix(x, seeded(5), severity=3, all_ops=False))
    assert not torch.equal(augmix(x, seeded(5)), augmix(x, seeded(5), all_ops=True))


def test_normalised_inputs_are_augmented_as_pixels(x):
    shift, scale = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    expected = augmix(x, seeded(3)).float() / 255
    torch.testing.assert_close(augmix(x.float() / 255, seeded(3)), expected)
    normalised = (x.float() / 255 - shift) / scale
    torch.testing.assert_close(augmix(normalised, seeded(3), mean=MEAN, std=STD), (expected - shift) / scale)
    half = augmix(normalised.half(), seeded(3), mean=MEAN, std=STD)
    assert half.dtype == torch.float16


def test_mixing_two_augmix_images(x):
    images = augmix(x.float() / 255, seeded(0))
    arguments = {"partner": torch.arange(6).roll(1), "lam": 0.5, "grid": 4, "generator": seeded(1)}
    m = PuzzleMix(6, transport=None)(images, torch.arange(6), smooth_saliency(6, 16, 16, 1), **arguments)
    share = m.mask.unsqueeze(1)
    torch.testing.assert_close(m.inputs, share * images + (1 - share) * images[m.partner])
    assert 0.05 < float(m.mask.mean()) < 0.95


def test_loss_by_hand():
    p = torch.tensor([[0.9, 0.1], [0.5, 0.5]])
    q = torch.tensor([[0.3, 0.7], [0.5, 0.5]])
    r = torch.tensor([[0.6, 0.4], [0.5, 0.5]])
    middle = (p + q + r) / 3
    expected = sum((v * (v / middle).log()).sum(1) for v in (p, q, r)) / 3
    torch.testing.assert_close(jensen_shannon_loss(p.log(), q.log(), r.log()), expected.mean())
    assert jensen_shannon_loss(p, p, p).abs() < 1e-6


def test_loss_is_bounded_finite_and_pulls_the_views_together():
    apart = torch.tensor([[1000.0, 0, 0]]), torch.tensor([[0, 1000.0, 0]]), torch.tensor([[0, 0, 1000.0]])
    assert float(jensen_shannon_loss(*apart)) == pytest.approx(math.log(3), abs=1e-5)
    views = [torch.randn(4, 5, generator=seeded(n)).requires_grad_() for n in range(3)]
    loss = jensen_shannon_loss(*views)
    gradients = torch.autograd.grad(loss, views)
    closer = jensen_shannon_loss(*(v - g for v, g in zip(views, gradients, strict=True)))
    assert 0 < closer < loss
    assert jensen_shannon_loss(*(v.half() for v in views)).dtype == torch.float32


def test_bad_input(x):
    with pytest.raises(ValueError, match="severity=11"):
        augmix(x, severity=11)
    with pytest.raises(ValueError, match=r"\(B, 1, H, W\) or \(B, 3, H, W\)"):
        augmix(x[:, :2])
    with pytest.raises(ValueError, match="give the mean= and std="):
        augmix(2 * x.float() / 255 - 1)
    with pytest.raises(ValueError, match="from nan to nan"):
        augmix(torch.full((1, 3, 8, 8), float("nan")))
    with pytest.raises(ValueError, match="go together"):
        augmix(x.float() / 255, mean=MEAN)
    with pytest.raises(ValueError, match="uint8"):
        augmix(x, mean=MEAN, std=STD)
    with pytest.raises(ValueError, match="two or more"):
        jensen_shannon_loss(torch.rand(2, 3))
    with pytest.raises(ValueError, match="two or more"):
        jensen_shannon_loss(torch.rand(2, 3), torch.rand(2, 4))
