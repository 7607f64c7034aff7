"""Kill a command at random moments, go on with it as its page says, and compare what comes to its end.

A command runs in a child that is forked from a process which has imported everything, so that a random moment of it is
one of its work and not of an import. What kills it is a real SIGKILL: from outside at a random time, or from inside
just before one of its file operations in the output folder, where half-written files come from.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_EVENTS = ("os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir")
OUT = "out"  # the same for all runs: its name stands in reports and configurations

Result = dict[str, str]  # what is compared, by name: hashes, or the texts themselves


@dataclass(frozen=True)
class Command:
    """How to start a command, to go on with it after a kill, and what it leaves.

    Attributes:
        promise: what its page says about a stopped run.
        start: arguments, with the folder of the result as ``{out}`` and that of the inputs as ``{inputs}``, in which
            spaces may stand.
        again: more arguments for a folder in which a run was killed.
        result: of a finished folder.
        whole: raises where a killed run left a result that would be taken for a whole one and is not.
    """

    name: str
    promise: str
    start: str
    again: Callable[[Path], tuple[str, ...]]
    result: Callable[[Path], Result]
    whole: Callable[[Path], None] = lambda out: None

    def arguments(self, inputs: Path, out: Path) -> list[str]:
        return [part.format(inputs=inputs, out=out) for part in self.start.split()]


# Children


def begin(argv: list[str], out: Path, log: Path, die_at: int | None = None, count: Path | None = None) -> int:
    """Fork a child that runs the command, and return its number.

    Args:
        out: folder whose file operations are counted.
        log: where its output goes.
        die_at: the operation before which it kills itself.
        count: file for the number of operations of a run that comes to its end.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        seen = _watch(out, die_at)
        with log.open("w") as file, redirect_stdout(file), redirect_stderr(file):
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            code = _call(argv)
        if count:
            count.write_text(str(seen[0]))
    finally:
        os._exit(code)


def _call(argv: list[str]) -> int:
    from dataopt.cli import main

    try:
        main(argv)
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else bool(e.code)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _watch(out: Path, die_at: int | None) -> list[int]:
    """Count the operations that write below a folder, in this process; at one of them it dies."""
    seen, root = [0], str(out)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if not (isinstance(path, str) and path.startswith(root) and flags & _WRITING):
                return
        elif event in _EVENTS:
            relative = event in ("os.remove", "os.rmdir") and args[1] != -1  # shutil.rmtree, below an open folder
            if not relative and not any(isinstance(a, str | Path) and str(a).startswith(root) for a in args[:2]):
                return
        else:
            return
        seen[0] += 1
        if seen[0] == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return seen


def wait(pid: int, seconds: float | None = None) -> int:
    """The exit code of a child, negative for a signal; after so many seconds it is killed."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while deadline is not None:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            os.kill(pid, signal.SIGKILL)
            break
        time.sleep(0.001)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# Kills


@dataclass(frozen=True)
class Straight:
    """An uninterrupted run: its result, its seconds, and the number of its file operations."""

    result: Result
    seconds: float
    operations: int


@dataclass
class Tally:
    """What came of the kills of one command.

    Attributes:
        landed: kills while it ran.
        finished: runs that came to an end after kills, and were compared.
        unequal: names of what differed, for each of them where something did.
        refused: last lines of runs that would not go on.
        torn: results that a kill had left and that were not whole.
        leftovers: hidden temporary files that lay in finished folders.
        worst: the most kills that one finished run had survived.
    """

    landed: int = 0
    finished: int = 0
    unequal: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    torn: list[str] = field(default_factory=list)
    leftovers: int = 0
    worst: int = 0

    def cell(self) -> dict[str, Any]:
        return dict(vars(self))


def straight(command: Command, inputs: Path, folder: Path) -> Straight:
    """Run it to its end, without a kill."""
    out, log, count = folder / OUT, folder / "straight.log", folder / "count"
    shutil.rmtree(out, ignore_errors=True)
    begun = time.monotonic()
    code = wait(begin(command.arguments(inputs, out), out, log, count=count))
    seconds = time.monotonic() - begun
    if code:
        raise RuntimeError(f"{command.name} failed without a kill:\n{log.read_text()[-2000:]}")
    return Straight(command.result(out), seconds, int(count.read_text()))


def kills(
    command: Command, inputs: Path, folder: Path, times: int, kind: str, expected: Straight, seed: int = 0
) -> Tally:
    """Kill a command, go on with it, kill it again; compare whatever comes to its end.

    Args:
        times: kills that have to land.
        kind: ``"time"``: at a random time of the uninterrupted run; ``"file"``: before a random one of its file
            operations.
    """
    draw, tally, survived = random.Random(seed), Tally(), 0
    out, log = folder / OUT, folder / f"{kind}.log"
    shutil.rmtree(out, ignore_errors=True)
    while tally.landed < times or survived:
        more: tuple[str, ...] = ()
        if out.is_dir() and any(out.iterdir()):
            with noted(tally.torn):
                command.whole(out)
            more = command.again(out)
        argv = [*command.arguments(inputs, out), *more]
        last = tally.landed >= times  # the last run goes to its end
        at = draw.randint(1, expected.operations) if kind == "file" and not last else None
        pid = begin(argv, out, log, die_at=at)
        code = wait(pid, draw.uniform(0, expected.seconds) if kind == "time" and not last else None)
        if code == -signal.SIGKILL:
            tally.landed += 1
            survived += 1
            continue
        if code:
            lines = log.read_text().strip().splitlines()
            tally.refused.append(lines[-1][-300:] if lines else f"exit code {code}")
        else:
            tally.finished += 1
            tally.worst = max(tally.worst, survived)
            with noted(tally.unequal):
                different = unequal(expected.result, command.result(out))
                tally.unequal += [", ".join(different)[:300]] if different else []
            tally.leftovers += len(leftovers(out))
        shutil.rmtree(out)
        survived = 0
    return tally


@contextmanager
def noted(where: list[str]) -> Iterator[None]:
    try:
        yield
    except Exception as e:
        where.append(f"{type(e).__name__}: {e}"[:300])


def unequal(one: Result, other: Result) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def leftovers(out: Path) -> list[Path]:
    """Temporary files of ``whole_file`` that a kill has left."""
    return [p for p in out.rglob(".*") if p.is_file() and len(p.suffix) == 9]  # .NAME.EXT.xxxxxxxx
