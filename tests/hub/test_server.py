"""The local Hub against the unmodified huggingface_hub and datasets clients."""

import hashlib
import json
import os
import urllib.error
import urllib.request
from typing import Any

import pytest
from dataopt.local_hub import Hub
from dataopt.local_hub.repos import File, Repo

from tests.hub.fixtures import run_client

# Every snippet prints one JSON value; `kind(call)` is the class name of what a call raises, or "fine".
HEAD = """
import json, os
from pathlib import Path
from huggingface_hub import HfApi, HfFileSystem, hf_hub_download, snapshot_download
from huggingface_hub import CommitOperationAdd as Add, CommitOperationDelete as Delete
api = HfApi()
def kind(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as error:
        return type(error).__name__
    return "fine"
def show(value):
    print(json.dumps(value))
"""


def client(hub: Hub, code: str, **env: str | None) -> Any:
    return json.loads(run_client(hub, HEAD + code, **env))


def test_round_trip_with_revisions(hub, tmp_path):
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    contents = {"weights.bin": bytes(range(256)) * 40, "sub/deep/ä b.json": b"{}", "empty.txt": b""}
    for path, data in contents.items():
        (tmp_path / path).write_bytes(data)
    code = """
me = api.whoami()["name"]
url = api.create_repo("me/model")
again = api.create_repo("me/model", exist_ok=True) == url
first = api.upload_folder(repo_id="me/model", folder_path=os.environ["FOLDER"], commit_message="first").oid
api.create_tag("me/model", tag="v1")
api.create_branch("me/model", branch="try/one")
second = api.create_commit("me/model", commit_message="second", parent_commit=first, operations=[
    Add("weights.bin", b"new"), Delete("sub/", is_folder=True)]).oid
stale = kind(api.create_commit, "me/model", commit_message="third", parent_commit=first, operations=[Add("x", b"x")])
same = api.upload_file(repo_id="me/model", path_in_repo="weights.bin", path_or_fileobj=b"new").oid
api.upload_file(repo_id="me/model", path_in_repo="on_branch", path_or_fileobj=b"b", revision="try/one")
folder = Path(snapshot_download("me/model", revision="v1"))
tree = {str(p.relative_to(folder)): p.read_bytes().hex() for p in folder.rglob("*") if p.is_file()}
api.delete_tag("me/model", tag="v1")
refs = api.list_repo_refs("me/model")
paths = api.get_paths_info("me/model", ["weights.bin", "sub", "nothing"], revision=first)
show({
    "me": me, "url": url, "again": again, "first": first, "second": second, "stale": stale, "same": same,
    "tree": tree, "folder": folder.name,
    "by_revision": {name: Path(hf_hub_download("me/model", "weights.bin", revision=name)).read_bytes().hex()
                    for name in ("main", "try/one", first, second)},
    "titles": [c.title for c in api.list_repo_commits("me/model")],
    "branches": {b.name: b.target_commit for b in refs.branches}, "tags": [t.name for t in refs.tags],
    "paths": [type(p).__name__ + " " + p.path for p in paths],
    "top": [p.path for p in api.list_repo_tree("me/model", revision=first)],
    "inside": [p.path for p in api.list_repo_tree("me/model", "sub", revision=first, recursive=True)],
    "info": [(s.rfilename, s.size) for s in api.model_info("me/model", files_metadata=True).siblings],
})
"""
    got = client(hub, code, FOLDER=str(tmp_path))
    everything = {**contents, ".gitattributes": hub.files("me/model")[".gitattributes"]}
    assert got["me"] == "me" and got["url"] == f"{hub.url}/me/model" and got["again"]
    assert {path: bytes.fromhex(data) for path, data in got["tree"].items()} == everything
    assert got["folder"] == got["first"] != got["second"] == got["same"]
    old, new = contents["weights.bin"].hex(), b"new".hex()
    assert got["by_revision"] == {"main": new, "try/one": old, got["first"]: old, got["second"]: new}
    assert got["stale"] == "HfHubHTTPError"
    assert got["titles"] == ["second", "first", "initial commit"]
    assert got["branches"]["main"] == got["second"] and got["tags"] == []
    assert got["paths"] == ["RepoFile weights.bin", "RepoFolder sub"]
    assert got["top"] == [".gitattributes", "empty.txt", "sub", "weights.bin"]
    assert got["inside"] == ["sub/deep", "sub/deep/ä b.json"]
    assert got["info"] == [[".gitattributes", len(everything[".gitattributes"])], ["empty.txt", 0], ["weights.bin", 3]]
    assert set(hub.files("me/model", revision="try/one")) == {*everything, "on_branch"}
    assert hub.files("me/model", revision=got["first"]) == everything


def test_who_may_do_what(hub):
    code = """
os.chdir(os.environ["HF_HOME"])  # for the caches, one for each reader
for name in ("me/private", "me/gated", "me/public"):
    api.create_repo(name, repo_type="dataset", private=name == "me/private")
    api.upload_file(repo_id=name, repo_type="dataset", path_in_repo="a.txt", path_or_fileobj=b"a")
api.update_repo_settings("me/gated", repo_type="dataset", gated="auto")
answers = {}
for who, token in {"me": None, "other": os.environ["OTHER"], "nobody": False, "wrong": "no-such-token"}.items():
    for name in ("private", "gated", "public", "missing"):
        repo = dict(repo_id="me/" + name, repo_type="dataset", token=token)
        answers[f"{who} {name}"] = [
            kind(api.dataset_info, "me/" + name, token=token),
            kind(hf_hub_download, filename="a.txt", cache_dir=who, **repo),
            kind(api.upload_file, path_in_repo="b.txt", path_or_fileobj=b"b", **repo),
        ]
public = dict(repo_id="me/public", repo_type="dataset")
answers["revision"] = [kind(hf_hub_download, filename="a.txt", revision="v9", **public),
                       kind(api.dataset_info, "me/public", revision="v9")]
answers["file"] = [kind(hf_hub_download, filename="b/c.txt", **public),
                   kind(api.delete_file, "b/c.txt", **public)]
answers["type"] = kind(api.model_info, "me/public")
answers["namespace"] = kind(api.create_repo, "other/mine")
answers["delete"] = [kind(api.delete_repo, "me/public", repo_type="dataset", token=os.environ["OTHER"]),
                     kind(api.delete_repo, "me/public", repo_type="dataset"), kind(api.dataset_info, "me/public")]
show(answers)
"""
    got = client(hub, code, OTHER=hub.other_token)
    missing, http = "RepositoryNotFoundError", "HfHubHTTPError"
    assert got["me private"] == got["me gated"] == got["me public"] == ["fine"] * 3
    assert got["me missing"] == got["other missing"] == got["nobody missing"] == [missing] * 3
    assert got["other private"] == got["nobody private"] == [missing] * 3
    assert got["other gated"] == ["fine", "GatedRepoError", http]
    assert got["nobody gated"] == ["fine", "GatedRepoError", missing]
    assert got["other public"] == ["fine", "fine", http] and got["nobody public"] == ["fine", "fine", missing]
    assert got["wrong public"][0] == got["wrong public"][2] == http and got["wrong public"][1] != "fine"
    assert got["revision"] == ["RevisionNotFoundError"] * 2
    assert got["file"] == ["RemoteEntryNotFoundError"] * 2
    assert got["type"] == missing and got["namespace"] == http
    assert got["delete"] == [http, "fine", missing]
    assert set(hub.repos) == {("dataset", "me/private"), ("dataset", "me/gated")}
    hub.repo("me/gated", "dataset").granted.add("other")
    code = 'show(Path(hf_hub_download("me/gated", "a.txt", repo_type="dataset")).read_text())'
    assert client(hub, code, HF_TOKEN=hub.other_token) == "a"


def test_cut_commit_leaves_nothing_and_can_be_repeated(hub):
    hub.fail(r"POST .*/commit/", "cut")
    hub.fail(r"GET /api/models/me/model/refs", 500)
    hub.fail(r"POST .*/preupload/", 503)
    code = """
api.create_repo("me/model")
before = api.model_info("me/model").sha
def commit():
    api.create_commit("me/model", commit_message="both", operations=[Add("a", b"a" * 300_000), Add("b", b"b")])
failed = kind(commit)
between = api.model_info("me/model")
show([failed, between.sha == before, [s.rfilename for s in between.siblings], kind(commit),
      kind(api.list_repo_refs, "me/model"), kind(api.list_repo_refs, "me/model")])
"""
    failed, unchanged, siblings, repeated, *refs = client(hub, code)
    assert failed in ("RemoteProtocolError", "ReadError", "WriteError")
    assert unchanged and siblings == [".gitattributes"] and repeated == "fine"
    assert hub.files("me/model").keys() == {".gitattributes", "a", "b"}
    assert hub.files("me/model")["a"] == b"a" * 300_000
    assert [commit.title for _, commit in hub.repo("me/model").history()] == ["both", "initial commit"]
    assert sum("/preupload/" in line for line in hub.requests) == 3  # 503 is tried again, then the second call
    assert refs == ["HfHubHTTPError", "fine"]


def test_finished_lfs_files_are_not_sent_again(hub, tmp_path):
    hub.lfs = True
    data = {"one.safetensors": b"1" * 200_000, "two.safetensors": b"2" * 200_000, "config.json": b"{}"}
    for path, content in data.items():
        (tmp_path / path).write_bytes(content)
    oid = {path: hashlib.sha256(content).hexdigest() for path, content in data.items()}
    hub.fail(f"PUT .*/{oid['one.safetensors']}", "cut")  # the client sends this one again by itself
    hub.fail(f"PUT .*/{oid['two.safetensors']}", 403)  # and gives up over this one
    code = """
def upload():
    api.upload_folder(repo_id="me/model", folder_path=os.environ["FOLDER"])
api.create_repo("me/model")
first = kind(upload)
files = api.list_repo_files("me/model")
second = kind(upload)
info = api.model_info("me/model", files_metadata=True)
folder = Path(snapshot_download("me/model"))
show({"first": first, "files": files, "second": second,
      "lfs": {s.rfilename: s.lfs.sha256 for s in info.siblings if s.lfs},
      "tree": {p.path: p.lfs.sha256 for p in api.list_repo_tree("me/model") if p.lfs},
      "down": {p.name: len(p.read_bytes()) for p in folder.iterdir()},
      "blob": (folder / "one.safetensors").resolve().name})
"""
    got = client(hub, code, FOLDER=str(tmp_path))
    assert got["first"] == "RuntimeError" and got["files"] == [".gitattributes"] and got["second"] == "fine"
    sent = [line.split("/")[-1] for line in hub.requests if line.startswith("PUT ")]
    assert {path: sent.count(oid[path]) for path in data} == {
        "one.safetensors": 2,  # cut and repeated in the first call, known in the second
        "two.safetensors": 2,  # refused in the first call, sent in the second
        "config.json": 0,  # in the commit itself
    }
    large = {path: oid[path] for path in ("one.safetensors", "two.safetensors")}
    assert got["lfs"] == got["tree"] == large and got["blob"] == oid["one.safetensors"]
    assert got["down"] == {path: len(content) for path, content in hub.files("me/model").items()}
    assert {path: hub.files("me/model")[path] for path in data} == data
    assert len(hub.repo("me/model").history()) == 2


def test_lfs_content_must_match_its_hash_and_be_there(hub):
    hub.lfs = True
    code = """
api.create_repo("me/model")
wrong = Add("a.bin", b"one")
wrong.upload_info.sha256 = bytes(32)
unsent = Add("b.bin", b"two")
unsent._is_uploaded, unsent._upload_mode = True, "lfs"
show([kind(api.create_commit, "me/model", commit_message="x", operations=[op]) for op in (wrong, unsent)])
"""
    assert client(hub, code) == ["RuntimeError", "BadRequestError"]
    assert hub.files("me/model").keys() == {".gitattributes"}


def test_cut_download_is_resumed_to_the_right_bytes(hub):
    block = 10 * 1024 * 1024  # what the client writes at a time
    hub.fail(r"GET .*/resolve/.*/small\.bin", "cut")
    hub.fail(r"GET .*/resolve/.*/large\.bin", "cut")
    data = {"small.bin": b"small" * 1000, "large.bin": os.urandom(24 * 1024 * 1024)}
    repo = hub.repos["model", "me/model"] = Repo("me/model", "model")
    repo.commit("main", "two", "", {name: File(content, lfs=True) for name, content in data.items()})
    code = """
import hashlib
paths = [Path(hf_hub_download("me/model", name)) for name in ("small.bin", "large.bin")]
show([hashlib.sha256(path.read_bytes()).hexdigest() for path in paths])
"""
    assert client(hub, code) == [hashlib.sha256(content).hexdigest() for content in data.values()]
    gets = [line.split("/")[-1] for line in hub.requests if line.startswith("GET /me/model/resolve/")]
    assert gets == ["small.bin", "small.bin", "large.bin", f"large.bin bytes={block}-"]


def get(url: str, asked: str) -> tuple[int, str | None, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Range": asked})) as answer:
            return answer.status, answer.headers["Content-Range"], answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers["Content-Range"], error.read()


def test_ranges(hub, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    repo = hub.repos["dataset", "me/data"] = Repo("me/data", "dataset")
    repo.commit("main", "digits", "", {"digits.txt": File(b"0123456789", lfs=False)})
    answers = {
        "bytes=2-4": (206, "bytes 2-4/10", b"234"),
        "bytes=7-": (206, "bytes 7-9/10", b"789"),
        "bytes=8-99": (206, "bytes 8-9/10", b"89"),
        "bytes=-3": (206, "bytes 7-9/10", b"789"),
        "bytes=10-": (416, "bytes */10", b""),
        "lines=1-2": (200, None, b"0123456789"),
    }
    assert {asked: get(f"{hub.url}/datasets/me/data/resolve/main/digits.txt", asked) for asked in answers} == answers


def test_datasets_load_and_push(hub):
    code = """
os.chdir(os.environ["HF_HOME"])
import datasets
table = datasets.Dataset.from_dict({"x": [1, 2, 3], "y": ["a", "b", "c"]})
"""
    plain = """
table.to_parquet("t.parquet")
api.create_repo("me/plain", repo_type="dataset")
api.upload_file(repo_id="me/plain", repo_type="dataset", path_in_repo="data/train.parquet", path_or_fileobj="t.parquet")
with HfFileSystem().open("datasets/me/plain/data/train.parquet") as file:
    tail = file.seek(-4, 2) and file.read().decode()
show([datasets.load_dataset("me/plain", split="train").to_dict(), tail])
"""
    columns = {"x": [1, 2, 3], "y": ["a", "b", "c"]}
    assert client(hub, code + plain) == [columns, "PAR1"]

    hub.lfs = True  # push_to_hub sends its shards before the commit, as LFS only
    pushed = """
table.push_to_hub("me/pushed", private=True)
table.select([0]).push_to_hub("me/pushed", split="test")
api.create_tag("me/pushed", tag="v1", repo_type="dataset")
table.select([1]).push_to_hub("me/pushed", split="train")
stranger = kind(datasets.load_dataset, "me/pushed", token=False)
both, tagged = datasets.load_dataset("me/pushed"), datasets.load_dataset("me/pushed", revision="v1")
show([{name: part["x"][:] for name, part in d.items()} for d in (both, tagged)] + [stranger])
"""
    now, tagged, stranger = client(hub, code + pushed)
    assert now == {"train": [2], "test": [1]} and tagged == {"train": [1, 2, 3], "test": [1]}
    assert stranger == "DatasetNotFoundError"
    assert hub.repo("me/pushed", "dataset").private
    shards = {path for path in hub.files("me/pushed", "dataset") if path.endswith(".parquet")}
    assert shards == {"data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"}


def test_card_with_yaml(hub):
    code = r"""
from huggingface_hub import ModelCard
api.create_repo("me/model")
card = ModelCard("---\nlicense: apache-2.0\ntags: [kvzip, cache]\ndate: 2024-05-06\n---\n# A model\n")
api.upload_file(repo_id="me/model", path_in_repo="README.md", path_or_fileobj=str(card).encode())
info = api.model_info("me/model")
text = ModelCard.load("me/model").text
bad = {"yaml": "---\ntags: [a\n---\n", "list": "---\n- a\n---\n", "tags": "---\ntags: a\n---\n", "none": "# no card\n"}
refused = {name: kind(api.upload_file, repo_id="me/model", path_in_repo="README.md", path_or_fileobj=content.encode())
           for name, content in bad.items() if name != "none"}
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    api.upload_file(repo_id="me/model", path_in_repo="README.md", path_or_fileobj=bad["none"].encode())
show({"license": info.card_data.license, "tags": info.tags, "date": str(info.card_data.date), "text": text,
      "refused": refused, "warned": any("empty or missing yaml" in str(w.message) for w in caught)})
"""
    got = client(hub, code)
    assert got["license"] == "apache-2.0" and got["tags"] == ["kvzip", "cache"] and got["date"] == "2024-05-06"
    assert got["text"] == "# A model\n" and got["refused"] == dict.fromkeys(("yaml", "list", "tags"), "ValueError")
    assert got["warned"]
    titles = [commit.title for _, commit in hub.repo("me/model").history()]
    assert len(titles) == 3  # the two cards that are valid, and the repo itself
    assert hub.files("me/model")["README.md"] == b"# no card\n"


def test_the_client_of_a_test_is_isolated_and_reports_failure(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", "/nowhere")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    show = "show([api.whoami()['name'], os.environ['HF_HOME'], os.environ.get('HF_HUB_CACHE')])"
    name, home, cache = client(hub, show)
    assert name == "me" and home and cache is None
    with pytest.raises(RuntimeError, match="exit status 3"):
        run_client(hub, "raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="LocalTokenNotFoundError"):
        client(hub, "api.whoami()", HF_TOKEN=None)
