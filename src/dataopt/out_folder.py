"""The ``--out`` folder of a command: empty, or begun by the same command with the same arguments."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .core.artifacts import alone_in, hold, write_whole

WORK = "work"  # what a stopped run goes on from


def claim(out: Path, asked: Mapping[str, Any], resume: bool, command: str) -> None:
    """Make ``out`` ours until this process ends, and note the arguments in it.

    Args:
        asked: values that JSON can hold and that a resumed run must have again.
        command: as a user types it.

    Raises:
        ValueError: ``out`` is a file, holds something already, was begun in another way, or is in use.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder")
    begun = out / WORK / "arguments.json"
    with alone_in(out):
        if _something_in(out, begun):
            if not resume:
                raise ValueError(f"--out {out} is not empty; give another folder, or --resume to go on in it")
            try:
                before = json.loads(begun.read_text())
            except (OSError, ValueError, RecursionError):
                before = {}
            if not isinstance(before, dict) or before.get("command") != command:
                raise ValueError(f"--out {out} was not begun by {command}; give another folder")
            other = [name for name in asked if before.get(name) != asked[name]]
            if other:
                raise ValueError(
                    f"--out {out} was begun with other values of {', '.join(other)}; give the same, or another folder"
                )
        else:
            write_whole(begun, _note(command, asked))
        if not hold(begun):
            raise ValueError(f"--out {out} is in use by another {command}; wait for its end, or give another folder")
        for path in out.rglob(".*.????????"):  # what whole_file leaves of a process that is killed; now nobody writes
            if path.is_file():
                path.unlink()


def _note(command: str, asked: Mapping[str, Any]) -> str:
    return json.dumps({"command": command, **asked}, indent=1) + "\n"


def _something_in(out: Path, begun: Path) -> bool:
    """Whether a folder holds more than what a run leaves that was killed before it had noted its arguments."""
    there = out.rglob("*") if out.is_dir() else ()
    return any(path != begun.parent and not path.name.startswith(f".{begun.name}.") for path in there)


@contextmanager
def claimed(
    out: Path, asked: Mapping[str, Any], resume: bool, command: str, *, together: bool = False
) -> Iterator[None]:
    """:func:`claim`, taken back where the block fails before it has written anything.

    Args:
        together: processes that torchrun or accelerate launch started work in ``out``. The first claims it for all,
            and they must meet after the block, before any of them writes.
    """
    there = out.exists()
    if not together or os.environ.get("RANK", "0") == "0":
        claim(out, asked, resume, command)
    try:
        yield
    except BaseException:
        begun = out / WORK / "arguments.json"
        with suppress(FileNotFoundError):  # another process fails at the same moment
            nothing_else = sorted(out.rglob("*")) == sorted([begun.parent, begun])
            if nothing_else and begun.read_text() == _note(command, asked):
                begun.unlink()
                begun.parent.rmdir()
                if not there:
                    out.rmdir()
        raise
