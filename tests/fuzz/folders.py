"""Valid artifacts, made once for each module, and copies of them to spoil."""

import shutil
import tempfile
from pathlib import Path

import pytest

from .artifacts import ARTIFACTS, plain


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """(name) to a folder with a valid artifact, and what its loader says."""
    made: dict[str, tuple[Path, object]] = {}

    def get(name: str) -> tuple[Path, object]:
        if name not in made:
            folder = tmp_path_factory.mktemp("valid")
            ARTIFACTS[name].make(folder)
            made[name] = folder, plain(ARTIFACTS[name].load(folder))
            assert plain(ARTIFACTS[name].load(folder)) == made[name][1]  # loading leaves it as it is
        return made[name]

    return get


@pytest.fixture
def copies(valid):
    """(name) to a copy of the valid folder, and what its loader says; the last copy goes when the next is made."""
    last = tempfile.mkdtemp(prefix="fuzz")

    def get(name: str) -> tuple[Path, object]:
        shutil.rmtree(last)
        source, before = valid(name)
        shutil.copytree(source, Path(last) / "folder")
        return Path(last) / "folder", before

    yield get
    shutil.rmtree(last, ignore_errors=True)
