"""Tensors and a JSON record that belong together: written whole, read only as they were written."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..artifacts import alone_in, member, write_whole

VERSION = 1


def write(folder: Path, name: str, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Write ``name-*.safetensors``, then ``name.json``, which names it, then remove older tensors of that name.

    A kill at any moment leaves the old pair or the new one, and so do several processes at once.

    Raises:
        ValueError: a record of another kind has that name.
        OSError: the disk is full or the folder is read-only; what was there before stays.
    """
    kind = _other_kind(folder / f"{name}.json")
    if kind is not None:
        raise ValueError(f"{folder / name}.json is there, of a {kind}; give another folder")
    record = json.loads(json.dumps(record))
    text = json.dumps(record, sort_keys=True)
    content = save({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, {"record": text})
    digest = hashlib.sha256(content).hexdigest()
    target = folder / f"{name}-{digest[:16]}.safetensors"
    files = {"file": target.name, "bytes": len(content), "sha256": digest}
    about = json.dumps({"format": VERSION, "tensors": files, "record": record}, indent=1)
    with alone_in(folder):
        write_whole(target, content)
        write_whole(folder / f"{name}.json", about)
        for old in folder.glob(f"{name}-*.safetensors"):
            if old != target and _is_ours(old.name, name):
                old.unlink()


def read(folder: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What :func:`write` wrote.

    Raises:
        FileNotFoundError: no such record.
        ValueError: a file that is damaged, cut short or changed; the message says what differs.
    """
    path = folder / f"{name}.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {path.name}; give the folder that was saved to")
    member(folder, path.name)
    kind = _other_kind(path)
    if kind is not None:
        raise ValueError(f"{path} is of a {kind}, which load_condensed and read_condensed read")
    try:
        content = json.loads(path.read_bytes())
        files, record = content["tensors"], content["record"]
        file, size, digest = files["file"], files["bytes"], files["sha256"]
        version = content["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise ValueError(
            f"{path} is damaged or none of ours ({type(e).__name__}: {e}); save or download it again"
        ) from e
    if version != VERSION:
        raise ValueError(
            f"{path} has format {version!r:.40} where this dataopt reads {VERSION}; use the dataopt it names"
        )
    if not isinstance(file, str) or not _is_ours(file, name) or not isinstance(record, dict):
        raise ValueError(
            f"{path} names {file!r:.80} as its file of tensors, which no save does; save or download it again"
        )
    target = folder / file
    if not target.is_file():
        raise ValueError(f"{folder} lacks {file}, which {path.name} names; save or download it again")
    member(folder, file)
    if target.stat().st_size != size:
        raise ValueError(
            f"{target} has {target.stat().st_size} bytes where {path.name} says {size}; save or download it again"
        )
    with target.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != digest:
        raise ValueError(
            f"{target} has the checksum {found[:16]} where {path.name} says {digest!r:.18}; save or download it again"
        )
    try:
        with safe_open(target, "pt") as tensors:
            stored = dict(json.loads((tensors.metadata() or {})["record"]))
            out = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise ValueError(f"{target} is damaged ({type(e).__name__}: {e}); save or download it again") from e
    for key in sorted(stored.keys() | record.keys()):
        if stored.get(key) != record.get(key):
            raise ValueError(
                f"{path} says {key}={record.get(key)!r:.60} where {file} was saved with {stored.get(key)!r:.60}; "
                "save or download it again"
            )
    return out, record


def _other_kind(path: Path) -> str | None:
    """What a record of this name says that it is of, where it is not one of :func:`write`."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None  # none, or damaged: :func:`read` says how
    kind = content.get("kind") if isinstance(content, dict) and "tensors" not in content else None
    return kind[:80] if isinstance(kind, str) else None


def _is_ours(file: str, name: str) -> bool:
    return re.fullmatch(re.escape(name) + r"-[0-9a-f]{16}\.safetensors", file, re.ASCII) is not None
