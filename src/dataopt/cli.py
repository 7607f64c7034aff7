"""The ``dataopt`` command. Nothing heavy is imported before a subcommand asks for it."""

from __future__ import annotations

import importlib
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand

from . import __version__, ccm_cli, clean_cli, condense_cli, kvzip_cli, review_cli
from .refusals import extra

app = typer.Typer(
    help="Data optimisation for the frameworks you already train with.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


app.add_typer(ccm_cli.app, name="ccm")
app.add_typer(condense_cli.app, name="condense")
app.add_typer(kvzip_cli.app, name="kvzip")
app.command()(clean_cli.clean)
app.command()(review_cli.review)


class Part(StrEnum):
    all = "all"
    clean = "clean"
    rounds = "rounds"
    mix = "mix"
    condense = "condense"
    kvzip = "kvzip"
    ccm = "ccm"


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
    """Train with timm, its own flags plus --mixup puzzle or comixup; `dataopt train --help` lists them."""
    with extra("timm"):
        importlib.import_module("dataopt.integrations.timm.train").main(ctx.args)


@app.command()
def demo(
    part: Annotated[Part, typer.Argument(help="One step alone.")] = Part.all,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for the report and its pictures.")] = Path("demo"),
    quick: Annotated[bool, typer.Option("--quick", help="One seed and fewer sizes, in about half the time.")] = False,
) -> None:
    """Find wrong labels, mix, condense, publish, question a compressed text, remember a conversation: one report."""
    with extra("demo"):
        wanted = [p for p in Part if p != Part.all and part in (Part.all, p)]
        if Part.kvzip in wanted:  # looked at before anything runs
            importlib.import_module("dataopt.smollm2").find_smollm2()
        walk = importlib.import_module("dataopt.demo")
        walk.main(walk.Walk(out, quick), wanted)


@app.command()
def doctor() -> None:
    """Show versions, extras, devices and compiled parts, and how to get what is missing."""
    raise typer.Exit(importlib.import_module("dataopt.doctor").main())


def main(argv: list[str] | None = None) -> None:
    """Entry point of the ``dataopt`` command and of ``python -m dataopt``."""
    app(sys.argv[1:] if argv is None else argv, prog_name="dataopt")
