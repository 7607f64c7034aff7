"""CCM's rows in plain loops, straight from section 7.3.1: what each token sees, and one layer of attention over it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor


@dataclass
class Row:
    """Pieces of one row: ``("prefix" | "context" | "query", tokens)`` in order."""

    pieces: list[tuple[str, int]]
    left: int = 0
    right: int = 0

    def marks(self, slots: int) -> tuple[list[int], list[int]]:
        """segment_ids and comp_slot."""
        segments, places = [-1] * self.left, [-1] * self.left
        number = 0
        for kind, count in self.pieces:
            number = 0 if kind == "prefix" else number + 1
            comp = slots if kind == "context" else 0
            segments += [number] * (count + comp)
            places += [-1] * count + list(range(comp))
        return segments + [-1] * self.right, places + [-1] * self.right


def marks(rows: list[Row], slots: int, left: bool = False) -> tuple[Tensor, Tensor]:
    """(B, L) segment_ids and comp_slot, padded at one end."""
    widths = [len(row.marks(slots)[0]) for row in rows]
    for row, width in zip(rows, widths, strict=True):
        if left:
            row.left = max(widths) - width
        else:
            row.right = max(widths) - width
    both = [row.marks(slots) for row in rows]
    return torch.tensor([b[0] for b in both]), torch.tensor([b[1] for b in both])


@st.composite
def rows(draw: st.DrawFn) -> list[Row]:
    out = []
    for _ in range(draw(st.integers(1, 3))):
        pieces = [("prefix", draw(st.integers(1, 3)))] if draw(st.booleans()) else []
        kinds = draw(st.lists(st.sampled_from(["context", "query"]), min_size=1, max_size=6))
        pieces += [(kind, draw(st.integers(1, 6))) for kind in kinds]
        out.append(Row(pieces))
    return out


def turned(key: Tensor, by: float, frequencies: Tensor) -> Tensor:
    """One key rotated, pair by pair."""
    out = key.clone()
    half = len(frequencies)
    for i, frequency in enumerate(frequencies.tolist()):
        a, b = key[i].item(), key[i + half].item()
        c, s = math.cos(by * frequency), math.sin(by * frequency)
        out[i], out[i + half] = a * c - b * s, b * c + a * s
    return out


def attend(
    row: Row,
    slots: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    frequencies: Tensor,
    scale: float,
    *,
    mode: str,
    recurrent: bool,
    positions: str,
    ema: float | None,
) -> tuple[Tensor, list[int]]:
    """One head, one row, segment by segment; the keys are given unrotated.

    Returns:
        (L, d) outputs and the L positions; zero on padding.
    """
    out, places = torch.zeros_like(value), [0] * len(query)
    at = row.left
    prefix_keys: list[Tensor] = []
    prefix_values: list[Tensor] = []
    memory: list[tuple[Tensor, Tensor]] = []  # unrotated ("cache") or rotated ("abs") keys of the slots
    steps, text = 0, 0
    for kind, count in row.pieces:
        sees = memory if kind == "query" or (kind == "context" and recurrent) else []
        p = len(prefix_keys)
        start = 0 if kind == "prefix" else p + (len(sees) if positions == "cache" else text)
        total = count + (slots if kind == "context" else 0)
        keys, values = list(prefix_keys), list(prefix_values)
        for slot, (k, v) in enumerate(sees):
            keys.append(turned(k, p + slot, frequencies) if positions == "cache" else k)
            values.append(v)
        own = []
        for r in range(total):
            places[at + r] = start + r
            own.append(turned(key[at + r], start + r, frequencies))
            keys.append(own[-1])
            values.append(value[at + r])
            q = turned(query[at + r], start + r, frequencies)
            weights = torch.softmax(torch.stack(keys) @ q * scale, 0)
            out[at + r] = weights @ torch.stack(values)
        if kind == "prefix":
            prefix_keys, prefix_values = own, [value[at + r] for r in range(total)]
        if kind == "context":
            steps, text = steps + 1, text + count
            new = [
                (key[at + count + s] if positions == "cache" else own[count + s], value[at + count + s])
                for s in range(slots)
            ]
            if mode == "concat" or steps == 1:
                memory = memory + new
            else:
                a = 1 / steps if ema is None else ema
                memory = [
                    ((1 - a) * k + a * nk, (1 - a) * v + a * nv) for (k, v), (nk, nv) in zip(memory, new, strict=True)
                ]
        at += total
    return out, places
