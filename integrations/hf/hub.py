"""Saved things in a folder or on the Hub: found, read with care, and pushed in one commit."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash
from dataopt.core.artifacts import member as member
from dataopt.core.artifacts import write_whole
from huggingface_hub import HfApi, ModelCard, ModelCardData, snapshot_download

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def find(
    source: str | Path,
    patterns: Sequence[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    repo_type: str = "model",
) -> Path:
    """The folder that ``source`` names; of a Hub repository, a snapshot with the files that match ``patterns``.

    Raises:
        ValueError: no such folder and no repository id either, or a revision of a folder.
        The errors of huggingface_hub: an unknown repository or revision, no access, no connection.
    """
    folder = Path(source)
    if source != "" and folder.is_dir():
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for the Hub and {str(source)!r} is a folder here; leave it out")
        return folder
    if isinstance(source, Path) or folder.exists() or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source):
        raise ValueError(f"{str(source)!r} is no folder; give one that was saved to, or a Hub repository id")
    return Path(
        snapshot_download(
            source,
            repo_type=repo_type,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_patterns=list(patterns),
        )
    )


def check_folder(folder: Path) -> None:
    """Raises ValueError where a folder to save to is a file."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"save_directory={str(folder)!r} is a file; give a folder")


def write_record(path: Path, kind: str, version: int, content: dict[str, Any]) -> None:
    """Write a JSON file that says what it is and carries a checksum of itself.

    Raises:
        ValueError: content that JSON cannot hold.
    """
    record = {"kind": kind, "format_version": version, **content}
    try:
        record = {**record, "checksum": _checksum(record)}
        text = json.dumps(record, indent=1, allow_nan=False)
    except (TypeError, ValueError) as e:
        raise ValueError(f"{path.name} cannot be written as JSON: {e}") from e
    write_whole(path, text + "\n")


def read_record(path: Path, kind: str, version: int) -> dict[str, Any]:
    """Read what :func:`write_record` wrote.

    Raises:
        ValueError: no JSON, another kind, a newer format, or content that was changed since.
    """
    try:
        record = json.loads(path.read_bytes())
        written = record.pop("checksum", None) if isinstance(record, dict) else None
        unchanged = written == _checksum(record)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is damaged ({type(e).__name__}); save or download it again") from e
    if not isinstance(record, dict) or record.get("kind") != kind:
        found = record.get("kind") if isinstance(record, dict) else None
        raise ValueError(f"{path} is of another kind ({found!r:.80}, not {kind!r}); give the file that dataopt saved")
    found = record.get("format_version")
    if type(found) is not int or found < 1:
        raise ValueError(f"{path} has format_version {found!r:.80}; save or download it again")
    if found > version:
        raise ValueError(f"{path} has the newer format {found}, and this dataopt reads {version}; update dataopt")
    if not unchanged:
        raise ValueError(f"{path} was changed after it was saved, or is damaged; save or download it again")
    return record


def _checksum(record: Any) -> str:
    return f"{zlib.crc32(json.dumps(record, sort_keys=True).encode()):08x}"


def file_checksum(path: Path) -> str:
    """Not cryptographic: it finds accidents, at the speed of memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def base_model(model: PreTrainedModel) -> str | None:
    """The Hub id that the model was loaded from; None where it came from a folder or a config."""
    name = str(getattr(model.config, "_name_or_path", "") or "")
    return name if REPO_ID.fullmatch(name) and not Path(name).exists() else None


def card(title: str, body: str, tags: Sequence[str], base: str | None) -> str:
    """The text of a README with the Hub's metadata above it."""
    data = ModelCardData(library_name="dataopt", tags=["dataopt", *tags], base_model=base)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{body}"))


def full_id(repo_id: str, token: str | bool | None = None) -> str:
    """With the user's name before a bare name, as the Hub takes it when it makes a repository; others stay."""
    return repo_id if "/" in repo_id else f"{HfApi(token=token).whoami()['name']}/{repo_id}"


def push(
    write: Callable[[Path], None],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    delete_patterns: Sequence[str] = (),
    repo_type: str = "model",
    **kwargs: Any,
) -> str:
    """Write files into a temporary folder and upload them to a repository, in one commit.

    What ``write`` refuses leaves the Hub as it was.

    Args:
        write: called with the folder.
        private: of a repository that this makes; True also refuses one that is public already.
        delete_patterns: older files that this commit replaces.
        repo_type: ``"model"`` or ``"dataset"``.
        kwargs: for ``HfApi.upload_folder``.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        ValueError: ``private=True`` and a public repository.
    """
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        repo_id = api.create_repo(repo_id, private=private, repo_type=repo_type, exist_ok=True).repo_id
        if private and not api.repo_info(repo_id, repo_type=repo_type).private:
            raise ValueError(f"{repo_id} is public and private=True; choose another repository, or say private=False")
        commit = api.upload_folder(
            repo_id=repo_id,
            repo_type=repo_type,
            folder_path=folder,
            delete_patterns=list(delete_patterns) or None,
            **kwargs,
        )
    return commit.pr_url or commit.commit_url
