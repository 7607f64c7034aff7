"""Mixing in two processes under both hosts, and the condensed data module; run as a program by test_mixing.py."""

import os
import sys
from pathlib import Path

import pytest
import torch
from dataopt.integrations.hf import mixup_trainer
from dataopt.integrations.lightning import CoMixupCallback, CondensedDataModule

from .hf.test_mixup import Images, arguments, tiny_vit
from .lightning import test_condensed
from .lightning.test_mixup import CLASSES, Net, fit


def with_lightning(out: Path) -> dict[str, torch.Tensor]:
    settings = dict(devices=2, strategy="ddp", accumulate_grad_batches=2, precision="bf16-mixed")
    module = fit(out, CoMixupCallback(CLASSES, clean_weight=1.0), Net(), rows=32, batch=4, **settings)
    return {name: value.detach() for name, value in module.named_parameters()}


def with_transformers(out: Path) -> dict[str, torch.Tensor]:
    model = tiny_vit()
    args = arguments(out, per_device_train_batch_size=4, gradient_accumulation_steps=2, bf16=True)
    mixup_trainer("puzzle")(model, args, train_dataset=Images(32), mixup={"clean_weight": 1.0}).train()
    with pytest.raises(ValueError, match="FSDP splits the model"):
        mixup_trainer("puzzle")(tiny_vit(), arguments(out, fsdp="full_shard"), train_dataset=Images())
    return {name: value.detach() for name, value in model.named_parameters()}


def with_condensed(out: Path) -> dict[str, list]:
    """What this process trained on in an epoch, step by step, plain and augmented."""
    seen = {}
    for augment in (False, True):
        data = CondensedDataModule(str(out / "set"), batch_size=4, config="exact", seed=5, augment=augment)
        net = test_condensed.fit(out, data, net=test_condensed.Net(), devices=2, strategy="ddp")
        seen["augmented" if augment else "plain"] = net.seen
    return seen


def work(rank: int, out: Path, port: int) -> None:
    torch.set_num_threads(1)
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2"}
    os.environ.update(ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_WORLD_SIZE="2")
    found = {"hf": with_transformers(out), "lightning": with_lightning(out), "condensed": with_condensed(out)}
    torch.save(found, out / f"{rank}.pt")


if __name__ == "__main__":
    # forked before any computation: the libraries are imported once
    torch.multiprocessing.start_processes(
        work, args=(Path(sys.argv[1]), int(sys.argv[2])), nprocs=2, start_method="fork"
    )
