"""``dataopt kvzip``: the options of its commands. What they do is in ``kvzip_commands``, which needs the extra hf."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from .refusals import extra, one_line

app = typer.Typer(
    help="Compress a text into a small key-value cache of a language model, once, and ask it many questions.",
    no_args_is_help=True,
)


class Level(StrEnum):
    pair = "pair"
    head = "head"


class Budget(StrEnum):
    overall = "global"
    layer = "layer"
    uniform = "uniform"


class Norm(StrEnum):
    full = "full"
    subset = "subset"


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Bits(StrEnum):
    eight = "8"
    four = "4"


Text = Annotated[str, typer.Argument(metavar="FILE", help="The text, in UTF-8; - reads it from stdin.")]
Model = Annotated[
    str, typer.Option(metavar="NAME", help="Model on the Hub, a folder, or smollm2 for that of the pip package.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the model on the Hub.")]
AskedDtype = Annotated[Dtype, typer.Option("--dtype", help="Precision of the model; auto is that of its files.")]
Device = Annotated[str, typer.Option(help="Such as cpu or cuda:1; auto takes the first GPU if there is one.")]
Out = Annotated[Path, typer.Option(file_okay=False, help="Folder for the result.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Write into a folder that is not empty.")]
AskedLevel = Annotated[Level, typer.Option("--level", help="Evict single pairs, or all but the last of whole heads.")]
AskedBudget = Annotated[Budget, typer.Option("--budget", help="Compare pairs of all heads, of a layer, or of a head.")]
AskedBits = Annotated[Bits | None, typer.Option("--bits", help="Store integers of so many bits.")]
Instruction = Annotated[str | None, typer.Option(help="A sentence before the text.")]
Chunk = Annotated[int, typer.Option(help="Tokens that are scored at once.")]
PrefillChunk = Annotated[int, typer.Option(help="Tokens that are read at once.")]
AskedNorm = Annotated[
    Norm, typer.Option("--norm", help="Keys that scores are normalised over; subset is the released code's.")
]
Recent = Annotated[int, typer.Option(help="Last tokens that every head keeps, with --level head.")]


@app.command()
def compress(
    file: Text,
    model: Model,
    out: Out,
    ratio: Annotated[
        float, typer.Option(help="Share of the text's key-value pairs that stays, above 0 and up to 1.")
    ] = 0.3,
    max_tokens: Annotated[
        int | None, typer.Option(help="Pairs that a head keeps on average, instead of --ratio.")
    ] = None,
    level: AskedLevel = Level.pair,
    budget: AskedBudget = Budget.overall,
    bits: AskedBits = None,
    instruction: Instruction = None,
    chunk: Chunk = 1024,
    prefill_chunk: PrefillChunk = 2048,
    norm: AskedNorm = Norm.full,
    recent: Recent = 128,
    keep_scores: Annotated[
        bool, typer.Option("--keep-scores", help="So that prune() can lower the ratio later.")
    ] = False,
    head_scores: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE", help="Folder or Hub repository with head scores: no scoring; needs --level head."
        ),
    ] = None,
    dtype: AskedDtype = Dtype.auto,
    device: Device = "auto",
    revision: Revision = None,
    overwrite: Overwrite = False,
) -> None:
    """Read FILE once, keep the pairs that matter, and save them. The files contain the text."""
    with _commands() as commands:
        commands.compress(
            file,
            out,
            commands.Source(model, dtype, device, revision),
            overwrite,
            ratio=ratio,
            max_tokens=max_tokens,
            level=str(level),
            budget=str(budget),
            bits=int(bits) if bits else None,
            instruction=instruction,
            chunk=chunk,
            prefill_chunk=prefill_chunk,
            norm=str(norm),
            recent=recent,
            keep_scores=keep_scores,
            head_scores=head_scores,
        )


@app.command()
def ask(
    source: Annotated[str, typer.Argument(metavar="CACHE", help="Folder of a saved cache, or a Hub repository.")],
    questions: Annotated[
        list[str] | None, typer.Argument(metavar="[QUESTION]...", help="Without any: from stdin, one a line.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The model that read the text; left out, the Hub model that is noted in the cache."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
    conversation: Annotated[
        bool, typer.Option("--conversation", help="Each question continues the talk, instead of standing alone.")
    ] = False,
    device: Device = "auto",
    revision: Revision = None,
    cache_revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the cache on the Hub.")] = None,
) -> None:
    """Answer questions about a compressed text; in a terminal without questions, as a prompt."""
    with _commands() as commands:
        commands.ask(
            source, list(questions or ()), model, device, revision, cache_revision, max_new_tokens, conversation
        )


@app.command()
def sweep(
    file: Text,
    model: Model,
    out: Out,
    ratios: Annotated[str, typer.Option(help="Shares of pairs to keep, with commas.")] = "1,.7,.5,.3,.2,.1",
    questions: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="A question, a tab and its answer, worded as the model would, on each line.",
        ),
    ] = None,
    level: AskedLevel = Level.pair,
    budget: AskedBudget = Budget.overall,
    bits: AskedBits = None,
    instruction: Instruction = None,
    chunk: Chunk = 1024,
    prefill_chunk: PrefillChunk = 2048,
    norm: AskedNorm = Norm.full,
    recent: Recent = 128,
    dtype: AskedDtype = Dtype.auto,
    device: Device = "auto",
    revision: Revision = None,
    overwrite: Overwrite = False,
) -> None:
    """Score FILE once, and measure bytes, time and quality at several ratios: a table, sweep.json and sweep.png."""
    with _commands() as commands:
        commands.sweep(
            file,
            out,
            commands.Source(model, dtype, device, revision),
            overwrite,
            ratios,
            questions,
            level=str(level),
            budget=str(budget),
            bits=int(bits) if bits else None,
            instruction=instruction,
            chunk=chunk,
            prefill_chunk=prefill_chunk,
            norm=str(norm),
            recent=recent,
        )


@contextmanager
def _commands() -> Iterator[ModuleType]:
    with extra("hf"), one_line():
        yield importlib.import_module("dataopt.kvzip_commands")
