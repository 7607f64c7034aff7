"""Training rows: from the token ids of contexts and queries, and padded into batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

import torch
from dataopt.core.arguments import check_choice
from torch import Tensor

Row = dict[str, list[int]]
IGNORED = -100


@dataclass(frozen=True)
class Query:
    """Token ids of I(t), which is read, and of O(t), which is learned."""

    input: Sequence[int]
    answer: Sequence[int]


def ccm_row(steps: Sequence[Sequence[int] | Query], comp_ids: Sequence[int], prefix: Sequence[int] = ()) -> Row:
    """One training row, ``[prefix | c(1) COMP.. | I O | c(2) COMP.. | ...]``.

    Args:
        steps: in order: the token ids of a context, which get COMP tokens, or a :class:`Query`, which reads the memory
            of the contexts before it and which nobody reads.
        comp_ids: of the model.
        prefix: ids that every segment sees, such as an attention sink.

    Returns:
        ``input_ids``, ``labels`` (-100 but on answers), ``segment_ids`` and ``comp_slot``; see
        :func:`dataopt.core.ccm.layout`.

    Raises:
        TypeError: something else than token ids. ValueError: an empty context or answer, no query, no COMP ids or the
            same one twice, or COMP tokens among the others.
    """
    if not any(isinstance(step, Query) for step in steps):
        raise ValueError("steps holds no Query, so there is nothing to learn from; add one with an answer")
    appended = _ids(comp_ids, "comp_ids")
    taken = set(appended)
    if not taken or len(taken) < len(appended):
        raise ValueError(f"comp_ids={appended} must be at least one id, and each once; give model.comp_ids")
    ids = _ids(prefix, "prefix")
    if taken.intersection(ids):
        raise ValueError("prefix holds COMP tokens; leave them out")
    labels, segments, slots = [IGNORED] * len(ids), [0] * len(ids), [-1] * len(ids)
    for number, step in enumerate(steps, 1):
        name = f"steps[{number - 1}]"
        if isinstance(step, Query):
            learned = _ids(step.answer, f"{name}.answer")
            if not learned:
                raise ValueError(f"{name}: the answer is empty; it needs at least one token")
            text, comp = [*_ids(step.input, f"{name}.input"), *learned], []
        else:
            text, learned, comp = _ids(step, name), [], appended
            if not text:
                raise ValueError(f"{name}: the context is empty; it needs at least one token")
        if taken.intersection(text):
            raise ValueError(f"{name} holds COMP tokens; leave them out, they are added where they belong")
        ids += [*text, *comp]
        labels += [IGNORED] * (len(text) - len(learned)) + learned + [IGNORED] * len(comp)
        segments += [number] * (len(text) + len(comp))
        slots += [-1] * len(text) + list(range(len(comp)))
    return {"input_ids": ids, "labels": labels, "segment_ids": segments, "comp_slot": slots}


def _ids(values: Sequence[int], name: str) -> list[int]:
    try:
        ids = [index(value) for value in values]
    except TypeError as e:
        raise TypeError(f"{name} must be one list of token ids, not {type(values).__name__} of other things") from e
    if ids and min(ids) < 0:
        raise ValueError(f"{name} holds {min(ids)}, which is no token id")
    return ids


def segments_of(
    input_ids: Tensor, comp_ids: Sequence[int], attention_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Segments from the COMP tokens: each ends behind its last one, and the rest is the query.

    Args:
        input_ids: (B, L).
        attention_mask: (B, L), 0 on padding.

    Returns:
        (B, L) int64 segment_ids and comp_slot.
    """
    matches = input_ids.unsqueeze(2) == torch.tensor(list(comp_ids), device=input_ids.device)
    comp_slot = torch.where(matches.any(2), matches.int().argmax(2), -1)
    ends = comp_slot == len(comp_ids) - 1
    segment_ids = ends.long().cumsum(1) - ends.long() + 1
    if attention_mask is not None:
        segment_ids = torch.where(attention_mask.bool(), segment_ids, -1)
        comp_slot = torch.where(attention_mask.bool(), comp_slot, -1)
    return segment_ids, comp_slot


@dataclass(frozen=True)
class CCMCollator:
    """Pads rows to a batch.

    Attributes:
        pad_token_id: of the padding.
        padding_side: "right" or "left".
        pad_to_multiple_of: rounds the width up.
        full_context: leave the COMP tokens out and give an ordinary batch of a causal language model, one row for each
            query with the contexts before it: for the first stage of training, and to compare with.
    """

    pad_token_id: int = 0
    padding_side: str = "right"
    pad_to_multiple_of: int | None = None
    full_context: bool = False

    def __post_init__(self) -> None:
        check_choice(("right", "left"), padding_side=self.padding_side)
        if not isinstance(self.pad_token_id, int):
            raise TypeError(f"pad_token_id={self.pad_token_id!r} must be a token id; eos_token_id does, too")
        if self.pad_to_multiple_of is not None:
            at_least_one("pad_to_multiple_of", self.pad_to_multiple_of)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """``input_ids``, ``labels``, ``attention_mask``, and but for ``full_context`` ``segment_ids``, ``comp_slot``.

        All are (B, L) int64.

        Raises:
            ValueError: no rows, or with ``full_context`` none that asks for something.
        """
        fills = {"input_ids": self.pad_token_id, "labels": IGNORED, "segment_ids": -1, "comp_slot": -1}
        plain = [{name: list(row[name]) for name in fills} for row in rows]
        if self.full_context:
            plain = [single for row in plain for single in full_context_rows(row)]
            fills = {"input_ids": self.pad_token_id, "labels": IGNORED}
        if not plain:
            raise ValueError(f"{len(rows)} rows hold no query; give rows as ccm_row makes them")
        width = max(len(row["input_ids"]) for row in plain)
        if self.pad_to_multiple_of:
            width += -width % self.pad_to_multiple_of
        out = {
            name: torch.tensor([self._padded(row[name], width, fill) for row in plain]) for name, fill in fills.items()
        }
        mask = [self._padded([1] * len(row["input_ids"]), width, 0) for row in plain]
        return out | {"attention_mask": torch.tensor(mask)}

    def _padded(self, values: list[int], width: int, fill: int) -> list[int]:
        gap = [fill] * (width - len(values))
        return gap + values if self.padding_side == "left" else values + gap


def full_context_rows(row: Row) -> list[Row]:
    """One row for each query: prefix, the text of the contexts before it, and the query; no COMP tokens."""
    contexts = {s for s, slot in zip(row["segment_ids"], row["comp_slot"], strict=True) if slot >= 0}
    queries = sorted({s for s in row["segment_ids"] if s > 0} - contexts)
    out = []
    for query in queries:
        kept = [
            i
            for i, (s, slot) in enumerate(zip(row["segment_ids"], row["comp_slot"], strict=True))
            if slot < 0 and (s == query or s == 0 or (s in contexts and s < query))
        ]
        out.append({name: [row[name][i] for i in kept] for name in ("input_ids", "labels")})
    return out


def at_least_one(name: str, value: int) -> None:
    """Raises ValueError for what is no whole number from 1 on."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
