"""Training data whose labels and weights may change while a loader runs, and the loss that weights enter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from .heads import logits_of

LABEL_KEYS = ("labels", "label", "label_ids", "target")
WEIGHT, INDEX = "sample_weight", "index"


class CleanableDataset(Dataset):
    """A map-style data set with its labels and weights in shared memory, so that running loader workers see a change.

    A row that is a dict gets its current label, ``sample_weight`` (float) and ``index`` (int, the row number); a tuple
    (x, y, ...) becomes (x, label, ..., weight, index).

    Args:
        dataset: map-style, for instance a ``datasets.Dataset``, ``ImageFolder`` or ``TensorDataset``; dicts or tuples.
        label_key: key or position of the label in a row; None is the first of labels, label, label_ids, target, or
            position 1.
        labels: (n,) class ids as the rows hold them. None takes the column, or ``dataset.targets``, or reads each row.

    Attributes:
        given: (n,) int64, the labels as they came.
        labels: (n,) int64, current. weights: (n,) float32, current, at first 1.

    Raises:
        TypeError: no map-style data set, or labels that are no integers.
        ValueError: a label key that is not there, labels of another number, or a row whose own label is another.

    Examples:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from dataopt.integrations.cleanable import CleanableDataset
        >>> data = CleanableDataset(TensorDataset(torch.rand(3, 2), torch.tensor([0, 1, 1])))
        >>> data.change(labels=torch.tensor([0, 1, 0]), weights=torch.tensor([1.0, 0.0, 1.0]))
        >>> data[1][1:], data[2][1:]
        ((tensor(1), 0.0, 1), (tensor(0), 1.0, 2))
    """

    def __init__(self, dataset: Any, label_key: str | int | None = None, labels: Sequence[int] | Tensor | None = None):
        check_map_style(dataset, "dataset")
        self.dataset, self.label_key = dataset, label_key
        given = torch.as_tensor(self._read() if labels is None else labels)
        if given.is_floating_point() or given.dtype == torch.bool:
            raise TypeError(f"labels holds {given.dtype}; give integer class ids")
        if given.shape != (len(dataset),):
            raise ValueError(
                f"labels has the shape {tuple(given.shape)} for {len(dataset)} rows; give one class id a row"
            )
        self.given = given.long().clone().share_memory_()
        self.labels = given.long().clone().share_memory_()
        self.weights = torch.ones(len(dataset)).share_memory_()

    def __len__(self) -> int:
        return len(self.given)

    def __getitem__(self, index: int) -> Any:
        return self._row(range(len(self))[index], self.dataset[index])

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """Rows of a batch, read together where the data set can."""
        many = getattr(self.dataset, "__getitems__", None)
        rows = many(indices) if many else [self.dataset[i] for i in indices]
        return [self._row(i, row) for i, row in zip(indices, rows, strict=True)]

    def change(self, labels: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Set labels (n,) or weights (n,) of all rows; batches that are made from now on hold them.

        Raises:
            ValueError: another number of rows, or weights that are negative or not finite.
        """
        for name, new, kept in (("labels", labels, self.labels), ("weights", weights, self.weights)):
            if new is None:
                continue
            if new.shape != kept.shape:
                raise ValueError(f"{name} has the shape {tuple(new.shape)} for {len(self)} rows; give one value a row")
            if name == "weights" and not (new.isfinite() & (new >= 0)).all():
                raise ValueError("weights holds negative or non-finite values; give 0 to drop a row, 1 to keep it")
            kept.copy_(new)

    def refresh(self, batch: Any) -> None:
        """Write the current labels and weights into a batch that was made earlier, by its row numbers."""
        if isinstance(batch, Mapping):
            label, weight, index = batch[find_key(batch, self.label_key)], batch[WEIGHT], batch[INDEX]
        else:
            label, weight, index = batch[find_key(batch, self.label_key)], batch[-2], batch[-1]
        label.copy_(self.labels[index.cpu()])
        weight.copy_(self.weights[index.cpu()])

    def _read(self) -> Any:
        names = getattr(self.dataset, "column_names", None)
        if names is not None:
            key = find_key(dict.fromkeys(names), self.label_key)
            column = self.dataset.with_format("numpy")[key][:]
            if getattr(column, "dtype", None) is None or column.dtype.kind not in "iu":
                raise TypeError(f"column {key!r} holds no integers; make class ids of it: class_encode_column({key!r})")
            return column.astype("int64")
        targets = getattr(self.dataset, "targets", None)
        if targets is not None:
            return torch.as_tensor(targets)
        rows = (self.dataset[i] for i in tqdm(range(len(self.dataset)), desc="labels", unit="row", disable=None))
        return torch.tensor([_class_id(row[find_key(row, self.label_key)]) for row in rows])

    def _row(self, index: int, row: Any) -> Any:
        key = find_key(row, self.label_key)
        own = _class_id(row[key])
        if own != int(self.given[index]):
            raise ValueError(
                f"row {index} holds the label {own} and labels the {int(self.given[index])}; give labels= as "
                "the rows hold them"
            )
        new = int(self.labels[index])
        label = torch.full_like(row[key], new) if isinstance(row[key], Tensor) else type(row[key])(new)
        weight = float(self.weights[index])
        if isinstance(row, Mapping):
            for name in (WEIGHT, INDEX):
                if name in row:
                    raise ValueError(f"the rows hold {name!r} already; remove or rename it")
            return {**row, key: label, WEIGHT: weight, INDEX: index}
        values = list(row)
        values[key] = label
        return (*values, weight, index)


def weighted_loss(
    outputs: Any,
    labels: Tensor,
    weights: Tensor | None = None,
    num_items: Tensor | int | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy where each row counts by its weight: the sum of w_i l_i over the number of rows, dropped ones too.

    Args:
        outputs: logits (B, C), or what a classifier returns with them.
        labels: (B,) class ids. weights: (B,), or None for 1.
        num_items: rows of the whole step where gradients are accumulated; None is B.
        label_smoothing: as in ``torch.nn.functional.cross_entropy``.

    Raises:
        ValueError: weights of another shape.

    Examples:
        >>> import torch
        >>> from dataopt.integrations.cleanable import weighted_loss
        >>> logits, labels = torch.zeros(2, 4), torch.tensor([1, 3])
        >>> weighted_loss(logits, labels, torch.tensor([1.0, 0.0])) / weighted_loss(logits, labels)
        tensor(0.5000)
    """
    losses = nn.functional.cross_entropy(
        logits_of(outputs).float(), labels, reduction="none", label_smoothing=label_smoothing
    )
    if weights is not None:
        if weights.shape != losses.shape:
            raise ValueError(
                f"weights has the shape {tuple(weights.shape)} for {len(losses)} rows; give one value a row"
            )
        losses = losses * weights.to(losses)
    return losses.sum() / (len(losses) if num_items is None else num_items)


def check_map_style(dataset: Any, name: str) -> None:
    """Raise TypeError unless rows can be read by number."""
    iterable = isinstance(dataset, torch.utils.data.IterableDataset)
    if iterable or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise TypeError(
            f"{name} is a {type(dataset).__name__}, whose rows have no numbers; give a map-style data set, with len() "
            "and []"
        )


def find_key(row: Any, key: str | int | None) -> Any:
    """Where the label of a row or batch is: a key of a dict, a position of a tuple.

    Raises:
        ValueError: nothing is there, with what is.
    """
    if isinstance(row, Mapping):
        names = LABEL_KEYS if key is None else (key,)
        found = next((name for name in names if name in row), None)
        if found is None:
            raise ValueError(
                f"no label under {' or '.join(map(repr, names))} among {list(row)}; name it with label_key="
            )
        return found
    place = 1 if key is None else key
    if not isinstance(row, tuple | list) or not isinstance(place, int) or not -len(row) <= place < len(row):
        form = f"{type(row).__name__} of {len(row)}" if isinstance(row, tuple | list) else type(row).__name__
        raise ValueError(
            f"a row or batch is a {form}, without a label at {place!r}; give (x, y) or dicts, or label_key="
        )
    return place % len(row)


def _class_id(value: Any) -> int:
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 else value
    if isinstance(value, bool | float) or not hasattr(value, "__index__"):
        raise TypeError(f"a label is {value!r:.80} ({type(value).__name__}); give integer class ids")
    return int(value)
