"""Decisions applied to the data set that the suspects came from."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.table import embed_table_storage

from ..core.artifacts import whole_file, write_whole
from .decisions import Decision

_BUILDERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}


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
        _write(cleaned, path)
    write_whole(out / "decisions.csv", _table(decisions, names))
    counts = {action: sum(d.action == action for d in decisions.values()) for action in ("keep", "relabel", "drop")}
    return Exported(out, len(keep), counts["keep"], counts["relabel"], counts["drop"], suspects - len(decisions))


def load_source(source: Mapping[str, Any]) -> datasets.Dataset:
    """The data set that a record's ``source`` names.

    Args:
        source: kind ("hub", "folder", "disk" or "files"), name, and where they apply revision, config and split.

    Raises:
        ValueError: an unknown kind, or several splits and none named.
        The errors of ``datasets``: nothing there, no connection.
    """
    try:
        return _load(source)
    except datasets.exceptions.DatasetsError as e:
        if isinstance(e, OSError):
            raise
        raise ValueError(f"{source['name']} cannot be loaded: {e}") from e  # a bare Exception otherwise


def _load(source: Mapping[str, Any]) -> datasets.Dataset:
    kind, name, split = source["kind"], source["name"], source.get("split")
    if kind == "disk":
        loaded = datasets.load_from_disk(name)
        if isinstance(loaded, datasets.DatasetDict) and split is not None:
            loaded = loaded[split]
    elif kind == "files":
        files = [name] if isinstance(name, str) else list(name)
        builder = _BUILDERS.get(Path(files[0]).suffix.lower())
        if builder is None:
            raise ValueError(f"{files[0]} is of no known format; use one of {', '.join(_BUILDERS)}")
        loaded = datasets.load_dataset(builder, data_files=files, split=split or "train")
    elif kind == "folder":
        loaded = datasets.load_dataset(os.fspath(Path(name).resolve()), source.get("config"), split=split)
    elif kind == "hub":
        loaded = datasets.load_dataset(name, source.get("config"), split=split, revision=source.get("revision"))
    else:
        raise ValueError(f"source kind {kind!r:.80} is unknown; use hub, folder, disk or files")
    if not isinstance(loaded, datasets.Dataset):
        raise ValueError(f"{name} has several splits ({', '.join(loaded)}) and the record names none")
    return loaded


def label_ids(data: datasets.Dataset, column: str, names: list[str]) -> np.ndarray:
    """The labels as places in ``names``, (n,) int64.

    Raises:
        ValueError: no such column, or a label that is no place or none of the names.
    """
    if column not in data.column_names:
        raise ValueError(f"the data set has no column {column!r} now, but {', '.join(data.column_names)}")
    values = data.with_format("arrow")[:][column].to_pylist()
    places = {name: i for i, name in enumerate(names)}
    try:
        return np.array([places[v] if isinstance(v, str) else int(v) for v in values], dtype=np.int64)
    except (KeyError, TypeError, ValueError, OverflowError) as e:
        raise ValueError(f"column {column!r} holds a label that was not there when it was reviewed ({e})") from e


def labels_hash(labels: np.ndarray) -> str:
    """sha256 of the labels as little-endian int64, in hex."""
    return hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest()


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


def _write(data: datasets.Dataset, path: Path) -> None:
    schema = data.features.arrow_schema
    media = any(isinstance(f, (datasets.Image, datasets.Audio)) for f in data.features.values())
    with pq.ParquetWriter(path, schema) as writer:
        for batch in data.with_format("arrow").iter(256 if media else 10_000):
            # pictures and sounds of a folder are paths until here
            writer.write_table(embed_table_storage(pa.Table.from_arrays(batch.columns, schema=schema)))


def _table(decisions: Mapping[int, Decision], names: list[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("index", "action", "given_label", "new_label", "given_name", "new_name", "time"))
    for _, d in sorted(decisions.items()):
        new = d.given if d.action == "keep" else d.label
        new_name = "" if new is None else names[new]
        writer.writerow((d.row, d.action, d.given, "" if new is None else new, names[d.given], new_name, d.time))
    return text.getvalue()
