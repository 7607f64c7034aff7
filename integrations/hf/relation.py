"""Relation scores as columns of a ``datasets.Dataset``, and the data set without what they found."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from dataopt.core.arguments import check_choice
from dataopt.core.relation import Issues, find_issues
from datasets import ClassLabel, Dataset, Features, Value, concatenate_datasets
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import nn

from .features import model_names, model_outputs, outputs_key
from .inputs import check_dataset, find_inputs, read_labels
from .scores import TYPES, as_table, check_rows

if TYPE_CHECKING:
    import pandas as pd

_logger = logging.getLogger(__name__)
_KINDS = ("label", "outlier", "near_duplicate")


def add_relation_scores(
    dataset: Dataset,
    model: nn.Module,
    *,
    processor: Any = None,
    transform: Callable[[Any], Any] | None = None,
    input_column: str | Sequence[str] | None = None,
    label_column: str = "label",
    batch_size: int = 32,
    head: str | None = None,
    probs: str = "model",
    device: torch.device | str | None = None,
    top: int = 8,
    out_dir: str | Path | None = None,
    progress: bool | None = None,
) -> Dataset:
    """Add what may be wrong with each row: label errors, outliers and near-duplicates, with the reasons.

    Computed inside ``Dataset.map`` and cached by it: the same data, weights and settings are read back. A format or
    transform that was set on ``dataset`` is not carried over; set it on the result.

    Args:
        dataset, model, processor, transform, input_column, label_column, batch_size, head, probs, device, progress: as
            in :func:`model_outputs`.
        top: conflicts to keep for a suspect.
        out_dir: folder that keeps the model's outputs and the sums over pairs; a killed run goes on there.

    Returns:
        ``dataset`` with the columns of :class:`dataopt.core.relation.Issues`, and ``conflicts``: for label issues and
        outliers the strongest conflicting rows, as ``{"row", "value"}``, value r(i, j) < 0, strongest first; empty for
        other rows.

    Raises:
        TypeError, ValueError: as :func:`model_outputs` and :func:`dataopt.core.relation.find_issues`; a column that is
            already there; or a transform without a stable ``repr``.

    References:
        Thesis sections 5.3.1 to 5.3.4.
    """
    check_dataset(dataset)
    if there := [name for name in (*TYPES, "conflicts") if name in dataset.column_names]:
        raise ValueError(f"the columns {there} are already there; remove_columns({there}) first")
    _, names = read_labels(dataset, label_column)
    inputs = find_inputs(dataset, model, input_column, processor, transform)
    made_by = [model_names(model), importlib.metadata.version("dataopt")]
    settings = [outputs_key(dataset, model, inputs, batch_size, head), label_column, probs, top, *made_by]

    found: list[tuple[pd.DataFrame, dict[int, list[dict[str, Any]]]]] = []

    def scores(batch: dict[str, Any], rows: list[int]) -> dict[str, Any]:
        if not found:  # the whole data set at once, and only where the cache has nothing
            outputs = model_outputs(
                dataset, model, processor=processor, transform=transform, input_column=input_column,
                label_column=label_column, batch_size=batch_size, head=head, probs=probs, device=device,
                out_dir=out_dir, progress=progress,
            )  # fmt: skip
            resume = None if out_dir is None else Path(out_dir) / f"sums-{probs}"
            issues = find_issues(
                outputs.features, outputs.probs, outputs.labels,
                top=top, device=device, resume=resume, progress=progress,
            )  # fmt: skip
            found.append((issues.to_pandas(), _conflicts(issues)))
        table, conflicts = found[0]
        made: dict[str, Any] = {name: table[name].to_numpy()[rows] for name in TYPES}
        return {**made, "conflicts": [conflicts.get(row, []) for row in rows]}

    label = Value("int64") if names is None else ClassLabel(names=list(names))
    features = {name: Value(kind) for name, kind in TYPES.items()}
    features |= {"given_label": label, "predicted_label": label}
    plain = dataset.with_format(None)
    added = plain.select_columns([label_column]).map(
        scores,
        batched=True,
        with_indices=True,
        remove_columns=[label_column],
        features=Features({**features, "conflicts": [{"row": Value("int64"), "value": Value("float32")}]}),
        # ours, because datasets would pickle the model to hash it
        new_fingerprint=hashlib.blake2b(json.dumps(settings).encode(), digest_size=16).hexdigest(),
        desc="relation scores",
    )
    return concatenate_datasets([plain, added], axis=1)


def _conflicts(issues: Issues) -> dict[int, list[dict[str, Any]]]:
    rows = zip(
        issues.suspects.tolist(),
        issues.relations.conflicting.tolist(),
        issues.relations.conflicting_values.tolist(),
        strict=True,
    )
    return {
        suspect: [{"row": j, "value": v} for j, v in zip(others, values, strict=True) if j >= 0]
        for suspect, others, values in rows
    }


def clean_dataset(
    dataset: Dataset,
    scores: Any = None,
    action: str = "drop",
    *,
    label_column: str = "label",
    issues: Sequence[str] = ("label",),
    min_score: float | None = None,
) -> Dataset:
    """The data set without the rows, or with other labels for the rows, that scores call an issue.

    Args:
        dataset: one split, as it was scored.
        scores: a table of one row for each row of ``dataset``: an :class:`Issues`, a DataFrame, the path of a parquet
            file, a folder with saved scores, or a data set; None takes the columns of ``dataset`` itself. A column
            ``index`` gives the row numbers where the order differs.
        action: ``"drop"``, or ``"relabel"``, which gives label issues their ``predicted_label``. Outliers and
            near-duplicates are dropped either way.
        label_column: class ids, a ``ClassLabel`` (it stays one), or class names.
        issues: any of ``"label"``, ``"outlier"``, ``"near_duplicate"``. Of near-duplicates the first stays that has no
            other issue.
        min_score: instead of the flags ``is_..._issue``: a row is an issue where its ``..._score`` lies below.

    Raises:
        TypeError: no data set, or scores of another type.
        ValueError: an unknown action or issue; missing columns; scores of another length, or that were made for other
            labels, with the first row that differs.
    """
    check_dataset(dataset)
    check_choice(("drop", "relabel"), action=action)
    issues = (issues,) if isinstance(issues, str) else tuple(issues)
    if not issues or set(issues) - set(_KINDS):
        raise ValueError(f"issues={issues} must name one or more of {', '.join(_KINDS)}, and nothing else")
    labels, names = read_labels(dataset, label_column)
    table = as_table(dataset if scores is None else scores)
    needed = ["given_label", *(f"{name}_score" if min_score is not None else f"is_{name}_issue" for name in issues)]
    needed += ["predicted_label"] * (action == "relabel") + ["nearest_neighbor"] * ("near_duplicate" in issues)
    if missing := [name for name in needed if name not in table]:
        raise ValueError(f"scores lack the columns {missing}; make them with find_issues or add_relation_scores")
    table = check_rows(table, labels, names)

    def flagged(name: str) -> np.ndarray:
        if min_score is not None:
            return table[f"{name}_score"].to_numpy() < min_score
        return table[f"is_{name}_issue"].to_numpy().astype(bool)

    wrong = flagged("label") if "label" in issues else np.zeros(len(dataset), bool)
    dropped = flagged("outlier") if "outlier" in issues else np.zeros(len(dataset), bool)
    if action == "drop":
        dropped = dropped | wrong
    if "near_duplicate" in issues:
        dropped = dropped | _later_copies(flagged("near_duplicate"), table["nearest_neighbor"].to_numpy(), dropped)
    if action == "relabel" and wrong.any():
        shown = dataset.format
        dataset = _relabelled(dataset, label_column, labels.numpy(), table["predicted_label"].to_numpy(), wrong, names)
        dataset.set_format(shown["type"], shown["columns"], shown["output_all_columns"], **shown["format_kwargs"])
    _logger.info("Cleaning: %d of %d rows dropped, %d labels looked at", dropped.sum(), len(dropped), wrong.sum())
    return dataset.select(np.flatnonzero(~dropped))


def _later_copies(flagged: np.ndarray, nearest: np.ndarray, dropped: np.ndarray) -> np.ndarray:
    """Of each group of near-duplicates all but the first row that stays."""
    n = len(flagged)
    rows = np.flatnonzero(flagged)
    if ((nearest[rows] < 0) | (nearest[rows] >= n)).any():
        raise ValueError(f"scores name a nearest_neighbor outside the {n} rows; use the scores of this data set")
    links = coo_matrix((np.ones(len(rows), bool), (rows, nearest[rows])), shape=(n, n))
    _, group = connected_components(links, directed=False)
    later = np.zeros(n, bool)
    staying = np.flatnonzero(~dropped)
    _, first = np.unique(group[staying], return_index=True)
    later[staying] = True
    later[staying[first]] = False
    return later


def _relabelled(
    dataset: Dataset,
    column: str,
    labels: np.ndarray,
    predicted: np.ndarray,
    wrong: np.ndarray,
    names: tuple[str, ...] | None,
) -> Dataset:
    classes = max(len(names) if names else 0, int(labels.max()) + 1)
    outside = wrong & ((predicted < 0) | (predicted >= classes))
    if names and outside.any():
        row = int(outside.argmax())
        raise ValueError(
            f"scores suggest the class {int(predicted[row])} for row {row}, outside the {classes} classes of "
            f"{column!r}; use the scores of this data set"
        )
    feature = dataset.features[column]
    ids = np.where(wrong, predicted, labels).tolist()
    values = [names[i] for i in ids] if names and not isinstance(feature, ClassLabel) else ids
    renewed = Dataset.from_dict({column: values}, features=Features({column: feature}))
    plain = dataset.with_format(None)
    return concatenate_datasets([plain.remove_columns(column), renewed], axis=1).select_columns(dataset.column_names)
