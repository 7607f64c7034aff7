"""The stored memories of one or several users, a row each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Memory:
    """Prefix and slots of every layer.

    Attributes:
        layers: for each layer (B, H, P + m, d) keys and values: the prefix, then the slots. Averages are stored in
            float32 or better.
        valid: (B, P + m) bool; users with fewer slots have empty ones between prefix and slots.
        steps: contexts that each user's memory holds.
        text: tokens of those contexts, which the positions "abs" count.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    valid: Tensor
    steps: tuple[int, ...]
    text: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(k.nbytes + v.nbytes for k, v in self.layers)


def stacked(memories: Sequence[Memory | None], prefix: int) -> Memory:
    """One memory with a row for each; shorter ones get empty slots between prefix and slots.

    Args:
        memories: at least one that is not None.
        prefix: pairs at the start that all of them have.
    """
    filled = next(m for m in memories if m is not None)
    width = max(0 if m is None else m.valid.shape[1] for m in memories)
    wide = [_widened(m, filled, prefix, width) for m in memories]
    layers = tuple(
        (torch.cat([m.layers[i][0] for m in wide]), torch.cat([m.layers[i][1] for m in wide]))
        for i in range(len(filled.layers))
    )
    steps, text = [t for m in wide for t in m.steps], [t for m in wide for t in m.text]
    return Memory(layers, torch.cat([m.valid for m in wide]), tuple(steps), tuple(text))


def single(memory: Memory, row: int) -> Memory | None:
    """The memory of one user, without empty slots; None where it holds nothing."""
    valid = memory.valid[row]
    if not bool(valid.any()):
        return None
    layers = tuple((k[row : row + 1, :, valid].clone(), v[row : row + 1, :, valid].clone()) for k, v in memory.layers)
    return Memory(
        layers,
        torch.ones(1, int(valid.sum()), dtype=torch.bool),
        memory.steps[row : row + 1],
        memory.text[row : row + 1],
    )


def _widened(memory: Memory | None, like: Memory, prefix: int, width: int) -> Memory:
    """The same memory with empty slots between prefix and slots, up to ``width`` pairs."""
    if memory is None:
        layers = tuple((empty_like(k[:1], 0), empty_like(v[:1], 0)) for k, v in like.layers)
        memory = Memory(layers, torch.ones(1, 0, dtype=torch.bool), (0,), (0,))
    more = width - memory.valid.shape[1]

    def wide(t: Tensor) -> Tensor:
        return torch.cat([t[:, :, :prefix], empty_like(t, more), t[:, :, prefix:]], 2)

    layers = tuple((wide(k), wide(v)) for k, v in memory.layers)
    gap = torch.zeros(len(memory.valid), more, dtype=torch.bool)
    valid = torch.cat([memory.valid[:, :prefix], gap, memory.valid[:, prefix:]], 1)
    return replace(memory, layers=layers, valid=valid)


def empty_like(pairs: Tensor, count: int) -> Tensor:
    """(B, H, count, d) zeros."""
    return torch.zeros(*pairs.shape[:2], count, pairs.shape[3], dtype=pairs.dtype, device=pairs.device)
