"""Transport: Algorithm 1 in its printed matrix form, its propositions, and the assignment optimum."""

import numpy as np
import pytest
import torch
from dataopt.core.mixup.transport import distances, plan_cost, plan_transport
from hypothesis import given, settings
from hypothesis import strategies as st

from .conftest import smooth_saliency

RELEASED = np.load(__file__.replace("test_transport.py", "released.npz"))


def algorithm_1(s, shown, xi, penalty=1e6):
    """Thesis Algorithm 1 on one sample with n x n matrices; yields the winning plan of every step."""
    rows, cols = s.shape
    n = rows * cols
    cost = xi * distances(rows, cols) - s.reshape(-1, 1) * shown.reshape(1, -1)
    first = cost.copy()
    while True:
        plan = np.zeros((n, n))
        plan[np.arange(n), cost.argmin(1)] = 1
        conflict = np.where(plan == 1, first, penalty)
        win = np.zeros((n, n))
        win[conflict.argmin(0), np.arange(n)] = 1
        win *= plan
        yield win
        lose = (1 - win) * plan
        if not lose.any():
            return
        cost = cost + penalty * lose


def problem(seed, rows, cols, peaked):
    rng = np.random.default_rng(seed)
    s = rng.random((rows, cols)) ** (6 if peaked else 1)
    return s / s.sum(), rng.random((rows, cols)) < rng.uniform(0.1, 0.9)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 6),
    cols=st.integers(2, 6),
    peaked=st.booleans(),
    xi=st.floats(0.01, 2),
)
def test_deferred_acceptance_is_algorithm_1(seed, rows, cols, peaked, xi):
    s, shown = problem(seed, rows, cols, peaked)
    *_, last = algorithm_1(s, shown, xi)
    source = plan_transport(s[None], shown[None], xi)[0]
    assert sorted(source) == list(range(rows * cols))
    np.testing.assert_array_equal(source, last.argmax(0))


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), peaked=st.booleans())
def test_propositions_3_to_5(seed, peaked):
    """Every shown place holds one region at each step, the objective never rises, and it ends in time."""
    s, shown = problem(seed, 4, 4, peaked)
    xi, n = 0.8, 16
    cost = xi * distances(4, 4) - s.reshape(-1, 1) * shown.reshape(1, -1)
    before, steps = np.inf, 0
    for win in algorithm_1(s, shown, xi):
        steps += 1
        assert (win[:, shown.ravel()].sum(0) == 1).all()
        value = (win * cost)[:, shown.ravel()].sum()
        assert value <= before + 1e-12
        before = value
    assert steps <= n * (n - 1) / 2 + 1
    assert (win.sum(0) == 1).all() and (win.sum(1) == 1).all()
    assert before == pytest.approx(plan_cost(plan_transport(s[None], shown[None], xi), s[None], shown[None], xi)[0])


def test_between_staying_and_the_exact_assignment():
    s = smooth_saliency(64, 64, 64, 5).numpy().astype(float) ** 3  # peaked: there is something to gain
    s = s.reshape(64, 8, 8, 8, 8).sum((2, 4))
    s /= s.sum((1, 2), keepdims=True)
    shown = np.random.default_rng(0).random(s.shape) < 0.5
    home = np.broadcast_to(np.arange(64), (64, 64))
    stay, ours, best = (
        plan_cost(plan, s, shown, 0.8)
        for plan in (home, plan_transport(s, shown, 0.8), plan_transport(s, shown, 0.8, "exact"))
    )
    assert (best <= ours + 1e-12).all() and (ours <= stay + 1e-12).all()
    assert (stay - best).mean() > 0.05
    assert (stay - ours).sum() >= 0.8 * (stay - best).sum()


def test_exact_is_optimal_by_brute_force():
    from itertools import permutations

    rng = np.random.default_rng(1)
    for _ in range(30):
        s, shown = rng.dirichlet(np.full(4, 0.3)).reshape(2, 2), rng.random((2, 2)) < 0.6
        plan = plan_transport(s[None], shown[None], 0.3, "exact")
        assert sorted(plan[0]) == [0, 1, 2, 3]
        every = [plan_cost(np.array([p]), s[None], shown[None], 0.3)[0] for p in permutations(range(4))]
        assert plan_cost(plan, s[None], shown[None], 0.3)[0] == pytest.approx(min(every))


@pytest.mark.parametrize("case", range(6))
def test_released_plans_on_shown_places(case):
    """The authors' code, run once; it leaves a shown place empty where its region has no saliency at all."""
    blocks = int(RELEASED[f"case{case}"][0])
    partner = RELEASED[f"perm{case}"]
    n = int(np.sqrt(RELEASED[f"plan{case}_0"].shape[1]))
    labels = RELEASED[f"mask{case}"].repeat(n // blocks, 1).repeat(n // blocks, 2)
    s = torch.from_numpy(RELEASED["saliency"].astype(np.float32))
    s = torch.nn.functional.avg_pool2d(s.unsqueeze(1), 32 // n).squeeze(1)
    s = (s / s.sum((1, 2), keepdim=True)).numpy()
    for side, (w, shown) in enumerate(((s, labels > 0), (s[partner], labels < 2))):
        theirs = RELEASED[f"plan{case}_{side}"]
        ours = plan_transport(w, shown, 0.8)
        compared = shown.reshape(len(ours), -1) & (theirs >= 0)
        assert compared.mean() > 0.2
        assert (ours == theirs)[compared].mean() >= 0.999


def test_hidden_everywhere_and_shown_everywhere_stay():
    s, _ = problem(0, 4, 4, True)
    for shown in (np.zeros((4, 4), bool), np.ones((4, 4), bool)):
        for method in ("iterative", "exact"):
            np.testing.assert_array_equal(plan_transport(s[None], shown[None], 0.8, method)[0], np.arange(16))


def test_free_moves_take_the_most_salient_regions():
    """With no price on distance the k shown places hold the k most salient regions."""
    s, shown = problem(3, 4, 4, True)
    for method in ("iterative", "exact"):
        source = plan_transport(s[None], shown[None], 1e-12, method)[0]
        k = shown.sum()
        assert set(source[shown.ravel()]) == set(np.argsort(-s.ravel())[:k])
