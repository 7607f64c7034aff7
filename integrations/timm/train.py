"""``dataopt train``: timm training with ``--mixup puzzle`` and ``--mixup comixup``, and on condensed data sets.

Runs timm's own ``train.py`` with every flag of it where one is found: ``--train-script PATH``, else
``$TIMM_TRAIN_SCRIPT``, else ``./train.py``. Otherwise the short loop of :mod:`.loop` runs. This
module is also ``python -m dataopt.integrations.timm.train``, for ``torchrun -m``.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from .options import METHODS, add_arguments, check_options, mixup_value, read_config, stop, task_settings

_logger = logging.getLogger(__name__)

# What tells timm's script from another train.py, and what we put our hands on.
_TIMM = ("from timm", "create_model", "config_parser", "_parse_args", "train_one_epoch")
_PATCHED = ("parser", "_parse_args", "ClassificationTask", "train_one_epoch", "main")

# Options of timm's that our methods do not go with, and why.
_REFUSED = {
    "naflex_loader": "NaFlex batches are patch sequences, not images",
    "aug_splits": "augmentation splits put several views of an image into one batch",
    "jsd_loss": "the JSD loss compares unmixed views",
    "kd_model_name": "the distillation tasks mix nothing",
    "cutmix_minmax": "use --cutmix ALPHA to switch between the method and CutMix",
}


def main(argv: list[str] | None = None) -> None:
    """Train.

    Args:
        argv: the command line without the program's name; ``sys.argv[1:]`` if None.

    Raises:
        SystemExit: status 2 on a bad command line.
    """
    own = argparse.ArgumentParser(prog="dataopt train", add_help=False, allow_abbrev=False)
    own.add_argument("--train-script")
    given, rest = own.parse_known_args(argv)
    path = find_script(given.train_script)
    if path is not None and str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))  # as `python train.py` does: a timm checkout beside it comes first
    for needed in ("timm",) if path else ("timm", "accelerate"):
        if importlib.util.find_spec(needed) is None:
            stop(f'{needed} is not installed; get it with: pip install "dataopt[timm]"')
    method = _method(rest)
    if path is None:
        from .loop import main as run_loop

        return run_loop(rest)
    from . import condensed  # timm is imported no earlier, for a checkout beside the script

    script = _load(path, method)
    asks = bool({"-h", "--help"} & set(rest))
    if condensed.mentioned(rest) or (hasattr(script, "create_dataset") and asks):
        condensed.teach(script, path)
    if method or (hasattr(script, "ClassificationTask") and asks):
        _teach(script, path, method or METHODS[0])
    before = sys.argv
    sys.argv = [str(path), *rest]
    try:
        script.main()
    finally:
        sys.argv = before


def _method(argv: list[str]) -> str | None:
    """The method of ours that ``--mixup`` names, on the command line or else in the ``-c`` file."""
    peek = argparse.ArgumentParser(prog="dataopt train", add_help=False, allow_abbrev=False)
    peek.add_argument("--mixup")
    peek.add_argument("-c", "--config")
    given, _ = peek.parse_known_args(argv)
    value = given.mixup
    if value is None and given.config:
        value = read_config(given.config).get("mixup")
    try:
        value = mixup_value(str(value)) if value is not None else None
    except argparse.ArgumentTypeError as e:
        stop(f"--mixup: {e}")
    return value if isinstance(value, str) else None


def find_script(given: str | None) -> Path | None:
    """timm's ``train.py``, recognised by its text, which is not executed."""
    name = given or os.environ.get("TIMM_TRAIN_SCRIPT")
    path = Path(name or "train.py").absolute()
    looks = path.is_file() and all(word in path.read_text(errors="replace") for word in _TIMM)
    if name and not looks:
        origin = "--train-script" if given else "$TIMM_TRAIN_SCRIPT"
        what = "does not look like timm's train.py" if path.is_file() else "does not exist"
        stop(f"{origin} {name} {what}; it is train.py of github.com/huggingface/pytorch-image-models")
    return path if looks else None


def _load(path: Path, method: str | None) -> ModuleType:
    """Import the script under its own name, so that what it defines can be pickled by workers."""
    if method and "ClassificationTask" not in path.read_text(errors="replace"):
        stop(
            f"{path} is older than timm's training tasks (timm.task.ClassificationTask), which --mixup {method} needs; "
            "take train.py of timm 1.0.23 or newer, or run without --train-script"
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = script
    spec.loader.exec_module(script)
    return script


def _teach(script: ModuleType, path: Path, method: str) -> None:
    """Teach timm's script ``--mixup METHOD``: the options, the task, and a check that it mixes."""
    import yaml

    from .task import TASKS

    task_class = TASKS[method]
    missing = [name for name in _PATCHED if not hasattr(script, name)]
    if missing:
        stop(
            f"{path} has no {', '.join(missing)}, so it is no train.py that dataopt knows; take that of another "
            "version of timm, or run without --train-script"
        )
    parse_known, parse, train_one_epoch = script.parser.parse_known_args, script._parse_args, script.train_one_epoch
    add_arguments(script.parser)
    # timm compares both values with 0, some versions while parsing, and its collate mixes above 0
    script.parser._option_string_actions["--mixup"].type = _zero_for_method
    run = argparse.Namespace(args=None, cutmix=0.0)

    def parse_known_args(*args: Any, **kwargs: Any) -> tuple[argparse.Namespace, list[str]]:
        parsed, rest = parse_known(*args, **kwargs)
        _refuse(parsed, method)
        run.args, run.cutmix, parsed.cutmix = parsed, parsed.cutmix, 0.0
        return parsed, rest

    def parse_args() -> tuple:
        args, text, *more = parse()
        saved = {**yaml.safe_load(text), "mixup": method, "cutmix": run.cutmix}
        args.mixup_method, args.mixup_method_cutmix = method, run.cutmix  # for loggers and checkpoints, which get args
        return args, yaml.safe_dump(saved, default_flow_style=False), *more

    class ScriptTask(task_class):  # type: ignore[misc, valid-type]
        """timm's ``ClassificationTask``, as this run's options want it."""

        def __init__(self, model: Any, criterion: Any = None, criterion_kwargs: dict | None = None, **kwargs: Any):
            # a criterion that timm built takes class ids
            made = {"criterion": _criterion(run.args)} if criterion_kwargs is None else {}
            settings = task_settings(run.args, model, run.cutmix, method)
            super().__init__(model, criterion_kwargs=criterion_kwargs, **made, **settings, **kwargs)

    def checked_epoch(epoch: int, *args: Any, **kwargs: Any) -> Any:
        task = next((v for v in (*args, *kwargs.values()) if isinstance(v, task_class)), None)
        if task is None:
            built = type(kwargs.get("task")).__name__
            raise RuntimeError(f"timm built {built}, not {task_class.__name__}: nothing would be mixed")
        task.set_epoch(epoch)
        before = task.mixer.decided, task.mixer.mixed
        result = train_one_epoch(epoch, *args, **kwargs)
        _check_mixed(task, epoch, *before, name=task_class.__name__)
        return result

    script.parser.parse_known_args = parse_known_args
    script._parse_args = parse_args  # type: ignore[attr-defined]
    script.ClassificationTask = ScriptTask  # type: ignore[attr-defined]
    script.train_one_epoch = checked_epoch  # type: ignore[attr-defined]


def _zero_for_method(text: str) -> float:
    value = mixup_value(text)
    return 0.0 if isinstance(value, str) else value


def _refuse(args: argparse.Namespace, method: str) -> None:
    """Stop on options of timm's that the method does not go with."""
    refused = {name: why for name, why in _REFUSED.items() if getattr(args, name, None)}
    if getattr(args, "loss", None) == "jsd":
        refused["loss jsd"] = _REFUSED["jsd_loss"]
    if getattr(args, "task", "classification") == "multilabel":
        refused["task multilabel"] = "use the method's task with a binary cross-entropy criterion in a loop of your own"
    for name, why in refused.items():
        stop(f"--mixup {method} does not go with --{name.replace('_', '-')}: {why}")
    check_options(args, method)


def _criterion(args: argparse.Namespace) -> Any:
    """The loss that timm would take with mixup on: smoothing is in the targets already."""
    from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy

    if not args.bce_loss:
        return SoftTargetCrossEntropy()
    return BinaryCrossEntropy(
        smoothing=0.0,
        target_threshold=args.bce_target_thresh,
        sum_classes=args.bce_sum,
        pos_weight=args.bce_pos_weight,
    )


def _check_mixed(task: Any, epoch: int, decided: int, mixed: int, name: str) -> None:
    """After an epoch in which batches should have been mixed: were they?"""
    if not task.mixer.active(epoch) or task.mixer.prob == 0:
        return
    decided, mixed = task.mixer.decided - decided, task.mixer.mixed - mixed
    if decided == 0 or (mixed == 0 and task.mixer.prob == 1):
        raise RuntimeError(f"epoch {epoch} passed without one batch through {name}: nothing was mixed")
    if mixed == 0:
        _logger.warning("Epoch %d mixed none of %d batches at --mixup-prob %g", epoch, decided, task.mixer.prob)


if __name__ == "__main__":
    main()
