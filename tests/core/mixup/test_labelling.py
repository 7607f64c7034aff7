"""The mask solvers: exact against brute force and each other, never worse than the released code."""

import importlib.util
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from dataopt.core.mixup.descent import descend, ishikawa
from dataopt.core.mixup.grid import MaskCosts, binomial_prior, mask_costs, pool, region_distances
from dataopt.core.mixup.labelling import mask_energy, solve_mask
from hypothesis import given, settings
from hypothesis import strategies as st

from .conftest import brute_force, random_costs, smooth_saliency

RELEASED = np.load(__file__.replace("test_labelling.py", "released.npz"))


def energy_by_loops(costs, labels):
    batch, rows, cols, k = costs.unary.shape
    e = np.zeros(batch)
    for b in range(batch):
        for r in range(rows):
            for c in range(cols):
                t = labels[b, r, c]
                e[b] += costs.unary[b, r, c, t]
                if r + 1 < rows:
                    e[b] += costs.down[b, r, c] * ((t - labels[b, r + 1, c]) / (k - 1)) ** 2
                if c + 1 < cols:
                    e[b] += costs.right[b, r, c] * ((t - labels[b, r, c + 1]) / (k - 1)) ** 2
    return e


def test_mask_energy_is_the_sum_of_its_terms():
    rng = np.random.default_rng(0)
    costs = random_costs(rng, 5, 4, 3, 4, convex=False)
    labels = rng.integers(0, 4, (5, 4, 3))
    np.testing.assert_allclose(mask_energy(costs, labels), energy_by_loops(costs, labels), rtol=1e-12)


@pytest.mark.parametrize("convex", [True, False])
@pytest.mark.parametrize(
    ("rows", "cols", "labels"), [(2, 2, 2), (2, 2, 3), (2, 2, 4), (3, 3, 2), (3, 3, 3), (1, 6, 3), (4, 2, 3)]
)
def test_every_exact_solver_reaches_the_brute_force_optimum(rows, cols, labels, convex):
    costs = random_costs(np.random.default_rng(rows * 100 + cols * 10 + labels), 120, rows, cols, labels, convex)
    best = brute_force(costs)
    for solver in ("auto", "numba", "scipy"):
        np.testing.assert_allclose(mask_energy(costs, solve_mask(costs, solver)), best, rtol=1e-6, atol=1e-7)
    one_cut = np.empty(costs.unary.shape[:-1], np.int64)
    ishikawa(costs.unary, costs.down, costs.right, one_cut)
    np.testing.assert_allclose(mask_energy(costs, one_cut), best, rtol=1e-9, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 16),
    cols=st.integers(1, 16),
    labels=st.integers(2, 5),
    ties=st.booleans(),
)
def test_descent_equals_one_ishikawa_cut(seed, rows, cols, labels, ties):
    costs = random_costs(np.random.default_rng(seed), 3, rows, cols, labels, convex=True)
    if ties:  # everywhere; in multiples of 1/8, so that rounding keeps the slopes sorted
        slopes = (np.diff(costs.unary, axis=-1) * 8).round() / 8
        unary = np.concatenate([np.zeros_like(costs.unary[..., :1]), np.cumsum(slopes, -1)], -1)
        costs = MaskCosts(unary, (costs.down * 8).round() / 8, (costs.right * 8).round() / 8)
    outs = []
    for kernel in (descend, ishikawa):
        out = np.empty(costs.unary.shape[:-1], np.int64)
        kernel(costs.unary, costs.down, costs.right, out)
        assert out.min() >= 0 and out.max() < labels
        outs.append(mask_energy(costs, out))
    np.testing.assert_allclose(outs[0], outs[1], rtol=1e-9, atol=1e-9)


def test_descent_needs_convexity_and_auto_knows_it():
    rng = np.random.default_rng(3)
    costs = random_costs(rng, 300, 3, 3, 3, convex=False)
    best = brute_force(costs)
    out = np.empty(costs.unary.shape[:-1], np.int64)
    descend(costs.unary, costs.down, costs.right, out)
    assert (mask_energy(costs, out) > best + 1e-6).any()  # else the next line would prove nothing
    np.testing.assert_allclose(mask_energy(costs, solve_mask(costs)), best, atol=1e-9)


@pytest.mark.parametrize("labels", [3, 4, 5])
@pytest.mark.parametrize("lam", [0.0, 1e-5, 0.001, 0.999, 1.0])
def test_extreme_shares_stay_exact(labels, lam):
    """Near 0 and 1 the prior's 1e-8 makes the unaries non-convex."""
    s = smooth_saliency(8, 32, 32, 1)
    costs = costs_of(s, torch.rand(8, 3, 32, 32), torch.arange(8).roll(1), lam, (8, 8), labels=labels)
    out = np.empty((8, 8, 8), np.int64)
    ishikawa(costs.unary, costs.down, costs.right, out)
    np.testing.assert_allclose(mask_energy(costs, solve_mask(costs)), mask_energy(costs, out), rtol=1e-9)
    if lam in (0.0, 1.0):  # flat saliency shows only the one that the prior asks for
        flat = costs_of(torch.full_like(s, 1 / 1024), torch.rand(8, 3, 32, 32), torch.arange(8).roll(1), lam, (8, 8))
        assert (solve_mask(flat) == 2 * lam).all()


def costs_of(s, x, partner, lam, grid, labels=3, data_term="released", beta=1.2, gamma=0.5, eta=0.2):
    p = pool(s, grid)
    return mask_costs(
        p,
        p[partner],
        torch.full((len(s),), lam),
        region_distances(x, partner, grid, 4),
        labels=labels,
        beta=beta,
        gamma=gamma,
        eta=eta,
        data_term=data_term,
    )


@pytest.mark.parametrize("case", range(6))
def test_never_above_the_released_code(case):
    """Masks that the authors' code chose once on these images (facts, not code)."""
    blocks, lam = int(RELEASED[f"case{case}"][0]), float(RELEASED[f"case{case}"][1])
    partner = torch.from_numpy(RELEASED[f"perm{case}"])
    x = torch.from_numpy(RELEASED["images"] / 255).float()
    s = torch.from_numpy(RELEASED["saliency"].astype(np.float32))
    costs = costs_of(s, x, partner, lam, (blocks, blocks))
    theirs = RELEASED[f"mask{case}"].astype(np.int64)
    ours = solve_mask(costs)
    gap = mask_energy(costs, ours) - mask_energy(costs, theirs)
    assert (gap <= 1e-5 * np.abs(mask_energy(costs, theirs))).all()
    moved = partner.numpy() != np.arange(len(partner))
    same = (ours == theirs).all((1, 2))[moved].mean()
    assert same >= {2: 0.9, 4: 0.85, 8: 0.5, 16: 0.0}[blocks]


def test_gco_backend_is_the_released_solver():
    blocks, lam = int(RELEASED["case2"][0]), float(RELEASED["case2"][1])
    partner = torch.from_numpy(RELEASED["perm2"])
    x = torch.from_numpy(RELEASED["images"] / 255).float()
    costs = costs_of(torch.from_numpy(RELEASED["saliency"].astype(np.float32)), x, partner, lam, (blocks, blocks))
    if importlib.util.find_spec("gco") is None:  # the extra pygco is opt-in
        with pytest.raises(RuntimeError, match=r"solver='gco' failed.*dataopt\[pygco\]"):
            solve_mask(costs, "gco")
        return
    moved = partner.numpy() != np.arange(len(partner))
    assert (solve_mask(costs, "gco") == RELEASED["mask2"])[moved].all()


def test_peaked_saliency_that_overflows_the_released_integers():
    """One region with 30 % of the mass on 16 x 16: the scaled unary leaves int32 in the released code."""
    s = torch.full((2, 64, 64), 1e-4)
    s[0, :4, :4] = s[:, 4:, 4:].sum() / 2  # region 0 dominates
    s = s / s.sum((1, 2), keepdim=True)
    costs = costs_of(s, torch.full((2, 3, 64, 64), 0.5), torch.tensor([1, 0]), 0.5, (16, 16))
    labels = solve_mask(costs)
    assert pool(s, (16, 16))[0, 0, 0] > 0.1
    assert labels[0, 0, 0] == 2 and labels[1, 0, 0] == 0  # both mixes show it


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), gamma=st.floats(0, 1), blocks=st.sampled_from([2, 4, 8]))
def test_pairwise_terms_are_submodular(seed, gamma, blocks):
    """Proposition 1 and 2: with distances in [0, 1] and gamma <= 1 every weight is non-negative."""
    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed)).round()  # the extremes
    partner = torch.tensor([1, 2, 3, 0])
    s = torch.ones(4, 16, 16) / 256
    for term in ("released", "thesis"):
        costs = costs_of(s, x, partner, 0.4, (blocks, blocks), gamma=gamma, data_term=term)
        assert costs.down.min() >= 0 and costs.right.min() >= 0


def test_definition_3_is_affine_and_definition_2_keeps_its_interaction():
    """The binary energy is psi plus phi^b; the thesis term drops exactly the interaction of phi^b'."""
    x = torch.rand(2, 3, 8, 8)
    partner = torch.tensor([1, 0])
    d_down, d_right = (d.numpy().astype(float) for d in region_distances(x, partner, (2, 2), 4))
    s = torch.rand(2, 8, 8)
    beta, gamma = 1.2, 0.5
    released = costs_of(s, x, partner, 0.5, (2, 2), labels=2)
    thesis = costs_of(s, x, partner, 0.5, (2, 2), labels=2, data_term="thesis")
    p = pool(s, (2, 2)).numpy().astype(float)
    b = beta / 32
    prior = -np.log(0.5 + 1e-8) * 0.2 / 4
    for bits in np.ndindex(2, 2, 2, 2):
        z = np.reshape(bits, (2, 2))
        labels = np.broadcast_to(z, (2, 2, 2))
        expected = np.zeros((2, 2))  # released, thesis
        for n in range(2):
            e = sum((1 - z[i]) * p[n][i] + z[i] * p[1 - n][i] + prior for i in np.ndindex(2, 2))
            t = e
            for (i, j), d in (
                (((0, 0), (1, 0)), d_down[n, :, :, 0, 0]),
                (((0, 1), (1, 1)), d_down[n, :, :, 0, 1]),
                (((0, 0), (0, 1)), d_right[n, :, :, 0, 0]),
                (((1, 0), (1, 1)), d_right[n, :, :, 1, 0]),
            ):
                a, c = z[i], z[j]
                e += b * (a - c) ** 2 + b * gamma * d[a, c]
                other = d[a, 1 - c] + d[1 - a, c] if a == c else d[0, 0] + d[1, 1]
                t += b * (a - c) ** 2 + b * gamma * (d[a, c] + other / 2)
            expected[n] = e, t
        ours = mask_energy(released, labels), mask_energy(thesis, labels)
        # equal up to a constant that no labelling changes
        offset = np.stack(ours, 1) - expected
        if bits == (0, 0, 0, 0):
            first = offset
        np.testing.assert_allclose(offset, first, atol=1e-9)


def test_prior_is_the_binomial():
    lam = torch.tensor([0.3, 0.8])
    p = torch.exp(-binomial_prior(lam, 4))
    share = torch.arange(4) / 3
    torch.testing.assert_close(p.sum(1), torch.ones(2, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close((p * share).sum(1), lam.double(), atol=1e-6, rtol=0)


def test_flat_saliency_takes_the_mode_of_the_prior():
    s = torch.ones(4, 16, 16) / 256
    x = torch.rand(4, 3, 16, 16)
    for lam, mode in ((0.1, 0), (0.3, 0), (0.4, 1), (0.6, 1), (0.7, 2)):
        costs = costs_of(s, x, torch.arange(4).flip(0), lam, (4, 4), beta=0.0, gamma=0.0)
        assert (solve_mask(costs) == mode).all()


@pytest.mark.parametrize("name", ["down", "right"])
def test_negative_weights_are_refused(name):
    costs = random_costs(np.random.default_rng(0), 1, 2, 2, 3, convex=True)
    getattr(costs, name)[0, 0, 0] = -0.1
    with pytest.raises(ValueError, match=rf"costs\.{name} has the weight -0\.1"):
        solve_mask(costs)


def test_unknown_solver():
    with pytest.raises(ValueError, match=r"solver='swap' must be one of 'auto', 'numba'"):
        solve_mask(random_costs(np.random.default_rng(0), 1, 2, 2, 3, convex=True), "swap")


def test_solvers_are_deterministic_and_leave_their_input():
    costs = random_costs(np.random.default_rng(0), 4, 8, 8, 3, convex=True)
    before = costs.unary.copy(), costs.down.copy(), costs.right.copy()
    for solver in ("numba", "scipy"):
        np.testing.assert_array_equal(solve_mask(costs, solver), solve_mask(costs, solver))
    for a, b in zip(before, (costs.unary, costs.down, costs.right), strict=True):
        np.testing.assert_array_equal(a, b)


def test_kernels_release_the_gil_and_are_cached_on_disk():
    costs = random_costs(np.random.default_rng(0), 8, 16, 16, 3, convex=True)
    solve_mask(costs)  # compiled
    many = MaskCosts(*(np.tile(a, (400, *[1] * (a.ndim - 1))) for a in (costs.unary, costs.down, costs.right)))
    worker = threading.Thread(target=solve_mask, args=(many,))
    worker.start()
    turns = 0
    while worker.is_alive():
        turns += 1
        time.sleep(0.001)
    assert turns > 20  # a kernel that holds the GIL lets this thread run only before and after it
    assert list(Path(descend.stats.cache_path).glob("*descend*.nbi"))
