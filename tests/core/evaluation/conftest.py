import pytest
import torch
from torch import nn


def seeded(n: int) -> torch.Generator:
    return torch.Generator().manual_seed(n)


class Net(nn.Module):
    """Convolutions, global average, linear head; batch norm and dropout tell evaluation from training."""

    def __init__(self, channels: int = 3, classes: int = 4):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3, 1, 1), nn.ReLU()
        )
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(16, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.drop(self.body(x).mean((2, 3))))


def quadrants(n: int, seed: int, side: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Faint noise with one bright square whose colour is the class: pixels, labels, boxes (n, 4)."""
    g = seeded(seed)
    x = 0.2 * torch.rand(n, 3, side, side, generator=g)
    y = torch.randint(0, 3, (n,), generator=g)
    size = side // 2
    left, top = torch.randint(0, side - size + 1, (2, n), generator=g)
    for i in range(n):
        x[i, y[i], top[i] : top[i] + size, left[i] : left[i] + size] += 0.5
    return x, y, torch.stack([left, top, left + size, top + size], 1)


@pytest.fixture(scope="session")
def trained() -> Net:
    """A small network that knows the squares' colours."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net(classes=3)
        optimizer = torch.optim.Adam(model.parameters(), 0.02)
        for step in range(60):
            x, y, _ = quadrants(64, step)
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.zero_grad()
    return model
