"""The fixture `hub` and the helper that runs a client against it. A conftest imports the fixture by name."""

import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator

import pytest
from dataopt.local_hub import Hub


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        yield server


def run_client(hub: Hub, code: str, **env: str | None) -> str:
    """Run a Python snippet as a client of `hub`, signed in as `me`, and return what it printed.

    It is a process of its own because huggingface_hub reads HF_ENDPOINT when imported. Its cache (HF_HOME) is a new
    empty folder unless `env` gives one; HF_TOKEN=None signs out, and other None values unset a variable too.

    Raises
    ------
    RuntimeError
        If the snippet fails; the message is its standard error.
    """
    with tempfile.TemporaryDirectory() as home:
        given: dict[str, str | None] = {**hub.environment(home), **env}
        variables = {name: value for name, value in given.items() if value is not None}
        command = [sys.executable, "-c", textwrap.dedent(code)]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        raise RuntimeError(f"the client failed with exit status {done.returncode}:\n{done.stderr}")
    return done.stdout
