"""The fixture `hub` and the helper that runs a client against it. A conftest imports the fixture by name."""

import os
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
    # What the tester has set for the real Hub must not leak in, and neither may a proxy.
    dropped = ("HF_", "HUGGING", "TRANSFORMERS_", "DATASETS_", "XDG_CACHE_HOME")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    with tempfile.TemporaryDirectory() as home:
        given: dict[str, str | None] = {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": hub.token,
            "HF_HOME": home,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1" if hub.lfs else None,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "*",
            **env,
        }
        variables = {name: value for name, value in {**clean, **given}.items() if value is not None}
        command = [sys.executable, "-c", textwrap.dedent(code)]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        raise RuntimeError(f"the client failed with exit status {done.returncode}:\n{done.stderr}")
    return done.stdout
