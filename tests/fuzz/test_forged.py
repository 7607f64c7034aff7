"""Files whose checksums are right and whose content nobody should trust: valid, or refused in one sentence."""

import copy
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from dataopt.core.condense import files as condensed_files
from dataopt.core.tensor_file import load_tensors, save_tensors
from dataopt.integrations.hf import hub
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from .artifacts import ARTIFACTS, sign, sign_review
from .budget import tries
from .folders import copies, valid

VALUES = [
    None, True, -1, 0, 1, 3, 1 << 31, 10**400, -0.5, 1e30, float("nan"), float("inf"), "", "x", "../../outside/secret",
    "/etc/hostname", "\x00", "\ud800", [], {}, [[]], [None], [1, 2], ["a", "a"], {"a": 1}, [0] * 5000, "long" * 5000,
]  # fmt: skip
RECORDS = {
    "condensed": "condensed.json", "published": "condensed.json", "published, exact": "condensed.json",
    "kvzip": "kvzip.json", "kvzip, 4 bits": "kvzip.json", "kvzip, heads": "kvzip.json",
    "head scores": "head_scores.json", "ccm memory, concat": "ccm_memory.json", "ccm memory, merge": "ccm_memory.json",
    "ccm adapter": "ccm_config.json", "relation scores": "__dataopt__/default/train/record.json",
    "review": "out/record.json",
}  # fmt: skip
__all__ = ["copies", "valid"]

opened: list[str] = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)


def edited(data: st.DataObject, tree: Any) -> Any:
    """A copy with one value, anywhere in it, replaced, left out or added."""
    tree = copy.deepcopy(tree)
    at, way = tree, []
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = data.draw(st.sampled_from(keys), "key")
        way.append(key)
        inner = at[key]
        if not isinstance(inner, dict | list) or not inner or data.draw(st.booleans(), "stop"):
            break
        at = inner
    what = data.draw(st.sampled_from(["replace", "replace", "replace", "leave out", "repeat"]), "edit")
    if what == "leave out":
        del at[key]
    elif what == "repeat" and isinstance(at, list):
        at.append(inner)
    else:
        at[key] = data.draw(st.sampled_from(VALUES), "value")
    return tree


def check(name: str, folder: Path) -> None:
    """Refused in a sentence, or loaded and used; and nothing outside was opened."""
    opened.clear()
    try:
        ARTIFACTS[name].load(folder)
    except (ValueError, *ARTIFACTS[name].missing) as e:
        assert len(str(e)) > 20 and (str(folder) in str(e) or "adapter" in str(e)), f"{type(e).__name__}: {e}"
    outside = [p for p in opened if "secret" in p or p == "/etc/hostname"]
    assert not outside, f"opened {outside}"


@pytest.mark.parametrize("name", RECORDS)
@tries(25)
@given(data=st.data())
def test_records(name, copies, data):
    folder, _ = copies(name)
    path = folder / RECORDS[name]
    if name == "condensed":
        tensors, record = condensed_files.read(folder, "condensed")
        condensed_files.write(folder, "condensed", tensors, edited(data, record))
    else:
        record = json.loads(path.read_text())
        sign(path, edited(data, record))
    check(name, folder)


CHANGES = {
    "transposed": lambda t: t.transpose(0, -1),
    "one axis more": lambda t: t.unsqueeze(0),
    "flat": lambda t: t.reshape(-1),
    "a row less": lambda t: t[:-1],
    "a column less": lambda t: t[..., :-1],
    "twice": lambda t: torch.cat([t, t]),
    "twice as wide": lambda t: torch.cat([t, t], -1),
    "twice the second axis": lambda t: torch.cat([t, t], min(1, t.ndim - 1)),
    "empty": lambda t: t[:0],
    "no number": lambda t: t * torch.nan if t.is_floating_point() else t,
    "infinite": lambda t: t + torch.inf if t.is_floating_point() else t + 1,
    "huge": lambda t: t * 1e30 if t.is_floating_point() else t * 1000,
    "negative": lambda t: -t if t.dtype != torch.bool else ~t,
    "float64": lambda t: t.double(),
    "float16": lambda t: t.half(),
    "int64": lambda t: t.nan_to_num().long(),
    "bool": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
}


def changed(data: st.DataObject, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    key = data.draw(st.sampled_from(sorted(tensors)), "tensor")
    what = data.draw(st.sampled_from([*CHANGES, "left out", "renamed"]), "change")
    rest = {n: t.clone() for n, t in tensors.items() if n != key}
    if what == "left out":
        return rest
    if what == "renamed":
        return rest | {key + "s": tensors[key]}
    keys = [key]
    if data.draw(st.booleans(), "and its partner"):  # keys and values alike
        keys += [n for n in tensors if n != key and n.split(".")[0] == key.split(".")[0]]
    return {n: (CHANGES[what](t) if n in keys else t).contiguous().clone() for n, t in tensors.items()}


@pytest.mark.parametrize("name", [n for n in RECORDS if "kvzip" in n or "memory" in n or n == "condensed"])
@tries(25)
@given(data=st.data())
def test_tensors(name, copies, data):
    folder, _ = copies(name)
    path = folder / RECORDS[name]
    if name == "condensed":
        tensors, record = condensed_files.read(folder, "condensed")
        condensed_files.write(folder, "condensed", changed(data, tensors), record)
    elif "kvzip" in name:
        record = json.loads(path.read_text())
        file = folder / record["tensors"]["file"]
        save_file(changed(data, load_file(file)), file)
        record["tensors"] |= {"bytes": file.stat().st_size, "xxh3_128": hub.file_checksum(file)}
        sign(path, record)
    else:
        file = folder / json.loads(path.read_text())["tensors"]
        save_tensors(file, changed(data, load_tensors(file)[0]), {})
    check(name, folder)


COLUMNS = {
    "text": lambda c: pa.array(["x"] * len(c)),
    "nothing": lambda c: pa.nulls(len(c)),
    "some nothing": lambda c: pa.array([None, *c.to_pylist()[1:]], c.type),
    "negative": lambda c: pa.array([-7] * len(c)),
    "far": lambda c: pa.array([1 << 62] * len(c)),
    "no number": lambda c: pa.array([float("nan")] * len(c)),
    "infinite": lambda c: pa.array([float("inf")] * len(c)),
    "dates": lambda c: pa.array(np.zeros(len(c), "M8[s]")),
    "lists": lambda c: pa.array([[1, 2]] * len(c)),
    "bytes": lambda c: pa.array([b"\xff\x00"] * len(c)),
    "decimals": lambda c: pa.array([1] * len(c), pa.decimal128(38)),
    "unsigned": lambda c: pa.array([(1 << 64) - 1] * len(c), pa.uint64()),
    "no bytes and a path outside": lambda c: pa.array([{"bytes": None, "path": OUTSIDE}] * len(c)),
    "an address": lambda c: pa.array([{"bytes": None, "path": "https://127.0.0.1:9/a.png"}] * len(c)),
    "bytes of no image": lambda c: pa.array([{"bytes": b"\x89PNG\r\n", "path": None}] * len(c)),
}
OUTSIDE = "/etc/hostname"


def tables(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.parquet"))


@pytest.mark.parametrize("name", ["published", "published, exact", "relation scores", "review"])
@tries(30)
@given(data=st.data())
def test_tables(name, copies, data):
    folder, _ = copies(name)
    path = data.draw(st.sampled_from([p for p in tables(folder) if p.parent.name != "pictures"]), "file")
    table = pq.read_table(path)
    key = data.draw(st.sampled_from(table.column_names), "column")
    what = data.draw(st.sampled_from([*COLUMNS, "left out", "rows left out", "twice", "no rows"]), "change")
    if what == "left out":
        table = table.drop_columns(key)
    elif what in ("rows left out", "no rows"):
        table = table.slice(0, 0 if what == "no rows" else len(table) - 1)
    elif what == "twice":
        table = table.append_column(key, table[key])
    else:
        values = COLUMNS[what](table[key])
        metadata = table.schema.metadata if data.draw(st.booleans(), "keep the metadata") else None
        table = table.set_column(table.column_names.index(key), key, values).replace_schema_metadata(metadata)
    pq.write_table(table, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if name == "relation scores":
        record = json.loads((path.parent / "record.json").read_text())
        sign(path.parent / "record.json", record | {"scores_hash": digest, "rows": len(table)})
    if name == "review":
        sign_review(folder / "out")
    if "published" in name:
        record = json.loads((folder / "condensed.json").read_text())
        for entry in record["files"].values():
            if entry["file"] == path.name:
                entry |= {"bytes": path.stat().st_size, "sha256": digest}
        sign(folder / "condensed.json", record)
    check(name, folder)
