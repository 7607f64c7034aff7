"""A condensed data set to a Hub and back, as two people would: ``python -m dataopt.demo.publish push|pull``.

A process of its own, since huggingface_hub reads HF_ENDPOINT when it is imported.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import save_file

from ..core.condense import Condensed
from ..local_hub import Hub

REPO = "me/digits-condensed"


def there_and_back(folder: Path) -> tuple[Path, int]:
    """Push the data set in ``folder`` to a Hub on this machine, and pull it into an empty cache.

    Returns:
        A file with what was pulled, ``images`` and ``labels`` as stored; and how many bytes the repository has.
    """
    pulled = folder / "pulled.safetensors"
    with Hub() as hub:
        for action, where in (("push", folder), ("pull", pulled)):
            with tempfile.TemporaryDirectory() as home:
                _run(hub, action, where, home)
        return pulled, sum(map(len, hub.files(REPO, "dataset").values()))


def _run(hub: Hub, action: str, where: Path, home: str) -> None:
    command = [sys.executable, "-m", "dataopt.demo.publish", action, str(where)]
    done = subprocess.run(command, env=hub.environment(home), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")


def main(action: str, where: str) -> None:
    from ..integrations.hf import load_condensed, push_condensed

    if action == "push":
        push_condensed(Condensed.load(where), REPO, source="scikit-learn's digits")
    else:
        data = load_condensed(REPO, config="exact", decode=False)[:]
        save_file({"images": data["image"].contiguous(), "labels": data["label"]}, where)


if __name__ == "__main__":
    main(*sys.argv[1:])
