"""Data sets as a command line names them: found, loaded, their labels read, written as parquet."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.table import embed_table_storage
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError

_BUILDERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}


def find_source(
    name: str,
    split: str | None,
    config: str | None,
    revision: str | None,
    *,
    usual: str = "train",
    option: str = "--split",
) -> dict[str, Any]:
    """What a data set's name means: a file, saved data, a folder or a Hub repository, and which split.

    Args:
        usual: the split of several where ``split`` is None. option: that gives another, for the message.

    Raises:
        ValueError: several splits and none of them named or called as usual, or a revision of local data.
        OSError: neither here nor on the Hub.
    """

    def chosen(names: Sequence[str]) -> str:
        wanted = split or (names[0] if len(names) == 1 else usual)
        if wanted not in names:
            raise ValueError(f"{name} has the splits {', '.join(names)}; give one of them with {option}")
        return wanted

    path = Path(name)
    if path.exists() and revision is not None:
        raise ValueError(f"--revision {revision} is for the Hub and {name} is here; leave it out")
    if path.is_file():
        return {"kind": "files", "name": [os.fspath(path.resolve())], "split": split}
    if path.is_dir() and (path / "state.json").exists():
        return {"kind": "disk", "name": os.fspath(path.resolve())}
    if path.is_dir() and (path / "dataset_dict.json").exists():
        names = json.loads((path / "dataset_dict.json").read_text())["splits"]
        return {"kind": "disk", "name": os.fspath(path.resolve()), "split": chosen(names)}
    if path.is_dir():
        names = datasets.get_dataset_split_names(os.fspath(path.resolve()), config)
        split = chosen(names)
        return {"kind": "folder", "name": os.fspath(path.resolve()), "config": config, "split": split}
    try:
        revision = HfApi().dataset_info(name, revision=revision).sha  # so that it is found again as it is now
    except HFValidationError as e:
        raise ValueError(
            f"{name!r} is no file, no folder and no name of a data set on the Hub; give one of them"
        ) from e
    names = datasets.get_dataset_split_names(name, config, revision=revision)
    split = chosen(names)
    return {"kind": "hub", "name": name, "config": config, "revision": revision, "split": split}


def split_names(source: Mapping[str, Any]) -> list[str]:
    """The splits that there are where a source was found; none for files and for saved data without splits."""
    if source["kind"] in ("hub", "folder"):
        name, revision = source["name"], source.get("revision")
        return list(datasets.get_dataset_split_names(name, source.get("config"), revision=revision))
    listed = Path(source["name"]) / "dataset_dict.json" if source["kind"] == "disk" else None
    return json.loads(listed.read_text())["splits"] if listed is not None and listed.exists() else []


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
            raise ValueError(f"{files[0]} is of no known format; give one of {', '.join(_BUILDERS)}")
        more = {"sep": "\t"} if Path(files[0]).suffix.lower() == ".tsv" else {}
        loaded = datasets.load_dataset(builder, data_files=files, split=split or "train", **more)
    elif kind == "folder":
        loaded = datasets.load_dataset(os.fspath(Path(name).resolve()), source.get("config"), split=split)
    elif kind == "hub":
        loaded = datasets.load_dataset(name, source.get("config"), split=split, revision=source.get("revision"))
    else:
        raise ValueError(f"source kind {kind!r:.80} must be one of hub, folder, disk, files")
    if not isinstance(loaded, datasets.Dataset):
        raise ValueError(
            f"{name} has several splits ({', '.join(loaded)}) and the record names none; run the command again with "
            "--split"
        )
    return loaded


def find_labels(data: datasets.Dataset) -> str:
    """The column of labels: the only ``ClassLabel``, or one that is called so.

    Raises:
        ValueError: none or several.
    """
    classes = [name for name, f in data.features.items() if isinstance(f, datasets.ClassLabel)]
    called = [name for name in ("label", "labels") if name in data.column_names]
    found = classes if len(classes) == 1 else called
    if len(found) != 1:
        raise ValueError(f"the column of labels is not clear among {', '.join(data.column_names)}; give --label-column")
    return found[0]


def label_ids(data: datasets.Dataset, column: str, names: list[str]) -> np.ndarray:
    """The labels as places in ``names``, (n,) int64.

    Raises:
        ValueError: no such column, or a label that is no place or none of the names.
    """
    if column not in data.column_names:
        raise ValueError(
            f"column {column!r} is no longer among the columns {', '.join(data.column_names)}; run dataopt clean again"
        )
    values = data.with_format("arrow")[:][column].to_pylist()
    places = {name: i for i, name in enumerate(names)}
    try:
        return np.array([places[v] if isinstance(v, str) else int(v) for v in values], dtype=np.int64)
    except (KeyError, TypeError, ValueError, OverflowError) as e:
        raise ValueError(
            f"column {column!r} holds a label that was not there when it was reviewed ({e}); run dataopt clean again"
        ) from e


def labels_hash(labels: np.ndarray) -> str:
    """sha256 of the labels as little-endian int64, in hex."""
    return hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest()


def write_parquet(data: datasets.Dataset, path: Path) -> None:
    """Write a data set as one parquet file, pictures and sounds of a folder inside it."""
    schema = data.features.arrow_schema
    media = any(isinstance(f, (datasets.Image, datasets.Audio)) for f in data.features.values())
    with pq.ParquetWriter(path, schema) as writer:
        for batch in data.with_format("arrow").iter(256 if media else 10_000):
            # pictures and sounds of a folder are paths until here
            writer.write_table(embed_table_storage(pa.Table.from_arrays(batch.columns, schema=schema)))
