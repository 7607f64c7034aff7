"""CoMixup as a whole: where every pixel and every label weight comes from, its draws, and what it refuses."""

import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dataopt.core.mixup import CoMixup
from dataopt.core.mixup.comixup import salient_places
from hypothesis import given, settings
from hypothesis import strategies as st

from .conftest import smooth_saliency
from .test_puzzle import coded


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def area(m, batch: int) -> torch.Tensor:
    """(B', B) float64 share of each input in each output, from the plan."""
    one = F.one_hot(m.first, batch).double() + F.one_hot(m.second, batch).double()
    return one.mean((1, 2)) / 2


def rebuilt(m, x: torch.Tensor) -> torch.Tensor:
    """The mix by loops over regions; no region changes its place."""
    outputs, rows, cols = m.first.shape
    bh, bw = x.shape[2] // rows, x.shape[3] // cols
    out = torch.empty(outputs, *x.shape[1:], dtype=x.dtype)
    for j in range(outputs):
        for r in range(rows):
            for c in range(cols):
                here = np.s_[:, r * bh : (r + 1) * bh, c * bw : (c + 1) * bw]
                out[j][here] = (x[m.first[j, r, c]][here] + x[m.second[j, r, c]][here]) / 2
    return out


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 13),
    partition=st.integers(1, 14),
    size=st.sampled_from([(16, 16), (16, 32), (8, 24)]),
    grid=st.sampled_from([1, 2, 4, 8, (2, 8), (4, 2)]),
    threshold=st.sampled_from(["hard", "soft"]),
)
def test_every_pixel_and_label_comes_from_the_plan(seed, batch, partition, size, grid, threshold):
    x, s = coded(batch, *size), smooth_saliency(batch, *size, seed)
    y = torch.arange(batch) % 5
    m = CoMixup(5, grid=grid, partition=partition, threshold=threshold)(x, y, s, generator=seeded(seed))
    assert m.gap == 0 or (m.first[0].numel() > 16 and m.gap < 0.01)  # the search is capped on large grids
    assert m.first.shape == (batch, *((grid, grid) if isinstance(grid, int) else grid))
    torch.testing.assert_close(m.inputs, rebuilt(m, x))
    torch.testing.assert_close(m.apply(x), m.inputs)
    # an output shows inputs of its own partition only
    own = torch.arange(batch).div(partition, rounding_mode="floor").view(-1, 1, 1)
    assert all((shown.div(partition, rounding_mode="floor") == own).all() for shown in (m.first, m.second))
    # labels weigh exactly what is shown
    shares = area(m, batch)
    torch.testing.assert_close(m.sources.double(), shares, atol=1e-6, rtol=0)
    torch.testing.assert_close(m.sources.sum(1), torch.ones(batch))
    torch.testing.assert_close(m.targets.double(), shares @ F.one_hot(y, 5).double(), atol=1e-6, rtol=0)
    assert m.targets.dtype == m.sources.dtype == torch.float32


def test_more_inputs_than_two_are_shown_and_some_by_halves():
    x, s = torch.rand(40, 3, 16, 16), smooth_saliency(40, 16, 16, 0)
    m = CoMixup(40)(x, torch.arange(40), s, generator=seeded(0))
    shown = (m.sources > 0).sum(1).float()
    assert 2 < shown.mean() < 4  # 2.5 to 2.7 with the released settings
    assert 0.05 < (m.first != m.second).float().mean() < 0.4


def test_salient_regions_are_shown():
    x, s = torch.rand(20, 3, 16, 16), smooth_saliency(20, 16, 16, 1)
    m = CoMixup(20, eta=0)(x, torch.arange(20), s, generator=seeded(0))
    kept = m.apply(s).sum((1, 2))  # an output with regions of anybody, at random, would keep 1 on average
    assert kept.mean() > 1.3


def test_repeated_supports_are_parted():
    """At most 1 % of outputs show exactly the inputs of another one, if more than one."""
    x, y, repeats = torch.zeros(20, 1, 16, 16), torch.arange(20), 0
    for seed in range(100):
        m = CoMixup(20)(x, y, smooth_saliency(20, 16, 16, seed), generator=seeded(seed))
        supports = [frozenset(row.nonzero().flatten().tolist()) for row in m.sources]
        mixed = [u for u in supports if len(u) > 1]
        repeats += len(mixed) - len(set(mixed))
    assert repeats <= 0.01 * 100 * 20


@pytest.mark.parametrize("given", [False, True])
def test_flat_saliency_without_the_other_terms_gives_the_mode_of_the_prior(given):
    x, s = coded(8, 8, 8), torch.full((8, 8, 8), 1 / 64)
    mix = CoMixup(8, beta=0, gamma=0, partition=4)
    if given:
        lam = torch.tensor([0.1, 0.5, 0.3, 0.1, 2.0, 1.0, 3.0, 2.5])  # each partition's is scaled to one
        m = mix(x, torch.arange(8), s, lam=lam)
        modes = [1, 6]
    else:
        m = mix(x, torch.arange(8), s, generator=seeded(5))
        modes = [int(m.first[0, 0, 0]), int(m.first[4, 0, 0])]
        # the mode is drawn, and every input's as often
        drawn = [int(mix(x, torch.arange(8), s, generator=seeded(n)).first[0, 0, 0]) for n in range(80)]
        assert min(np.bincount(drawn, minlength=4)) > 8
    for at, mode in enumerate(modes):
        assert (m.first[4 * at : 4 * at + 4] == mode).all() and (m.second[4 * at : 4 * at + 4] == mode).all()
        assert torch.equal(m.inputs[4 * at], x[mode])


def test_a_batch_of_one_and_identical_inputs_come_back():
    x, y, s = torch.rand(1, 3, 16, 16), torch.tensor([2]), smooth_saliency(1, 16, 16, 0)
    one = CoMixup(4)(x, y, s)
    assert torch.equal(one.inputs, x) and one.targets.tolist() == [[0, 0, 1, 0]]
    five = [t.expand(5, *t.shape[1:]) for t in (x, y, s)]
    same = CoMixup(4)(*five)
    torch.testing.assert_close(same.inputs, five[0])
    assert torch.equal(same.targets, F.one_hot(five[1], 4).float())


@pytest.mark.parametrize(("outputs", "expected"), [(None, [6, 6, 3]), (2, [2, 2, 1]), (9, [9, 9, 4]), (1, [1, 1, 1])])
def test_as_many_outputs_as_asked_for(outputs, expected):
    x, s = coded(15, 8, 8), smooth_saliency(15, 8, 8, 0)
    m = CoMixup(15, partition=6, outputs=outputs)(x, torch.arange(15), s, generator=seeded(1))
    assert len(m.inputs) == len(m.targets) == len(m.sources) == sum(expected)
    at = 0
    for part, count in enumerate(expected):  # a smaller partition gives its share of them
        shown = m.sources[at : at + count].sum(0).nonzero()
        assert shown.min() >= 6 * part and shown.max() < 6 * part + 6
        at += count
    torch.testing.assert_close(m.inputs, rebuilt(m, x))
    torch.testing.assert_close(m.sources.sum(1), torch.ones(sum(expected)))


def test_one_dimensional_inputs():
    x, s = torch.rand(6, 2, 32).double(), smooth_saliency(6, 1, 32, 0)
    m = CoMixup(6, grid=8)(x, torch.arange(6), s.squeeze(1), generator=seeded(2))
    assert m.inputs.shape == x.shape and m.first.shape == (6, 1, 8)
    image = CoMixup(6, grid=(1, 8))(x.unsqueeze(2), torch.arange(6), s, generator=seeded(2))
    assert torch.equal(m.inputs, image.inputs.squeeze(2)) and torch.equal(m.sources, image.sources)
    torch.testing.assert_close(m.apply(x[:, 0]), m.inputs[:, 0])
    torch.testing.assert_close(m.apply(x[..., ::2]), m.inputs[..., ::2])
    assert m.apply(torch.arange(6).view(6, 1).expand(6, 8)).tolist() == m.first.squeeze(1).tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_dtype_and_memory_format_survive(dtype, channels):
    x = torch.rand(5, channels, 16, 16).to(dtype).to(memory_format=torch.channels_last)
    s, kept = smooth_saliency(5, 16, 16, 0), x.clone()
    m = CoMixup(5)(x, torch.arange(5), s, generator=seeded(3))
    assert m.inputs.dtype == dtype and m.inputs.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, kept)
    exact = CoMixup(5)(x.double().contiguous(), torch.arange(5), s, generator=seeded(3))
    torch.testing.assert_close(m.inputs.double(), exact.inputs, atol=1e-2, rtol=0)
    assert exact.inputs.is_contiguous() and torch.equal(m.sources, exact.sources)


def test_autocast_does_not_round_the_targets():
    x, s, y = torch.rand(7, 3, 16, 16), smooth_saliency(7, 16, 16, 0), torch.full((7, 3), 1 / 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        m = CoMixup(3)(x, y, s, generator=seeded(0))
    assert m.targets.dtype == torch.float32
    torch.testing.assert_close(m.targets, y)


def test_soft_and_multi_hot_labels():
    x, s = torch.rand(3, 1, 8, 8), smooth_saliency(3, 8, 8, 0)
    y = torch.tensor([[0.2, 0.8, 0], [1, 1, 0], [0, 0, 1.0]])
    m = CoMixup(3, grid=2)(x, y, s)
    torch.testing.assert_close(m.targets, m.sources @ y)
    ids = CoMixup(3, grid=2)(x, torch.tensor([2, 0, 1], dtype=torch.int32), s)
    torch.testing.assert_close(ids.targets, ids.sources[:, [1, 2, 0]])


def test_apply_on_other_things():
    x, s = torch.rand(6, 3, 32, 32), smooth_saliency(6, 32, 32, 6)
    m = CoMixup(6, partition=6, outputs=15)(x, torch.arange(6), s, generator=seeded(0))
    half = m.first != m.second
    assert half.any() and not half.all()
    first, second = (t.repeat_interleave(8, 1).repeat_interleave(8, 2) for t in (m.first, m.second))
    # integers and booleans take the first of two halves
    sample = torch.arange(6).view(6, 1, 1).expand(6, 32, 32)
    assert torch.equal(m.apply(sample), first) and m.apply(sample.to(torch.uint8)).dtype == torch.uint8
    assert torch.equal(m.apply(sample > 2), first > 2)
    torch.testing.assert_close(m.apply(sample.float()), (first + second).float() / 2)
    # other sizes, extra axes
    depth = torch.rand(6, 2, 5, 16, 16)
    assert m.apply(depth).shape == (15, 2, 5, 16, 16)
    big = depth.repeat_interleave(2, -1).repeat_interleave(2, -2)
    torch.testing.assert_close(m.apply(depth), m.apply(big)[..., ::2, ::2])
    # what is hidden stays hidden, NaN included
    depth = torch.rand(6, 32, 32)
    depth[1] = float("nan")
    assert torch.equal(m.apply(depth).isnan(), (first == 1) | (second == 1))
    with pytest.raises(ValueError, match=r"sides \(30, 30\), which the grid 4x4 does not divide"):
        m.apply(torch.rand(6, 30, 30))
    for wrong in (torch.rand(5, 32, 32), torch.rand(6, 32)):
        with pytest.raises(ValueError, match=r"t has the shape .*give \(6, \.\.\., H, W\)"):
            m.apply(wrong)


def test_the_generator_decides_everything():
    x, s, y = torch.rand(12, 3, 16, 16), smooth_saliency(12, 16, 16, 0), torch.arange(12)
    mix = CoMixup(12, partition=8)
    a, b, c = (mix(x, y, s, generator=seeded(n)) for n in (1, 1, 2))
    assert torch.equal(a.inputs, b.inputs) and a.objective == b.objective
    assert not torch.equal(a.first, c.first)
    state = torch.get_rng_state()
    found = []
    thread = threading.Thread(target=lambda: found.append(mix(x, y, s, generator=seeded(1))))
    thread.start()
    thread.join()
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(found[0].first, a.first) and torch.equal(found[0].second, a.second)
    given = mix(x, y, s, generator=seeded(1), lam=torch.ones(12))
    assert torch.equal(given.first, mix(x, y, s, generator=seeded(1), lam=torch.full((12,), 0.3)).first)
    assert not torch.equal(given.first, a.first)


def test_restarts_never_give_a_higher_objective_than_the_first_start():
    x, y = torch.zeros(15, 1, 16, 16), torch.arange(15)
    gains = []
    for seed in range(15):
        s = smooth_saliency(15, 16, 16, seed)
        values = [CoMixup(15, partition=10, restarts=n)(x, y, s, generator=seeded(seed)).objective for n in (1, 2, 4)]
        assert values[0] >= values[1] >= values[2]  # in every partition, so in their sum
        gains.append(values[0] - values[2])
    assert np.mean(gains) > 1


def test_the_prior_shifts_the_shares():
    x, s = torch.rand(10, 1, 16, 16), smooth_saliency(10, 16, 16, 0)
    lam = torch.full((10,), 1e-6)
    lam[3] = 1
    m = CoMixup(10, eta=1.0, gamma=0.05)(x, torch.arange(10), s, lam=lam, generator=seeded(0))
    assert m.sources[:, 3].mean() > 0.5


def test_salient_places_by_loops():
    s = smooth_saliency(4, 24, 16, 3)
    for height, width in ((24, 16), (5, 16), (1, 16)):
        places = salient_places(s[:, :height, :width])
        kh, kw = min(8, height), min(8, width)
        for b in range(4):
            sums = {
                (r, c): float(s[b, r : r + kh, c : c + kw].double().sum())
                for r in range(height - kh + 1)
                for c in range(width - kw + 1)
            }
            assert tuple(places[b]) == max(sums, key=sums.__getitem__)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "num_classes=0 must be at least 1"),
        ({"alpha": -1}, "alpha=-1 leaves the Dirichlet prior undefined"),
        ({"alpha": 0}, "alpha=0 leaves the Dirichlet prior undefined"),
        ({"alpha": float("inf")}, "alpha=inf leaves the Dirichlet prior undefined"),
        ({"beta": -0.1}, r"beta=-0\.1 must be finite and not negative"),
        ({"gamma": float("nan")}, "gamma=nan must be finite and not negative"),
        ({"eta": float("inf")}, "eta=inf must be finite"),
        ({"tau": -1.0}, r"tau=-1\.0 must be finite and not negative"),
        ({"omega": 1.5}, r"omega=1\.5 must lie in \[0, 1\]"),
        ({"omega": -0.1}, r"omega=-0\.1 must lie in \[0, 1\]"),
        ({"partition": 0}, "partition=0 must be a whole number of at least 1"),
        ({"outputs": 0}, "outputs=0 must be a whole number of at least 1"),
        ({"n_iter": 0}, "n_iter=0 must be a whole number"),
        ({"restarts": 1.5}, r"restarts=1\.5 must be a whole number"),
        ({"partition": 4.0}, r"partition=4\.0 must be a whole number"),
        ({"threshold": "firm"}, "threshold='firm' must be one of 'hard', 'soft'"),
    ],
)
def test_constructor_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        CoMixup(**{"num_classes": 4, **arguments})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.full((4, 3, 12, 12), float("nan"))}, "non-finite values in samples"),
        ({"y": torch.tensor([0, 1, 2, 4])}, "class ids from 0 to 4; num_classes=4 allows 0 to 3"),
        ({"y": torch.arange(3)}, r"y is torch\.int64 of shape \(3,\); give \(4,\) integer"),
        ({"y": torch.full((4, 4), float("nan"))}, "negative or non-finite label weights"),
        ({"s": torch.rand(4, 6, 6)}, r"s has the shape \(4, 6, 6\); give the saliency as \(4, 12, 12\)"),
        ({"s": -torch.ones(4, 12, 12)}, "negative or non-finite values"),
        ({"s": torch.zeros(4, 12, 12)}, "s is zero everywhere in some samples"),
        ({"grid": 5}, "grid=5 does not divide inputs of size 12x12; grids that fit: 2, 3, 4, 6, 12"),
        ({"omega": 0.9}, r"omega=0\.9 makes A indefinite .* give at most 0\.\d+, or 2 / \(partition \+ 2\)"),
        ({"lam": 0.3}, r"lam has the shape \(\); give \(4,\) finite shares"),
        ({"lam": torch.ones(5)}, r"lam has the shape \(5,\); give \(4,\)"),
        ({"lam": -torch.ones(4)}, "give .* finite shares of at least 0"),
        ({"lam": torch.tensor([1.0, 1, 0, 0]), "partition": 2}, "lam is 0 for all inputs of a partition"),
    ],
)
def test_call_refuses(change, message):
    own = {"omega", "grid", "partition"}
    given = {"x": torch.rand(4, 3, 12, 12), "y": torch.arange(4), "s": smooth_saliency(4, 12, 12, 0)}
    given |= {k: v for k, v in change.items() if k not in own}
    mix = CoMixup(4, **{k: v for k, v in change.items() if k in own})
    with pytest.raises(ValueError, match=message):
        mix(**given)
