"""One file of tensors with a few words about them, and a checksum over both: read as it was written, or refused."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .artifacts import whole_file


def save_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Write tensors and words whole; ``crc`` is no word that ``about`` may have."""
    rows = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with whole_file(path) as temporary:
        save_file(rows, temporary, {**about, "crc": _checksum(rows, about)})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What :func:`save_tensors` wrote.

    Raises:
        ValueError: missing, damaged, cut or changed since; a word or two about why, for the caller's sentence.
    """
    while True:
        before = _identity(path)
        try:
            return _load(path)
        except ValueError:
            # safe_open opens the file anew for the tensors: where another process replaced it in between, read again
            if _identity(path) == before:
                raise


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        about = path.stat()
    except OSError:
        return None
    return about.st_ino, about.st_mtime_ns


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            about = dict(file.metadata() or {})
            rows = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError) as e:
        raise ValueError(type(e).__name__) from e
    if about.pop("crc", None) != _checksum(rows, about):
        raise ValueError("checksum")
    return rows, about


def _checksum(rows: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    """Not cryptographic: it finds accidents."""
    crc = zlib.crc32(json.dumps(dict(about), sort_keys=True).encode())
    for name, t in sorted(rows.items()):
        crc = zlib.crc32(f"{name} {t.dtype} {tuple(t.shape)} ".encode(), crc)
        crc = zlib.crc32(t.reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"
