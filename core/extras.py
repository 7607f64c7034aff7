"""Packages that only an extra brings."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def optional(module: str, extra: str) -> Any:
    """The module, or one line that says which extra brings it.

    Raises:
        ModuleNotFoundError: the extra is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as e:
        missing = (e.name or module).partition(".")[0]
        raise ModuleNotFoundError(
            f'{missing} is not installed; get it with: pip install "dataopt[{extra}]"', name=e.name
        ) from e
