"""The compiled solver of Co-Mixup: sub-problems against exhaustive search, sweeps against their definition."""

import itertools

import numpy as np
import pytest
from dataopt.core.mixup.comixup import compatibility
from dataopt.core.mixup.joint import neighbours, objective, penalty, solve_cells, sweeps
from hypothesis import given, settings
from hypothesis import strategies as st

HALF_BONUS = 5e-4
CAP = 200_000


def distances(labels: list[tuple[int, int]]) -> np.ndarray:
    """V by its words: 0 for the same, 1/4 between a half and one of its inputs, else 1."""

    def v(p, q):
        if p == q:
            return 0.0
        halves = [x for x in (p, q) if x[0] != x[1]]
        return 0.25 if len(halves) == 1 and set(p) & set(q) else 1.0

    return np.array([[v(p, q) for q in labels] for p in labels])


def edges(rows: int, cols: int) -> list[tuple[int, int]]:
    cell = np.arange(rows * cols).reshape(rows, cols)
    return [*zip(cell[:-1].flat, cell[1:].flat, strict=True), *zip(cell[:, :-1].flat, cell[:, 1:].flat, strict=True)]


def energy(unary: np.ndarray, weight: float, dist: np.ndarray, rows: int, cols: int, chosen: np.ndarray) -> float:
    total = sum(unary[i, k] for i, k in enumerate(chosen))
    return total + weight * sum(dist[chosen[i], chosen[j]] for i, j in edges(rows, cols))


def brute_force(unary: np.ndarray, weight: float, dist: np.ndarray, rows: int, cols: int) -> float:
    """Least energy over all labellings, by broadcasting: one axis per cell."""
    n, labels = unary.shape
    total = np.zeros((labels,) * n)

    def on(values, *cells):
        return values.reshape([labels if i in cells else 1 for i in range(n)])

    for i in range(n):
        total = total + on(unary[i], i)
    for i, j in edges(rows, cols):
        total = total + weight * on(dist, i, j)
    return float(total.min())


def by_rows(unary: np.ndarray, weight: float, dist: np.ndarray, rows: int, cols: int) -> float:
    """Least energy of a grid, by dynamic programming over all labels of the last ``cols`` cells, none eliminated."""
    labels = unary.shape[1]
    table = np.zeros((labels,) * cols)  # oldest cell first
    for i in range(rows * cols):
        up = i >= cols
        new = table[..., None] + unary[i].reshape([1] * cols + [labels])
        if up:
            new = new + weight * dist.reshape([labels] + [1] * (cols - 1) + [labels])
        if i % cols:
            new = new + weight * dist.reshape([1] * (cols - 1) + [labels, labels])
        table = new.min(0)
    return float(table.min())


def solve(unary, weight, dist, rows, cols, cap=CAP):
    near, degree = neighbours(rows, cols)
    chosen = np.full(rows * cols, -1)
    gap = solve_cells(unary, weight, dist, rows, cols, near, degree, cap, chosen)
    return energy(unary, weight, dist, rows, cols, chosen), gap


def problem(rng, cells: int, inputs: int, halves: int):
    """Arbitrary unaries and weights over three orders of magnitude; the last ``halves`` labels mix two inputs."""
    pairs = list(itertools.combinations(range(inputs), 2))[:halves]
    labels = [(k, k) for k in range(inputs)] + pairs
    unary = rng.normal(size=(cells, inputs))
    mixed = [(unary[:, a] + unary[:, b]) / 2 - rng.random() * 0.3 for a, b in pairs]
    return np.column_stack([unary, *mixed]), 10 ** rng.uniform(-2, 1), distances(labels)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    grid=st.sampled_from([(2, 3), (3, 2), (1, 6), (6, 1), (2, 2), (1, 1), (3, 3)]),
    halves=st.integers(0, 3),
)
def test_sub_problems_are_solved_exactly(seed, grid, halves):
    rows, cols = grid
    inputs = 3 if grid == (3, 3) else 4
    halves = min(halves, 1) if grid == (3, 3) else halves
    unary, weight, dist = problem(np.random.default_rng(seed), rows * cols, inputs, halves)
    found, gap = solve(unary, weight, dist, rows, cols)
    assert gap == 0
    assert found == pytest.approx(brute_force(unary, weight, dist, rows, cols), abs=1e-9)


def test_ties_and_no_weight():
    for unary in (np.zeros((6, 4)), np.tile([[1.0, 1, 2, 2]], (6, 1))):
        for weight in (0.0, 0.5):
            assert solve(unary, weight, distances([(k, k) for k in range(4)]), 2, 3) == (6 * unary[0].min(), 0)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), cap=st.sampled_from([1, 2, 4, 9, 30]))
def test_the_gap_of_a_capped_search_is_certified(seed, cap):
    unary, weight, dist = problem(np.random.default_rng(seed), 6, 5, 3)
    unary *= 0.3
    found, gap = solve(unary, weight, dist, 2, 3, cap)
    best = brute_force(unary, weight, dist, 2, 3)
    assert best - 1e-9 <= found <= best + gap + 1e-9


def test_a_small_cap_is_felt():
    gaps = [solve(*problem(np.random.default_rng(seed), 6, 5, 0), 2, 3, 1)[1] for seed in range(40)]
    assert sum(g > 0 for g in gaps) > 10


def real_costs(rng, m: int, n: int) -> np.ndarray:
    """(n, m) costs as they come up: most of an input's saliency in a few cells, and the prior."""
    pooled = rng.random((m, n)) ** 4
    pooled /= pooled.sum(1, keepdims=True)
    return np.ascontiguousarray((-pooled - 0.05 / n * np.log(rng.dirichlet(np.full(m, 2.0)) + 1e-8)[:, None]).T)


def test_real_sub_problems_on_4x4_match_a_full_search():
    rng = np.random.default_rng(0)
    for _ in range(12):
        cost = real_costs(rng, 12, 16)
        others = rng.multinomial(11 * 16, rng.dirichlet(np.ones(12))).astype(float)
        unary = cost + penalty(others, np.eye(12), 2 / 16, 0.83 * 16, True)
        pairs = list(itertools.combinations(rng.choice(12, 3, replace=False).tolist(), 2))
        pairs = [(min(p), max(p)) for p in pairs]
        mixed = [(unary[:, a] + unary[:, b]) / 2 - HALF_BONUS for a, b in pairs]
        unary = np.column_stack([unary, *mixed])
        dist = distances([(k, k) for k in range(12)] + pairs)
        found, gap = solve(unary, 0.32 / 16, dist, 4, 4)
        assert gap == 0
        assert found == pytest.approx(by_rows(unary, 0.32 / 16, dist, 4, 4), abs=1e-9)


def test_the_two_exhaustive_searches_agree():
    for seed, (rows, cols) in enumerate([(2, 3), (3, 2), (1, 4), (4, 1)] * 3):
        given_problem = problem(np.random.default_rng(seed), rows * cols, 4, 2)
        assert by_rows(*given_problem, rows, cols) == pytest.approx(brute_force(*given_problem, rows, cols))


# --- propositions ---


def random_places(rng, m):
    return rng.integers(0, 25, (m, 2))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), m=st.integers(1, 30))
def test_proposition_6_a_is_positive_semidefinite_up_to_the_stated_omega(seed, m):
    rng = np.random.default_rng(seed)
    places = random_places(rng, m)
    if rng.random() < 0.5:  # the worst seen: one far away from all others
        places[:] = 0
        places[0] = 24
    a = compatibility(places, 2 / (m + 2))
    assert np.array_equal(a, a.T) and a.min() >= 0
    for x, other in rng.random((5, 2, m)):
        s = lambda p, q: p @ a @ q  # noqa: E731
        assert s(x, x) + s(other, other) - 2 * s(x, other) >= -1e-12
    assert np.linalg.eigvalsh(a)[0] >= -1e-12


def test_an_omega_that_is_too_large_is_refused_with_its_limit():
    rng = np.random.default_rng(0)
    for m in (2, 5, 20):
        places = random_places(rng, m)
        with pytest.raises(
            ValueError, match=r"omega=0\.9 makes A indefinite.*Proposition 6.*give at most 0\."
        ) as error:
            compatibility(places, 0.9)
        limit = float(str(error.value).split("give at most ")[1].split(",")[0])
        assert np.linalg.eigvalsh(compatibility(places, limit))[0] >= -1e-12
        with pytest.raises(ValueError, match="indefinite"):
            compatibility(places, limit + 0.002)
    same = np.zeros((4, 2), int)
    assert np.array_equal(compatibility(same, 0.3), 0.7 * np.eye(4))  # nothing is apart, and nothing is 0 / 0


def test_the_distances_are_l1_with_a_mean_of_one_over_m():
    places = np.array([[0, 0], [3, 4], [1, 0]])
    a = compatibility(places, 0.2)
    apart = np.array([[0, 7, 1], [7, 0, 6], [1, 6, 0]])
    np.testing.assert_allclose(a, 0.8 * np.eye(3) + 0.2 * apart * 3 / apart.sum())


def unclipped(o: np.ndarray, a: np.ndarray) -> float:
    """f_c of eq. 4.1 without its maximum."""
    return sum(o[j] @ a @ o[k] for j in range(len(o)) for k in range(len(o)) if k != j)


def test_proposition_7_without_clipping_it_is_linear_in_one_output():
    rng = np.random.default_rng(0)
    a = compatibility(random_places(rng, 6), 0.1)
    o = rng.random((4, 6))
    for j in range(4):
        slope = 2 * a @ (o.sum(0) - o[j])
        for step in np.eye(6) * 1e-3:
            up, down = o.copy(), o.copy()
            up[j] += step
            down[j] -= step
            up, down, here = unclipped(up, a), unclipped(down, a), unclipped(o, a)
            assert (up - down) / 2e-3 == pytest.approx(slope @ step / 1e-3, abs=1e-9)
            assert up + down - 2 * here == pytest.approx(0, abs=1e-9)
        # and this slope is what a sweep charges below no threshold, but for the factor gamma / n
        for hard in (True, False):
            np.testing.assert_allclose(penalty(o.sum(0) - o[j], a, 2.0, 0.0, hard), slope)


def test_proposition_8_the_soft_penalty_is_that_of_equation_4_2():
    """max{tau', v} o is, since the shares of an output have a fixed sum, relu(v - tau') o and a constant."""
    rng = np.random.default_rng(1)
    a = compatibility(random_places(rng, 8), 0.05)
    others = rng.multinomial(7 * 16, rng.dirichlet(np.ones(8))).astype(float)
    v, limit = a @ others, 0.83 * 16
    assert (v < limit).any() and (v > limit).any()
    soft = penalty(others, a, 2 / 16, limit, False)
    np.testing.assert_allclose(soft, np.maximum(2 / 16 * limit, 2 / 16 * v))
    o = rng.multinomial(16, np.ones(8) / 8, size=5)
    other_form = o @ (2 / 16 * np.maximum(v - limit, 0))
    np.testing.assert_allclose(o @ soft - other_form, np.full(5, 2 / 16 * limit * 16))
    # criterion 1: more of an input in the other outputs never makes it cheaper; 2: nothing extra below the limit
    for one in np.eye(8):
        assert (penalty(others + one, a, 2 / 16, limit, False) >= soft).all()
    assert (soft[v < limit] == soft.min()).all()


def test_the_hard_penalty_has_the_mask_inside_the_product():
    a = np.array([[0.9, 0.05, 0.05], [0.05, 0.9, 0.05], [0.05, 0.05, 0.9]])
    others = np.array([20.0, 1.0, 0.0])
    assert ((a @ others) > 10).tolist() == [True, False, False]
    charged = penalty(others, a, 2.0, 10.0, True)
    np.testing.assert_allclose(charged, 2 * a @ [20.0, 0, 0])
    assert charged[1] == charged[2] > 0  # inputs below the limit pay for their distance to the one above
    assert (penalty(others, a, 2.0, 100.0, True) == 0).all()


# --- sweeps ---


def swept(cost, a, rows, cols, outputs, n_iter, *, beta=0.32, gamma=1.0, tau=0.83, hard=True, resolve=True, seed=0):
    """(first, second, objective) after ``n_iter`` sweeps from a seeded start."""
    n, m = cost.shape
    first = np.random.default_rng(seed).integers(m, size=(outputs, n))
    second = first.copy()
    settings = beta / n, a, 2 * gamma / n, tau * n, hard
    if n_iter:
        value, gap = sweeps(cost, *settings, rows, cols, n_iter, gamma / n * resolve, CAP, first, second)
        assert gap == 0
    else:
        near, degree = neighbours(rows, cols)
        value = objective(cost, *settings, near, degree, first, second, counted(first, second, m))
    return first, second, value


def counted(first, second, m):
    return (np.eye(m)[first] + np.eye(m)[second]).sum(1) / 2


def test_the_objective_by_loops():
    rng = np.random.default_rng(2)
    cost, a = real_costs(rng, 6, 12), compatibility(random_places(rng, 6), 0.05)
    for hard in (True, False):
        for tau in (0.0, 0.83):
            first, second, value = swept(cost, a, 3, 4, 5, 3, tau=tau, hard=hard)
            assert (first != second).any()
            total, o = 0.0, counted(first, second, 6)
            v = distances([(i, k) for i in range(6) for k in range(i, 6)])
            index = {(i, k): at for at, (i, k) in enumerate((i, k) for i in range(6) for k in range(i, 6))}
            for j in range(5):
                labels = [index[p] for p in zip(first[j].tolist(), second[j].tolist(), strict=True)]
                unary = np.column_stack([(cost[:, i] + cost[:, k]) / 2 for i, k in index])
                total += energy(unary, 0.32 / 12, v, 3, 4, labels)
                rest = o.sum(0) - o[j]
                usage = a @ rest
                charged = a @ (rest * (usage > tau * 12)) if hard else np.maximum(usage, tau * 12)
                total += charged @ o[j] / 12
            assert value == pytest.approx(total)
    # without a threshold it is eq. 4.1 itself: unaries, smoothness and gamma / n f_c
    first, second, value = swept(cost, a, 3, 4, 5, 3, tau=0.0, beta=0.0)
    o = counted(first, second, 6)
    assert value == pytest.approx(shown_cost(cost, first, second) + unclipped(o, a) / 12)


def shown_cost(cost, first, second):
    cells = np.arange(len(cost))
    return sum((cost[cells, i] + cost[cells, k]).sum() / 2 for i, k in zip(first, second, strict=True))


def test_one_sweep_solves_each_output_given_the_others():
    rng = np.random.default_rng(3)
    cost, a = real_costs(rng, 4, 6), compatibility(random_places(rng, 4), 0.05)
    first, _, _ = swept(cost, a, 2, 3, 5, 0)
    o = counted(first, first, 4)
    expected = []
    for j in range(5):
        unary = cost + penalty(o.sum(0) - o[j], a, 2 / 6, 0.83 * 6, True)
        best = min(
            itertools.product(range(4), repeat=6),
            key=lambda c: energy(unary, 0.32 / 6, distances([(k, k) for k in range(4)]), 2, 3, c),
        )
        o[j] = np.bincount(best, minlength=4)
        expected.append(best)
    first, second, _ = swept(cost, a, 2, 3, 5, 1)
    assert np.array_equal(first, second) and np.array_equal(first, np.array(expected))


def offered(first, second, m) -> set[tuple[int, int]]:
    """The half labels of the next sweep: pairs of the two or three inputs that are shown most."""
    shown = counted(first[None], second[None], m)[0]
    top = [k for k in np.argsort(-shown, kind="stable") if shown[k] > 0][:3]
    return {(min(p), max(p)) for p in itertools.combinations(top, 2)}


def test_without_compatibility_a_sweep_never_raises_the_objective():
    """An output is then a problem of its own; only a half label that is no longer offered can make it worse."""
    compared = 0
    for seed in range(80):
        cost = real_costs(np.random.default_rng(seed), 7, 16)
        before = swept(cost, np.eye(7), 4, 4, 1, 0, gamma=0.0, seed=seed)
        for t in range(1, 5):
            after = swept(cost, np.eye(7), 4, 4, 1, t, gamma=0.0, seed=seed)
            used = {(p, q) for p, q in zip(before[0][0], before[1][0], strict=True) if p != q}
            if used <= offered(before[0][0], before[1][0], 7):
                bonus = [HALF_BONUS * (v[0] != v[1]).sum() for v in (before, after)]
                assert after[2] - bonus[1] <= before[2] - bonus[0] + 1e-12
                compared += 1
            before = after
    assert compared > 0.9 * 320


def test_without_compatibility_and_threshold_a_sweep_without_halves_never_raises_it_either():
    """Coordinate descent on eq. 4.1: each output's charge is its exact share of f_c (Proposition 7)."""
    for seed in range(30):
        rng = np.random.default_rng(seed)
        cost, a = real_costs(rng, 7, 16), compatibility(random_places(rng, 7), 0.05)
        before, after = (swept(cost, a, 4, 4, 5, t, tau=0.0, seed=seed)[2] for t in (0, 1))
        assert after <= before + 1e-12


def test_half_labels_come_from_the_inputs_that_an_output_shows_most():
    rng = np.random.default_rng(4)
    halves = 0
    for seed in range(20):
        cost, a = real_costs(rng, 8, 16), np.eye(8)
        once, alone, _ = swept(cost, a, 4, 4, 8, 1, seed=seed)
        assert np.array_equal(once, alone)  # none in the first sweep
        first, second, _ = swept(cost, a, 4, 4, 8, 2, seed=seed, resolve=False)
        assert (first <= second).all()
        for j in range(8):
            pairs = {(p, q) for p, q in zip(first[j], second[j], strict=True) if p != q}
            halves += (first[j] != second[j]).sum()
            assert pairs <= offered(once[j], once[j], 8)
    assert halves > 100


def test_half_labels_are_preferred_by_the_bonus_alone():
    """Two inputs of equal cost everywhere, no smoothness: halves cost the same but for the bonus."""
    cost = np.array([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.2, 0.0, 1.0], [0.0, 0.2, 1.0]])
    first, second, _ = swept(cost, np.eye(3), 2, 2, 1, 4, beta=0.0, gamma=0.0)
    assert (first[0].tolist(), second[0].tolist()) == ([0, 0, 1, 0], [1, 1, 1, 0])
