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
    digits = "digits"
    clean = "clean"
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
    part: Annotated[Part, typer.Argument(help="One part alone.")] = Part.all,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for pictures and results.")] = Path("demo"),
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Digits: epochs per run; the default fits four minutes.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Digits: runs per method.")] = 3,
) -> None:
    """Mix, clean and condense handwritten digits; question a compressed text; keep a conversation in a small memory."""
    with extra("demo"):
        wanted = [p for p in Part if p != Part.all and part in (Part.all, p)]
        # All are looked at before one runs, so that what is missing shows at once.
        if Part.kvzip in wanted:
            importlib.import_module("dataopt.smollm2").find_smollm2()
        ready = {
            p: importlib.import_module("dataopt.demo" if p == Part.digits else f"dataopt.demo_{p}") for p in wanted
        }
        for p in wanted:
            if p != wanted[0]:
                typer.echo()
            ready[p].main(out=out, **({"epochs": epochs, "seeds": seeds} if p == Part.digits else {}))


@app.command()
def doctor() -> None:
    """Show versions, extras, devices and compiled parts, and how to get what is missing."""
    raise typer.Exit(importlib.import_module("dataopt.doctor").main())


def main(argv: list[str] | None = None) -> None:
    """Entry point of the ``dataopt`` command and of ``python -m dataopt``."""
    app(sys.argv[1:] if argv is None else argv, prog_name="dataopt")
