"""The command line's ``--puzzle-*`` and ``--comixup-*`` options, and the objects that they describe."""

from __future__ import annotations

import argparse
import inspect
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dataopt.core.mixup import Adversarial, CoMixup, PuzzleMix
from dataopt.core.mixup.grid import resolve_grid

if TYPE_CHECKING:
    from torch import nn

METHODS = ("puzzle", "comixup")


def mixup_value(text: str) -> str | float:
    """The value of ``--mixup``: a method's name, or a number for timm's own mixup.

    Raises:
        argparse.ArgumentTypeError: neither.
    """
    if text in METHODS:
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"method {text!r} must be one of {', '.join(METHODS)}, or a number, the alpha of timm's own mixup"
        ) from None


def stop(message: str) -> NoReturn:
    """One line on the error stream, exit status 2."""
    print(f"dataopt train: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def read_config(path: str) -> dict[str, Any]:
    """The options in a YAML file, as timm's ``-c`` takes it; stops where it is not one."""
    import yaml  # comes with timm

    try:
        values = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, yaml.YAMLError) as e:
        stop(f"--config {path} cannot be read: {e}")
    if not isinstance(values, dict):
        stop(f"--config {path} holds {type(values).__name__}; give a YAML mapping of options")
    return values


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of every method."""
    add_puzzle_arguments(parser)
    add_comixup_arguments(parser)


def add_puzzle_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the ``--puzzle-*`` group; defaults are :class:`PuzzleMix`'s own."""
    default = {name: p.default for name, p in inspect.signature(PuzzleMix).parameters.items()}
    add = parser.add_argument_group(
        "Puzzle Mix (dataopt), used with --mixup puzzle",
        "--cutmix, --mixup-prob, --mixup-switch-prob, --mixup-mode batch|elem, --mixup-off-epoch, --smoothing and "
        "--bce-loss act as they do on timm's mixup. --train-script PATH says which train.py of timm's runs.",
    ).add_argument
    for name, meaning in (
        ("alpha", "the expected share is drawn from Beta(alpha, alpha)"),
        ("beta", "label smoothness"),
        ("gamma", "data smoothness, relative to beta, at most 1"),
        ("eta", "weight of the mixing prior"),
        ("transport-cost", "price of moving a region"),
    ):
        value = default[name.replace("-", "_")]
        add(f"--puzzle-{name}", type=float, default=value, metavar="X", help=f"{meaning} (default: {value})")
    add("--puzzle-labels", type=int, default=default["labels"], metavar="N", help="labels of the mask (default: 3)")
    add(
        "--puzzle-grids",
        type=_grid,
        nargs="+",
        default=list(default["grids"]),
        metavar="N",
        help="grids of the mask, N or ROWSxCOLS, one drawn per batch (default: 2 4 8 16)",
    )
    add("--puzzle-neigh-size", type=int, default=default["neigh_size"], metavar="PX", help="border pixels averaged")
    add("--puzzle-data-term", choices=("released", "thesis"), default=default["data_term"])
    add("--puzzle-transport", choices=("iterative", "exact", "none"), default=default["transport"])
    add("--puzzle-transport-patch", type=int, metavar="PX", help="side of the regions that move (default: the mask's)")
    add("--puzzle-solver", choices=("auto", "numba", "scipy", "gco"), default=default["solver"])
    add("--puzzle-clean-weight", type=float, default=0.0, metavar="X", help="weight of the loss on unmixed inputs")
    add(
        "--puzzle-saliency-resolution",
        type=float,
        default=1.0,
        metavar="X",
        help="below 1, saliency from inputs downsized by this factor",
    )
    add("--puzzle-augment", choices=("augmix",), help="mix AugMix images of the batch (default: the images)")
    add("--puzzle-adv-prob", type=float, default=0.0, metavar="P", help="probability of adversarial noise (default: 0)")
    add("--puzzle-adv-eps", type=float, default=10 / 255, metavar="X", help="its radius, of [0, 1] pixels (10/255)")
    add("--puzzle-adv-step", type=float, metavar="X", help="its step (default: eps + 2/255)")
    add("--puzzle-adv-shared-draw", action="store_true", help="perturb both inputs of a pair, or neither")
    add("--puzzle-adv-no-decay", action="store_true", help="do not scale the noise by a uniform draw")


def add_comixup_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the ``--comixup-*`` group; defaults are :class:`CoMixup`'s own."""
    default = {name: p.default for name, p in inspect.signature(CoMixup).parameters.items()}
    add = parser.add_argument_group(
        "Co-Mixup (dataopt), used with --mixup comixup",
        "--cutmix, --mixup-prob, --mixup-switch-prob, --mixup-off-epoch, --smoothing and --bce-loss act as they do on "
        "timm's mixup; --mixup-mode is batch.",
    ).add_argument
    for name, meaning in (
        ("alpha", "of the Dirichlet prior over a partition's images"),
        ("beta", "label smoothness"),
        ("gamma", "weight of the compatibility between outputs"),
        ("eta", "weight of the mixing prior"),
        ("tau", "how much the others may show an image before it costs"),
        ("omega", "weight of the distance between salient places"),
    ):
        value = default[name]
        add(f"--comixup-{name}", type=float, default=value, metavar="X", help=f"{meaning} (default: {value})")
    for name, meaning in (
        ("partition", "images that are mixed together"),
        ("n-iter", "sweeps over the outputs"),
        ("restarts", "random starts, the best of which is taken"),
    ):
        value = default[name.replace("-", "_")]
        add(f"--comixup-{name}", type=int, default=value, metavar="N", help=f"{meaning} (default: {value})")
    add("--comixup-outputs", type=int, metavar="N", help="mixed images of a partition (default: as many as it has)")
    add("--comixup-grid", type=_grid, default=default["grid"], metavar="N", help="regions, N or ROWSxCOLS (default: 4)")
    add("--comixup-threshold", choices=("hard", "soft"), default=default["threshold"])
    add("--comixup-clean-weight", type=float, default=0.0, metavar="X", help="weight of the loss on unmixed inputs")
    add(
        "--comixup-saliency-resolution",
        type=float,
        default=1.0,
        metavar="X",
        help="below 1, saliency from inputs downsized by this factor",
    )
    add("--comixup-augment", choices=("augmix",), help="mix AugMix images of the batch (default: the images)")


def co_mixup(args: argparse.Namespace) -> CoMixup:
    """The :class:`CoMixup` that the options describe, for ``args.num_classes`` classes."""
    names = [name for name in inspect.signature(CoMixup).parameters if name not in ("num_classes", "grid")]
    grid = args.comixup_grid
    return CoMixup(
        args.num_classes,
        grid=tuple(grid) if isinstance(grid, list) else grid,  # YAML has no tuples
        **{name: getattr(args, f"comixup_{name}") for name in names},
    )


def puzzle_mix(args: argparse.Namespace, mean: Sequence[float], std: Sequence[float]) -> PuzzleMix:
    """The :class:`PuzzleMix` that the options describe, for ``args.num_classes`` classes."""
    adversarial = None
    if args.puzzle_adv_prob > 0:
        step = args.puzzle_adv_step if args.puzzle_adv_step is not None else args.puzzle_adv_eps + 2 / 255
        adversarial = Adversarial(
            args.puzzle_adv_prob,
            args.puzzle_adv_eps,
            step,
            shared_draw=args.puzzle_adv_shared_draw,
            decay=not args.puzzle_adv_no_decay,
        )
    return PuzzleMix(
        args.num_classes,
        alpha=args.puzzle_alpha,
        beta=args.puzzle_beta,
        gamma=args.puzzle_gamma,
        eta=args.puzzle_eta,
        labels=args.puzzle_labels,
        grids=_grids(args.puzzle_grids),
        neigh_size=args.puzzle_neigh_size,
        data_term=args.puzzle_data_term,
        transport=None if args.puzzle_transport == "none" else args.puzzle_transport,
        transport_cost=args.puzzle_transport_cost,
        transport_patch=args.puzzle_transport_patch,
        adversarial=adversarial,
        solver=args.puzzle_solver,
        mean=mean,
        std=std,
    )


def task_settings(args: argparse.Namespace, model: nn.Module | None, cutmix: float, method: str) -> dict[str, Any]:
    """Arguments of the method's task, but for the criterion, from timm's options and ours.

    Args:
        args: timm's options, ``num_classes`` resolved, and ours.
        model: the model, whose configuration may hold mean and std; None before there is one.
        cutmix: what the user gave as ``--cutmix``.
        method: of ``METHODS``.

    Raises:
        ValueError: a value that the method does not take, or a grid that does not divide the images.
    """
    from timm.data import resolve_data_config

    config = resolve_data_config(vars(args), model=model)
    channels = config["input_size"][0]
    mean, std = _per_channel(config["mean"], channels), _per_channel(config["std"], channels)
    mix = puzzle_mix(args, mean, std) if method == "puzzle" else co_mixup(args)
    given = vars(args)
    if model is not None or given.get("input_size") or given.get("img_size"):  # else the model has yet to say its size
        sizes = [(n, n) for n in given.get("train_img_sizes") or ()] or [config["input_size"][1:]]
        for grid, size in itertools.product(mix.grids if isinstance(mix, PuzzleMix) else (mix.grid,), sizes):
            resolve_grid(grid, tuple(size))
    return dict(
        mix=mix,
        prob=args.mixup_prob,
        cutmix_alpha=cutmix,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        smoothing=args.smoothing,
        off_epoch=args.mixup_off_epoch,
        clean_weight=given[f"{method}_clean_weight"],
        saliency_resolution=given[f"{method}_saliency_resolution"],
        augment=given[f"{method}_augment"],
        mean=mean,
        std=std,
        seed=args.seed,
    )


def check_options(args: argparse.Namespace, method: str) -> None:
    """Stop on values that the method does not take, before a model is built."""
    from .mixup import BatchMixer

    modes = {"puzzle": ("batch", "elem"), "comixup": ("batch",)}[method]
    if args.mixup_mode in ("pair", "elem") and args.mixup_mode not in modes:
        stop(f"--mixup {method} does not go with --mixup-mode {args.mixup_mode}: it has {' and '.join(modes)}")
    trial = argparse.Namespace(**{**vars(args), "num_classes": args.num_classes or 1})
    try:
        BatchMixer(**task_settings(trial, None, args.cutmix, method))
    except (ValueError, TypeError) as e:
        stop(f"--mixup {method}: {e}")


def _per_channel(values: Sequence[float], channels: int) -> list[float]:
    """As timm's loader does where a model's statistics have other channels: their average."""
    values = [float(v) for v in values]
    return values if len(values) == channels else [sum(values) / len(values)] * channels


def _grids(given: Any) -> list[Any]:
    """Of the command line a list; of YAML also one grid alone, lists for tuples, or texts such as 2x4."""
    several = list(given) if isinstance(given, list) else [given]
    return [_grid(g) if isinstance(g, str) else tuple(g) if isinstance(g, list) else g for g in several]


def _grid(text: str) -> int | tuple[int, int]:
    rows, cross, cols = text.partition("x")
    return (int(rows), int(cols)) if cross else int(rows)
