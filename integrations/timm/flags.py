"""timm's command line, as far as the short loop of :mod:`.loop` goes."""

from __future__ import annotations

import argparse
import os
from typing import Any

from timm.utils import ParseKwargs

from . import condensed
from .options import METHODS, add_arguments, check_options, mixup_value, read_config, stop

# timm's flags: name, type (None: a switch), default, and nargs where a flag takes several values
_FLAGS: dict[str, list[tuple]] = {
    "Dataset": [
        ("--data-dir", str, None), ("--dataset", str, ""), ("--dataset-download", None, False),
        ("--train-split", str, "train"), ("--val-split", str, "validation"), ("--class-map", str, ""),
        ("--input-key", str, None), ("--target-key", str, None),
    ],
    "Model": [
        ("--model", str, "resnet50"), ("--pretrained", None, False), ("--initial-checkpoint", str, ""),
        ("--num-classes", int, None), ("--img-size", int, None), ("--in-chans", int, None),
        ("--input-size", int, None, 3), ("--mean", float, None, "+"), ("--std", float, None, "+"),
        ("--crop-pct", float, None), ("--interpolation", str, ""), ("--drop", float, 0.0), ("--drop-path", float, None),
        ("--channels-last", None, False), ("--model-ema", None, False), ("--model-ema-decay", float, 0.9998),
    ],
    "Optimisation": [
        ("--opt", str, "sgd"), ("--opt-eps", float, None), ("--opt-betas", float, None, "+"), ("--lr", float, None),
        ("--lr-base", float, 0.1), ("--lr-base-size", int, 256), ("--momentum", float, 0.9),
        ("--weight-decay", float, 2e-5), ("--clip-grad", float, None), ("--clip-mode", str, "norm"),
        ("--sched", str, "cosine"), ("--epochs", int, 300), ("--warmup-epochs", int, 5), ("--warmup-lr", float, 1e-5),
        ("--min-lr", float, 0.0), ("--cooldown-epochs", int, 0), ("--decay-epochs", float, 90.0),
        ("--decay-milestones", int, [90, 180, 270], "+"), ("--decay-rate", float, 0.1), ("--grad-accum-steps", int, 1),
    ],
    "Augmentation": [
        ("--no-aug", None, False), ("--train-crop-mode", str, None), ("--scale", float, [0.08, 1.0], "+"),
        ("--ratio", float, [3 / 4, 4 / 3], "+"), ("--hflip", float, 0.5), ("--vflip", float, 0.0),
        ("--color-jitter", float, 0.4), ("--aa", str, None), ("--reprob", float, 0.0),
        ("--train-interpolation", str, "random"), ("--smoothing", float, 0.1), ("--bce-loss", None, False),
        ("--mixup", mixup_value, 0.0), ("--cutmix", float, 0.0), ("--mixup-prob", float, 1.0),
        ("--mixup-switch-prob", float, 0.5), ("--mixup-mode", str, "batch"), ("--mixup-off-epoch", int, 0),
    ],
    "Run": [
        ("--device", str, ""), ("--amp", None, False), ("--amp-dtype", str, "float16"), ("--seed", int, 42),
        ("--pin-mem", None, False), ("--log-interval", int, 50), ("--checkpoint-hist", int, 10),
        ("--output", str, "output/train"), ("--experiment", str, ""), ("--resume", str, ""),
    ],
}  # fmt: skip


def parse(argv: list[str]) -> argparse.Namespace:
    """timm's command line, as far as this loop goes; stops with one line on anything else."""
    parser = argparse.ArgumentParser(
        prog="dataopt train",
        description="No train.py of timm's was found, so dataopt's short loop runs. "
        "--train-script PATH runs timm's own script, with every flag of it.",
    )
    parser.add_argument("data", nargs="?", metavar="DIR", help="path to dataset")
    parser.add_argument("-c", "--config", default="", metavar="FILE", help="YAML file of options")
    for title, flags in _FLAGS.items():
        group = parser.add_argument_group(title)
        for flag, kind, default, *nargs in flags:
            how: dict[str, Any] = {"type": kind, "metavar": "X"} if kind else {"action": "store_true"}
            group.add_argument(flag, default=default, **how, **({"nargs": nargs[0]} if nargs else {}))
    group.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs)
    group.add_argument("-b", "--batch-size", type=int, default=128, metavar="N")
    group.add_argument("-vb", "--validation-batch-size", type=int, metavar="N")
    group.add_argument("-j", "--workers", type=int, default=4, metavar="N")
    condensed.add_arguments(parser)
    add_arguments(parser)

    config = parser.parse_known_args(argv)[0].config
    if config:
        values = read_config(config)
        unknown = sorted(set(values) - set(vars(parser.parse_args([]))))
        if unknown:
            stop(f"{config} sets {', '.join(unknown)}, which this loop does not know; timm's own train.py may, "
                 "give it with --train-script PATH")  # fmt: skip
        parser.set_defaults(**values)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        stop(f"this loop does not know {' '.join(unknown)}; if that is a flag of timm's train.py, give the script with "
             "--train-script PATH")  # fmt: skip
    condensed.adopt(args)
    args.data_dir = args.data_dir or args.data
    prefix = args.dataset.partition("/")[0].lower() if "/" in args.dataset else ""
    if not prefix and not (args.data_dir and os.path.exists(args.data_dir)):
        stop(f"--data-dir {args.data_dir} does not exist; give a folder with train/ and validation/, or --dataset NAME")
    if args.amp_dtype not in ("float16", "bfloat16"):
        stop(f"--amp-dtype {args.amp_dtype} must be float16 or bfloat16")
    if args.device not in ("", "cpu", "cuda", "mps", "xpu", "npu"):
        stop(f"--device {args.device} is for accelerate to choose, for each process; give cpu, or leave it out")
    if args.resume and not os.path.isfile(args.resume):
        stop(f"--resume {args.resume} does not exist; give a checkpoint, for example last.pth.tar")
    if args.mixup in METHODS:
        check_options(args, args.mixup)
    args.grad_accum_steps = max(1, args.grad_accum_steps)
    return args
