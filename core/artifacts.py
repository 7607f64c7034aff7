"""Files written whole: a reader sees the old content or the new one, never a half. And who may write them when."""

from __future__ import annotations

import errno
import glob
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nobody is kept out
    fcntl = None  # type: ignore[assignment]

_STALE = 24 * 3600.0  # seconds after which nobody is at work on a temporary file any more
_UMASK = os.umask(0o077)  # the only way to read it is to set it
os.umask(_UMASK)
_held: dict[tuple[int, int], int] = {}  # files that this process holds, and their handles


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to; after the block it is flushed to disk and renamed over ``path``.

    An error inside the block leaves ``path`` as it was. Several processes may write the same path; the last one to
    finish stays. Missing folders are made.

    Raises:
        OSError: a full disk, a folder that cannot be written to; it names ``path``.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        os.close(handle)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(_mode(path))  # mkstemp's files are for their owner alone
        temporary.replace(path)
    except BaseException as e:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()
        number = _errno(e, path, temporary)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from e


def _mode(path: Path) -> int:
    """Permissions of the file that is replaced, or of a new one as open() would make it."""
    try:
        return path.stat().st_mode & 0o777
    except OSError:
        return 0o666 & ~_UMASK


def _sweep(path: Path) -> None:
    """Remove what killed processes have left of this file."""
    for old in path.parent.glob(f".{glob.escape(path.name)}.????????"):  # as mkstemp names them
        with suppress(OSError):
            if time.time() - old.stat().st_mtime > _STALE:
                old.unlink()


def _errno(e: BaseException, path: Path, temporary: Path | None) -> int | None:
    """What the system said about the file that is written; None for errors of any other kind."""
    if isinstance(e, FileExistsError) and temporary is None:
        return errno.ENOTDIR  # of mkdir: a folder on the way is a file
    if isinstance(e, OSError):
        ours = e.filename is None or temporary is None or str(e.filename) == str(temporary)
        return e.errno if ours else None
    said = re.search(r"\(os error (\d+)\)", str(e))  # libraries in Rust have errors of their own, as safetensors
    return int(said[1]) if said and isinstance(e, Exception) else None


@contextmanager
def alone_in(folder: Path) -> Iterator[bool]:
    """Wait until no other process or thread is inside such a block of the same folder, which is made if it is missing.

    A kill ends the block, and nothing is left behind. False where the system has no such locks.
    """
    handle, locked = None, False
    with suppress(OSError):  # a folder that cannot be made is for the first file in it to complain about
        folder.mkdir(parents=True, exist_ok=True)
        if fcntl is not None:
            handle = os.open(folder, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX)
            locked = True
    try:
        yield locked
    finally:
        if handle is not None:
            os.close(handle)


def hold(path: Path) -> bool:
    """Keep a file until this process ends, also by a kill; False where another process holds it."""
    if fcntl is None:
        return True
    handle = os.open(path, os.O_RDONLY)
    about = os.fstat(handle)
    key = about.st_dev, about.st_ino
    try:
        if key not in _held:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _held[key] = handle
    except BlockingIOError:
        return False
    except OSError:  # no locks on this file system
        return True
    finally:
        if _held.get(key) != handle:
            os.close(handle)
    return True


def _let_go() -> None:
    """A child would hold it beyond its parent, as workers that load data do for some seconds."""
    for handle in _held.values():
        with suppress(OSError):
            os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def write_whole(path: Path, content: bytes | str) -> None:
    """Write bytes, or text as UTF-8, through :func:`whole_file`."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def member(folder: Path, name: str) -> Path:
    """A file of the folder, checked to lie in it; in the Hub's own cache it may lie among the repository's blobs.

    Args:
        name: may begin with folders inside, ``"a/b.json"``.

    Raises:
        ValueError: it is missing, no plain file, or a link that leads elsewhere.
    """
    root = folder.resolve()
    path, home = folder / name, (root / name).parent
    if not os.path.lexists(path):
        raise ValueError(f"{path} is missing; the folder holds no complete save: save or download it again")
    real = path.resolve()
    homes = [home, *([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else ())]
    if real.parent not in homes:
        raise ValueError(f"{path} is a link to {real}, outside its folder; put the file itself there")
    if not real.is_file():
        raise ValueError(f"{path} is no file; save or download it again")
    return path
