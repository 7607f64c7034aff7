"""What the local Hub keeps: repos, commits and files, and how the Hub's API describes a file."""

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import yaml

FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)


class HubError(Exception):
    """An answer other than success; `code` is what the client turns into its own exception classes."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message.encode("ascii", "replace").decode()}
        if code:
            self.headers["X-Error-Code"] = code
        self.headers |= {name.replace("_", "-"): value for name, value in headers.items()}


@dataclass(frozen=True)
class File:
    """One version of a file. LFS files are known by their SHA-256, the others by their git hash."""

    data: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def blob(self) -> bytes:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        return pointer.encode() if self.lfs else self.data

    @cached_property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.blob) + self.blob).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid


@dataclass(frozen=True)
class Commit:
    parent: str | None
    title: str
    message: str
    date: str
    files: dict[str, File]


@dataclass
class Repo:
    """A model or dataset repo; every change is one commit, put in place in a single step."""

    id: str
    type: str
    private: bool = False
    gated: str | bool = False
    granted: set[str] = field(default_factory=set)  # users who may read the files of a gated repo
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # LFS uploads by SHA-256, committed or not

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    def commit(self, branch: str, title: str, message: str, files: dict[str, File]) -> str:
        parent = self.branches.get(branch)
        date = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        tree = [(path, file.git_oid) for path, file in sorted(files.items())]
        oid = hashlib.sha1(repr((parent, title, message, date, tree)).encode()).hexdigest()
        self.commits[oid] = Commit(parent, title, message, date, files)
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str:
        """The full hash that a branch, a tag or a full hash stands for."""
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    def history(self, revision: str = "main") -> list[tuple[str, Commit]]:
        """(hash, commit) from the newest to the first."""
        oid: str | None = self.resolve(revision)
        log = []
        while oid is not None:
            log.append((oid, self.commits[oid]))
            oid = self.commits[oid].parent
        return log


def card(content: str) -> tuple[dict[str, Any], list[str]]:
    """The metadata of a README and what is wrong with it."""
    match = FRONT_MATTER.match(content)
    if match is None:
        return {}, []
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return {}, [f"YAML metadata is invalid: {error}"]
    if not isinstance(data, dict):
        return {}, ["YAML metadata must be a mapping"]
    tags = data.get("tags", [])
    bad = not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags)
    data = json.loads(json.dumps(data, default=str))  # YAML has dates, JSON does not
    return data, ['"tags" must be an array of strings'] if bad else []


def path_info(commit: Commit, path: str) -> dict[str, Any]:
    file = commit.files.get(path)
    if file is None:  # a folder: its hash only has to follow its content
        tree = [(name, f.git_oid) for name, f in sorted(commit.files.items()) if name.startswith(f"{path}/")]
        return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(repr(tree).encode()).hexdigest()}
    info = {"type": "file", "path": path, "size": len(file.data), "oid": file.git_oid}
    return info | ({"lfs": lfs_info(file, "oid")} if file.lfs else {})


def lfs_info(file: File, key: str) -> dict[str, Any]:
    return {key: file.sha256, "size": len(file.data), "pointerSize": len(file.blob)}


def folders(commit: Commit) -> set[str]:
    return {path[:i] for path in commit.files for i, char in enumerate(path) if char == "/"}


def changed(files: dict[str, File], objects: dict[str, bytes], operations: list[dict[str, Any]]) -> dict[str, File]:
    """The files after the operations of a commit; `files` itself stays as it is."""
    files = dict(files)
    for operation in operations:
        key, value = operation["key"], operation["value"]
        path = value["path"]
        if key == "file":
            files[path] = File(base64.b64decode(value["content"]), lfs=False)
        elif key == "lfsFile":
            if value["oid"] not in objects:
                raise HubError(400, f"{path} points to an LFS object that was not uploaded")
            files[path] = File(objects[value["oid"]], lfs=True)
        elif key in ("deletedFile", "deletedFolder"):
            folder = path.rstrip("/") + "/"
            gone = [p for p in files if (p == path if key == "deletedFile" else p.startswith(folder))]
            if not gone:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del files[name]
        else:
            raise HubError(400, f"unknown operation {key}")
    return files
