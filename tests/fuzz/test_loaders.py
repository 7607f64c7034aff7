"""Every loader on files that were cut, changed or linked elsewhere: the answer that it gave before, or one sentence."""

import json
import struct
from fnmatch import fnmatch
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from .artifacts import ARTIFACTS, Artifact, plain
from .budget import tries
from .folders import copies, valid

__all__ = ["copies", "valid"]  # fixtures
DEEP = b"[" * 100_000
HOSTILE = {
    "nothing": b"",
    "zeros": bytes(4096),
    "a header of 2^63 bytes": struct.pack("<Q", 1 << 63) + b"{}",
    "a header of 90 million bytes": struct.pack("<Q", 90_000_000) + b"{}",
    "a header that is nested": struct.pack("<Q", len(DEEP)) + DEEP,
    "a tensor of negative size": b"",
    "nested lists": DEEP,
    "nested objects": b'{"record":' * 100_000,
    "a list": b"[]",
    "a number": b"NaN",
    "a huge number": b"9" * 10_000,
    "a text": b'"text"',
    "no UTF-8": b'{"kind": "\xff\xfe"}',
    "empty parquet": b"PAR1" + bytes(4) + b"PAR1",
    "huge parquet footer": b"PAR1" + b"\xff" * 64 + struct.pack("<I", 1 << 31) + b"PAR1",
    "a short database": b"SQLite format 3\x00" + bytes(84),
}


def _header(entry: dict) -> bytes:
    text = json.dumps({"keys": entry}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(16)


HOSTILE |= {
    "a tensor of negative size": _header({"dtype": "F32", "shape": [-1, 4], "data_offsets": [0, 16]}),
    "a tensor that overlaps": _header({"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [8, 1 << 60]}),
    "a tensor of no type": _header({"dtype": "F3", "shape": [4], "data_offsets": [0, 16]}),
}


def files_of(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def check(artifact: Artifact, folder: Path, changed: str, before: object) -> None:
    """The property: the same answer, or a ValueError that names the file, its folder or what stood in it."""
    try:
        after = plain(artifact.load(folder))
    except (ValueError, *artifact.missing) as e:
        parts = [Path(changed).name, str(folder), folder.name]
        assert any(part in str(e) for part in parts) and len(str(e)) > 20, f"{type(e).__name__}: {e}"
        return
    if not any(fnmatch(Path(changed).name, pattern) for pattern in artifact.unsigned):
        assert after == before, "a changed file was loaded as something else"


@pytest.mark.parametrize("name", ARTIFACTS)
@tries(16)
@given(data=st.data())
def test_cut_and_flipped(name, copies, data):
    folder, before = copies(name)
    file = data.draw(st.sampled_from(files_of(folder)), "file")
    content = bytearray((folder / file).read_bytes())
    if data.draw(st.booleans(), "cut") or not content:
        content = content[: data.draw(st.integers(0, max(len(content) - 1, 0)), "length")]
    else:
        for _ in range(data.draw(st.integers(1, 3), "flips")):
            place = data.draw(st.integers(0, len(content) - 1), "place")
            content[place] ^= 1 << data.draw(st.integers(0, 7), "bit")
    (folder / file).write_bytes(content)
    check(ARTIFACTS[name], folder, file, before)


@pytest.mark.parametrize("name", ARTIFACTS)
@tries(12)
@given(data=st.data())
def test_hostile_content(name, copies, data):
    folder, before = copies(name)
    file = data.draw(st.sampled_from(files_of(folder)), "file")
    what = data.draw(st.sampled_from(sorted(HOSTILE)), "content")
    (folder / file).write_bytes(HOSTILE[what])
    check(ARTIFACTS[name], folder, file, before)


@pytest.mark.parametrize("name", ARTIFACTS)
def test_missing_files_and_folders_in_their_place(name, copies):
    artifact = ARTIFACTS[name]
    for file in files_of(copies(name)[0]):
        folder, before = copies(name)
        (folder / file).unlink()
        if any(fnmatch(Path(file).name, pattern) for pattern in artifact.optional):
            artifact.load(folder)  # begins anew
        else:
            check(artifact, folder, file, before)
        folder, before = copies(name)
        (folder / file).unlink()
        (folder / file).mkdir()
        check(artifact, folder, file, before)


@pytest.mark.parametrize("name", [n for n, a in ARTIFACTS.items() if a.shared])
def test_nothing_outside_the_folder_is_read(name, copies):
    """A link to the very same content elsewhere: loading it would succeed."""
    artifact = ARTIFACTS[name]
    for file in files_of(copies(name)[0]):
        folder, before = copies(name)
        outside = folder.parent / "outside"
        outside.mkdir()
        (folder / file).rename(outside / "secret")
        (folder / file).symlink_to(outside / "secret")
        try:
            artifact.load(folder)
        except ValueError as e:
            assert "outside its folder" in str(e), e
        else:
            (outside / "secret").unlink()  # what is not read need not be there
            assert plain(artifact.load(folder)) == before, f"{file} was read through a link"
