"""Decisions applied to the data set that the suspects came from."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ..core.artifacts import whole_file, write_whole
from ..sources import label_ids, labels_hash, load_source, write_parquet
from .decisions import Decision


@dataclass(frozen=True)
class Exported:
    """What an export wrote: the folder, rows in its train.parquet, and how many decisions of each kind were applied."""

    folder: Path
    rows: int
    kept: int
    relabelled: int
    dropped: int
    undecided: int

    def __str__(self) -> str:
        return (
            f"{self.rows:,} rows into {self.folder}: {self.relabelled:,} relabelled, {self.dropped:,} dropped, "
            f"{self.kept:,} kept as they were; {self.undecided:,} suspects undecided and left alone"
        )


def export(record: Mapping[str, Any], decisions: Mapping[int, Decision], suspects: int, out: Path) -> Exported:
    """Write ``train.parquet``, the cleaned data set with its media inside, and ``decisions.csv``.

    Args:
        record: content of record.json.
        decisions: by row.
        suspects: how many there are.
        out: files of these names in it are replaced.

    Raises:
        ValueError: the data set cannot be loaded, or is not the one that was reviewed.
        OSError: it is gone, or ``out`` cannot be written.
    """
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    data = load_source(record["source"])
    column, names = record["label_column"], record["label_names"]
    labels = label_ids(data, column, names)
    _check_same(record, labels)
    keep = np.array([row for row in range(len(labels)) if not _drops(decisions.get(row))], dtype=np.int64)
    for decision in decisions.values():
        if decision.label is not None:
            labels[decision.row] = decision.label
    cleaned = _with_labels(data, column, names, labels, list(_relabelled(decisions))).select(keep)
    with whole_file(out / "train.parquet") as path:
        write_parquet(cleaned, path)
    write_whole(out / "decisions.csv", _table(decisions, names))
    counts = {action: sum(d.action == action for d in decisions.values()) for action in ("keep", "relabel", "drop")}
    return Exported(out, len(keep), counts["keep"], counts["relabel"], counts["drop"], suspects - len(decisions))


def _check_same(record: Mapping[str, Any], labels: np.ndarray) -> None:
    name = record["source"]["name"]
    if len(labels) != record["rows"]:
        raise ValueError(
            f"{name} has {len(labels):,} rows now and had {record['rows']:,}: the decisions are about other data; "
            "run dataopt clean again"
        )
    if labels_hash(labels) != record["labels_hash"]:
        raise ValueError(
            f"{name} has other labels or another order than it had: the decisions are about other data; "
            "run dataopt clean again"
        )


def _drops(decision: Decision | None) -> bool:
    return decision is not None and decision.action == "drop"


def _relabelled(decisions: Mapping[int, Decision]) -> list[int]:
    return [row for row, decision in decisions.items() if decision.label is not None]


def _with_labels(
    data: datasets.Dataset, column: str, names: list[str], labels: np.ndarray, changed: list[int]
) -> datasets.Dataset:
    values = data.with_format("arrow")[:][column].to_pylist()
    for row in changed:
        values[row] = names[labels[row]] if isinstance(values[row], str) else type(values[row])(labels[row])
    features, order = data.features, data.column_names
    replaced = data.remove_columns(column).add_column(column, values, feature=features[column])
    return replaced.select_columns(order)


def _table(decisions: Mapping[int, Decision], names: list[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("index", "action", "given_label", "new_label", "given_name", "new_name", "time"))
    for _, d in sorted(decisions.items()):
        new = d.given if d.action == "keep" else d.label
        new_name = "" if new is None else names[new]
        writer.writerow((d.row, d.action, d.given, "" if new is None else new, names[d.given], new_name, d.time))
    return text.getvalue()
