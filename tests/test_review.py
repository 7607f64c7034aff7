"""``dataopt review``: the folder, the decisions, the page in a browser, the export."""

import csv
import io
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import tomllib
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import uvicorn
from dataopt.cli import app
from dataopt.integrations.hf.hub import write_record
from dataopt.review import server as server_module
from dataopt.review.decisions import Decisions, open_decisions
from dataopt.review.export import export
from dataopt.review.folder import read_folder
from dataopt.review.server import application, describe
from dataopt.sources import label_ids, labels_hash, load_source
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from starlette.testclient import TestClient
from typer.testing import CliRunner

from .test_cli import dataopt_command

ROWS, SUSPECTS, NEAR = 40, 14, 6
NAMES = ["cat", "dog", "<b>owl</b>"]
ATTACKS = [
    "<script>window.ran = 1</script>",
    "<img src=x onerror='window.ran = 2'>",
    "</p><svg onload='window.ran = 3'>",
    "{{ 7 * 7 }} ${window.ran = 4}",
]
TEXTS = [*ATTACKS, "", "\u202eright to left", "long " * 5_000, *(f"sample number {i}" for i in range(7, ROWS))]


def given(rows: int = ROWS) -> np.ndarray:
    return np.arange(rows) % len(NAMES)


def png(row: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (32, 32), (row * 6 % 256, 90, 160)).save(out, "PNG")
    return out.getvalue()


def wav(row: int) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes((8000 * np.sin(np.arange(2000) * (0.1 + row / 50))).astype("<i2").tobytes())
    return out.getvalue()


def make_source(folder: Path, modality: str) -> dict:
    """A data set on the disk, and what the record says about it."""
    labels = given()
    if modality == "image":  # a folder for each class, paths and no bytes
        for row, label in enumerate(labels):
            path = folder / "pictures" / "abc"[label] / f"{row:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(row))
        return {"kind": "folder", "name": str(folder / "pictures"), "split": "train"}
    content = TEXTS if modality == "text" else [f"sound {row}" for row in range(ROWS)]
    features = datasets.Features(
        {"id": datasets.Value("int32"), "kind": datasets.ClassLabel(names=NAMES), "text": datasets.Value("string")}
    )
    data = datasets.Dataset.from_dict({"id": range(100, 100 + ROWS), "kind": labels, "text": content}, features)
    data.to_parquet(folder / "data.parquet")
    return {"kind": "files", "name": str(folder / "data.parquet"), "split": "train"}


def make_folder(folder: Path, modality: str = "text", checkpoints: int = 1) -> Path:
    """What ``dataopt clean`` writes. Suspects are rows 0 to 13: ten labels, two outliers, two near-duplicates."""
    out, rng = folder / "out", np.random.default_rng(0)
    source = make_source(folder, modality)
    column = "label" if modality == "image" else "kind"
    names = ["a", "b", "c"] if modality == "image" else NAMES
    labels = label_ids(load_source(source), column, names)
    rows = np.arange(ROWS)
    suggested = np.where(rows < 10, (labels + 1) % len(names), labels)
    scores = pd.DataFrame(
        {
            "index": rows, "is_label_issue": rows < 10, "label_score": np.where(rows < 10, rows / 50, 0.9),
            "given_label": labels, "predicted_label": suggested, "relation_noisiness": 20.0 - rows,
            "loss": np.linspace(6, 0, ROWS), "is_outlier_issue": (rows >= 10) & (rows < 12),
            "outlier_score": np.where((rows >= 10) & (rows < 12), 0.01 * rows, 0.8),
            "is_near_duplicate_issue": (rows >= 12) & (rows < SUSPECTS),
            "near_duplicate_score": np.where(rows == 12, 0.02, np.where(rows == 13, 0.03, 1.0)),
            "nearest_neighbor": np.where(rows == 12, 13, np.where(rows == 13, 12, (rows + 1) % ROWS)),
        }
    )  # fmt: skip
    near, spread = [], []
    for row in range(SUSPECTS):
        if row == 11:
            continue  # an outlier without any neighbour
        for rank, other in enumerate(rng.choice(np.arange(SUSPECTS, ROWS), NEAR, replace=False)):
            sign = -1 if rank % 3 else 1
            near.append((row, other, sign * 0.9**rank, 0.9 - 0.05 * rank, rank))
        for other in rng.choice(np.arange(SUSPECTS, ROWS), 20, replace=False):
            std = rng.random() * 0.1 if checkpoints > 1 else 0
            spread.append((row, other, rng.normal() * 0.4, std, rng.normal() * 0.4))
    wanted = sorted({n[1] for n in near} | set(range(SUSPECTS)))
    items = pd.DataFrame({"index": wanted, "label": labels[wanted]})
    if modality == "text":
        items["text"] = [TEXTS[row] for row in wanted]
    else:
        items["media"] = [(png if modality == "image" else wav)(row) for row in wanted]
        items["media_type"] = "image/png" if modality == "image" else "audio/wav"
    out.mkdir()
    parquet(scores, out / "scores.parquet")
    parquet(pd.DataFrame(near, columns=["row", "neighbour", "value", "similarity", "rank"]), out / "relations.parquet")
    parquet(pd.DataFrame(spread, columns=["row", "neighbour", "mean", "std", "last"]), out / "map.parquet")
    items.to_parquet(out / "items.parquet", index=False, row_group_size=7)
    record = {
        "source": source, "rows": ROWS, "label_column": column, "input_column": modality, "modality": modality,
        "label_names": names, "labels_hash": labels_hash(labels), "counts": {"suspects": SUSPECTS},
    }  # fmt: skip
    write_record(out / "record.json", "dataopt-clean", 1, record)
    return out


def parquet(frame: pd.DataFrame, path: Path) -> None:
    narrow = {c: "float32" for c in ("value", "similarity", "mean", "std", "last") if c in frame}
    frame.astype(narrow | ({"rank": "int32"} if "rank" in frame else {})).to_parquet(path, index=False)


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_folder(tmp_path)


def run(*args):
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, ["review", *map(str, args)])


# ---- the decisions


def test_a_decision_is_in_the_file_when_decide_returns(tmp_path):
    ours = Decisions(tmp_path / "d.sqlite")
    decision = ours.decide(7, 1, "relabel", 2)
    with sqlite3.connect(tmp_path / "d.sqlite") as other:
        assert other.execute("SELECT row, action, label, given, time FROM decisions").fetchall() == [
            (7, "relabel", 2, 1, decision.time)
        ]
        assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert ours._db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


def test_two_stores_see_each_others_decisions(tmp_path):
    one, two = Decisions(tmp_path / "d.sqlite"), Decisions(tmp_path / "d.sqlite")
    one.decide(1, 0, "keep")
    two.decide(1, 0, "drop")
    two.decide(2, 0, "keep")
    assert {row: d.action for row, d in one.all().items()} == {1: "drop", 2: "keep"}
    assert one.get(2) == two.all()[2] and one.get(3) is None


def test_undo_walks_back_through_everything(tmp_path):
    store = Decisions(tmp_path / "d.sqlite")
    seen = [store.all()]
    for row, action, label in ((1, "keep", None), (2, "drop", None), (1, "relabel", 2), (1, "drop", None)):
        store.decide(row, 0, action, label)
        seen.append(store.all())
    store.close()
    store = Decisions(tmp_path / "d.sqlite")  # in another process, too
    undone = []
    while (row := store.undo()) is not None:
        undone.append(row)
        seen.pop()
        assert store.all() == seen[-1]
    assert undone == [1, 1, 2, 1] and store.all() == {}


def test_a_row_decided_many_times_keeps_a_history_that_grows_with_it(tmp_path):
    store = Decisions(tmp_path / "d.sqlite")
    for i in range(200):
        store.decide(1, 0, ("keep", "drop")[i % 2])
    again = store.decide(1, 0, "drop")
    assert again == store.get(1)  # nothing new: nothing to take back
    (size,) = store._db.execute("SELECT length(before) FROM decisions").fetchone()
    assert size < 200 * 100
    for i in range(199, 0, -1):
        assert store.undo() == 1 and store.get(1).action == ("keep", "drop")[(i - 1) % 2]
    assert store.undo() == 1 and store.get(1) is None


def test_histories_as_they_were_kept_at_first_are_undone(tmp_path):
    store = Decisions(tmp_path / "d.sqlite")
    first = [1, "keep", None, 0, "then", 1, None]
    second = [1, "drop", None, 0, "then", 2, json.dumps(first)]
    third = (1, "relabel", 2, 0, "then", 3, json.dumps(second))
    store._db.execute("INSERT INTO decisions VALUES (?, ?, ?, ?, ?, ?, ?)", third)
    found = []
    while store.get(1) is not None:
        found.append(store.get(1).action)
        store.undo()
    assert found == ["relabel", "drop", "keep"]


@pytest.mark.parametrize(
    ("action", "label"), [("burn", None), ("keep", 1), ("drop", 0), ("relabel", None), ("relabel", 0)]
)
def test_an_impossible_decision_is_refused(tmp_path, action, label):
    store = Decisions(tmp_path / "d.sqlite")
    with pytest.raises(ValueError, match="relabel with another label"):
        store.decide(1, 0, action, label)
    assert store.all() == {}


def test_a_database_that_is_not_ours_is_refused(tmp_path):
    (tmp_path / "text").write_text("no database, and long enough to be sure of it" * 30)
    with sqlite3.connect(tmp_path / "other") as other:
        other.execute("CREATE TABLE decisions (a)")
    Decisions(tmp_path / "newer").close()
    with sqlite3.connect(tmp_path / "newer") as newer:
        newer.execute("PRAGMA user_version = 2")
    for name, words in (
        ("text", "not a database"),
        ("other", "another program"),
        ("newer", "newer dataopt"),
        ("no/folder", "cannot be used"),
    ):
        with pytest.raises(ValueError, match=words):
            Decisions(tmp_path / name)


def test_decisions_about_other_data_are_refused(tmp_path):
    open_decisions(tmp_path, {3: 0}).decide(3, 0, "keep")
    assert open_decisions(tmp_path, {3: 0}).get(3)
    for labels in ({3: 1}, {4: 0}):
        with pytest.raises(ValueError, match="about other data: row 3"):
            open_decisions(tmp_path, labels)


# ---- the folder


def test_suspects_in_order(folder):
    read = read_folder(folder)
    assert read.suspects.tolist() == list(range(SUSPECTS))
    assert read.kinds.tolist() == [1] * 10 + [2] * 2 + [4] * 2


def test_what_the_page_is_told(folder):
    shown = describe(read_folder(folder), 3)
    relations = pq.read_table(folder / "relations.parquet").to_pandas().query("row == 3")
    assert [n["row"] for n in shown["neighbours"]] == relations["neighbour"].tolist()
    assert [n["value"] for n in shown["neighbours"]] == relations["value"].tolist()
    assert [n["label"] for n in shown["neighbours"]] == given()[relations["neighbour"]].tolist()
    assert (shown["given"], shown["suggested"], shown["text"]) == (0, 1, TEXTS[3])
    assert (shown["noisiness"], shown["noisiness_rank"], shown["loss_rank"]) == (17, 4, 4)
    assert len(shown["map"]) == 20
    assert describe(read_folder(folder), 12)["nearest"]["text"] == TEXTS[13]
    alone = describe(read_folder(folder), 11)
    assert alone["neighbours"] == alone["map"] == []
    long = describe(read_folder(folder), 6)
    assert long["text"] == TEXTS[6][:20_000] and long["cut"] and not shown["cut"]


def _edit(name, change):
    def edit(folder: Path) -> None:
        table = pq.read_table(folder / f"{name}.parquet").to_pandas()
        changed = change(table)
        changed.to_parquet(folder / f"{name}.parquet", index=False)

    return edit


def _record(version=1, **changes):
    def edit(folder: Path) -> None:
        record = json.loads((folder / "record.json").read_text()) | changes
        kind = record.pop("kind")
        del record["format_version"], record["checksum"]
        write_record(folder / "record.json", kind, version, record)

    return edit


def _cut(name):
    def edit(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return edit


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: shutil.rmtree(folder), "is no folder"),
        (lambda folder: (folder / "record.json").unlink(), "record.json is missing"),
        (lambda folder: (folder / "map.parquet").unlink(), "map.parquet is missing"),
        (_cut("record.json"), "is damaged"),
        (_cut("scores.parquet"), "scores.parquet is damaged"),
        (_cut("items.parquet"), "items.parquet is damaged"),
        (_record(kind="dataopt-kvzip"), "of another kind"),
        (_record(version=2), "newer format 2"),
        (_record(rows=0), "rows=0"),
        (_record(modality="video"), "modality='video'"),
        (_record(label_names=[]), "label_names="),
        (_record(label_names=["cat"]), "given_label"),
        (_edit("scores", lambda t: t.drop(columns="loss")), "lacks the column 'loss'"),
        (_edit("scores", lambda t: t.assign(index=t["index"] + 1)), "index 40"),
        (_edit("scores", lambda t: pd.concat([t, t[:1]])), "row 0 twice"),
        (_edit("scores", lambda t: t.assign(given_label="cat")), "not integers"),
        (_edit("relations", lambda t: t.assign(neighbour=99)), "row 99, which has no scores"),
        (_edit("items", lambda t: t[1:]), "lacks row 0, a suspect"),
        (lambda folder: (folder / "decisions.sqlite").write_text("text" * 400), "not a database"),
    ],
)
def test_a_bad_folder_is_refused_in_one_line(folder, damage, words):
    damage(folder)
    result = run(folder)
    assert result.exit_code == 1
    assert words in result.stderr and len(result.stderr.strip().splitlines()) == 1, result.stderr


def test_a_port_in_use_is_refused_in_one_line(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = run(folder, "--port", taken.getsockname()[1])
    assert result.exit_code == 1 and "--port" in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_a_process_without_the_extra(folder):
    result = dataopt_command("review", str(folder), without="starlette")
    assert result.returncode == 1 and len(result.stderr.strip().splitlines()) == 1
    assert 'pip install "dataopt[review]"' in result.stderr


# ---- the server

PORT, TOKEN = 8123, "the-token"
ORIGIN = {"Origin": f"http://127.0.0.1:{PORT}"}


@contextmanager
def client(folder: Path, opened: bool = True) -> Iterator[TestClient]:
    read = read_folder(folder)
    decisions = open_decisions(folder, read.scores["given_label"].to_dict())
    guarded = application(read, decisions, TOKEN, PORT)
    made = TestClient(guarded, base_url=f"http://127.0.0.1:{PORT}", raise_server_exceptions=False)
    if opened:
        assert made.get(f"/?token={TOKEN}").status_code == 200
    yield made
    decisions.close()


def test_only_who_has_the_token_gets_anything(folder):
    for path in (
        "/",
        "/?token=wrong",
        "/?token=",
        f"/state?token={TOKEN}",
        "/page.js",
        "/items/0",
        "/media/0",
        "/none",
    ):
        with client(folder, opened=False) as stranger:
            answer = stranger.get(path)
            assert answer.status_code == 403 and "set-cookie" not in answer.headers, path
            assert "sample" not in answer.text
    with client(folder, opened=False) as stranger:
        for cookie in ("wrong", "", "t\u00f6ken"):
            header = f"dataopt-review-{PORT}={cookie}".encode()
            assert stranger.get("/state", headers={"Cookie": header}).status_code == 403
        assert stranger.post("/decide", json={"row": 0, "action": "drop"}, headers=ORIGIN).status_code == 403
    assert Decisions(folder / "decisions.sqlite").all() == {}


def test_the_cookie_is_for_this_page_alone(folder):
    with client(folder, opened=False) as made:
        cookie = made.get(f"/?token={TOKEN}").headers["set-cookie"]
        assert cookie == f"dataopt-review-{PORT}={TOKEN}; Path=/; HttpOnly; SameSite=Strict"
        assert made.get("/state").status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": f"evil.example:{PORT}"},
        {"Host": f"127.0.0.1:{PORT + 1}"},
        {"Host": "127.0.0.1"},
        {"Host": ""},
        {"Origin": "http://evil.example"},
        {"Origin": f"http://127.0.0.1:{PORT + 1}"},
        {"Origin": f"https://127.0.0.1:{PORT}"},
        {"Origin": "null"},
        {"Origin": f"http://localhost:{PORT}"},  # another name than that of Host
    ],
)
def test_a_foreign_host_or_origin_is_refused(folder, headers):
    with client(folder) as made:
        for path in ("/", f"/?token={TOKEN}", "/state", "/media/0", "/page.js"):
            assert made.get(path, headers=headers).status_code == 403, path
        answer = made.post("/decide", json={"row": 0, "action": "drop"}, headers=ORIGIN | headers)
        assert answer.status_code == 403
        assert made.get("/state").json()["decisions"] == []


def test_a_post_without_an_origin_is_refused(folder):
    with client(folder) as made:
        assert made.post("/decide", json={"row": 0, "action": "drop"}).status_code == 403
        assert made.post("/decide", json={"row": 0, "action": "drop"}, headers=ORIGIN).status_code == 200


def test_every_answer_carries_the_policy(folder):
    with client(folder) as made:
        for path in ("/", "/page.js", "/page.css", "/icon.svg", "/state", "/items/0", "/none", "/media/0"):
            headers = made.get(path).headers
            policy = headers["content-security-policy"]
            assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
            assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
        page = made.get("/").text
        assert not re.search(r"<script(?! src)|<style|\son\w+=|\sstyle=", page)
        assert not re.search(r"(src|href)=.(?!/page|/icon|#)", page)  # nothing from elsewhere


def test_the_wheel_carries_the_page():
    setup = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = setup["package-data"]["dataopt.review"]
    files = {p.name for p in Path(server_module.__file__).parent.iterdir() if p.is_file() and p.suffix != ".py"}
    assert {"page.html", "page.js", "page.css"} <= files
    assert all(any(fnmatch(name, pattern) for pattern in patterns) for name in files)


def test_no_file_but_the_pages_own_is_served(folder):
    with client(folder) as made:
        for path in (
            "/record.json", "/../record.json", "/%2e%2e/record.json", "/media/..%2frecord.json", "/media//etc/passwd",
            "/server.py", "/page.html", "/media/-1", "/media/999999999999999999999", "/items/20", "/items/x",
        ):  # fmt: skip
            assert made.get(path).status_code == 404, path


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_media_are_served_by_row_with_a_type_of_the_list(tmp_path, modality):
    folder = make_folder(tmp_path, modality)
    kind, content = ("image/png", png) if modality == "image" else ("audio/wav", wav)
    bad = {0: "text/html", 1: "image/svg+xml", 2: None, 3: "application/javascript"}
    _edit("items", lambda t: t.assign(media_type=[bad.get(row, kind) for row in t["index"]]))(folder)
    with client(folder) as made:
        for row in (5, 13):
            answer = made.get(f"/media/{row}")
            assert answer.content == content(row) and answer.headers["content-type"] == kind
        for row in bad:
            assert made.get(f"/media/{row}").status_code == 404
            assert not made.get(f"/items/{row}").json()["media"]


def test_a_decision_is_saved_before_the_answer(folder):
    with client(folder) as made:
        with sqlite3.connect(folder / "decisions.sqlite") as other:
            for row, action, label in ((0, "keep", None), (4, "relabel", 2), (13, "drop", None)):
                answer = made.post("/decide", json={"row": row, "action": action, "label": label}, headers=ORIGIN)
                assert answer.status_code == 200
                saved = other.execute("SELECT action, label, time FROM decisions WHERE row = ?", (row,)).fetchone()
                assert saved == (action, label, answer.json()["time"])
        with client(folder) as second:  # a second server
            assert [d["row"] for d in second.get("/state").json()["decisions"]] == [0, 4, 13]
            assert second.post("/undo", json={}, headers=ORIGIN).json() == {"row": 13, "decision": None}
        assert made.get("/items/13").json()["decision"] is None
        assert made.get("/items/4").json()["decision"]["label"] == 2


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400), (b"[1]", 400), (b"{", 400), (b"[" * 4000, 400), (b" " * 5000, 413), (b"{}", 400),
        (b'{"row": "0", "action": "keep"}', 400), (b'{"row": true, "action": "keep"}', 400),
        (b'{"row": 20, "action": "keep"}', 404), (b'{"row": -1, "action": "keep"}', 404),
        (b'{"row": 0, "action": "relabel", "label": 3}', 400), (b'{"row": 0, "action": "relabel", "label": -1}', 400),
        (b'{"row": 0, "action": "relabel", "label": 0}', 409), (b'{"row": 0, "action": "burn"}', 409),
    ],
)  # fmt: skip
def test_a_bad_request_changes_nothing(folder, body, status):
    with client(folder) as made:
        answer = made.post("/decide", content=body, headers=ORIGIN | {"Content-Type": "application/json"})
        assert answer.status_code == status and answer.json()["error"]
        assert made.get("/state").json()["decisions"] == []
        form = made.post("/decide", data={"row": "0", "action": "drop"}, headers=ORIGIN)
        assert form.status_code == 415


# ---- the export


def expected(decided: dict) -> pd.DataFrame:
    frame = pd.DataFrame({"id": range(100, 100 + ROWS), "kind": given(), "text": TEXTS})
    for row, (action, label) in decided.items():
        if action == "relabel":
            frame.loc[row, "kind"] = label
    return frame.drop([row for row, (action, _) in decided.items() if action == "drop"]).reset_index(drop=True)


def test_export_applies_the_decisions(folder, tmp_path):
    decided = {0: ("keep", None), 1: ("relabel", 2), 2: ("drop", None), 12: ("drop", None), 9: ("relabel", 1)}
    store = Decisions(folder / "decisions.sqlite")
    for row, (action, label) in decided.items():
        store.decide(row, int(given()[row]), action, label)
    result = run(folder, "--export", tmp_path / "new")
    assert result.exit_code == 0, result.stderr
    assert "38 rows" in result.stdout and "2 relabelled, 2 dropped, 1 kept" in result.stdout
    assert "9 suspects undecided" in result.stdout
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["decisions.csv", "train.parquet"]
    written = datasets.load_dataset("parquet", data_files=str(tmp_path / "new/train.parquet"), split="train")
    pd.testing.assert_frame_equal(written.to_pandas(), expected(decided), check_dtype=False)
    assert written.features["kind"].names == NAMES and written.features["id"].dtype == "int32"
    lines = list(csv.DictReader((tmp_path / "new/decisions.csv").open(newline="")))
    assert [(int(line["index"]), line["action"], line["new_name"]) for line in lines] == [
        (0, "keep", "cat"), (1, "relabel", "<b>owl</b>"), (2, "drop", ""), (9, "relabel", "dog"), (12, "drop", ""),
    ]  # fmt: skip
    assert all(line["time"].endswith("+00:00") for line in lines)
    again = run(folder, "--export", tmp_path / "new")
    assert again.exit_code == 1 and "is not empty" in again.stderr
    assert run(folder, "--export", tmp_path / "new", "--overwrite").exit_code == 0


def test_export_of_a_picture_folder_carries_the_pictures(tmp_path):
    folder = make_folder(tmp_path, "image")
    store = Decisions(folder / "decisions.sqlite")
    labels = pq.read_table(folder / "scores.parquet")["given_label"].to_pylist()
    store.decide(3, labels[3], "relabel", 2)
    store.decide(5, labels[5], "drop")
    assert run(folder, "--export", tmp_path / "new").exit_code == 0
    source = load_source({"kind": "folder", "name": str(tmp_path / "pictures"), "split": "train"})
    before = [path["path"] for path in source.cast_column("image", datasets.Image(decode=False))["image"]]
    contents = [Path(path).read_bytes() for path in before]
    shutil.rmtree(tmp_path / "pictures")
    written = datasets.load_dataset("parquet", data_files=str(tmp_path / "new/train.parquet"), split="train")
    assert written["label"] == [2 if row == 3 else labels[row] for row in range(ROWS) if row != 5]
    raw = written.cast_column("image", datasets.Image(decode=False))["image"]
    assert [image["bytes"] for image in raw] == [contents[row] for row in range(ROWS) if row != 5]


@pytest.mark.parametrize("kind", ["disk", "csv"])
def test_export_of_other_sources(tmp_path, kind):
    """Labels that are names stay names, and a saved DatasetDict is read by its split."""
    data = datasets.Dataset.from_dict({"text": list("abcd"), "kind": ["dog", "cat", "dog", "cat"]})
    if kind == "disk":
        datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "data")
        source = {"kind": "disk", "name": str(tmp_path / "data"), "split": "train"}
    else:
        data.to_csv(tmp_path / "data.csv")
        source = {"kind": "files", "name": str(tmp_path / "data.csv"), "split": "train"}
    ids = label_ids(data, "kind", ["cat", "dog"])
    assert ids.tolist() == [1, 0, 1, 0]
    store = Decisions(tmp_path / "d.sqlite")
    store.decide(0, 1, "relabel", 0)
    store.decide(2, 1, "drop")
    record = {
        "source": source, "rows": 4, "label_column": "kind", "label_names": ["cat", "dog"],
        "labels_hash": labels_hash(ids),
    }  # fmt: skip
    done = export(record, store.all(), 3, tmp_path / "new")
    assert (done.rows, done.relabelled, done.dropped, done.kept, done.undecided) == (3, 1, 1, 0, 1)
    assert pq.read_table(tmp_path / "new/train.parquet").to_pydict() == {
        "text": ["a", "b", "d"], "kind": ["cat", "cat", "cat"],
    }  # fmt: skip


def test_a_source_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "bad.json").write_text("{]")
    with pytest.raises(ValueError, match=r"bad\.json cannot be loaded"):
        load_source({"kind": "files", "name": str(tmp_path / "bad.json"), "split": "train"})
    with pytest.raises(ValueError, match="source kind 'ftp' must be one of hub"):
        load_source({"kind": "ftp", "name": "x"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.slice(1), "39 rows now and had 40"),
        (lambda t: t.take(pa.array([1, 0, *range(2, ROWS)])), "other labels or another order"),
        (lambda t: t.drop_columns("kind"), "column 'kind' is no longer among"),
        (lambda t: t.set_column(1, "kind", pa.array(["cow"] * ROWS)), "was not there when it was reviewed"),
        (None, "data.parquet"),
    ],
)
def test_export_refuses_another_data_set_and_writes_nothing(folder, tmp_path, change, words):
    path = tmp_path / "data.parquet"
    if change is None:
        path.unlink()
    else:
        pq.write_table(change(pq.read_table(path).replace_schema_metadata()), path)
    result = run(folder, "--export", tmp_path / "new")
    assert result.exit_code == 1
    assert words in result.stderr and len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert not (tmp_path / "new").exists()
    with client(folder) as made:
        answer = made.post("/export", json={}, headers=ORIGIN)
        assert answer.status_code == 409 and words in answer.json()["error"]
        assert not (folder / "reviewed").exists()


# ---- a browser


def browser_path() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        reason = "no browser: install Debian's chromium, or Google Chrome, to test the review page"
        if os.environ.get("DATAOPT_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@contextmanager
def browser() -> Iterator:
    path = browser_path()
    with sync_playwright() as playwright:
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []
        made = playwright.chromium.launch(executable_path=path, args=flags)
        yield made
        made.close()


@contextmanager
def server(folder: Path) -> Iterator[tuple[subprocess.Popen, str]]:
    """A server in a process of its own, and the address that it prints."""
    command = [sys.executable, "-m", "dataopt", "review", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        lines = iter(process.stdout.readline, "")
        address = next((m.group() for line in lines if (m := re.search(r"http://\S+", line))), None)
        assert address, process.stderr.read()
        yield process, address
    finally:
        process.kill()
        process.communicate()


def press(page, key: str) -> None:
    """A key, and the wait for what it does."""
    page.keyboard.press(key)
    page.wait_for_selector("body:not(.busy)")


def rows_shown(page) -> int:
    return int(page.url.rpartition("#")[2])


def test_ten_decisions_a_kill_and_an_export(folder, tmp_path):
    """By keyboard in a real browser; the server is killed, started again, and has them all."""
    decided, errors = {}, []
    with browser() as chromium:
        context = chromium.new_context()
        page = context.new_page()
        page.on("pageerror", lambda e: errors.append(str(e)))
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        with server(folder) as (process, address):
            page.goto(address)
            page.wait_for_selector("#sample .text")
            assert "token" not in page.url and page.title().startswith("Review of ")
            for keys in ("r", "k", "d", "l", "r", "s", "k", "d", "r", "d", "k", "d"):
                row = rows_shown(page)
                # what the data holds is text, whatever it looks like
                shown = TEXTS[row][:20_000]
                assert (page.locator("#sample .text").evaluate("e => e.firstChild.data")) == (shown or "(empty)")
                assert page.locator("#given").inner_text() == NAMES[given()[row]]
                if keys == "l":
                    page.keyboard.press("l")
                    page.keyboard.type("OWL")
                    assert page.locator("#options li").all_inner_texts() == ["<b>owl</b>"]
                press(page, "Enter" if keys == "l" else keys)
                if keys == "s":
                    assert rows_shown(page) != row
                else:
                    label = {"r": (given()[row] + 1) % 3, "l": 2}.get(keys)
                    action = {"k": "keep", "d": "drop"}.get(keys, "relabel")
                    if action == "relabel" and label == given()[row]:
                        action, label = "keep", None
                    decided[row] = (action, label)
                assert page.locator("#problem").inner_text() == ""
            # one is taken back
            press(page, "u")
            del decided[rows_shown(page)]
            assert page.locator("#decided").inner_text() == "Undecided"
            assert len(decided) == 10 and page.locator("#progress").inner_text() == "10 of 14 decided"
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert {
                row: (d.action, d.label) for row, d in Decisions(folder / "decisions.sqlite").all().items()
            } == decided
            press(page, "k")
            assert "Not saved" in page.locator("#problem").inner_text()
            assert page.locator("#progress").inner_text() == "10 of 14 decided"
        errors.clear()  # of the connection that was refused
        with server(folder) as (process, address):
            page.goto(address)
            page.wait_for_selector("#sample .text")
            assert page.locator("#progress").inner_text() == "10 of 14 decided"
            press(page, "f")
            assert rows_shown(page) == min(set(range(SUSPECTS)) - set(decided))
            page.get_by_role("button", name="Outlier").click()
            expect(page.locator("#place")).to_contain_text("of 2")
            page.click("#export")
            expect(page.locator("#status")).to_contain_text("Wrote 37 rows")
            assert page.evaluate("window.ran") is None
            assert page.locator("#main script, #main img, #main b b").count() == 0
            assert not errors
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == 0
    written = pq.read_table(folder / "reviewed/train.parquet").to_pandas()
    pd.testing.assert_frame_equal(written, expected(decided), check_dtype=False)
    result = run(folder, "--export", tmp_path / "new")
    assert result.exit_code == 0, result.stderr
    assert pq.read_table(tmp_path / "new/train.parquet").equals(pq.read_table(folder / "reviewed/train.parquet"))


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_a_browser_shows_pictures_and_plays_sounds(tmp_path, modality):
    folder, errors = make_folder(tmp_path, modality, checkpoints=3), []
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    read, decisions = read_folder(folder), Decisions(folder / "decisions.sqlite")
    config = uvicorn.Config(application(read, decisions, TOKEN, port), ws="none", lifespan="off", log_level="warning")
    serving = uvicorn.Server(config)
    thread = threading.Thread(target=serving.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        with browser() as chromium:
            page = chromium.new_page()
            page.on("console", lambda m: errors.append(m.text) if m.type in ("error", "warning") else None)
            page.goto(f"http://127.0.0.1:{port}/?token={TOKEN}")
            page.wait_for_selector("#sample > *")
            assert page.locator("#map circle").count() == 20
            assert page.locator("#against li, #for li").count() == NEAR
            if modality == "image":
                images = page.locator("#sample img, .neighbours img")
                expect(images).to_have_count(NEAR + 1)
                for image in images.all():
                    assert image.evaluate("e => e.decode().then(() => e.naturalWidth)") == 32
            else:
                page.wait_for_selector("#sample audio[src^='blob:']")
                sound = page.locator("#sample audio")
                sound.evaluate("e => e.duration || new Promise(done => (e.ondurationchange = done))")
                assert sound.evaluate("e => e.duration") == pytest.approx(0.25)
                page.locator(".neighbours button.play").first.click()
                page.wait_for_selector(".neighbours audio[src^='blob:']")
            assert not errors
    finally:
        serving.should_exit = True
        thread.join(10)
        decisions.close()


def test_no_browser_is_a_skip_or_where_it_is_required_a_failure(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("DATAOPT_REQUIRE_BROWSER", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no browser"):
        browser_path()
    monkeypatch.setenv("DATAOPT_REQUIRE_BROWSER", "1")
    with pytest.raises(pytest.fail.Exception, match="no browser"):
        browser_path()
