"""The ``--out`` folder of a command: empty, or begun by the same command with the same arguments."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .core.artifacts import write_whole

WORK = "work"  # what a stopped run goes on from


def claim(out: Path, asked: Mapping[str, Any], resume: bool, command: str) -> None:
    """Make ``out`` ours, and note the arguments in it.

    Args:
        asked: values that JSON can hold and that a resumed run must have again.
        command: as a user types it.

    Raises:
        ValueError: ``out`` is a file, holds something already, or was begun in another way.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder")
    begun = out / WORK / "arguments.json"
    if out.is_dir() and any(out.iterdir()):
        if not resume:
            raise ValueError(f"--out {out} is not empty; give another folder, or --resume to go on in it")
        try:
            before = json.loads(begun.read_text())
        except (OSError, ValueError):
            before = {}
        if before.get("command") != command:
            raise ValueError(f"--out {out} was not begun by {command}; give another folder")
        other = [name for name in asked if before.get(name) != asked[name]]
        if other:
            raise ValueError(
                f"--out {out} was begun with other values of {', '.join(other)}; give the same, or another folder"
            )
    write_whole(begun, json.dumps({"command": command, **asked}, indent=1) + "\n")


@contextmanager
def claimed(out: Path, asked: Mapping[str, Any], resume: bool, command: str) -> Iterator[None]:
    """:func:`claim`, taken back where the block fails before it has written anything."""
    there = out.exists()
    claim(out, asked, resume, command)
    try:
        yield
    except BaseException:
        begun = out / WORK / "arguments.json"
        if sorted(out.rglob("*")) == sorted([begun.parent, begun]):
            begun.unlink()
            begun.parent.rmdir()
            if not there:
                out.rmdir()
        raise
