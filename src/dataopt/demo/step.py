"""What a step of the demo hands to the terminal and to the report."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any


@dataclass(frozen=True)
class Step:
    """One thing that was tried.

    Attributes:
        title: what the reader does with it.
        asked: the question, with the data.
        header, rows: the table of what came out, text in all cells.
        found: what that says, in a sentence or two.
        commands: what does this alone, on data of one's own.
        pictures: caption to PNG, by file name.
        figures: the numbers behind the table, for ``report.json``.
    """

    title: str
    asked: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    found: str
    commands: Sequence[str]
    pictures: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)

    def text(self, columns: int | None = None) -> str:
        """For a terminal of so many columns; None asks it."""
        columns = columns or min(140, shutil.get_terminal_size((110, 24)).columns)
        return "\n".join(
            [
                f"{self.title}\n{'-' * len(self.title)}",
                *textwrap.wrap(self.asked, columns),
                "",
                aligned(self.header, self.rows, columns),
                "",
                *textwrap.wrap(self.found, columns),
                *(f"  $ {command}" for command in self.commands),
            ]
        )


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], columns: int) -> str:
    """The table, no wider than ``columns`` where that can be: long cells are wrapped."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    room = columns - 2 * (len(widths) - 1)
    while sum(widths) > room and max(widths) > 12:
        widths[widths.index(max(widths))] -= 1
    numeric = [all(_is_number(line[i]) for line in lines[1:]) for i in range(len(header))]
    out = []
    for line in lines:
        cells = [textwrap.wrap(cell, width) or [""] for cell, width in zip(line, widths, strict=True)]
        height = max(map(len, cells))
        for k in range(height):
            parts = [cell[k] if k < len(cell) else "" for cell in cells]
            padded = [p.rjust(w) if n else p.ljust(w) for p, w, n in zip(parts, widths, numeric, strict=True)]
            out.append("  ".join(padded).rstrip())
        if height > 2:
            out.append("")
    return "\n".join(out).rstrip()


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean and sample standard deviation; of one value the value."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def _is_number(cell: str) -> bool:
    return (cell[:1].isdigit() and not any(c.isalpha() for c in cell)) or cell == ""
