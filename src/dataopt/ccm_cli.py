"""``dataopt ccm``: the options of its commands. What they do is in ``ccm_commands``, which needs the extra hf."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from .kvzip_cli import AskedDtype, Device, Dtype, Model, Revision
from .refusals import extra, one_line

app = typer.Typer(
    help="Keep a conversation's memory small: train an adapter that compresses contexts, talk, and read without end.",
    no_args_is_help=True,
)


class Form(StrEnum):
    dialogue = "dialogue"
    demonstrations = "demonstrations"
    profile = "profile"


class Mode(StrEnum):
    concat = "concat"
    merge = "merge"


class Positions(StrEnum):
    cache = "cache"
    abs = "abs"


Adapter = Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder of a trained adapter, or a Hub repository.")]


@app.command()
def train(
    dataset: Annotated[
        str, typer.Argument(metavar="DATASET", help="Data set on the Hub, a folder of saved data, or one file.")
    ],
    model: Model,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for the adapter.")],
    form: Annotated[
        Form, typer.Option(help="What a row holds: turns of a talk, demonstrations of a task, or a user's profile.")
    ] = Form.dialogue,
    column: Annotated[
        str | None, typer.Option(help="Column of turns, demonstrations or profiles; the default is the form's.")
    ] = None,
    instruction_column: Annotated[
        str | None, typer.Option(help="With --form profile: column of what is to be done with the input.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split to train on; the default is the only one, or train.")] = None,
    config: Annotated[str | None, typer.Option(help="Configuration of the data set.")] = None,
    mode: Annotated[Mode, typer.Option(help="Keep what each context became, or their average.")] = Mode.concat,
    comp_tokens: Annotated[int, typer.Option(min=1, help="COMP tokens of a context.")] = 2,
    reserved_tokens: Annotated[
        bool,
        typer.Option(
            "--reserved-tokens", help="Take reserved tokens, such as <unused0>, instead of growing the vocabulary."
        ),
    ] = False,
    r: Annotated[int, typer.Option(min=1, help="Rank of the LoRA.")] = 8,
    recurrent: Annotated[bool, typer.Option(help="Contexts see the memory of those before them.")] = True,
    positions: Annotated[
        Positions, typer.Option(help="Positions that stay small, or those of the released code.")
    ] = Positions.cache,
    ema: Annotated[float | None, typer.Option(help="With --mode merge: a constant rate instead of the mean.")] = None,
    sink: Annotated[bool, typer.Option("--sink", help="The first token stays visible to all.")] = False,
    multi_query: Annotated[
        bool, typer.Option("--multi-query", help="Ask after every context of a row, not only after the last.")
    ] = False,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Of a row; the default is the form's.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the adapter.")] = 1000,
    full_context_steps: Annotated[
        int, typer.Option(min=0, help="Steps of a LoRA on full contexts before, merged into the model.")
    ] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a step, over all processes.")] = 128,
    micro_batch: Annotated[int, typer.Option(min=1, help="Rows that a process takes at once.")] = 8,
    lr: Annotated[float, typer.Option(help="Learning rate, with warm-up and a cosine.")] = 3e-4,
    distill: Annotated[float, typer.Option(min=0, help="Weight of the divergence from the full context.")] = 0.0,
    test_rows: Annotated[int, typer.Option(min=0, help="Rows at the end that are kept out and measured.")] = 64,
    checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing", help="Less memory for more time.")] = False,
    seed: Annotated[int, typer.Option(help="Of all draws.")] = 0,
    dtype: AskedDtype = Dtype.auto,
    device: Device = "auto",
    revision: Revision = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on in a folder where this was stopped.")] = False,
) -> None:
    """Train an adapter on DATASET, and measure it beside the full context and no context at all."""
    with _commands() as commands:
        commands.train(
            dataset,
            out,
            commands.Source(model, str(dtype), device, revision),
            form=str(form),
            column=column,
            instruction_column=instruction_column,
            split=split,
            config=config,
            options={
                "mode": str(mode),
                "comp_tokens": comp_tokens,
                "r": r,
                "recurrent": recurrent,
                "positions": str(positions),
                "ema": ema,
                "sink": sink,
            },
            reserved_tokens=reserved_tokens,
            multi_query=multi_query,
            max_tokens=max_tokens,
            steps=steps,
            full_context_steps=full_context_steps,
            batch_size=batch_size,
            micro_batch=micro_batch,
            lr=lr,
            distill=distill,
            test_rows=test_rows,
            checkpointing=checkpointing,
            seed=seed,
            resume=resume,
        )


@app.command()
def chat(
    adapter: Adapter,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The base model; left out, the one that is noted.")
    ] = None,
    memory: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder of a memory to go on with, and to save to.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    separator: Annotated[str, typer.Option(help="Before every turn, as in training.")] = "\nA:",
    dtype: AskedDtype = Dtype.auto,
    device: Device = "auto",
    revision: Revision = None,
) -> None:
    """Talk; every turn is compressed, and its cost is shown. An empty line ends. Reads stdin off a terminal."""
    with _commands() as commands:
        commands.chat(adapter, commands.Asked(model, str(dtype), device, revision), memory, max_new_tokens, separator)


@app.command()
def stream(
    adapter: Adapter,
    file: Annotated[str, typer.Argument(metavar="FILE", help="The text, in UTF-8; - reads it from stdin.")],
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The base model; left out, the one that is noted.")
    ] = None,
    max_pairs: Annotated[int, typer.Option(min=1, help="Key-value pairs per head, never more.")] = 160,
    memory: Annotated[int, typer.Option(min=1, help="Of those, slots of the memory.")] = 8,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens that are compressed at a time.")] = 64,
    sink: Annotated[int, typer.Option(min=0, help="First tokens that stay.")] = 1,
    go_on: Annotated[int, typer.Option("--continue", min=0, help="Tokens to write behind the text.")] = 0,
    dtype: AskedDtype = Dtype.auto,
    device: Device = "auto",
    revision: Revision = None,
) -> None:
    """Read a text of any length within a fixed number of pairs; its perplexity, and how the text might go on."""
    with _commands() as commands:
        source = commands.Asked(model, str(dtype), device, revision)
        commands.stream(adapter, file, source, go_on, max_pairs=max_pairs, memory=memory, chunk=chunk, sink=sink)


@contextmanager
def _commands() -> Iterator[ModuleType]:
    with extra("hf"), one_line():
        yield importlib.import_module("dataopt.ccm_commands")
