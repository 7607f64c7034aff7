"""Generated image folders, and runs of ``dataopt train`` in this process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from dataopt.integrations.timm.task import MixTask
from dataopt.integrations.timm.train import main
from PIL import Image

CLASSES = 4
LIKE_TIMM = Path(__file__).with_name("like_timm.py")


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ with 16 and validation/ with 8 PNGs of 32 x 32 in four classes: a bright band each, on noise."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, n in (("train", 4), ("validation", 2)):
        for c in range(CLASSES):
            folder = root / split / f"class{c}"
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 128, (32, 32, 3), dtype=np.uint8)
                pixels[8 * c : 8 * c + 8, :, c % 3] = 255
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture
def base_flags(image_folder: Path, tmp_path: Path) -> list[str]:
    """A run of one short epoch of two batches, on the CPU, in this process."""
    options = {
        "--data-dir": image_folder,
        "--model": "test_resnet",
        "--num-classes": CLASSES,
        "--img-size": 32,
        "--batch-size": 8,
        "--epochs": 1,
        "--warmup-epochs": 0,
        "--lr": 0.05,
        "--device": "cpu",
        "--workers": 0,
        "--output": tmp_path / "out",
    }
    return [str(part) for option in options.items() for part in option]


Train = Callable[..., Path]


def _runner(base: list[str], tmp_path: Path) -> Train:
    def run(*more: object, experiment: str = "run") -> Path:
        try:
            main([*base, "--experiment", experiment, *map(str, more)])
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
        return tmp_path / "out" / experiment

    return run


@pytest.fixture
def train(base_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """``dataopt train`` with our loop: run(*flags, experiment="run") gives the experiment's folder."""
    monkeypatch.delenv("TIMM_TRAIN_SCRIPT", raising=False)
    monkeypatch.chdir(tmp_path)
    return _runner(base_flags, tmp_path)


@pytest.fixture
def train_script(base_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """``dataopt train`` with timm's own ``train.py``."""
    monkeypatch.chdir(tmp_path)
    return _runner(base_flags, tmp_path)


@pytest.fixture
def like_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Run the script that is like timm's; gives its output folder."""
    monkeypatch.delenv("TIMM_TRAIN_SCRIPT", raising=False)
    monkeypatch.chdir(tmp_path)

    def run(*flags: object, out: str = "out") -> Path:
        (tmp_path / out).mkdir(exist_ok=True)
        main(["--train-script", str(LIKE_TIMM), "--output", str(tmp_path / out), *map(str, flags)])
        return tmp_path / out

    return run


needs_script = pytest.mark.skipif(
    not os.environ.get("TIMM_TRAIN_SCRIPT"),
    reason="timm's train.py is in no wheel: set TIMM_TRAIN_SCRIPT to its path to run this",
)


@pytest.fixture
def steps() -> Iterator[list[dict[str, Any]]]:
    """What every task of ours returned while the test ran, with ``mixing`` and ``epoch`` added."""
    seen: list[dict[str, Any]] = []

    def watch(module: torch.nn.Module, inputs: Any, result: Any) -> None:
        if isinstance(module, MixTask):
            seen.append({**result, "task": module, "epoch": module.epoch, "input": inputs[0], "label": inputs[1]})

    handle = torch.nn.modules.module.register_module_forward_hook(watch)
    yield seen
    handle.remove()


def two_processes(folder: Path, *runs: list[str]) -> list[list[dict[str, Any]]]:
    """``dataopt train`` once per run, under one torchrun with 2 processes: per run and rank, what it recorded."""
    arguments = [str(folder / "rank"), *runs[0]]
    for run in runs[1:]:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            arguments += ["++", str(s.getsockname()[1]), *run]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launch, str(Path(__file__).with_name("record_run.py")), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    return [[torch.load(folder / f"rank.{i}.{rank}") for rank in (0, 1)] for i in range(len(runs))]


def alike(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def weights(folder: Path, name: str = "last", key: str = "state_dict") -> dict[str, torch.Tensor]:
    """The model's tensors in one of timm's checkpoints."""
    return torch.load(folder / f"{name}.pth.tar", map_location="cpu", weights_only=False)[key]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
