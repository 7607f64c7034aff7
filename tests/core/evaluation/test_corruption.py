"""Twelve corruptions: range, order of the severities, determinism, and the errors' arithmetic."""

import pytest
import torch
from dataopt.core.evaluation import CORRUPTIONS, CorruptionError, corrupt, corruption_error, top1_error
from skimage.data import astronaut
from skimage.transform import resize

from .conftest import quadrants, seeded

DRAWN = {"gaussian_noise", "shot_noise", "impulse_noise", "motion_blur", "fog", "elastic"}


@pytest.fixture(scope="module")
def x():
    """Two real images, not square: a face, and the same one mirrored and darker."""
    picture = torch.from_numpy(resize(astronaut(), (32, 48), anti_aliasing=True)).permute(2, 0, 1).float()
    return torch.stack([picture, 0.7 * picture.flip(2)])


def test_there_are_a_dozen():
    assert len(CORRUPTIONS) == len(set(CORRUPTIONS)) == 12


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_range_order_and_determinism(name, x):
    before = x.clone()
    distances = []
    for severity in (1, 2, 3, 4, 5):
        out = corrupt(x, name, severity, seeded(3))
        assert out.shape == x.shape and out.dtype == x.dtype
        assert out.min() >= 0 and out.max() <= 1
        assert torch.equal(out, corrupt(x, name, severity, seeded(3)))
        assert torch.equal(out, corrupt(x, name, severity, seeded(4))) == (name not in DRAWN)
        distances.append(float((out - x).square().mean().sqrt()))
    assert distances == sorted(set(distances)) and distances[0] > 0.01 and distances[4] > 1.3 * distances[0]
    assert distances[4] < 0.4  # something is still to be seen
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_one_channel_half_precision_and_a_flat_image(name, x):
    grey = x.mean(1, keepdim=True)
    torch.testing.assert_close(
        corrupt(grey.half(), name, 2, seeded(0)).float(), corrupt(grey.half().float(), name, 2, seeded(0)),
        atol=1e-3, rtol=0,
    )  # fmt: skip
    flat = corrupt(torch.full((1, 3, 16, 16), 0.25), name, 5, seeded(0))
    assert torch.isfinite(flat).all()
    if name.endswith("blur") or name in ("elastic", "pixelate", "contrast", "jpeg"):
        torch.testing.assert_close(flat, torch.full_like(flat, 0.25), atol=0.02 if name == "jpeg" else 1e-4, rtol=0)


def test_noises_have_the_strength_they_state():
    grey = torch.full((4, 3, 64, 64), 0.5)
    for name, expected in (("gaussian_noise", 0.08), ("shot_noise", (0.5 / 100) ** 0.5)):
        assert float((corrupt(grey, name, 2, seeded(0)) - grey).std()) == pytest.approx(expected, rel=0.03)
    hit = corrupt(grey, "impulse_noise", 4, seeded(0)) != grey
    assert float(hit.float().mean()) == pytest.approx(0.1, rel=0.05)


def test_motion_moves_each_image_in_its_own_direction():
    dot = torch.zeros(6, 1, 33, 33)
    dot[:, :, 16, 16] = 1
    out = corrupt(dot, "motion_blur", 5, seeded(1))[:, 0]
    assert torch.allclose(out.sum((1, 2)), torch.ones(6))
    assert len({tuple(o.flatten().tolist()) for o in out}) == 6
    assert torch.allclose(out, out.flip((1, 2)), atol=1e-6)  # a line through the middle


def test_errors_are_those_of_the_corrupted_images(trained):
    x, y, _ = quadrants(120, 9)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    shift, scale = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)

    class OnPixels(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = trained

        def forward(self, z):
            return trained(z * scale + shift)

    batches = [((x - shift) / scale, y)]
    result = corruption_error(OnPixels(), iter(batches), mean, std, ["contrast", "pixelate"], (1, 5), seeded(0))
    assert result.clean == top1_error(trained, [(x, y)])
    for name in ("contrast", "pixelate"):  # these draw nothing
        expected = tuple(top1_error(trained, [(corrupt(x, name, s), y)]) for s in (1, 5))
        assert result.errors[name] == pytest.approx(expected, abs=1 / 120 + 1e-9)
    assert result.errors["contrast"][1] > result.clean + 0.02


def test_a_cell_does_not_depend_on_the_others(trained):
    x, y, _ = quadrants(100, 10)
    batches = [(x[:50], y[:50]), (x[50:], y[50:])]
    together = corruption_error(trained, batches, names=["fog", "impulse_noise"], generator=seeded(5))
    alone = corruption_error(trained, batches, names=["impulse_noise"], severities=[4], generator=seeded(5))
    assert together.errors["impulse_noise"][3] == alone.errors["impulse_noise"][0]
    assert together == corruption_error(trained, batches, names=["fog", "impulse_noise"], generator=seeded(5))


def test_mean_and_relative_errors_by_hand():
    ours = CorruptionError(0.1, {"fog": (0.1, 0.3), "jpeg": (0.2, 0.6)})
    base = CorruptionError(0.2, {"fog": (0.2, 0.2), "jpeg": (0.8, 0.8)})
    assert ours.mean == pytest.approx(0.3)
    assert ours.relative_to(base) == pytest.approx((0.2 / 0.2 + 0.4 / 0.8) / 2)
    with pytest.raises(ValueError, match="same corruptions"):
        ours.relative_to(CorruptionError(0.2, {"fog": (0.2, 0.2)}))
    with pytest.raises(ValueError, match="no error on fog"):
        ours.relative_to(CorruptionError(0, {"fog": (0.0, 0.0), "jpeg": (0.1, 0.1)}))


def test_bad_input(trained, x):
    with pytest.raises(ValueError, match="name='rain' must be one of 'gaussian_noise'"):
        corrupt(x, "rain", 1)
    with pytest.raises(ValueError, match="severity=6"):
        corrupt(x, "fog", 6)
    with pytest.raises(ValueError, match=r"give images \(B, 1, H, W\)"):
        corrupt(torch.rand(2, 4, 8, 8), "fog", 1)
    with pytest.raises(ValueError, match=r"not in \[0, 1\]"):
        corrupt(2 * x, "fog", 1)
    with pytest.raises(ValueError, match="floating"):
        corrupt((255 * x).to(torch.uint8), "fog", 1)
    with pytest.raises(ValueError, match="batches is empty"):
        corruption_error(trained, [])
    with pytest.raises(ValueError, match="at least one each"):
        corruption_error(trained, [], names=[])
