"""Siamese augmentation: the same change for two batches, differentiable, from a generator."""

import pytest
import torch
from dataopt.core.condense import Augment

ALL = Augment(flip=True, scale=1.2, rotate=15)


def draws(augment: Augment, rows: int, size=(9, 7), count: int = 20):
    g = torch.Generator().manual_seed(1)
    return [augment.draw(rows, size, g) for _ in range(count)]


@pytest.mark.parametrize("augment", [Augment(), ALL, Augment(colour=False, crop=(0, 0.3), cutout=0)])
def test_one_draw_changes_two_batches_alike(augment):
    x = torch.rand(6, 3, 9, 7)
    for draw in draws(augment, 1):
        both = augment(x, draw)
        torch.testing.assert_close(augment(x[:2], draw), both[:2])
        torch.testing.assert_close(augment(x[2:], draw), both[2:])


def test_a_draw_for_each_image_is_the_draws_of_single_images():
    x = torch.rand(5, 3, 9, 7)
    for draw in draws(ALL, 5):
        single = [ALL(x[i : i + 1], {name: v[i : i + 1] for name, v in draw.items()}) for i in range(5)]
        torch.testing.assert_close(ALL(x, draw), torch.cat(single))


def test_generator_decides():
    x = torch.rand(4, 3, 8, 8)
    g = [torch.Generator().manual_seed(seed) for seed in (3, 3, 4)]
    first, again, other = (ALL(x, generator=h, siamese=True) for h in g)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(ALL(x, generator=g[0], siamese=True), first)  # the next draw


@pytest.mark.parametrize("name", ["crop", "flip", "scale", "rotate"])
def test_gradients_pass_through_every_change(name):
    draw = next(d for d in draws(ALL, 2, (6, 5), 200) if name in d)
    x = torch.rand(2, 2, 6, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ALL(x, draw), x)


def test_changes_are_affine():
    a, b = torch.rand(2, 1, 3, 8, 8, dtype=torch.float64)
    for draw in draws(ALL, 1, (8, 8)):
        mixed = ALL(0.3 * a + 0.7 * b, draw)
        torch.testing.assert_close(mixed, 0.3 * ALL(a, draw) + 0.7 * ALL(b, draw))


def test_given_parameters():
    x = torch.arange(1.0, 17).view(1, 1, 4, 4)
    off = Augment(colour=False, crop=0, cutout=0)
    down = off(x, {"crop": torch.tensor([[1, -2]])})[0, 0]
    assert torch.equal(down[1:, :2], x[0, 0, :3, 2:]) and not down[0].any() and not down[:, 2:].any()
    assert torch.equal(off(x, {"flip": torch.tensor([True])}), x.flip(3))
    cut = Augment(cutout=0.5)(x, {"cutout": torch.tensor([[0, 3]])})[0, 0]
    assert not cut[:1, 2:].any() and int((cut == 0).sum()) == 2  # the square of 2 x 2 reaches over the upper border
    turned = off(x, {"rotate": torch.tensor([torch.pi / 2])})
    torch.testing.assert_close(turned, x.rot90(1, (2, 3)), rtol=0, atol=1e-4)
    wide = torch.zeros(1, 1, 4, 8)
    wide[0, 0, 1:3, 2:6] = 1  # 2 high and 4 wide; turned, 4 high and 2 wide
    torch.testing.assert_close(off(wide, {"rotate": torch.tensor([torch.pi / 2])})[0, 0, :, 3:5], torch.ones(4, 2))
    neutral = {"colour": torch.tensor([[0.5, 0.5, 0.5]])}  # no brightness, saturation and contrast times 1
    torch.testing.assert_close(off(torch.ones(1, 3, 4, 4) / 3, neutral), torch.ones(1, 3, 4, 4) / 3)
    grey = off(torch.rand(1, 3, 4, 4), {"colour": torch.tensor([[0.5, 0.0, 0.5]])})
    assert torch.equal(grey[:, 0], grey[:, 1]) and torch.equal(grey[:, 1], grey[:, 2])


def test_ranges_of_the_draws():
    found = draws(ALL, 500, (40, 20), 30)
    assert all(("colour" in d) and ("cutout" in d) for d in found)
    kinds = [next(iter(set(d) - {"colour", "cutout"})) for d in found]
    assert set(kinds) == {"crop", "flip", "scale", "rotate"} and all(len(d) == 3 for d in found)
    crop = torch.cat([d["crop"] for d in found if "crop" in d])
    assert crop.amin(0).tolist() == [-5, -3] and crop.amax(0).tolist() == [5, 3]
    scale = torch.cat([d["scale"] for d in found if "scale" in d])
    assert 1 / 1.2 <= scale.min() < 0.85 and 1.18 < scale.max() <= 1.2
    angle = torch.cat([d["rotate"] for d in found if "rotate" in d]).rad2deg()
    assert -15 <= angle.min() < -14 and 14 < angle.max() <= 15


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop": 1.0}, r"crop=1.0 must lie in \[0, 1\); it is a share"),
        ({"crop": (0, -0.1)}, r"crop=\(0, -0.1\) must lie in \[0, 1\)"),
        ({"cutout": -1}, r"cutout=-1 must lie in \[0, 1\)"),
        ({"scale": 0.5}, "scale=0.5 must be at least 1"),
        ({"rotate": 200}, "rotate=200 must be degrees"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Augment(**settings)


def test_a_draw_of_other_rows_is_refused():
    with pytest.raises(ValueError, match=r"draw\['colour'\] has 3 rows; give 1, or 2 as x has"):
        Augment()(torch.rand(2, 3, 8, 8), Augment().draw(3, (8, 8)))
