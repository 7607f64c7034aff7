"""``dataopt review``: its options. What it does is in the package ``review``, which needs the extra review."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

import typer

from .refusals import extra, one_line


def review(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder that dataopt clean wrote.")],
    export: Annotated[
        Path | None,
        typer.Option(metavar="OUT", file_okay=False, help="Apply the decisions, write the data set, show no page."),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the page on 127.0.0.1; 0 takes a free one.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Export into a folder that is not empty.")] = False,
) -> None:
    """Go through the suspects of a data set on a page of this machine: keep, relabel or drop; then export."""
    with extra("review"), one_line():
        # what is missing shows before a folder is read
        doing = importlib.import_module(f"dataopt.review.{'export' if export else 'server'}")
        reading = importlib.import_module("dataopt.review.folder")
        store = importlib.import_module("dataopt.review.decisions")
        if export and export.is_dir() and any(export.iterdir()) and not overwrite:
            raise ValueError(f"--export {export} is not empty; give another folder, or --overwrite")
        read = reading.read_folder(folder)
        decisions = store.open_decisions(folder, read.scores["given_label"].to_dict())
        try:
            if export:
                typer.echo(f"Wrote {doing.export(read.record, decisions.all(), len(read.suspects), export)}.")
            else:
                doing.serve(read, decisions, port)
        finally:
            decisions.close()
