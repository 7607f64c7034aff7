"""What every benchmark shares: arguments, the machine, cells that are kept, the printed report."""

from __future__ import annotations

import argparse
import collections
import datetime
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from dataopt.core.artifacts import write_whole
from threadpoolctl import threadpool_limits

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SCRATCH = ROOT / "build" / "benchmarks"  # ignored: quick runs and trained weights
PACKAGES = ("dataopt", "torch", "torchvision", "timm", "numpy", "scipy", "numba", "gco-wrapper")

Cell = dict[str, Any]


@dataclass
class Run:
    """One benchmark: finished cells are in ``NAME.json`` and are not measured again.

    Attributes:
        name: of the files.
        title: first line of the report.
        settings: what the numbers depend on; cells of other settings are not kept.
        args: command line.
        cells: finished ones.
        cpus: the processor that each of them ran on.
    """

    name: str
    title: str
    settings: Cell
    args: argparse.Namespace
    machine: Cell
    cells: dict[str, Cell] = field(default_factory=dict)
    cpus: dict[str, str] = field(default_factory=dict)

    @property
    def json_path(self) -> Path:
        return self.args.out / f"{self.name}.json"

    @property
    def scratch(self) -> Path:
        """Where trained weights are kept."""
        return SCRATCH if self.args.out in (RESULTS, SCRATCH) else self.args.out / "scratch"

    def missing(self, keys: Sequence[str]) -> list[str]:
        """The cells that are still to be measured."""
        return [key for key in keys if key not in self.cells]

    def ran(self, plan: Sequence[str]) -> str:
        """Which cells of a plan have run, for a report."""
        missing = self.missing(plan)
        out = f"Cells that have run: {len(plan) - len(missing)} of {len(plan)}."
        return out + (f" Not yet: {'; '.join(missing)}. The same command goes on with them." if missing else "")

    def cell(self, key: str, measure: Callable[[], Cell]) -> Cell:
        """The kept result of a cell, or a new one, which is stored at once."""
        if key not in self.cells:
            start = time.perf_counter()
            self.store(key, measure(), time.perf_counter() - start)
        return self.cells[key]

    def store(self, key: str, result: Cell, seconds: float) -> None:
        self.cells[key] = result | {"cell_seconds": round(seconds, 1), "date": _now()}
        self.cpus[key] = self.machine["cpu"]
        content = {"settings": self.settings, "machine": self.machine, "cpus": self.cpus, "cells": self.cells}
        write_whole(self.json_path, json.dumps(content, indent=1) + "\n")
        say(f"{key}: ran, {seconds:.1f} s")

    def report(self, *parts: str) -> None:
        """Print the parts and write them to ``NAME.md``, below the machine and above the date."""
        first, last = (min(c["date"] for c in self.cells.values()), max(c["date"] for c in self.cells.values()))
        seconds = sum(c["cell_seconds"] for c in self.cells.values())
        cpus = collections.Counter(self.cpus.values())
        cpu = next(iter(cpus)) if len(cpus) == 1 else ", ".join(f"{name} ({n} cells)" for name, n in cpus.items())
        head = [f"# {self.title}", self.machine_line(cpu), f"Measured {first} to {last}, {seconds:.0f} s in all."]
        text = "\n\n".join([*head, *parts]) + "\n"
        path = self.args.out / f"{self.name}.md"
        write_whole(path, text)
        print("\n" + text)

    def machine_line(self, cpu: str) -> str:
        versions = ", ".join(f"{k} {v}" for k, v in self.machine["versions"].items() if v)
        return f"{cpu}, {self.machine['processors']} processors, {self.machine['threads']}; {versions}."


def parser(description: str | None) -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    out.add_argument("--fresh", action="store_true", help="measure again what is there")
    out.add_argument("--quick", action="store_true", help="smallest sizes, to see that it runs; results are no claim")
    out.add_argument(
        "--out", type=Path, help="folder of the results (benchmarks/results; quick runs: build/benchmarks)"
    )
    return out


def add_data_option(arguments: argparse.ArgumentParser) -> None:
    arguments.add_argument(
        "--data",
        type=Path,
        default=ROOT.parent / "shared" / "data" / "cifar10",
        help="folder with train.parquet and test.parquet of CIFAR-10 (../shared/data/cifar10)",
    )


def start(
    name: str,
    title: str,
    args: argparse.Namespace,
    threads: int,
    settings: Cell,
    workers: int = 1,
    packages: Sequence[str] = PACKAGES,
    timed: bool = True,
) -> Run:
    """Set the thread count, say where this runs, and read the cells that are there.

    Cells of other settings or versions are dropped, and where the numbers are times (``timed``) those of
    another processor: they do not compare. Quick runs take one thread, since they may share the machine.
    """
    threads = 1 if args.quick else threads
    torch.set_num_threads(threads)
    threadpool_limits(threads)
    if args.out is None:
        args.out = SCRATCH if args.quick else RESULTS
    text = f"{threads} thread{'s' if threads > 1 else ''}"
    machine = {
        "cpu": _cpu(),
        "processors": os.cpu_count(),
        "threads": f"{workers} processes of {text} each" if workers > 1 else text,
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in packages}},
    }
    run = Run(name, title, settings | {"quick": args.quick}, args, machine)
    print(f"{title}\n{run.machine_line(machine['cpu'])}\nLoad average {os.getloadavg()[0]:.2f}, {_now()}.")
    if run.json_path.exists() and not args.fresh:
        stored = json.loads(run.json_path.read_text())
        cpus = {key: stored.get("cpus", {}).get(key, stored["machine"]["cpu"]) for key in stored["cells"]}
        here = json.loads(json.dumps({"settings": run.settings, "machine": machine}))
        if not timed:
            stored["machine"]["cpu"] = machine["cpu"]
        other = [part for part in here if stored[part] != here[part]]
        if other:
            say(f"the results that are there come from other {' and '.join(other)}; measuring all cells anew")
        else:
            run.cells, run.cpus = stored["cells"], cpus
            say(f"kept cells: {', '.join(run.cells)}")
    return run


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table, padded so that it reads well as text too; the first column to the left."""
    lines = [list(header), *([str(c) for c in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = [
        "| "
        + " | ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        + " |"
        for line in lines
    ]
    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([text[0], rule, *text[1:]])


def verdict(what: str, value: float, least: float | None = None, most: float | None = None) -> str:
    """A line that says whether a target is met."""
    if least is not None:
        return f"Target: {what} at least {least:g}. Measured {value:.2f}: {'met' if value >= least else 'MISSED'}."
    assert most is not None
    return f"Target: {what} at most {most:g}. Measured {value:.2f}: {'met' if value <= most else 'MISSED'}."


def say(line: str) -> None:
    print(f"  {line}", flush=True)


def stop(message: str) -> None:
    """End with one line on standard error."""
    sys.exit(message)


def _now() -> str:
    return datetime.datetime.now().strftime("%Y-%m-%d %H:%M")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
