import itertools

import numpy as np
import pytest
import torch
from dataopt.core.mixup.grid import MaskCosts
from dataopt.core.mixup.labelling import mask_energy


@pytest.fixture
def g():
    return torch.Generator().manual_seed(0)


def smooth_saliency(batch: int, height: int, width: int, seed: int) -> torch.Tensor:
    """Blobs times |N(0, 1)|, what network saliency looks like."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    maps = np.zeros((batch, height, width))
    for b in range(batch):
        for _ in range(3):
            cy, cx, r = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(0.05, 0.15) * max(height, width)
            maps[b] += np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * r**2))
    maps *= np.abs(rng.normal(size=maps.shape)) + 1e-6
    return torch.from_numpy(maps / maps.sum((1, 2), keepdims=True)).float()


def random_costs(rng: np.random.Generator, batch: int, rows: int, cols: int, labels: int, convex: bool) -> MaskCosts:
    """Hostile problems: arbitrary unaries, weights over three orders of magnitude, some of them zero."""
    unary = rng.normal(size=(batch, rows, cols, labels))
    if convex:
        slopes = np.sort(rng.normal(size=(batch, rows, cols, labels - 1)), -1)
        unary = np.concatenate([np.zeros((batch, rows, cols, 1)), np.cumsum(slopes, -1)], -1)
    scale = 10 ** rng.uniform(-2, 1, size=(batch, 1, 1))
    down = rng.random((batch, rows - 1, cols)) * scale * (rng.random((batch, rows - 1, cols)) > 0.1)
    return MaskCosts(unary, down, rng.random((batch, rows, cols - 1)) * scale)


def brute_force(costs: MaskCosts) -> np.ndarray:
    """Least energy of each sample over all labellings."""
    batch, rows, cols, labels = costs.unary.shape
    best = np.full(batch, np.inf)
    for labelling in itertools.product(range(labels), repeat=rows * cols):
        one = np.broadcast_to(np.reshape(labelling, (rows, cols)), (batch, rows, cols))
        best = np.minimum(best, mask_energy(costs, one))
    return best
