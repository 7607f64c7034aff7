"""What a model says about every row of a data set at one moment of its training: one pass, kept in a file."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from dataopt.core.relation import RelationGraph
from dataopt.core.tensor_file import load_tensors, save_tensors
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from .cleanable import INDEX, WEIGHT, find_key
from .heads import Tap

_FILE = "snapshot.safetensors"
_MARK = {"kind": "dataopt-snapshot", "format_version": "1"}


@dataclass(frozen=True)
class Snapshot:
    """Features and predictions of all rows, row i of the data set in row i.

    Attributes:
        epoch: finished epochs.
        features: (n, d). probs: (n, C). Floating.
        labels: (n,) int64, as given.
    """

    epoch: int
    features: Tensor
    probs: Tensor
    labels: Tensor

    def save(self, folder: Path, half: bool = False) -> None:
        """Write ``snapshot.safetensors``; features and probabilities as float16 with ``half``."""
        dtype = torch.float16 if half else torch.float32
        tensors = {"features": self.features.to(dtype), "probs": self.probs.to(dtype), "labels": self.labels}
        save_tensors(folder / _FILE, tensors, {**_MARK, "epoch": str(self.epoch)})

    def graph(self, **settings: Any) -> RelationGraph:
        """The relation graph at this moment; ``settings`` for :class:`RelationGraph`."""
        return RelationGraph(self.features.float(), self.probs.float(), self.labels, **settings)


def processes() -> tuple[int, int]:
    """This process' rank and the number of processes; 0 and 1 without ``torch.distributed``."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def epoch_folder(out_dir: Path, epoch: int) -> Path:
    return out_dir / f"epoch-{epoch:04d}"


def epochs_in(out_dir: Path) -> list[int]:
    """Numbers of the epochs that have a folder, in order."""
    names = (path.name.removeprefix("epoch-") for path in out_dir.glob("epoch-*") if path.is_dir())
    return sorted(int(name) for name in names if name.isdigit())


def read_snapshots(out_dir: str | Path) -> Iterator[Snapshot]:
    """The snapshots that a label cleaning callback wrote, in the order of training, one in memory at a time.

    They feed the temporal ensemble and the relation map::

        ensemble = average_scores(s.graph().label_noise().noisiness for s in read_snapshots(out_dir))
        spread = relation_map((s.graph() for s in read_snapshots(out_dir)), i)

    Raises:
        ValueError: no snapshot there, or a file that is damaged or none of ours.
    """
    found = [epoch_folder(Path(out_dir), epoch) / _FILE for epoch in epochs_in(Path(out_dir))]
    if not found:
        raise ValueError(f"out_dir={str(out_dir)!r} holds no snapshots; give the folder of a label cleaning callback")
    for path in found:
        try:
            tensors, mark = load_tensors(path)
        except ValueError as e:
            raise ValueError(f"{path} is missing or damaged ({e}); make the snapshot again") from e
        if {key: mark.get(key) for key in _MARK} != _MARK:
            raise ValueError(f"{path} is no snapshot that this dataopt reads; make it again")
        yield Snapshot(int(mark["epoch"]), *(tensors[x] for x in ("features", "probs", "labels")))


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards training flags and random states are what they were."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {x.device for x in model.parameters() if x.device.type == "cuda"}
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices), torch.no_grad():
        try:
            model.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training
            random.setstate(states[0])
            np.random.set_state(states[1])


def run_classifier(model: nn.Module, batch: Any, label_key: str | int | None, input_key: str | int | None) -> Any:
    """What the model returns for the inputs of a batch: its dict without label, weight and index, or its first part."""
    if input_key is not None:
        return model(batch[input_key])
    if isinstance(batch, Mapping):
        hidden = {find_key(batch, label_key), WEIGHT, INDEX}
        return model(**{key: value for key, value in batch.items() if key not in hidden})
    return model(batch[0])


def take_snapshot(
    model: nn.Module,
    forward: Callable[[Any], Any],
    loader: Mapping[str, Any],
    rows: int,
    *,
    epoch: int,
    label_key: str | int | None = None,
    classes: int | None = None,
    head: str | None = None,
) -> Snapshot:
    """Run the model once over all rows, in order, each process a part of them.

    Args:
        model: holds the head; run through ``forward``, in evaluation mode.
        forward: batch to the model's output.
        loader: for ``DataLoader``: dataset, batch_size, collate_fn, num_workers.
        rows: n.
        label_key: where the batch has its labels (B,).
        classes, head: for :class:`Tap`.

    Returns:
        The same in every process.

    Raises:
        TypeError, ValueError: labels that are no class ids, a batch of another size than its rows, or as :class:`Tap`.
    """
    rank, world = processes()
    share = -(-rows // world)
    mine = torch.arange(rank * share, (rank + 1) * share)
    mine[mine >= rows] = -1  # padding, for all processes meet in every batch; the last row is read and forgotten
    parts = mine.split(loader["batch_size"])
    batches = DataLoader(
        loader["dataset"],
        batch_sampler=[part.where(part >= 0, torch.tensor(rows - 1)).tolist() for part in parts],
        collate_fn=loader["collate_fn"],
        num_workers=loader["num_workers"],
        generator=torch.Generator().manual_seed(0),
    )
    found: list[Tensor] = []
    labels = torch.empty(rows, dtype=torch.int64)
    bar = tqdm(
        zip(parts, batches, strict=True), "label cleaning", len(parts), unit="batch", disable=True if rank else None
    )
    with undisturbed(model), Tap(model, classes, head) as tap:
        for part, batch in bar:
            given = _labels(batch, label_key, len(part))
            values = [x.contiguous() for x in tap.read(forward(batch))]
            if len(values[0]) != len(part):
                raise ValueError(
                    f"the batch of {len(part)} rows came back as {len(values[0])}; one row in, one row out"
                )
            if not found:
                found = [torch.empty(rows, x.shape[1]) for x in values]
            place = torch.stack([part, given.cpu()], 1).to(values[0].device)
            for at, *gathered in zip(*(_gather(x, world) for x in (place, *values)), strict=True):
                index, given = at.cpu().T
                kept = index >= 0
                labels[index[kept]] = given[kept]
                for whole, x in zip(found, gathered, strict=True):
                    whole[index[kept]] = x.cpu()[kept]
    return Snapshot(epoch, found[0], found[1], labels)


def _labels(batch: Any, key: str | int | None, count: int) -> Tensor:
    label = batch[find_key(batch, key)]
    if not isinstance(label, Tensor) or label.shape != (count,) or label.is_floating_point():
        what = f"{label.dtype} of shape {tuple(label.shape)}" if isinstance(label, Tensor) else type(label).__name__
        raise TypeError(f"labels of a batch are {what}; give class ids of shape ({count},), one a row")
    return label.long()


def _gather(x: Tensor, world: int) -> list[Tensor]:
    if world == 1:
        return [x]
    out = [torch.empty_like(x) for _ in range(world)]
    dist.all_gather(out, x)
    return out
