"""The ``dataopt`` command. Nothing heavy is imported before a subcommand asks for it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand

from . import __version__

app = typer.Typer(
    help="Data optimisation for the frameworks you already train with.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class _PassThrough(TyperCommand):
    """A command that leaves its arguments to somebody else, ``--help`` and ``--`` included."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        ctx.args = list(args)
        return ctx.args


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dataopt {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(cls=_PassThrough, add_help_option=False)
def train(ctx: typer.Context) -> None:
    """Train with timm, its own flags plus --mixup puzzle; `dataopt train --help` lists them."""
    with _extra("timm"):
        importlib.import_module("dataopt.integrations.timm.train").main(ctx.args)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for the picture.")] = Path("demo"),
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs per run; the default fits four minutes.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs per method.")] = 3,
) -> None:
    """Train on handwritten digits: plain, CutMix and Puzzle Mix; print the scores, draw the mixes."""
    with _extra("demo"):
        importlib.import_module("dataopt.demo").main(out=out, epochs=epochs, seeds=seeds)


@app.command()
def doctor() -> None:
    """Show versions, extras, devices and compiled parts, and how to get what is missing."""
    raise typer.Exit(importlib.import_module("dataopt.doctor").main())


@contextmanager
def _extra(name: str) -> Iterator[None]:
    """One line instead of a traceback where a package of this extra is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        from .doctor import expand, requirements

        needed = requirements()
        missing = (error.name or "").partition(".")[0]
        if missing not in {r.module for r in needed if not r.extra} | {r.module for r in expand(name, needed)}:
            raise
        typer.echo(f'{missing} is not installed; get it with: pip install "dataopt[{name}]"', err=True)
        raise typer.Exit(1) from error


def main(argv: list[str] | None = None) -> None:
    """Entry point of the ``dataopt`` command and of ``python -m dataopt``."""
    app(sys.argv[1:] if argv is None else argv, prog_name="dataopt")
