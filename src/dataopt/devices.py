"""The device that a command line names."""

from __future__ import annotations

import os

import torch


def find_device(name: str) -> torch.device:
    """``auto`` takes the first GPU if there is one; of the processes that torchrun starts each its own.

    Raises:
        ValueError: no such device, or one that cannot be used here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda" and "LOCAL_RANK" in os.environ:
            name = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"  # as accelerate counts
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise ValueError(f"device={name!r} cannot be used ({str(e).splitlines()[0]}); give cpu, cuda or auto") from e
    return device
