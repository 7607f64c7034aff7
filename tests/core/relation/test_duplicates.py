"""Near-duplicates."""

import pytest
import torch
from dataopt.core.relation import near_duplicates

from .reference import problem


def test_planted_twins_are_found():
    f, _, _ = problem(n=300, d=32, seed=0)
    g = torch.Generator().manual_seed(0)
    f[100:110] = 3 * f[:10]  # the same direction
    f[110:120] = f[10:20] + 0.01 * torch.randn(10, 32, generator=g)
    found = near_duplicates(f)
    twins = [*range(20), *range(100, 120)]
    assert found.is_issue.nonzero().squeeze(1).tolist() == twins
    assert found.nearest[:20].tolist() == list(range(100, 120))
    assert found.nearest[100:120].tolist() == list(range(20))
    assert (found.distance[:10] < 1e-6).all() and found.score[found.is_issue].max() < found.score[~found.is_issue].min()


def test_distances_are_cosine_distances_to_the_nearest_other_row():
    f, _, _ = problem(n=200, seed=1)
    unit = torch.nn.functional.normalize(f.double(), dim=1)
    distance, nearest = (1 - unit @ unit.T).fill_diagonal_(9).min(1)
    found = near_duplicates(f.numpy())
    torch.testing.assert_close(found.distance, distance, rtol=0, atol=1e-6)
    assert torch.equal(found.nearest, nearest)
    middle = found.distance.median()
    torch.testing.assert_close(found.score, found.distance / (found.distance + middle))
    for threshold in (0.13, 0.7):
        issues = near_duplicates(f, threshold).is_issue
        assert torch.equal(issues, found.distance <= threshold * middle)
    assert issues.any()
    types = [x.dtype for x in (found.nearest, found.distance, found.score, found.is_issue)]
    assert types == [torch.int64, torch.float64, torch.float64, torch.bool]


def test_three_alike_and_all_alike():
    f, _, _ = problem(n=60, seed=2)
    f[20] = f[40] = f[0]
    found = near_duplicates(f)
    assert all(int(found.nearest[i]) in {0, 20, 40} - {i} for i in (0, 20, 40))
    same = near_duplicates(torch.ones(5, 3))
    assert same.is_issue.all() and (same.nearest != torch.arange(5)).all() and same.score.tolist() == [0] * 5


def test_one_row():
    with pytest.raises(ValueError, match="features has one row"):
        near_duplicates(torch.ones(1, 4))
