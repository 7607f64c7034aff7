"""Label cleaning in two processes finds and does what it finds and does in one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pandas as pd
import torch
from dataopt.integrations.snapshots import read_snapshots
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer

from .tiny import FLIPPED, Perceptron, Sentences, arguments, tiny_bert, trainer
from .two_processes import with_lightning, with_transformers


def trained(folder: Path) -> None:
    """Models that know something, and the digits with some wrong labels."""
    bert = tiny_bert()
    Trainer(bert, arguments(folder, num_train_epochs=9), train_dataset=Sentences()).train()
    save_file(bert.state_dict(), folder / "bert.safetensors")
    x, y = (torch.from_numpy(a)[:301] for a in load_digits(return_X_y=True))
    x = x.float() / 16
    module = Perceptron()
    trainer(folder, epochs=15).fit(module, DataLoader(TensorDataset(x, y), 16, shuffle=True))
    y[::20] = (y[::20] + 1) % 10
    save_file({"x": x, "y": y}, folder / "rows.safetensors")
    save_file(module.state_dict(), folder / "perceptron.safetensors")


def test_two_processes_are_as_one(tmp_path):
    model, one, two = (tmp_path / name for name in ("model", "one", "two"))
    for folder in (model, one, two):
        folder.mkdir()
    trained(model)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "tests.integrations.two_processes", two, model, str(port)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=Path(__file__).parents[2], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as program:
        weights = {"hf": with_transformers(one, model), "lightning": with_lightning(one, model)}
        output = program.communicate(timeout=200)[0]
    assert program.returncode == 0, output[-5000:]

    ranks = [torch.load(two / f"weights-{rank}.pt") for rank in range(2)]
    for host, dropped in (("hf", FLIPPED), ("lightning", range(0, 301, 20))):
        (mine,), (theirs,) = (list(read_snapshots(folder / host)) for folder in (one, two))
        torch.testing.assert_close(mine.features, theirs.features, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(mine.probs, theirs.probs, rtol=1e-5, atol=1e-6)
        assert torch.equal(mine.labels, theirs.labels)
        tables = [pd.read_parquet(folder / host / "epoch-0001" / "scores.parquet") for folder in (one, two)]
        pd.testing.assert_frame_equal(*tables, rtol=1e-4, atol=1e-6)
        zero = (weights[host] == 0).nonzero().squeeze(1).tolist()
        assert len(set(zero) & set(dropped)) >= 0.6 * len(dropped) and len(zero) < 0.2 * len(mine.labels)
        assert all(torch.equal(weights[host], rank[host]) for rank in ranks)
