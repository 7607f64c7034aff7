"""The first look at arguments: one sentence that names the argument, its value and a remedy, not one of torch's."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor


def check_numbers(**values: Any) -> None:
    """Raise TypeError for the first that is no real number; ranges, which leave out NaN, are the caller's."""
    for name, value in values.items():
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            raise TypeError(f"{name}={_short(value)} is a {type(value).__name__}; give a number")


def check_whole(**values: Any) -> None:
    """Raise TypeError for the first that is no whole number."""
    for name, value in values.items():
        if not isinstance(value, numbers.Integral) or isinstance(value, bool):
            raise TypeError(f"{name}={_short(value)} is a {type(value).__name__}; give a whole number")


def check_tensors(**values: Any) -> None:
    """Raise TypeError for the first that is no tensor of real numbers."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name} is a {type(value).__name__}; give a tensor (torch.as_tensor makes one of an array)"
            )
        if value.is_complex():
            raise TypeError(f"{name} is {value.dtype}; give a tensor of real numbers")


def check_flags(**values: Any) -> None:
    """Raise TypeError for the first that is neither True nor False."""
    for name, value in values.items():
        if not isinstance(value, bool | np.bool_):
            raise TypeError(f"{name}={_short(value)} is a {type(value).__name__}; give True or False")


def check_strings(**values: Any) -> None:
    """Raise TypeError for the first that is no text; which texts there are is the caller's to say."""
    for name, value in values.items():
        if not isinstance(value, str):
            raise TypeError(f"{name}={_short(value)} is a {type(value).__name__}; give a text")


def check_choice(choices: Collection[Any], **values: Any) -> None:
    """Raise ValueError for the first that is none of the choices: texts, whole numbers or None."""
    for name, value in values.items():
        if not isinstance(value, str | numbers.Integral | None) or value not in choices:
            raise ValueError(f"{name}={_short(value)} must be one of {', '.join(map(repr, choices))}")


def check_channels(mean: Any, std: Any, channels: int | None = None) -> None:
    """Raise ValueError unless both are None, or finite numbers for each channel, those of ``std`` above 0."""
    if (mean is None) != (std is None):
        raise ValueError(f"mean={_short(mean)} and std={_short(std)} go together; give both or neither")
    found = [check_channel_numbers(name, value, channels) for name, value in (("mean", mean), ("std", std))]
    if len(found[0]) != len(found[1]):
        raise ValueError(f"mean={_short(mean)} and std={_short(std)} must have one number a channel each")


def check_channel_numbers(name: str, value: Any, channels: int | None = None) -> list[float]:
    """The finite numbers of ``mean``, or of ``std`` above 0; none for None. Raises ValueError for anything else."""
    if value is None:
        return []
    try:
        found = [] if isinstance(value, str | bytes) else [float(v) for v in value]
    except (TypeError, ValueError, OverflowError):
        found = []
    fits = all(-math.inf < v < math.inf and (v > 0 or name != "std") for v in found)
    if not found or not fits or channels not in (None, len(found)):
        many = "" if channels is None else f" ({channels})"
        raise ValueError(f"{name}={_short(value)} must have one number a channel{many}, finite, and std above 0")
    return found


def check_label_names(names: Any) -> None:
    """Raise TypeError unless ``label_names`` is None, or a list or tuple of texts."""
    if names is not None and not (isinstance(names, list | tuple) and all(isinstance(n, str) for n in names)):
        raise TypeError(f"label_names={_short(names)} must be a list of names, or None")


def check_generator(generator: Any) -> None:
    """Raise TypeError unless it is a generator of torch, or None."""
    if not isinstance(generator, torch.Generator | None):
        raise TypeError(f"generator is a {type(generator).__name__}; give a torch.Generator, or None")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."
