"""``dataopt condense``: its options. What it does is in ``condense_commands``, which needs the extra hf."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .refusals import extra, one_line


class _Condense(TyperGroup):
    """A command that has one other command below it: what is not ``eval`` names a data set."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args[:1] == ["eval"] else ["data", *args])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name if name == "eval" else None, command, rest  # usage lines do not show the other's name


app = typer.Typer(cls=_Condense, help="Condense a data set of images to a few that networks can be trained on.")


class Preset(StrEnum):
    fast = "fast"
    released = "released"


class Objective(StrEnum):
    gradients = "gradients"
    features = "features"


class Init(StrEnum):
    centres = "centres"
    mix = "mix"
    random = "random"
    herding = "herding"
    noise = "noise"


class Axes(StrEnum):
    space = "space"
    time = "time"


Device = Annotated[str, typer.Option(help="Such as cpu or cuda:1; auto takes the first GPU if there is one.")]
NETWORKS = "convnet, resnet10, resnetap10, or timm:NAME"


@app.command("data")
def condense(
    dataset: Annotated[
        str,
        typer.Argument(
            metavar="DATASET", help="Data set on the Hub, a folder of images, saved data or files, or one file."
        ),
    ],
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for the result.")],
    images_per_class: Annotated[int, typer.Option(min=1, help="Images to store for each class.")] = 10,
    factor: Annotated[
        str,
        typer.Option(
            metavar="N|auto", help="Cut each stored image into N x N tiles to train on; auto tries 1, 2 and 3."
        ),
    ] = "2",
    axes: Annotated[Axes, typer.Option(help="Cut both sides, or the width alone, for spectrograms.")] = Axes.space,
    split: Annotated[str | None, typer.Option(help="Split to condense; the default is the only one, or train.")] = None,
    config: Annotated[str | None, typer.Option(help="Configuration of the data set.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the data set on the Hub.")] = None,
    input_column: Annotated[str | None, typer.Option(help="Column of images.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of labels.")] = None,
    size: Annotated[
        int | None, typer.Option(min=2, help="Cut to a square and resize to so many pixels a side first.")
    ] = None,
    hold_out: Annotated[
        float, typer.Option(min=0, max=0.9, help="Share of each class to keep out, for eval to test on.")
    ] = 0.0,
    preset: Annotated[
        Preset, typer.Option(help="fast for minutes; released is the authors' schedule, for days of a GPU.")
    ] = Preset.fast,
    network: Annotated[str, typer.Option(metavar="NAME", help=f"{NETWORKS}: what is trained on the way.")] = "convnet",
    depth: Annotated[
        int | None, typer.Option(min=1, help="Levels of a convnet; the default follows the size, 3 for 32 pixels.")
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(min=1, help="Channels of the network. The default is the thesis' (128); 32 is far quicker."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the images.")] = 500,
    init: Annotated[Init | None, typer.Option(help="What to start from; the default is the preset's.")] = None,
    objective: Annotated[Objective, typer.Option(help="What is matched.")] = Objective.gradients,
    lr: Annotated[float | None, typer.Option(help="Rate of the images; the default is the preset's.")] = None,
    early_steps: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Steps that train each new network before it is matched; the default is the preset's. "
            "0 where few steps teach it nearly all, as with digits.",
        ),
    ] = None,
    networks: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="New networks in all, to which the run goes back; 0 for ever new ones. The default is the preset's.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all draws.")] = 0,
    device: Device = "auto",
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile; pays in runs of several minutes.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on in a folder where this was stopped, or with more --steps.")
    ] = False,
    push: Annotated[str | None, typer.Option(metavar="ID", help="Upload the result to this Hub repository.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make that repository private.")] = False,
    licence: Annotated[str | None, typer.Option(help="Of the data set, for the card, such as mit.")] = None,
) -> None:
    """Condense a data set of images to a few for each class that networks can be trained on.

    `dataopt condense eval DIR` then says how well, beside other choices of the same size.
    """
    with _commands() as commands:
        commands.condense(
            dataset,
            out,
            commands.Network(network, depth, width),
            images_per_class=images_per_class,
            factor=factor,
            axes=str(axes),
            split=split,
            config=config,
            revision=revision,
            input_column=input_column,
            label_column=label_column,
            size=size,
            hold_out=hold_out,
            preset=str(preset),
            steps=steps,
            init=init and str(init),
            objective=str(objective),
            lr=lr,
            early_steps=early_steps,
            networks=networks,
            seed=seed,
            device=device,
            compile=compile,
            resume=resume,
            push=commands.Push(push, private, licence),
        )


@app.command("eval")
def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that dataopt condense has written.")],
    test: Annotated[
        str | None, typer.Option(metavar="DATASET", help="Where test images are; the default is the same data set.")
    ] = None,
    test_split: Annotated[str | None, typer.Option(help="Their split; the default is test.")] = None,
    network: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help=f"{NETWORKS}: what to train; again for several. The default made the images."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Networks to train for each row.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each training, the same for all rows.")] = 300,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over each set instead; 1000 in the thesis for 32 pixels.")
    ] = None,
    same_compute: Annotated[
        bool, typer.Option("--same-compute", help="With --epochs: steps as if nothing were cut into tiles.")
    ] = False,
    device: Device = "auto",
    push: Annotated[
        str | None, typer.Option(metavar="ID", help="Upload the condensed data with these scores to the Hub.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make that repository private.")] = False,
    licence: Annotated[str | None, typer.Option(help="Of the data set, for the card, such as mit.")] = None,
) -> None:
    """Test networks trained on the condensed images beside random, herding and initial ones of the same size.

    Prints accuracy after the last step, and writes it to DIR/scores.json.
    """
    with _commands() as commands:
        commands.evaluate_folder(
            folder,
            test=test,
            test_split=test_split,
            networks=list(network or ()),
            seeds=seeds,
            steps=steps,
            epochs=epochs,
            same_compute=same_compute,
            device=device,
            push=commands.Push(push, private, licence),
        )


@contextmanager
def _commands() -> Iterator[ModuleType]:
    with extra("hf"), extra("timm"), one_line():
        yield importlib.import_module("dataopt.condense_commands")
