"""``dataopt clean``: its options. What it does is in ``clean``, which needs the extras hf and clean."""

from __future__ import annotations

import importlib
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .refusals import extra, one_line


class Action(StrEnum):
    drop = "drop"
    relabel = "relabel"


class Issue(StrEnum):
    label = "label"
    outlier = "outlier"
    near_duplicate = "near_duplicate"


class Probs(StrEnum):
    model = "model"
    out_of_fold = "out-of-fold"


def clean(
    dataset: Annotated[
        str,
        typer.Argument(
            metavar="DATASET", help="Data set on the Hub, a folder of images, saved data or files, or one file."
        ),
    ],
    model: Annotated[
        list[str],
        typer.Option(
            metavar="NAME",
            help="Classifier on the Hub or in a folder, or timm:NAME. Again for later checkpoints of one training, "
            "the last one counts and all of them make the relation map.",
        ),
    ],
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for the result.")],
    split: Annotated[str | None, typer.Option(help="Split to clean; the default is the only one, or train.")] = None,
    config: Annotated[str | None, typer.Option(help="Configuration of the data set.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the data set on the Hub.")] = None,
    input_column: Annotated[str | None, typer.Option(help="Column of images, texts or sounds.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of labels.")] = None,
    probs: Annotated[
        Probs,
        typer.Option(
            help="Whose probabilities: the model's, or those of a logistic regression on its features, each row "
            "predicted by one that did not see it; the second needs no classifier, only an encoder."
        ),
    ] = Probs.model,
    action: Annotated[Action, typer.Option(help="What happens in the cleaned copy.")] = Action.drop,
    issue: Annotated[list[Issue] | None, typer.Option(help="To what: again for several; the default is label.")] = None,
    head: Annotated[str | None, typer.Option(help="Name of the layer that makes the logits.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in one forward pass.")] = 32,
    device: Annotated[
        str, typer.Option(help="Such as cpu or cuda:1; auto takes the first GPU if there is one.")
    ] = "auto",
    partitions: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Compare rows within so many random parts only, but for near-duplicates; for very large data.",
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Neighbours to keep for a suspect, of each kind.")] = 8,
    resume: Annotated[bool, typer.Option("--resume", help="Go on in a folder where this was stopped.")] = False,
) -> None:
    """Find wrong labels, outliers and near-duplicates; write scores, a report and a cleaned copy. Changes no data."""
    with extra("hf"), extra("clean"), one_line():
        importlib.import_module("dataopt.clean").main(
            dataset,
            model,
            out,
            split=split,
            config=config,
            revision=revision,
            input_column=input_column,
            label_column=label_column,
            probs=str(probs),
            action=str(action),
            issues=tuple(str(i) for i in issue or [Issue.label]),
            head=head,
            batch_size=batch_size,
            device=device,
            partitions=partitions,
            top=top,
            resume=resume,
        )
