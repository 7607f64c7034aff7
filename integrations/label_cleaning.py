"""Label cleaning while a model trains: snapshots, the table of issues, and what is done about them."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from dataopt.core.arguments import check_choice
from dataopt.core.artifacts import whole_file
from dataopt.core.relation import Issues, find_issues
from dataopt.core.relation.label_noise import MOST
from dataopt.core.tensor_file import load_tensors, save_tensors
from torch import Tensor, nn

from .cleanable import CleanableDataset, check_map_style
from .snapshots import Snapshot, epoch_folder, epochs_in, processes, run_classifier, take_snapshot

_logger = logging.getLogger(__name__)
ACTIONS = ("drop", "relabel", "reweight")
_TABLE, _DATA = "scores.parquet", "data.safetensors"


class LabelCleaner:
    """Looks at the training set after some epochs, writes what is wrong with it, and may act on it.

    Each time the model runs over all training rows in evaluation mode, in order, the processes sharing the rows; the
    training goes on as if nothing had happened. ``out_dir/epoch-0001`` and so on hold ``scores.parquet``, the table of
    :func:`dataopt.core.relation.find_issues` with an ``index`` column, and ``snapshot.safetensors`` for
    :func:`read_snapshots`; with an action ``data.safetensors``, the labels and weights from then on.

    Actions start from the given labels each time, so a later, better model takes back what an earlier one did; where a
    quarter of the labels or more are doubted, nothing is done. They need the training data wrapped in
    :class:`CleanableDataset`.

    Args:
        out_dir: folder for the results; one that holds snapshots already is refused, unless training is resumed.
        epochs: after which epochs: every so many, a list of them (the first is 1), or "last", the end of the training.
        action: None reports only. "drop" gives doubted rows the weight 0, "reweight" the probability that the model
            has for their given label, "relabel" the suggested label where the model's probability for it is above
            ``confidence``.
        start: act from this epoch on; None is half of the training.
        confidence: of "relabel", in [0, 1).
        dataset: the training rows as the model should see them here, in the same order, without augmentation; None
            reads the training data itself.
        head: name of the layer that makes the logits; None finds it.
        classes: number of classes; None asks the model.
        label_key, input_key: key or position of the labels and of the one input in a batch; None takes labels, label,
            label_ids or target of a dict and gives the model the others by name, and takes (inputs, labels) of a tuple.
        batch_size, num_workers: None are those of the training loader.
        half: write snapshots as float16.
        partitions: of the relation graph, for large data.
        device: where the relations are computed; None is where the model is.

    Attributes:
        issues: what the last look found; None before.

    Raises:
        TypeError, ValueError: an argument that the message names.
    """

    def __init__(
        self,
        out_dir: str | Path,
        epochs: int | list[int] | str = 1,
        action: str | None = None,
        start: int | None = None,
        confidence: float = 0.9,
        dataset: Any | None = None,
        head: str | None = None,
        classes: int | None = None,
        label_key: str | int | None = None,
        input_key: str | int | None = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
        half: bool = False,
        partitions: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        check_choice((None, *ACTIONS), action=action)
        self.every, self.listed = _schedule(epochs)
        if action is not None and epochs == "last":
            raise ValueError(f"action={action!r} with epochs='last' comes after the training; give a number or a list")
        if start is not None and start < 1:
            raise ValueError(f"start={start} must be at least 1, the end of the first epoch")
        if not 0 <= confidence < 1:
            raise ValueError(f"confidence={confidence} must lie in [0, 1)")
        for name, given in (("batch_size", batch_size), ("partitions", partitions)):
            if given is not None and given < 1:
                raise ValueError(f"{name}={given} must be at least 1")
        if dataset is not None:
            check_map_style(dataset, "dataset")
        self.out_dir, self.action, self.start, self.confidence = Path(out_dir), action, start, confidence
        self.dataset, self.head, self.classes = dataset, head, classes
        self.label_key, self.input_key = label_key, input_key
        self.batch_size, self.num_workers = batch_size, num_workers
        self.half, self.partitions, self.device = half, partitions, device
        self.issues: Issues | None = None
        self._train: Any = None

    def due(self, epoch: int) -> bool:
        """Whether there is a look after ``epoch`` finished epochs."""
        return epoch % self.every == 0 if self.every else epoch in self.listed

    def _begin(self, train: Any, fresh: bool, finished: int, epochs: int | None) -> None:
        """Check the training data; take up the labels and weights of a run that is resumed.

        Args:
            train: the data set behind the training loader.
            fresh: no step has been made.
            finished: epochs that were finished before.
            epochs: how many there will be.
        """
        check_map_style(train, "the training data")
        if self.action is not None and not isinstance(train, CleanableDataset):
            raise TypeError(
                f"action={self.action!r} changes the training data, which is a {type(train).__name__}; wrap it in "
                "CleanableDataset, or leave action out to get the report only"
            )
        if self.dataset is not None and len(self.dataset) != len(train):
            raise ValueError(
                f"dataset has {len(self.dataset)} rows and the training data {len(train)}; give the same rows in the "
                "same order"
            )
        if self.action is not None and self.start is None:
            if epochs is None:
                raise ValueError("start=None is half of the training, whose number of epochs is not known; give start=")
            self.start = max(1, epochs // 2)
        self._train = train
        there = epochs_in(self.out_dir) if processes()[0] == 0 else []
        if _from_first(bool(fresh and there)):
            raise ValueError(
                f"out_dir={str(self.out_dir)!r} holds the snapshots of another training; give another folder, or "
                "resume that training from its checkpoint"
            )
        if processes()[0] == 0:
            for epoch in there:
                if epoch > finished:  # the resumed training makes it again
                    shutil.rmtree(epoch_folder(self.out_dir, epoch))

    def _resume(self, finished: int, boundary: bool, look: Callable[[int], None]) -> None:
        """Put back the labels and weights that held at a checkpoint.

        Args:
            finished: epochs that were finished before it.
            boundary: it was written at the end of an epoch, and the model is as it was there.
            look: makes the snapshot of an epoch.
        """
        due = [epoch for epoch in range(1, finished + 1) if self.due(epoch)]
        if not due:
            return
        complete = _from_first([e for e in due if (epoch_folder(self.out_dir, e) / _TABLE).is_file()])
        again = boundary and due[-1] == finished and finished not in complete  # killed between checkpoint and look
        last = due[-1] if not again else complete[-1] if complete else 0
        if self.action is not None and last >= (self.start or 1):
            folder = epoch_folder(self.out_dir, last)
            if last not in complete:
                raise ValueError(
                    f"the training is resumed after epoch {finished}, and {str(folder)!r} is missing; give the out_dir "
                    "of the training that is resumed"
                )
            labels, weights = _from_first(_read_data(folder / _DATA) if processes()[0] == 0 else None)
            self._train.change(labels, weights)
        if again:
            look(finished)

    def _look(
        self,
        model: nn.Module,
        forward: Callable[[Callable[[Any], Any], Any], Any],
        epoch: int,
        loader: Any,
        batch_size: int | None,
        view: Any = None,
    ) -> None:
        """Take a snapshot, write and log what it shows, and act.

        Args:
            model: with its weights after ``epoch`` epochs.
            forward: moves a batch to the model and calls its first argument with it, in the host's precision.
            loader: the training loader.
            batch_size: where the loader does not tell.
            view: what to read; None is ``dataset``, or the training data.
        """
        view = view if view is not None else self.dataset if self.dataset is not None else self._train

        def run(batch: Any) -> Any:
            return run_classifier(model, batch, self.label_key, self.input_key)

        snapshot = take_snapshot(
            model,
            lambda batch: forward(run, batch),
            {
                "dataset": view,
                "batch_size": self.batch_size or batch_size or loader.batch_size or 32,
                "collate_fn": loader.collate_fn,
                "num_workers": loader.num_workers if self.num_workers is None else self.num_workers,
            },
            len(view),
            epoch=epoch,
            label_key=self.label_key,
            classes=self.classes,
            head=self.head,
        )
        if isinstance(self._train, CleanableDataset):
            snapshot = self._as_given(snapshot, view)
        device = self.device or next(model.parameters()).device
        self.issues = issues = find_issues(
            snapshot.features, snapshot.probs, snapshot.labels, partitions=self.partitions, device=device
        )
        labels, weights = None, None
        if self.action is not None and epoch >= (self.start or 1):
            labels, weights = self._act(issues, snapshot.probs, epoch)
        folder = epoch_folder(self.out_dir, epoch)
        if processes()[0] == 0:
            snapshot.save(folder, self.half)
            if labels is not None and weights is not None:
                _save_data(folder / _DATA, labels, weights)
            frame = issues.to_pandas()
            frame.insert(0, "index", range(len(frame)))
            with whole_file(folder / _TABLE) as temporary:  # last: where it is, the folder is complete
                frame.to_parquet(temporary, index=False)
            _logger.info(
                "Label cleaning, epoch %d: %s; %s", epoch, self._summary(issues, labels, weights), folder / _TABLE
            )

    def _act(self, issues: Issues, probs: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Change the training data, unless so many labels are doubted that the model must be what is wrong."""
        assert self.action is not None
        most = int(MOST * len(issues.given_label))  # what find_issues calls an issue, at most
        if int(issues.is_label_issue.sum()) >= most:
            _logger.warning(
                "Label cleaning, epoch %d: %d labels or more are doubted, a quarter of all: the model is not good "
                "enough yet, labels and weights stay as they were",
                epoch,
                most,
            )
            return self._train.labels.clone(), self._train.weights.clone()
        labels, weights = _from_first(decide(issues, probs, self.action, self.confidence))
        self._train.change(labels, weights)
        return labels, weights

    def _summary(self, issues: Issues, labels: Tensor | None, weights: Tensor | None) -> str:
        doubted, outliers, twins = (
            int(x.sum()) for x in (issues.is_label_issue, issues.is_outlier_issue, issues.is_near_duplicate_issue)
        )
        text = f"{doubted} of {len(issues.given_label)} labels doubted, {outliers} outliers, {twins} near-duplicates"
        if labels is None or weights is None:
            return text
        if self.action == "relabel":
            return f"{text}; {int((labels != issues.given_label).sum())} relabelled"
        return f"{text}; {int((weights < 1).sum())} {'dropped' if self.action == 'drop' else 'reweighted'}"

    def _as_given(self, snapshot: Snapshot, view: Any) -> Snapshot:
        """The snapshot with the labels as they came; a second view of the data must hold them too."""
        given = self._train.given
        other = (snapshot.labels != given).nonzero().squeeze(1)
        if view is not self._train and len(other):
            row = int(other[0])
            raise ValueError(
                f"dataset has the label {int(snapshot.labels[row])} in row {row} and the training data "
                f"{int(given[row])}; give the same rows in the same order"
            )
        return Snapshot(snapshot.epoch, snapshot.features, snapshot.probs, given.clone())


def decide(issues: Issues, probs: Tensor, action: str, confidence: float) -> tuple[Tensor, Tensor]:
    """Labels (n,) int64 and weights (n,) float32 after ``action``; see :class:`LabelCleaner`."""
    labels, weights = issues.given_label.clone(), torch.ones(len(issues.given_label))
    doubted = issues.is_label_issue
    if action == "drop":
        weights[doubted] = 0
    elif action == "reweight":
        weights[doubted] = probs[doubted, labels[doubted]].float()
    else:
        sure = probs.gather(1, issues.predicted_label[:, None]).squeeze(1) > confidence
        labels = torch.where(doubted & sure, issues.predicted_label, labels)
    return labels, weights


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on ``device``."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if hasattr(batch, "items"):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return [to_device(value, device) for value in batch]
    return batch


def _schedule(epochs: Any) -> tuple[int | None, frozenset[int]]:
    """Every so many epochs, or these."""
    if epochs == "last":
        return None, frozenset()
    if isinstance(epochs, int) and not isinstance(epochs, bool) and epochs > 0:
        return epochs, frozenset()
    numbers = isinstance(epochs, Sequence) and not isinstance(epochs, str) and len(epochs) > 0
    if numbers and all(isinstance(e, int) and e > 0 for e in epochs):
        return None, frozenset(epochs)
    raise ValueError(f"epochs={epochs!r} must be a positive number, a list of them, or 'last'")


def _save_data(path: Path, labels: Tensor, weights: Tensor) -> None:
    save_tensors(path, {"labels": labels, "weights": weights}, {})


def _read_data(path: Path) -> tuple[Tensor, Tensor]:
    try:
        data, _ = load_tensors(path)
    except ValueError as e:
        raise ValueError(
            f"{path} is missing or damaged ({e}); resume from an earlier checkpoint, or start again"
        ) from e
    return data["labels"], data["weights"]


def _from_first(value: Any) -> Any:
    """What the first process has, in all."""
    if processes()[1] == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]
