"""Relations over training, and the mean of scores over checkpoints."""

import numpy as np
import pytest
import torch
from dataopt.core.relation import RelationGraph, average_scores, relation_map

from .reference import edges, kernel_matrix, problem


def checkpoints():
    """The same labels, seen by a model that grows surer."""
    _, _, y = problem(n=90, seed=0)
    return [(*problem(n=90, d=12 + step, seed=0, sharp=1.0 + 2 * step)[:2], y) for step in range(3)]


def test_mean_and_spread_over_three_checkpoints():
    data = checkpoints()
    r = torch.stack([-edges(kernel_matrix(f, p), y) for f, p, y in data])
    for i in (0, 33, np.int64(89)):
        found = relation_map((RelationGraph(*each) for each in data), i)
        others = [j for j in range(90) if j != i]
        assert found.index == i and found.others.tolist() == others and found.others.dtype == torch.int64
        row = r[:, int(i), others]
        mean = row.mean(0)
        std = ((row - mean) ** 2).mean(0).sqrt()
        for value, expected in ((found.mean, mean), (found.std, std), (found.last, row[-1])):
            assert value.shape == (89,) and value.dtype == torch.float32
            torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-6)
        assert std.max() > 0.05


def test_one_checkpoint_has_no_spread():
    found = relation_map([RelationGraph(*problem(n=50))], 4)
    assert (found.std == 0).all() and torch.equal(found.mean, found.last) and found.mean.any()


def test_checkpoints_are_asked_one_at_a_time():
    alive, most = [0], [0]

    class Counted(RelationGraph):
        def __init__(self, *args):
            super().__init__(*args)
            alive[0] += 1
            most[0] = max(most[0], alive[0])

        def __del__(self):
            alive[0] -= 1

    relation_map((Counted(*problem(n=50)) for _ in range(4)), 0)
    assert alive[0] == 0 and most[0] <= 2


def test_checkpoints_that_do_not_fit():
    with pytest.raises(ValueError, match="checkpoints is empty"):
        relation_map([], 0)
    with pytest.raises(ValueError, match="checkpoint 1 has 51 rows, the first 50"):
        relation_map([RelationGraph(*problem(n=50)), RelationGraph(*problem(n=51))], 0)
    with pytest.raises(IndexError, match="row 50 is not among the 50 rows"):
        relation_map([RelationGraph(*problem(n=50))], 50)


def test_average_scores():
    a, b = torch.tensor([2.0, -4.0, 1.0]), torch.tensor([0.5, 0.25, -0.5], dtype=torch.float64)
    expected = [(0.5 + 1) / 2, (-1 + 0.5) / 2, (0.25 - 1) / 2]
    found = average_scores([a, b])
    assert found.dtype == torch.float64 and found.tolist() == pytest.approx(expected)
    assert average_scores(iter([a])).tolist() == pytest.approx([0.5, -1, 0.25])
    assert average_scores([torch.zeros(3), a]).tolist() == pytest.approx([0.25, -0.5, 0.125])  # no scale to divide by
    for bad in ([], [a, a[:2]]):
        with pytest.raises(ValueError, match="scores has the lengths"):
            average_scores(bad)
