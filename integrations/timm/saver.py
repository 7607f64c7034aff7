"""timm's checkpoints and summary, such that a run which is killed at any moment can be resumed to the same files."""

from __future__ import annotations

import argparse
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from dataopt.core.artifacts import alone_in, hold, whole_file, write_whole
from timm.utils import CheckpointSaver
from timm.utils.summary import trim_summary

from .options import stop


class Saver(CheckpointSaver):
    """timm's, but ``last`` is replaced after the copies of it, and nothing goes before its successor is whole."""

    def save_checkpoint(self, epoch: int, metric: float | None = None) -> Any:
        with suppress(FileNotFoundError):  # a killed run may have left it as another name of a checkpoint
            os.remove(os.path.join(self.checkpoint_dir, "tmp.pth.tar"))
        best = super().save_checkpoint(epoch, metric)
        os.replace(self.made, os.path.join(self.checkpoint_dir, "last.pth.tar"))
        return best

    def _replace(self, src: str, dst: str) -> None:
        self.made = src

    def _duplicate(self, src: str, dst: str) -> None:
        super()._duplicate(self.made, f"{dst}.part")
        os.replace(f"{dst}.part", dst)


def make_saver(
    args: argparse.Namespace, folder: str, saved: argparse.Namespace, task: Any, optimizer: Any, accelerator: Any
) -> Saver:
    """The saver of a folder, which is this process' until it ends; ``saved`` goes into its ``args.yaml``.

    Raises:
        SystemExit: a run lies there that is not the one resumed, or another process is at work there.
    """
    about, last = Path(folder, "args.yaml"), os.path.join(folder, "last.pth.tar")
    used = f"--output {folder} is in use by another dataopt train; give another --experiment"
    with alone_in(Path(folder)):
        there = {name for name in os.listdir(folder) if name[0] != "."} if os.path.isdir(folder) else set()
        if about.exists() and not hold(about):
            stop(used)
        to_resume = "last.pth.tar" in there
        # in its first epoch
        killed = not to_resume and (there <= {"args.yaml", "summary.csv"} or "tmp.pth.tar" in there)
        same = bool(args.resume) and os.path.dirname(os.path.realpath(args.resume)) == os.path.realpath(folder)
        if there and not killed and not same:
            remedy = f", or --resume {last}" if to_resume else ""
            stop(f"--output {folder} is not empty; give another --experiment{remedy}")
        saver = Saver(
            model=task.trainable_module, optimizer=optimizer, args=args, amp_scaler=accelerator.scaler, task=task,
            checkpoint_dir=folder, recovery_dir=folder, decreasing=not args.val_split,
            max_history=args.checkpoint_hist,
        )  # fmt: skip
        if same:
            saver.load_state_dict_from_checkpoint(args.resume)
        write_whole(about, yaml.safe_dump(vars(saved)))
        if not hold(about):
            stop(used)
    return saver


def trim(summary: str, start: int) -> None:
    """Drop the rows from an epoch on; timm's own function empties the file first, and a kill would lose them all."""
    if os.path.exists(summary):
        with whole_file(Path(summary)) as part:
            shutil.copyfile(summary, part)
            trim_summary(str(part), start)
