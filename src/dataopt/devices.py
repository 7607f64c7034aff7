"""The device that a command line names."""

from __future__ import annotations

import torch


def find_device(name: str) -> torch.device:
    """``auto`` takes the first GPU if there is one.

    Raises:
        ValueError: no such device, or one that cannot be used here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise ValueError(f"device={name!r} cannot be used: {str(e).splitlines()[0]}") from e
    return device
