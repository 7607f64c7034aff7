"""PuzzleMix as a whole: where every pixel and every label weight comes from, and what it refuses."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dataopt.core.mixup import CutMix, PuzzleMix
from dataopt.core.mixup.grid import pool, region_distances
from hypothesis import given, settings
from hypothesis import strategies as st

from .conftest import smooth_saliency

RELEASED = np.load(__file__.replace("test_puzzle.py", "released.npz"))


def coded(batch, height, width, channels=2):
    """Every pixel carries its sample and its position, in [0, 1]."""
    position = torch.arange(height * width, dtype=torch.float64).view(height, width) / (2 * height * width)
    x = torch.stack([torch.full((height, width), b / batch, dtype=torch.float64) for b in range(batch)])
    return torch.stack([x, position.expand(batch, -1, -1)] + [x * 0.5] * (channels - 2), 1)


def rebuilt(m, x, rows, cols):
    """The mix from its parts by loops over regions: (1 - z) * moved first + z * moved second."""
    batch, _, height, width = x.shape
    bh, bw = height // rows, width // cols
    source = np.tile(np.arange(rows * cols), (2, batch, 1))
    if m.moves is not None:
        for side in (0, 1):
            moves = m.moves[side]
            assert moves.grid == (rows, cols)
            source[side, moves.sample, moves.place] = moves.source
    out = torch.empty_like(x)
    for b in range(batch):
        for j in range(rows * cols):
            r, c = divmod(j, cols)
            here = np.s_[:, r * bh : (r + 1) * bh, c * bw : (c + 1) * bw]
            patches = []
            for side, n in ((0, b), (1, int(m.partner[b]))):
                sr, sc = divmod(int(source[side, b, j]), cols)
                patches.append(x[n][:, sr * bh : (sr + 1) * bh, sc * bw : (sc + 1) * bw])
            share = m.mask[b, r * bh, c * bw].item()
            out[b][here] = share * patches[0] + (1 - share) * patches[1]
    return out


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([(16, 16), (16, 32), (8, 24)]),
    grid=st.sampled_from([2, 4, 8, (2, 8), (8, 4)]),
    labels=st.integers(2, 4),
    transport=st.sampled_from(["iterative", "exact", None]),
    term=st.sampled_from(["released", "thesis"]),
)
def test_every_pixel_and_label_comes_from_the_plan(seed, size, grid, labels, transport, term):
    x = coded(4, *size)
    s = smooth_saliency(4, *size, seed) ** 2
    rows, cols = (grid, grid) if isinstance(grid, int) else grid
    mix = PuzzleMix(7, labels=labels, transport=transport, data_term=term, transport_cost=0.05)
    m = mix(x, torch.tensor([0, 3, 6, 3]), s, generator=torch.Generator().manual_seed(seed), grid=grid)
    torch.testing.assert_close(m.inputs, rebuilt(m, x, rows, cols))
    # the mask is made of regions and of the allowed shares
    regions = m.mask.view(4, rows, size[0] // rows, cols, size[1] // cols)
    assert (regions == regions[:, :, :1, :, :1]).all()
    assert torch.isin((m.mask * (labels - 1)).round(decimals=5), torch.arange(labels).float()).all()
    # labels weigh exactly what is shown
    y = F.one_hot(torch.tensor([0, 3, 6, 3]), 7).double()
    ratio = m.mask.double().mean((1, 2)).unsqueeze(1)
    torch.testing.assert_close(m.targets.double(), ratio * y + (1 - ratio) * y[m.partner], atol=1e-6, rtol=0)
    torch.testing.assert_close(m.targets.sum(1), torch.ones(4))
    assert m.targets.min() >= 0 and m.targets.dtype == torch.float32
    # and apply() is the same mix
    torch.testing.assert_close(m.apply(x), m.inputs)


@pytest.mark.parametrize("case", [1, 4])
def test_released_images(case):
    """Same pixels as the authors' code where their mask is the optimum and their plan has no hole."""
    blocks, lam = int(RELEASED[f"case{case}"][0]), float(RELEASED[f"case{case}"][1])
    x = torch.from_numpy(RELEASED["images"] / 255).float()
    s = torch.from_numpy(RELEASED["saliency"].astype(np.float32))
    partner = torch.from_numpy(RELEASED[f"perm{case}"])
    mix = PuzzleMix(16, transport_patch=4 if case == 4 else None)
    m = mix(x, torch.arange(16), s, partner=partner, lam=lam, grid=blocks)
    theirs = torch.from_numpy(RELEASED[f"mask{case}"]).float() / 2
    same_mask = (F.avg_pool2d(m.mask.unsqueeze(1), 32 // blocks).squeeze(1) == theirs).all(2).all(1)
    holes = torch.zeros(16, dtype=torch.bool)
    for side in (0, 1):
        shown = (theirs > 0 if side == 0 else theirs < 1).repeat_interleave(
            int(RELEASED[f"plan{case}_0"].shape[1] ** 0.5) // blocks, 1
        )
        shown = shown.repeat_interleave(shown.shape[1] // blocks, 2).flatten(1)
        holes |= ((torch.from_numpy(RELEASED[f"plan{case}_{side}"]) < 0) & shown).any(1)
    comparable = same_mask & ~holes & (partner != torch.arange(16))
    assert comparable.sum() >= 5
    images = torch.from_numpy(RELEASED[f"mixed{case}"].astype(np.float32))
    torch.testing.assert_close(m.inputs[comparable], images[comparable], atol=1e-3, rtol=0)


def test_transport_patch_moves_finer_regions():
    x, s = coded(4, 32, 32), smooth_saliency(4, 32, 32, 2) ** 2
    partner = torch.tensor([1, 2, 3, 0])  # a drawn one may leave nothing to move
    m = PuzzleMix(4, transport_patch=4, transport_cost=0.01)(x, torch.arange(4), s, partner=partner, lam=0.5, grid=2)
    assert m.grid == (2, 2) and m.moves[0].grid == (8, 8)
    assert len(m.moves[0].sample) > 0
    torch.testing.assert_close(m.inputs, rebuilt(m, x, 8, 8))
    # a patch above the region's side is the region itself
    assert PuzzleMix(4, transport_patch=64)(x, torch.arange(4), s, grid=8).moves[0].grid == (8, 8)


def test_transport_shows_more_saliency():
    x, s = torch.rand(16, 3, 32, 32), smooth_saliency(16, 32, 32, 3) ** 2
    s = s / s.sum((1, 2), keepdim=True)
    y, roll = torch.arange(16), torch.arange(16).roll(1)

    def shown(transport):
        m = PuzzleMix(16, transport=transport)(x, y, s, partner=roll, lam=0.5, grid=8)
        first, second = m.moves if m.moves else (None, None)
        moved = [t.apply(v) if t else v for t, v in ((first, s), (second, s[roll]))]
        return (m.mask * moved[0] + (1 - m.mask) * moved[1]).sum((1, 2))

    stay, ours, best = shown(None), shown("iterative"), shown("exact")
    assert (ours >= stay - 1e-6).all() and ours.mean() > stay.mean()
    assert best.mean() >= ours.mean() - 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_dtype_and_memory_format_survive(dtype, channels):
    x = torch.rand(4, channels, 16, 16).to(dtype, memory_format=torch.channels_last)
    s = smooth_saliency(4, 16, 16, 0)
    kept = x.clone()
    m = PuzzleMix(4)(x, torch.arange(4), s, grid=4)
    assert m.inputs.dtype == dtype and m.inputs.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, kept)
    exact = PuzzleMix(4)(x.double(), torch.arange(4), s, grid=4, partner=m.partner, lam=0.5)
    plain = PuzzleMix(4)(x.contiguous(), torch.arange(4), s, grid=4, partner=m.partner, lam=0.5)
    torch.testing.assert_close(plain.inputs.double(), exact.inputs, atol=1e-2, rtol=0)


def test_one_dimensional_inputs():
    x = torch.rand(6, 2, 32).double()
    s = smooth_saliency(6, 1, 32, 0).squeeze(1) ** 2
    m = PuzzleMix(6, transport_cost=0.01)(x, torch.arange(6), s, grid=8)
    assert m.inputs.shape == x.shape and m.mask.shape == (6, 32) and m.grid == (1, 8)
    as_image = rebuilt_line(m, x)
    torch.testing.assert_close(m.inputs, as_image)
    torch.testing.assert_close(m.apply(x), m.inputs)
    torch.testing.assert_close(m.apply(x[:, 0]), m.inputs[:, 0])


def rebuilt_line(m, x):
    class Line:
        mask, partner, moves = m.mask.unsqueeze(1), m.partner, m.moves

    return rebuilt(Line, x.unsqueeze(2), 1, 8).squeeze(2)


def test_one_row_image_is_the_one_dimensional_input():
    x, s = torch.rand(5, 3, 16), smooth_saliency(5, 1, 16, 1)
    args = {"partner": torch.arange(5).roll(1), "lam": 0.4}
    line = PuzzleMix(5)(x, torch.arange(5), s.squeeze(1), grid=4, **args)
    image = PuzzleMix(5)(x.unsqueeze(2), torch.arange(5), s, grid=(1, 4), **args)
    torch.testing.assert_close(line.inputs, image.inputs.squeeze(2))


def test_a_sample_that_is_its_own_partner_comes_back():
    x, s, y = torch.rand(4, 3, 16, 16), smooth_saliency(4, 16, 16, 0), torch.arange(4)
    m = PuzzleMix(4, transport=None)(x, y, s, partner=torch.tensor([0, 2, 1, 3]), grid=4)
    torch.testing.assert_close(m.inputs[[0, 3]], x[[0, 3]])
    torch.testing.assert_close(m.targets[[0, 3]], F.one_hot(y, 4).float()[[0, 3]])
    one = PuzzleMix(4)(x[:1], y[:1], s[:1], partner=torch.tensor([0]), grid=4)
    assert one.targets[0, 0] == 1
    same = PuzzleMix(4)(x[:1].expand(4, -1, -1, -1), y[:1].expand(4), s[:1].expand(4, -1, -1), grid=4)
    assert (same.targets[:, 0] == 1).all()


def test_share_follows_lam():
    x, s = torch.rand(64, 3, 32, 32), smooth_saliency(64, 32, 32, 9)
    means = [PuzzleMix(64)(x, torch.arange(64), s, lam=lam, grid=8).mask.mean().item() for lam in (0.05, 0.5, 0.95)]
    assert means[0] < 0.25 and 0.4 < means[1] < 0.6 and means[2] > 0.75
    each = torch.linspace(0.02, 0.98, 64)
    m = PuzzleMix(64)(x, torch.arange(64), s, lam=each, grid=8)
    assert np.corrcoef(each, m.mask.mean((1, 2)))[0, 1] > 0.85  # .93 +- .013 over 300 seeds


def test_the_generator_decides_everything():
    x, s, y = torch.rand(8, 3, 32, 32), smooth_saliency(8, 32, 32, 0), torch.arange(8)
    mix = PuzzleMix(8)
    a, b, c = (mix(x, y, s, generator=torch.Generator().manual_seed(n)) for n in (1, 1, 2))
    assert torch.equal(a.inputs, b.inputs) and torch.equal(a.partner, b.partner)
    assert not torch.equal(a.partner, c.partner)
    state = torch.get_rng_state()
    mix(x, y, s, generator=torch.Generator().manual_seed(1))
    assert torch.equal(state, torch.get_rng_state())
    grids = {mix(x, y, s, generator=torch.Generator().manual_seed(n)).grid for n in range(40)}
    assert grids == {(2, 2), (4, 4), (8, 8), (16, 16)}
    lams = [mix(x, y, s, grid=2, generator=torch.Generator().manual_seed(n)).mask.mean().item() for n in range(30)]
    assert np.std(lams) > 0.15


def test_normalised_inputs_give_the_mix_of_their_pixels():
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
    x, s = torch.rand(6, 3, 32, 32).double(), smooth_saliency(6, 32, 32, 4)
    z = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    args = {"partner": torch.arange(6).roll(2), "lam": 0.45, "grid": 8}
    plain = PuzzleMix(6)(x, torch.arange(6), s, **args)
    normalised = PuzzleMix(6, mean=mean, std=std)(z, torch.arange(6), s, **args)
    assert torch.equal(plain.mask, normalised.mask)
    back = normalised.inputs * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    torch.testing.assert_close(back, plain.inputs)


def test_soft_and_multi_hot_labels():
    x, s = torch.rand(3, 1, 8, 8), smooth_saliency(3, 8, 8, 0)
    y = torch.tensor([[0.2, 0.8, 0], [1, 1, 0], [0, 0, 1.0]])
    m = PuzzleMix(3)(x, y, s, partner=torch.tensor([1, 2, 0]), grid=2)
    ratio = m.mask.mean((1, 2)).unsqueeze(1)
    torch.testing.assert_close(m.targets, ratio * y + (1 - ratio) * y[[1, 2, 0]])


def test_apply_on_other_things():
    x, s = torch.rand(4, 3, 32, 32), smooth_saliency(4, 32, 32, 6) ** 2
    m = PuzzleMix(4, transport_cost=0.05)(x, torch.arange(4), s, grid=4, lam=0.5)
    # integers take the larger share, the first source at a half
    sample = torch.arange(4).view(4, 1, 1).expand(4, 32, 32)
    labels = m.apply(sample)
    assert labels.dtype == sample.dtype
    assert torch.equal(labels, torch.where(m.mask >= 0.5, sample, sample[m.partner]))
    assert m.apply(sample > 1).dtype == torch.bool
    # half the resolution, extra axes
    depth = torch.rand(4, 2, 5, 16, 16)
    assert m.apply(depth).shape == depth.shape
    big = depth.repeat_interleave(2, -1).repeat_interleave(2, -2)
    torch.testing.assert_close(m.apply(depth), m.apply(big)[..., ::2, ::2])
    # what is hidden stays hidden, NaN included
    depth = torch.rand(4, 32, 32)
    depth[1, :, :] = float("nan")
    hidden = m.apply(depth)
    shows_nan = (m.mask < 1) & (m.partner == 1).view(4, 1, 1) | (m.mask > 0) & (torch.arange(4) == 1).view(4, 1, 1)
    assert torch.equal(hidden.isnan(), shows_nan)
    with pytest.raises(ValueError, match=r"sides \(30, 30\), which the mix's 4x4 regions do not divide"):
        m.apply(torch.rand(4, 30, 30))
    with pytest.raises(ValueError, match=r"t has the shape \(3, 32, 32\)"):
        m.apply(torch.rand(3, 32, 32))


def test_region_distances_by_loops():
    x = torch.rand(3, 3, 16, 24)
    partner = torch.tensor([1, 2, 0])
    for (rows, cols), k in (((2, 2), 4), ((4, 4), 4), ((4, 3), 2), ((2, 12), 4)):
        down, right = region_distances(x, partner, (rows, cols), k)
        bh, bw = 16 // rows, 24 // cols
        kh, kw = (max(d for d in range(1, k + 1) if side % d == 0) for side in (bh, bw))
        p = F.avg_pool2d(x, (kh, kw))
        h, w = bh // kh, bw // kw
        for b in range(3):
            images = {1: p[b], 0: p[partner[b]]}
            for a in (0, 1):
                for c in (0, 1):
                    for r in range(rows - 1):
                        for q in range(cols):
                            edge = images[a][:, (r + 1) * h - 1, q * w : (q + 1) * w]
                            other = images[c][:, (r + 1) * h, q * w : (q + 1) * w]
                            assert down[b, a, c, r, q].item() == pytest.approx(
                                (edge - other).abs().mean().item(), abs=1e-6
                            )
                    for r in range(rows):
                        for q in range(cols - 1):
                            edge = images[a][:, r * h : (r + 1) * h, (q + 1) * w - 1]
                            other = images[c][:, r * h : (r + 1) * h, (q + 1) * w]
                            assert right[b, a, c, r, q].item() == pytest.approx(
                                (edge - other).abs().mean().item(), abs=1e-6
                            )


def test_pooled_saliency_sums_to_one():
    p = pool(smooth_saliency(3, 8, 16, 0), (4, 2))
    torch.testing.assert_close(p.sum((1, 2)), torch.ones(3))


def test_cutmix_is_one_rectangle():
    x = coded(6, 16, 24)
    for seed in range(20):
        m = CutMix(6)(x, torch.arange(6), generator=torch.Generator().manual_seed(seed))
        hidden = (m.mask[0] == 0).nonzero()
        assert (m.mask == m.mask[0]).all()
        if len(hidden):
            (top, left), (bottom, right) = hidden.amin(0), hidden.amax(0)
            assert (bottom - top + 1) * (right - left + 1) == len(hidden)
        share = m.mask.unsqueeze(1).double()
        torch.testing.assert_close(m.inputs, share * x + (1 - share) * x[m.partner])
        ratio = m.mask.mean((1, 2)).unsqueeze(1)
        y = torch.eye(6)
        torch.testing.assert_close(m.targets, ratio * y + (1 - ratio) * y[m.partner])
    areas = [CutMix(6)(x, torch.arange(6), lam=0.7, generator=torch.Generator().manual_seed(n)) for n in range(50)]
    shown = torch.stack([a.mask[0].mean() for a in areas])
    assert shown.min() >= 0.65 and shown.mean() < 0.9  # clipping only shows more
    line = CutMix(6)(torch.rand(6, 2, 32), torch.arange(6), lam=0.5)
    assert line.mask.shape == (6, 32) and line.inputs.shape == (6, 2, 32)


GOOD = {"num_classes": 4}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": 1.5}, r"gamma=1\.5 must lie in \[0, 1\].*Proposition 1"),
        ({"beta": -1.0}, r"beta=-1\.0 must be finite and not negative"),
        ({"labels": 1}, "labels=1 must be at least 2"),
        ({"grids": ()}, "grids is empty"),
        ({"solver": "swap"}, "solver='swap' must be one of 'auto'"),
        ({"transport": "none"}, "transport='none' must be one of 'iterative', 'exact', None"),
        ({"data_term": "paper"}, "data_term='paper' must be one of 'released', 'thesis'"),
        ({"mean": [0.5]}, r"mean=\[0\.5\] and std=None go together"),
        ({"num_classes": 0}, "num_classes=0 must be at least 1"),
        ({"alpha": -1}, "alpha=-1 must be finite and not negative"),
        ({"transport_patch": 0}, "transport_patch=0 must be at least 1 pixel"),
    ],
)
def test_constructor_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        PuzzleMix(**{**GOOD, **arguments})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.full((4, 3, 12, 12), float("nan"))}, "non-finite values in samples"),
        ({"x": torch.rand(4, 3, 12, 12) * 255}, r"x ranges from .* give the mean= and std="),
        ({"y": torch.tensor([0, 1, 2, 4])}, "class ids from 0 to 4; num_classes=4 allows 0 to 3"),
        ({"y": torch.tensor([0, 1, -1, 3])}, "class ids from -1 to 3"),
        ({"y": torch.arange(3)}, r"y is torch\.int64 of shape \(3,\); give \(4,\) integer"),
        ({"y": torch.rand(4, 5)}, r"y is torch\.float32 of shape \(4, 5\)"),
        ({"y": torch.full((4, 4), float("nan"))}, "negative or non-finite label weights"),
        ({"s": torch.rand(4, 6, 6)}, r"s has the shape \(4, 6, 6\); give the saliency as \(4, 12, 12\)"),
        ({"s": -torch.ones(4, 12, 12)}, "negative or non-finite values"),
        ({"grid": 8}, "grid=8 does not divide inputs of size 12x12; grids that fit: 2, 3, 4, 6, 12"),
        ({"grid": (5, 2)}, r"grid=\(5, 2\) does not divide"),
        ({"lam": 1.5}, r"lam=1\.5 must be a number in \[0, 1\]"),
        ({"partner": torch.tensor([0, 1, 2, 4])}, r"give \(4,\) indices from 0 to 3"),
        ({"noise": object()}, "noise needs gradient="),
    ],
)
def test_call_refuses(change, message):
    arguments = {"x": torch.rand(4, 3, 12, 12), "y": torch.arange(4), "s": torch.rand(4, 12, 12), "grid": 4, **change}
    with pytest.raises(ValueError, match=message):
        PuzzleMix(4)(**arguments)


def test_batch_of_one_and_indivisible_patch():
    x, s = torch.rand(2, 3, 12, 12), torch.rand(2, 12, 12)
    with pytest.raises(ValueError, match=r"batch of one.*drop_last=True"):
        PuzzleMix(4)(x[:1], torch.tensor([0]), s[:1], grid=2)
    with pytest.raises(ValueError, match="transport_patch=4 does not divide the 2x2 grid's regions of 6x6 pixels"):
        PuzzleMix(4, transport_patch=4)(x, torch.tensor([0, 1]), s, grid=2)


@pytest.mark.parametrize("transport", ["iterative", None])
def test_gradients_reach_the_inputs(transport):
    torch.manual_seed(0)
    x, y, s = torch.rand(4, 3, 16, 16), torch.arange(4), torch.rand(4, 16, 16)
    mix = PuzzleMix(4, transport=transport)
    plain = mix(x, y, s, generator=torch.Generator().manual_seed(0))
    mixed = mix(x.requires_grad_(), y, s, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mixed.inputs, plain.inputs) and not mixed.targets.requires_grad
    (g,) = torch.autograd.grad(mixed.inputs.sum(), x)
    shown = plain.mask + torch.zeros_like(plain.mask).index_add_(0, plain.partner, 1 - plain.mask)
    assert g.sum() == pytest.approx(mixed.inputs.numel(), rel=1e-5)
    assert transport or torch.allclose(g, shown.unsqueeze(1).expand_as(g))
