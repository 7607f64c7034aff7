"""Rows of contexts and queries: from token ids, from data sets of three forms, and padded into batches.

The forms are those of section 7.4: demonstrations of a task (MetaICL), dialogues (DailyDialog, SODA) and user profiles
(LaMP).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..chat import encode

if TYPE_CHECKING:
    from datasets import Dataset

Row = dict[str, list[int]]
IGNORED = -100
_log = logging.getLogger(__name__)


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
        ValueError: an empty context or answer, no query, or COMP tokens among the others.
    """
    if not any(isinstance(step, Query) for step in steps):
        raise ValueError("steps holds no Query, so there is nothing to learn from; add one with an answer")
    taken = set(comp_ids)
    ids, labels = list(prefix), [IGNORED] * len(prefix)
    segments, slots = [0] * len(prefix), [-1] * len(prefix)
    for number, step in enumerate(steps, 1):
        if isinstance(step, Query):
            if not step.answer:
                raise ValueError(f"steps[{number - 1}]: the answer is empty; it needs at least one token")
            text, learned, comp = [*step.input, *step.answer], list(step.answer), []
        else:
            if not step:
                raise ValueError(f"steps[{number - 1}]: the context is empty; it needs at least one token")
            text, learned, comp = list(step), [], list(comp_ids)
        if taken.intersection(text):
            raise ValueError(f"steps[{number - 1}] holds COMP tokens; leave them out, they are added where they belong")
        ids += [*text, *comp]
        labels += [IGNORED] * (len(text) - len(learned)) + learned + [IGNORED] * len(comp)
        segments += [number] * (len(text) + len(comp))
        slots += [-1] * len(text) + list(range(len(comp)))
    if taken.intersection(prefix):
        raise ValueError("prefix holds COMP tokens; leave them out")
    return {"input_ids": ids, "labels": labels, "segment_ids": segments, "comp_slot": slots}


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


# Data sets


def demonstration_rows(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    comp_ids: Sequence[int],
    *,
    demonstrations: str = "demonstrations",
    input: str = "input",
    output: str = "output",
    contexts: int = 16,
    multi_query: bool = False,
    max_context_tokens: int = 256,
    max_tokens: int = 1024,
    sink: bool = False,
    seed: int = 0,
) -> Dataset:
    """Rows for in-context learning: c(j) is a demonstration "Input: x Output: y", the query another one.

    Args:
        dataset: with a column of demonstrations, each a list of ``{"input": .., "output": ..}``, and columns of the
            input and output that are asked for.
        tokenizer: of the model.
        comp_ids: ``model.comp_ids``.
        demonstrations, input, output: names of the columns.
        contexts: demonstrations of a row, drawn at random where there are more.
        multi_query: every demonstration but the first is asked for too, before it becomes a context.
        max_context_tokens: longer contexts are cut at the end.
        max_tokens: of a row, COMP tokens aside; the last contexts are left out beyond it, as in the released code.
        sink: the tokenizer's first token is seen by all, instead of beginning the first context.
        seed: of the draws, which depend on it and the number of the row alone.

    Returns:
        A data set of rows; those without a context are left out.

    Raises:
        ValueError: a missing column or an empty text, with the number of its row.
    """

    def texts(example: dict[str, Any], rng: np.random.Generator) -> tuple[list[str], list[tuple[str, str] | None]]:
        shown = _draw(example[demonstrations], contexts, rng)
        ask = [f"\nInput: {d['input']} Output:" for d in shown]
        parts = [f"{a} {d['output']}" for a, d in zip(ask, shown, strict=True)]
        if parts:
            parts[0] = parts[0].removeprefix("\n")
        between: list[tuple[str, str] | None] = [None] * len(parts)
        if multi_query:  # behind c(j), the demonstration j + 1
            between = [(a, f" {d['output']}") for a, d in zip(ask[1:], shown[1:], strict=True)] + [None]
        if between:
            between[-1] = (f"\nInput: {example[input]} Output:", f" {example[output]}")
        return parts, between

    return _mapped(
        dataset,
        [demonstrations, input, output],
        tokenizer,
        comp_ids,
        texts,
        max_context_tokens,
        max_tokens,
        False,
        sink,
        seed,
    )


def dialogue_rows(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    comp_ids: Sequence[int],
    *,
    turns: str = "dialog",
    separator: str = "\nA:",
    multi_query: bool = False,
    max_context_tokens: int = 128,
    max_tokens: int = 400,
    sink: bool = False,
    seed: int = 0,
) -> Dataset:
    """Rows for conversations: the turns before are contexts, a turn is the input and the next one its answer.

    Args:
        dataset: with a column of turns, a list of at least three texts.
        turns: name of the column.
        separator: before every turn, for all speakers alike.
        multi_query: all turns from the third on are answers; otherwise one that is drawn at random.
        max_tokens: of a row, COMP tokens aside; the oldest contexts are left out beyond it.
        tokenizer, comp_ids, max_context_tokens, sink, seed: see :func:`demonstration_rows`.

    Returns:
        A data set of rows; dialogues of fewer than three turns are left out.

    Raises:
        ValueError: a missing column or an empty text, with the number of its row.
    """

    def texts(example: dict[str, Any], rng: np.random.Generator) -> tuple[list[str], list[tuple[str, str] | None]]:
        said = [turn.strip() for turn in example[turns]]
        if len(said) < 3:
            return [], []
        last = len(said) - 1 if multi_query else int(rng.integers(2, len(said)))
        spoken = [f"{separator} {turn}" for turn in said]
        spoken[0] = spoken[0].lstrip("\n")
        between: list[tuple[str, str] | None] = [
            (spoken[t] + separator, f" {said[t + 1]}") if multi_query or t == last - 1 else None for t in range(1, last)
        ]
        return spoken[: last - 1], between

    return _mapped(dataset, [turns], tokenizer, comp_ids, texts, max_context_tokens, max_tokens, True, sink, seed)


def profile_rows(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    comp_ids: Sequence[int],
    *,
    profile: str = "profile",
    input: str = "input",
    output: str = "output",
    contexts: int = 16,
    multi_query: bool = False,
    max_context_tokens: int = 128,
    max_tokens: int = 1024,
    sink: bool = False,
    seed: int = 0,
) -> Dataset:
    """Rows for personalisation: each entry of a user's profile is a context, and the user asks for one thing.

    Args:
        dataset: with a column of profiles, lists of texts, and columns of what is asked and answered.
        profile, input, output: names of the columns.
        contexts: entries of a row, drawn at random where there are more.
        multi_query: the same question is asked after every entry.
        max_tokens: of a row, COMP tokens aside; the last contexts are left out beyond it.
        tokenizer, comp_ids, max_context_tokens, sink, seed: see :func:`demonstration_rows`.

    Returns:
        A data set of rows; users without an entry are left out.

    Raises:
        ValueError: a missing column or an empty text, with the number of its row.
    """

    def texts(example: dict[str, Any], rng: np.random.Generator) -> tuple[list[str], list[tuple[str, str] | None]]:
        entries = _draw(example[profile], contexts, rng)
        parts = [entry if i == 0 else f", {entry}" for i, entry in enumerate(entries)]
        asked = (f"\nInput: {example[input]}\nOutput:", f" {example[output]}")
        return parts, [asked if multi_query or i == len(parts) - 1 else None for i in range(len(parts))]

    columns = [profile, input, output]
    return _mapped(dataset, columns, tokenizer, comp_ids, texts, max_context_tokens, max_tokens, False, sink, seed)


# Texts of a row: the contexts, and for each the query that follows it, if any.
_Texts = Callable[[dict[str, Any], np.random.Generator], tuple[list[str], list[tuple[str, str] | None]]]


def _mapped(
    dataset: Dataset,
    columns: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    comp_ids: Sequence[int],
    texts: _Texts,
    max_context_tokens: int,
    max_tokens: int,
    keep_last: bool,
    sink: bool,
    seed: int,
) -> Dataset:
    for name in columns:
        if name not in dataset.column_names:
            raise ValueError(f"column {name!r} is not among the columns {dataset.column_names}; name yours")
    for name, value in (("max_context_tokens", max_context_tokens), ("max_tokens", max_tokens)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
    first = first_ids(tokenizer)
    if sink and not first:
        raise ValueError("sink=True needs a tokenizer that begins a text with a token of its own")
    end = [tokenizer.eos_token_id] if isinstance(tokenizer.eos_token_id, int) else []

    def steps_of(parts: list[str], between: list[tuple[str, str] | None], row: int) -> list[list[int] | Query]:
        contexts = [list(encode(tokenizer, part))[:max_context_tokens] for part in parts]
        queries = [
            None if q is None else Query(encode(tokenizer, q[0]), [*encode(tokenizer, q[1]), *end]) for q in between
        ]
        if not all(contexts) or any(q is not None and not q.answer for q in queries):
            raise ValueError(f"row {row} holds an empty text; leave it out")
        if first and not sink:
            contexts[0] = [*first, *contexts[0]]
        pairs = list(zip(contexts, queries, strict=True))
        while len(pairs) > 1 and _length(pairs) > max_tokens:
            if keep_last:
                pairs.pop(0)
                continue
            _, asked = pairs.pop()  # the last question stays: it is the row's own
            pairs[-1] = (pairs[-1][0], asked)
        steps: list[list[int] | Query] = []
        for context, query in pairs:
            steps += [context] if query is None else [context, query]
        return steps

    def made(batch: dict[str, list[Any]], rows: list[int]) -> dict[str, list[list[int]]]:
        out: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "segment_ids": [], "comp_slot": []}
        for i, row in enumerate(rows):
            example = {name: batch[name][i] for name in columns}
            if any(value is None or (isinstance(value, list) and None in value) for value in example.values()):
                raise ValueError(f"row {row} has no value in one of {columns}; leave it out")
            parts, between = texts(example, np.random.default_rng([seed, row]))
            if not parts:
                continue
            made = ccm_row(steps_of(parts, between, row), comp_ids, first if sink else ())
            for name, values in made.items():
                out[name].append(values)
        return out

    rows = dataset.with_format(None).map(
        made, batched=True, with_indices=True, remove_columns=dataset.column_names, desc="making rows"
    )
    if len(rows) < len(dataset):
        _log.info("%d of %d rows have no context and are left out", len(dataset) - len(rows), len(dataset))
    return rows


def _length(pairs: Sequence[tuple[Sequence[int], Query | None]]) -> int:
    return sum(len(c) + (0 if q is None else len(q.input) + len(q.answer)) for c, q in pairs)


def _draw(items: Sequence[Any], count: int, rng: np.random.Generator) -> list[Any]:
    if len(items) <= count:
        return list(items)
    return [items[i] for i in rng.permutation(len(items))[:count]]


def first_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that begins a text, if the tokenizer adds one."""
    first = tokenizer.bos_token_id
    return [int(first)] if isinstance(first, int) and first in tokenizer("").input_ids else []


# Batches


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
        if self.padding_side not in ("right", "left"):
            raise ValueError(f"padding_side={self.padding_side!r} must be 'right' or 'left'")

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """``input_ids``, ``labels``, ``attention_mask``, and but for ``full_context`` ``segment_ids``, ``comp_slot``.

        All are (B, L) int64.
        """
        fills = {"input_ids": self.pad_token_id, "labels": IGNORED, "segment_ids": -1, "comp_slot": -1}
        plain = [{name: list(row[name]) for name in fills} for row in rows]
        if self.full_context:
            plain = [single for row in plain for single in full_context_rows(row)]
            fills = {"input_ids": self.pad_token_id, "labels": IGNORED}
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
