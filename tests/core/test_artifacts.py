"""Files are written whole."""

import os

import pytest
from dataopt.core.artifacts import write_whole


def test_writes_text_and_bytes_and_makes_folders(tmp_path):
    path = tmp_path / "a" / "b.txt"
    write_whole(path, "grüße")
    assert path.read_bytes() == "grüße".encode()
    write_whole(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert os.listdir(path.parent) == ["b.txt"]
    plain = tmp_path / "plain"
    plain.touch()  # as open() makes files, whatever the umask
    assert path.stat().st_mode & 0o777 == plain.stat().st_mode & 0o777
    path.chmod(0o600)
    write_whole(path, "private")
    assert path.stat().st_mode & 0o777 == 0o600


def test_whoever_has_the_old_file_open_keeps_it_whole(tmp_path):
    path = tmp_path / "a"
    write_whole(path, "old" * 1000)
    with path.open() as reader:
        write_whole(path, "new")
        assert reader.read() == "old" * 1000
    assert path.read_text() == "new"


def test_a_failure_leaves_nothing_behind(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError):
        write_whole(tmp_path / "a", "text")  # a folder cannot be renamed over
    assert os.listdir(tmp_path) == ["a"]
