"""Rows from data sets of three forms (section 7.4).

Demonstrations of a task (MetaICL), dialogues (DailyDialog, SODA) and user profiles (LaMP).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..chat import continued, encode
from .rows import Query, at_least_one, ccm_row

if TYPE_CHECKING:
    from datasets import Dataset

_logger = logging.getLogger(__name__)


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
        max_tokens: of a row, COMP tokens aside; the last contexts are left out beyond it, as in the released code, and
            rows that are too long with one context.
        sink: the tokenizer's first token is seen by all, instead of beginning the first context.
        seed: of the draws, which depend on it and the number of the row alone.

    Returns:
        A data set of rows; those without a context are left out. Texts lose the space around them.

    Raises:
        TypeError: a column that holds something else, with the number of its row.
        ValueError: a missing column, an empty text, with the number of its row, or no row that can be used.
    """

    at_least_one("contexts", contexts)

    def texts(example: dict[str, Any], rng: np.random.Generator) -> tuple[list[str], list[tuple[str, str] | None]]:
        pairs = _list(example[demonstrations], demonstrations)
        shown = [[_member(pair, key, demonstrations) for key in ("input", "output")] for pair in pairs]
        shown = _draw(shown, contexts, rng)
        ask = [f"\nInput: {said} Output:" for said, _ in shown]
        answers = [f" {answer}" for _, answer in shown]
        parts = [a + answer for a, answer in zip(ask, answers, strict=True)]
        if parts:
            parts[0] = parts[0].removeprefix("\n")
        between: list[tuple[str, str] | None] = [None] * len(parts)
        if multi_query:  # behind c(j), the demonstration j + 1
            between = [*zip(ask[1:], answers[1:], strict=True), None]
        if between:
            asked, answer = (_text(example[name], name) for name in (input, output))
            between[-1] = (f"\nInput: {asked} Output:", f" {answer}")
        return parts, between

    return _mapped(
        dataset, [demonstrations, input, output], tokenizer, comp_ids, texts, max_context_tokens=max_context_tokens,
        max_tokens=max_tokens, sink=sink, seed=seed,
    )  # fmt: skip


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
        max_tokens: of a row, COMP tokens aside; the oldest contexts are left out beyond it, and rows that are too long
            with one context. The released code leaves out all dialogues beyond it.
        tokenizer, comp_ids, max_context_tokens, sink, seed: see :func:`demonstration_rows`.

    Returns:
        A data set of rows; dialogues of fewer than three turns are left out.

    Raises:
        TypeError: a column that holds something else, with the number of its row.
        ValueError: a missing column, an empty text, with the number of its row, or no row that can be used.
    """

    def texts(example: dict[str, Any], rng: np.random.Generator) -> tuple[list[str], list[tuple[str, str] | None]]:
        said = [_text(turn, turns) for turn in _list(example[turns], turns)]
        if len(said) < 3:
            return [], []
        last = len(said) - 1 if multi_query else int(rng.integers(2, len(said)))
        spoken = [f"{separator} {turn}" for turn in said]
        spoken[0] = spoken[0].lstrip("\n")
        between: list[tuple[str, str] | None] = [
            (spoken[t] + separator, f" {said[t + 1]}") if multi_query or t == last - 1 else None for t in range(1, last)
        ]
        return spoken[: last - 1], between

    return _mapped(
        dataset, [turns], tokenizer, comp_ids, texts, max_context_tokens=max_context_tokens, max_tokens=max_tokens,
        sink=sink, seed=seed, keep_last=True,
    )  # fmt: skip


def profile_rows(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    comp_ids: Sequence[int],
    *,
    profile: str = "profile",
    input: str = "input",
    output: str = "output",
    instruction: str | None = None,
    contexts: int = 16,
    multi_query: bool = False,
    max_context_tokens: int = 128,
    max_tokens: int = 1024,
    sink: bool = False,
    seed: int = 0,
) -> Dataset:
    """Rows for personalisation: each entry of a user's profile is a context, and the user asks for one thing.

    The texts are "Instruction: first entry\\n", then "\\n, and entry\\n" for each other one, and the query
    ". instruction\\nInput: x\\nOutput:"; without an instruction "\\nInput: x\\nOutput:".

    Args:
        dataset: with a column of profiles, lists of texts, and columns of what is asked and answered.
        profile, input, output: names of the columns.
        instruction: name of a column of what is to be done with the input; None for none.
        contexts: entries of a row, drawn at random where there are more.
        multi_query: the same question is asked after every entry.
        max_tokens: as for :func:`demonstration_rows`.
        tokenizer, comp_ids, max_context_tokens, sink, seed: see :func:`demonstration_rows`.

    Returns:
        A data set of rows; users without an entry are left out.

    Raises:
        TypeError: a column that holds something else, with the number of its row.
        ValueError: a missing column, an empty text, with the number of its row, or no row that can be used.
    """

    at_least_one("contexts", contexts)

    def texts(example: dict[str, Any], rng: np.random.Generator) -> tuple[list[str], list[tuple[str, str] | None]]:
        entries = [_text(entry, profile) for entry in _list(example[profile], profile)]
        entries = _draw(entries, contexts, rng)
        parts = [f"Instruction: {entry}\n" if i == 0 else f"\n, and {entry}\n" for i, entry in enumerate(entries)]
        told = "" if instruction is None else f". {_text(example[instruction], instruction)}"
        asked = (f"{told}\nInput: {_text(example[input], input)}\nOutput:", f" {_text(example[output], output)}")
        return parts, [asked if multi_query or i == len(parts) - 1 else None for i in range(len(parts))]

    columns = [profile, input, output] + ([] if instruction is None else [instruction])
    return _mapped(
        dataset, columns, tokenizer, comp_ids, texts, max_context_tokens=max_context_tokens, max_tokens=max_tokens,
        sink=sink, seed=seed,
    )  # fmt: skip


# Texts of a row: the contexts, and for each the query that follows it, if any.
_Texts = Callable[[dict[str, Any], np.random.Generator], tuple[list[str], list[tuple[str, str] | None]]]


def _mapped(
    dataset: Dataset,
    columns: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    comp_ids: Sequence[int],
    texts: _Texts,
    *,
    max_context_tokens: int,
    max_tokens: int,
    sink: bool,
    seed: int,
    keep_last: bool = False,
) -> Dataset:
    """The rows of a form; beyond ``max_tokens`` contexts are left out, the first ones with ``keep_last``."""
    from ..inputs import check_dataset

    check_dataset(dataset)
    for name in columns:
        if name not in dataset.column_names:
            raise ValueError(f"column {name!r} is not among the columns {dataset.column_names}; name one of them")
    at_least_one("max_context_tokens", max_context_tokens)
    at_least_one("max_tokens", max_tokens)
    first = first_ids(tokenizer)
    if sink and not first:
        raise ValueError("sink=True needs a tokenizer that begins a text with a token of its own")
    end = [tokenizer.eos_token_id] if isinstance(tokenizer.eos_token_id, int) else []
    room = max_tokens - len(first)

    def context_of(part: str) -> list[int]:
        ids = list(encode(tokenizer, part))[:max_context_tokens]
        if not ids:
            raise ValueError(f"the tokenizer makes nothing of {part!r}; leave the row out")
        return ids

    def query_of(asked: str, answer: str) -> Query:
        return Query(encode(tokenizer, asked), [*continued(tokenizer, answer), *end])

    def steps_of(parts: list[str], between: list[tuple[str, str] | None]) -> list[list[int] | Query]:
        """Nothing if the row is too long even with one context."""
        queries = [None if q is None else query_of(*q) for q in between]
        pairs = list(zip(map(context_of, parts), queries, strict=True))
        while len(pairs) > 1 and _length(pairs) > room:
            if keep_last:
                pairs.pop(0)
                begin = parts[-len(pairs)].lstrip("\n")  # it begins the text now
                pairs[0] = (context_of(begin), pairs[0][1])
                continue
            _, asked = pairs.pop()  # the last question stays: it is the row's own
            pairs[-1] = (pairs[-1][0], asked)
        if _length(pairs) > room:
            return []
        steps: list[list[int] | Query] = []
        for context, query in pairs:
            steps += [context] if query is None else [context, query]
        if first and not sink:
            steps[0] = [*first, *pairs[0][0]]
        return steps

    def rows_of(batch: dict[str, list[Any]], rows: list[int]) -> dict[str, list[list[int]]]:
        out: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "segment_ids": [], "comp_slot": []}
        for i, row in enumerate(rows):
            try:
                parts, between = texts({name: batch[name][i] for name in columns}, np.random.default_rng([seed, row]))
                steps = steps_of(parts, between)
                made = ccm_row(steps, comp_ids, first if sink else ()) if steps else {}
            except (TypeError, ValueError) as e:
                raise type(e)(f"row {row}: {e}") from e
            for name, values in made.items():
                out[name].append(values)
        return out

    rows = dataset.with_format(None).map(
        rows_of, batched=True, with_indices=True, remove_columns=dataset.column_names, desc="rows"
    )
    if not len(rows):
        raise ValueError(
            f"none of {len(dataset)} rows has a context and fits into max_tokens={max_tokens}; give others, or raise it"
        )
    if len(rows) < len(dataset):
        _logger.info("%d of %d rows have no context or are too long; left out", len(dataset) - len(rows), len(dataset))
    return rows


def _text(value: Any, column: str) -> str:
    """Without space around it."""
    if value is None:
        raise ValueError(f"{column!r} has no value; leave the row out")
    if not isinstance(value, str):
        raise TypeError(f"{column!r} holds {type(value).__name__} where a text belongs; make it one")
    if not value.strip():
        raise ValueError(f"{column!r} holds an empty text; leave the row out")
    return value.strip()


def _list(value: Any, column: str) -> list[Any]:
    if value is None:
        raise ValueError(f"{column!r} has no value; leave the row out")
    if not isinstance(value, list):
        raise TypeError(f"{column!r} holds {type(value).__name__} where a list belongs; make it one")
    return value


def _member(pair: Any, key: str, column: str) -> str:
    if not isinstance(pair, dict) or key not in pair:
        raise TypeError(f'{column!r} holds {pair!r} where a {{"input": .., "output": ..}} belongs; make it one')
    return _text(pair[key], f"{column}.{key}")


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
