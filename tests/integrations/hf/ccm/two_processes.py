"""CCM training in two processes; run as a program by test_two_processes.py."""

import os
import sys
from pathlib import Path

import torch
from dataopt.integrations.hf import CCMTrainer

from .test_trainer import arguments, ccm, dataset, trained


def train(folder: Path, batch: int) -> dict[str, torch.Tensor]:
    """Two steps of eight rows, with merging and the divergence from the full context."""
    model = ccm(mode="merge", comp_tokens=1, lora_dropout=0.0)
    for name, weight in model.named_parameters():
        weight.requires_grad_("lora_" in name or "trainable_tokens" in name)
    args = arguments(folder, per_device_train_batch_size=batch, max_steps=2, optim="sgd", learning_rate=0.1)
    CCMTrainer(model, args, train_dataset=dataset(model, 16), distill=0.5).train()
    return trained(model)


def work(rank: int, folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ.update(ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_WORLD_SIZE="2")
    torch.save(train(folder, 4), folder / f"weights-{rank}.pt")


if __name__ == "__main__":
    torch.multiprocessing.start_processes(
        work, args=(Path(sys.argv[1]), int(sys.argv[2])), nprocs=2, start_method="fork"
    )
