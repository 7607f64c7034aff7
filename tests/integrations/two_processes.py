"""Label cleaning in two processes under both hosts; run as a program by test_two_processes.py.

The hosts train with a learning rate of 0, so that the look of one process and of two is at the same model.
"""

import os
import sys
from pathlib import Path

import torch
from dataopt.integrations import hf, lightning
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer

from .tiny import Perceptron, Sentences, arguments, tiny_bert, trainer


def with_transformers(out: Path, model: Path) -> torch.Tensor:
    """The weights after one epoch."""
    data = hf.CleanableDataset(Sentences())
    bert = tiny_bert()
    bert.load_state_dict(load_file(model / "bert.safetensors"))
    cleaning = hf.LabelCleaningCallback(out / "hf", action="drop", start=1, batch_size=5)
    Trainer(
        bert,
        arguments(out, num_train_epochs=1, learning_rate=0.0, remove_unused_columns=False),
        train_dataset=data,
        callbacks=[cleaning],
        compute_loss_func=cleaning.loss,
    ).train()
    return data.weights


def with_lightning(out: Path, model: Path, **more) -> torch.Tensor:
    """The weights after one epoch."""
    rows = load_file(model / "rows.safetensors")
    data = lightning.CleanableDataset(TensorDataset(rows["x"], rows["y"]))
    module = Perceptron(lr=0.0)
    module.load_state_dict(load_file(model / "perceptron.safetensors"))
    cleaning = lightning.LabelCleaningCallback(out / "lightning", action="drop", start=1, batch_size=50)
    trainer(out, cleaning, epochs=1, **more).fit(module, DataLoader(data, 16, shuffle=True))
    return data.weights


def work(rank: int, out: Path, model: Path, port: int) -> None:
    torch.set_num_threads(1)
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2"}
    os.environ.update(ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_WORLD_SIZE="2")
    weights = {"hf": with_transformers(out, model)}
    weights["lightning"] = with_lightning(out, model, devices=2, strategy="ddp")
    torch.save(weights, out / f"weights-{rank}.pt")


if __name__ == "__main__":
    # forked before any computation: the libraries are imported once
    torch.multiprocessing.start_processes(
        work, args=(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])), nprocs=2, start_method="fork"
    )
