"""What ``dataopt clean`` wrote, read and checked once, before the page is served."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ..integrations.hf import hub

KIND, VERSION = "dataopt-clean", 1
LABEL, OUTLIER, NEAR_DUPLICATE = 1, 2, 4  # bits of a suspect's kinds
# No SVG and no HTML: both carry scripts.
MEDIA_TYPES = (
    *("image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp"),
    *("audio/wav", "audio/x-wav", "audio/mpeg", "audio/ogg", "audio/flac", "audio/mp4", "audio/webm"),
)
_FLAGS = {"is_label_issue": LABEL, "is_outlier_issue": OUTLIER, "is_near_duplicate_issue": NEAR_DUPLICATE}
_NUMBERS = ("label_score", "outlier_score", "near_duplicate_score", "relation_noisiness", "loss")
_SCORES = ("index", *_FLAGS, *_NUMBERS, "given_label", "predicted_label", "nearest_neighbor")
_AGAIN = "run dataopt clean again"


@dataclass(frozen=True)
class ByRow:
    """A table sorted by its column ``row``."""

    frame: pd.DataFrame
    rows: np.ndarray

    def of(self, row: int) -> pd.DataFrame:
        """The lines of one row, in their order; none is an empty table."""
        start, end = np.searchsorted(self.rows, [row, row + 1])
        return self.frame.iloc[start:end]


class Items:
    """Text or media of suspects and neighbours; the file's row groups are read when they are asked for.

    Attributes:
        rows: (k,) int64, row numbers that it has.

    Raises:
        ValueError: a file that is damaged or lacks a column.
    """

    def __init__(self, path: Path, modality: str) -> None:
        self._path = path
        self._content = "text" if modality == "text" else "media"
        wanted = ["index", "label", *(["media_type"] if modality != "text" else [])]
        frame = _table(path, wanted, [*wanted, self._content])
        kinds = {
            "text": (pa.types.is_string, pa.types.is_large_string),
            "media": (pa.types.is_binary, pa.types.is_large_binary),
        }
        found = pq.read_schema(path).field(self._content).type
        if not any(fits(found) for fits in kinds[self._content]):
            needed = "texts" if self._content == "text" else "bytes"
            raise ValueError(f"{path} has {found} in {self._content!r} and not {needed}; {_AGAIN}")
        self.rows = _integers(path, frame, "index")
        self._place = {row: i for i, row in enumerate(self.rows.tolist())}
        self._types = frame["media_type"].tolist() if modality != "text" else []
        self._file = pq.ParquetFile(path)
        groups = self._file.metadata
        self._starts = np.cumsum([0, *(groups.row_group(i).num_rows for i in range(groups.num_row_groups))])
        self._group = lru_cache(maxsize=4)(self._read_group)

    def text(self, row: int) -> str | None:
        """None where the row is not in the file, or empty there."""
        return self._value(row) if self._content == "text" and row in self._place else None

    def media_type(self, row: int) -> str | None:
        """None where the row has no media, or none of a type that is shown."""
        found = self._types[self._place[row]] if self._types and row in self._place else None
        return found if found in MEDIA_TYPES else None

    def media(self, row: int) -> bytes | None:
        return self._value(row) if self.media_type(row) else None

    def _value(self, row: int) -> Any:
        place = self._place[row]
        group = int(np.searchsorted(self._starts, place, side="right")) - 1
        return self._group(group)[place - int(self._starts[group])]

    def _read_group(self, group: int) -> list[Any]:
        try:
            return self._file.read_row_group(group, columns=[self._content]).column(0).to_pylist()
        except (pa.ArrowException, OSError, ValueError) as e:
            raise ValueError(f"{self._path} is damaged ({_first_line(e)}); {_AGAIN}") from e


@dataclass(frozen=True)
class Folder:
    """A folder of ``dataopt clean``.

    Attributes:
        path: of the folder.
        record: content of record.json.
        scores: of all samples, indexed by row number; two columns more, the ranks of relation and loss (1 is worst).
        suspects: (s,) int64, row numbers: wrong labels from the worst on, then outliers, then near-duplicates.
        kinds: (s,) int64, the bits ``LABEL``, ``OUTLIER`` and ``NEAR_DUPLICATE``.
        relations: row, neighbour, value, similarity, strongest first.
        map: row, neighbour, mean, std, last.
        items: text or media.
    """

    path: Path
    record: dict[str, Any]
    scores: pd.DataFrame
    suspects: np.ndarray
    kinds: np.ndarray
    relations: ByRow
    map: ByRow
    items: Items

    @property
    def label_names(self) -> list[str]:
        return self.record["label_names"]

    @property
    def name(self) -> str:
        """What the data set is called: its name on the Hub, or the end of its path."""
        source = self.record["source"]
        name = source["name"] if isinstance(source["name"], str) else str(source["name"][0])
        return name if source["kind"] == "hub" else "/".join(Path(name).parts[-2:])

    def given(self, row: int) -> int:
        return int(self.scores.at[row, "given_label"])


def read_folder(path: Path) -> Folder:
    """Read what ``dataopt clean`` wrote.

    Raises:
        ValueError: no such folder, a missing, foreign, newer or damaged file, or files that do not belong together.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is no folder; give one that dataopt clean wrote")
    record = _checked(path / "record.json", hub.read_record(hub.member(path, "record.json"), KIND, VERSION))
    files = {name: hub.member(path, f"{name}.parquet") for name in ("scores", "relations", "map", "items")}
    for file in files.values():
        if record.get("files", {}).get(file.name) not in (None, hub.file_checksum(file)):
            raise ValueError(f"{file} is damaged, or of another run than record.json; {_AGAIN}")
    scores = _read_scores(files["scores"], record)
    relations = _by_row(files["relations"], ("row", "neighbour", "rank"), ("value", "similarity"), scores)
    relations_map = _by_row(files["map"], ("row", "neighbour"), ("mean", "std", "last"), scores)
    items = Items(files["items"], record["modality"])
    kinds = sum(scores[flag].to_numpy(bool) * bit for flag, bit in _FLAGS.items())
    named = np.isin(scores.index, relations.rows)
    held = np.isin(scores.index, items.rows)
    missing = scores.index[named & ~held]
    if len(missing):
        raise ValueError(f"{files['items']} lacks row {missing[0]}, a suspect; {_AGAIN}")
    # a flagged row without neighbours is in no line of the relations
    shown = named | ((kinds > 0) & held)
    suspects = _in_order(scores[shown], kinds[shown])
    places = scores.index.get_indexer(suspects)
    return Folder(path, record, scores, suspects, kinds[places], relations, relations_map, items)


def _in_order(scores: pd.DataFrame, kinds: np.ndarray) -> np.ndarray:
    turn = np.select([kinds & LABEL > 0, kinds & OUTLIER > 0, kinds & NEAR_DUPLICATE > 0], [0, 1, 2], 3)
    worst = np.select(
        [turn == 1, turn == 2], [scores["outlier_score"], scores["near_duplicate_score"]], scores["label_score"]
    )
    return scores.index.to_numpy(np.int64)[np.lexsort((worst, turn))]


def _checked(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    source, names = record.get("source"), record.get("label_names")
    right = {
        "source": isinstance(source, dict) and isinstance(source.get("kind"), str) and _names(source.get("name")),
        "rows": type(record.get("rows")) is int and record["rows"] > 0,
        "label_column": isinstance(record.get("label_column"), str),
        "modality": record.get("modality") in ("image", "text", "audio"),
        "label_names": isinstance(names, list) and len(names) > 0 and all(isinstance(n, str) for n in names),
        "labels_hash": isinstance(record.get("labels_hash"), str),
        "files": isinstance(record.get("files", {}), dict),
    }
    for key, fine in right.items():
        if not fine:
            raise ValueError(f"{path} has {key}={record.get(key)!r:.80}, which cannot be reviewed; {_AGAIN}")
    return record


def _names(name: Any) -> bool:
    """A name, or the names of files."""
    several = name if isinstance(name, list) else [name]
    return len(several) > 0 and all(isinstance(n, str) and n for n in several)


def _read_scores(path: Path, record: dict[str, Any]) -> pd.DataFrame:
    frame = _table(path, _SCORES)
    classes = len(record["label_names"])
    for name, end in (("index", record["rows"]), ("given_label", classes), ("predicted_label", classes)):
        values = _integers(path, frame, name)
        if len(values) and not (values.min() >= 0 and values.max() < end):
            raise ValueError(f"{path} has {name} {_outside(values, end)}, and record.json has {end}; {_AGAIN}")
    _integers(path, frame, "nearest_neighbor")
    _floats(path, frame, _NUMBERS)
    for flag in _FLAGS:
        if not pd.api.types.is_bool_dtype(frame[flag]):
            raise ValueError(f"{path} has {frame[flag].dtype} in {flag!r} and not true or false; {_AGAIN}")
    frame = frame.set_index("index")
    if not frame.index.is_unique:
        raise ValueError(f"{path} has row {frame.index[frame.index.duplicated()][0]} twice; {_AGAIN}")
    for score in ("relation_noisiness", "loss"):
        frame[f"{score}_rank"] = frame[score].rank(ascending=False, method="min")
    return frame


def _by_row(path: Path, integers: Sequence[str], floats: Sequence[str], scores: pd.DataFrame) -> ByRow:
    frame = _table(path, (*integers, *floats))
    for name in ("row", "neighbour"):
        known = np.isin(_integers(path, frame, name), scores.index)
        if not known.all():
            raise ValueError(f"{path} names row {frame[name][~known].iloc[0]}, which has no scores; {_AGAIN}")
    _floats(path, frame, floats)
    for name in integers:
        _integers(path, frame, name)
    order = ["row", "rank"] if "rank" in integers else ["row"]
    frame = frame.sort_values(order, kind="stable", ignore_index=True)
    return ByRow(frame, frame["row"].to_numpy(np.int64))


def _table(path: Path, columns: Sequence[str], needed: Sequence[str] | None = None) -> pd.DataFrame:
    try:
        found = pq.read_schema(path).names
        missing = [c for c in needed or columns if found.count(c) != 1]
        frame = pd.DataFrame() if missing else pq.read_table(path, columns=list(columns)).to_pandas()
    except Exception as e:  # pyarrow raises errors of many kinds
        raise ValueError(f"{path} is damaged ({_first_line(e)}); {_AGAIN}") from e
    if missing:
        what = "has twice" if missing[0] in found else "lacks"
        raise ValueError(f"{path} {what} the column {missing[0]!r}; {_AGAIN}")
    return frame


def _integers(path: Path, frame: pd.DataFrame, name: str) -> np.ndarray:
    if not pd.api.types.is_integer_dtype(frame[name]):
        raise ValueError(f"{path} has {frame[name].dtype} in {name!r} and not integers; {_AGAIN}")
    return frame[name].to_numpy(np.int64)


def _floats(path: Path, frame: pd.DataFrame, names: Sequence[str]) -> None:
    for name in names:
        if not pd.api.types.is_float_dtype(frame[name]):
            raise ValueError(f"{path} has {frame[name].dtype} in {name!r} and not numbers; {_AGAIN}")


def _outside(values: np.ndarray, end: int) -> int:
    return int(values[(values < 0) | (values >= end)][0])


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
