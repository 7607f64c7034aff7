"""Condensed data sets on the Hub and in folders: stored images as parquet files, decoded when they are loaded."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from dataopt.core.arguments import check_choice, check_flags, check_strings
from dataopt.core.artifacts import write_whole
from dataopt.core.condense import Condensed, Scores
from datasets import Array3D, ClassLabel, Dataset, Features, Image
from huggingface_hub import _CACHED_NO_EXIST, HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

from . import hub
from .condensed_card import card
from .condensed_images import MODES, as_pictures, as_png, decode_condensed, pixels, rounding

KIND, VERSION = "dataopt condensed data set", 1
RECORD = "condensed.json"  # of a published data set, and of one that Condensed.save wrote
PNG, EXACT = "default", "exact"  # configs
_SETTINGS = ("factor", "axes", "mode", "mean", "std", "label_names", "made")
_FILES = {PNG: "train", EXACT: "exact"}
_DIGEST = "[0-9a-f]" * 16
_OURS = [f"train-{_DIGEST}.parquet", f"exact-{_DIGEST}.parquet", f"condensed-{_DIGEST}.safetensors"]
_BESIDE = re.compile(r"(\.gitattributes|README\.md|LICENSE.*)", re.IGNORECASE)  # what may be in a repository before


def save_condensed(
    condensed: Condensed,
    folder: str | Path,
    *,
    png: bool = True,
    scores: Scores | None = None,
    licence: str | None = None,
    source: str | None = None,
) -> Path:
    """Write what :func:`push_condensed` publishes into a folder, for a mirror or an upload of one's own.

    An earlier one in the folder is replaced; a kill at any moment leaves the old or the new one.

    Args:
        condensed, png, scores, licence, source: as in :func:`push_condensed`.

    Returns:
        The folder.

    Raises:
        TypeError: arguments of another type.
        ValueError: as :func:`push_condensed`, and a folder whose ``condensed.json`` or README is another's.
    """
    root = Path(folder)
    for name in (RECORD, "README.md"):
        if (root / name).exists() and not is_published(root / RECORD):
            raise ValueError(f"{root / name} is there and of no published data set; give another folder")
    _write(root, root.resolve().name, condensed, png, scores, licence, source)
    return root


def push_condensed(
    condensed: Condensed,
    repo_id: str,
    *,
    png: bool = True,
    scores: Scores | None = None,
    licence: str | None = None,
    source: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    **kwargs: Any,
) -> str:
    """Publish a condensed data set on the Hub, in one commit.

    Config ``default`` holds PNG images, rounded to 8 bits; config ``exact`` the numbers, bit for bit. Columns are
    ``image`` and ``label``. An earlier push to the repository is replaced, its README too.

    Args:
        condensed: to be published.
        repo_id: of the data set's repository, made where there is none; a bare name is the user's own.
        png: False publishes ``exact`` alone, as data that is neither grey nor colour needs.
        scores: of :func:`evaluate`, with the row of random images; for the card.
        licence: of the source data, as the Hub spells it (``"mit"``, ``"cc-by-4.0"``); for the card.
        source: name or address of the source data; for the card.
        private: of a repository that this makes; True also refuses one that is public already.
        token, revision, commit_message, kwargs: for ``HfApi.upload_folder``.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        ValueError: ``png=True`` and images of neither 1 nor 3 channels, scores without random images, label names that
            come twice, or a repository that holds something else. The errors of huggingface_hub.
    """
    repo_id = hub.full_id(repo_id, token)
    parent = _parent(repo_id, token, revision)
    if parent is not None:
        kwargs.setdefault("parent_commit", parent)  # what was looked at is what is replaced

    def write(folder: Path) -> None:
        _write(folder, repo_id, condensed, png, scores, licence, source)

    return hub.push(
        write, repo_id, private=private, token=token, delete_patterns=_OURS, repo_type="dataset", revision=revision,
        commit_message=commit_message or "Condensed data set", **kwargs,
    )  # fmt: skip


def load_condensed(
    source: str | Path,
    *,
    config: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    decode: bool = True,
) -> Dataset:
    """The images to train on, from a repository, a folder that was published to, or one of ``Condensed.save``.

    Args:
        source: repository id or folder.
        config: ``"default"``, PNG images, or ``"exact"``; None is the first that there is.
        revision, token, cache_dir, local_files_only: for the Hub.
        decode: False gives the stored images.

    Returns:
        Columns ``image`` and ``label``, n' rows; those of one stored image stand together. Images are PIL images, or of
        ``exact`` (C, H, W) float32 tensors in [0, 1] (the data set has the format ``"torch"`` then).

    Raises:
        FileNotFoundError: no condensed data set there.
        ValueError: files that are cut short, changed or damaged; the message says what differs. Another config.
        The errors of huggingface_hub for a repository.
    """
    stored, condensed = _read(source, config, revision, token, cache_dir, local_files_only)
    exact = not isinstance(stored.features["image"], Image)
    if not decode:
        return stored.with_format("torch") if exact else stored
    decoded = stored.with_format("numpy" if exact else None).map(
        decode_condensed,
        batched=True,
        batch_size=64,
        fn_kwargs={"factor": condensed.factor, "axes": condensed.axes, "mode": condensed.mode},
        features=stored.features,
        desc="decoding",
    )
    return decoded.with_format("torch" if exact else None)


def read_condensed(
    source: str | Path,
    *,
    config: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Condensed:
    """The :class:`Condensed` that was published or saved; arguments and errors are those of :func:`load_condensed`.

    Config ``exact`` gives the images bit for bit, ``default`` as 8 bits hold them; None is ``exact`` for a folder of
    ``Condensed.save``.
    """
    return _read(source, config, revision, token, cache_dir, local_files_only)[1]


def is_condensed(
    source: str, *, revision: str | None = None, token: str | bool | None = None, cache_dir: str | Path | None = None
) -> bool:
    """Whether a folder or a repository holds a condensed data set; False where there is no such thing at all.

    One whose ``condensed.json`` cannot be read is True: :func:`load_condensed` says what is wrong with it.

    Raises:
        LocalEntryNotFoundError: the Hub cannot be asked, and its cache does not know.
    """
    if Path(source).is_dir():
        path: Path | None = Path(source, RECORD)
    elif not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source):
        return False
    else:
        path = _downloaded(source, revision, token, cache_dir)
    return path is not None and os.path.lexists(path) and (_json(path) is None or is_published(path) or _is_saved(path))


def is_published(path: Path) -> bool:
    """Whether :func:`save_condensed` or :func:`push_condensed` wrote this ``condensed.json``."""
    return (_json(path) or {}).get("kind") == KIND


def _write(
    root: Path, name: str, condensed: Condensed, png: bool, scores: Scores | None, licence: str | None,
    source: str | None,
) -> None:  # fmt: skip
    if not isinstance(condensed, Condensed) or not isinstance(scores, Scores | None):
        raise TypeError(
            f"condensed is a {type(condensed).__name__} and scores a {type(scores).__name__}; give a Condensed, and "
            "the Scores of evaluate or None"
        )
    check_flags(png=png)
    check_strings(**{k: v for k, v in (("licence", licence), ("source", source)) if v is not None})
    channels = condensed.images.shape[1]
    if png and channels not in MODES:
        raise ValueError(
            f"png=True and the images have {channels} channels, where PNG holds 1 (grey) or 3 (colour); "
            "png=False publishes the exact numbers alone"
        )
    if scores is not None and "random" not in {row.data for row in scores.rows}:
        raise ValueError("scores has no row of random images to compare with; evaluate with 'random' in baselines")
    for argument, value in (("licence", licence), ("source", source)):
        if value is not None and (not value.strip() or "\n" in value):
            raise ValueError(f"{argument}={value!r} must be one line of text; leave it out where it is not known")
    names = condensed.label_names or ()
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise ValueError(f"label_names has {twice!r} twice; give each class a name of its own")
    files, contents = {}, {}
    for config in (PNG, EXACT) if png else (EXACT,):
        buffer = io.BytesIO()
        stored = _stored(condensed, config)
        table = stored.data.table.combine_chunks()
        pq.write_table(table.replace_schema_metadata(stored.features.arrow_schema.metadata), buffer)
        content = buffer.getvalue()
        digest = hashlib.sha256(content).hexdigest()
        file = f"{_FILES[config]}-{digest[:16]}.parquet"
        files[config], contents[file] = {"file": file, "bytes": len(content), "sha256": digest}, content
    record = {
        **{name: getattr(condensed, name) for name in _SETTINGS},
        "images": len(condensed.images),
        "decoded": sum(condensed.formation.counts(len(condensed.images))),
        "shape": list(condensed.images.shape[1:]),
        "rounding": rounding(condensed) if png else None,
        "scores": None if scores is None else dataclasses.asdict(scores),
        "licence": licence,
        "source": source,
        "files": files,
    }
    try:
        record = json.loads(json.dumps(record, allow_nan=False))  # as it is read back: lists for tuples
    except (TypeError, ValueError) as e:
        raise ValueError(f"made holds what JSON cannot ({e}); leave it out") from e
    text = card(name, record)
    for file, content in contents.items():
        write_whole(root / file, content)
    hub.write_record(root / RECORD, KIND, VERSION, record)
    write_whole(root / "README.md", text)
    for old in [path for pattern in _OURS for path in root.glob(pattern)]:
        if old.name not in contents:
            old.unlink()


def _stored(condensed: Condensed, config: str) -> Dataset:
    """The stored images in memory."""
    x = condensed.images
    images = as_pictures(x) if config == PNG else list(x.cpu().numpy())
    features = _features(config, tuple(x.shape[1:]), condensed.label_names, condensed.classes)
    return Dataset.from_dict({"image": images, "label": condensed.labels.tolist()}, features=features)


def _features(config: str, shape: tuple[int, ...], names: tuple[str, ...] | None, classes: int) -> Features:
    label = ClassLabel(num_classes=classes) if names is None else ClassLabel(names=list(names))
    return Features({"image": Image() if config == PNG else Array3D(shape, "float32"), "label": label})


def _is_saved(path: Path) -> bool:
    """Whether ``Condensed.save`` wrote this ``condensed.json``."""
    record = (_json(path) or {}).get("record")
    return isinstance(record, dict) and record.get("kind") == "condensed"


def _json(path: Path) -> dict[str, Any] | None:
    """The content of a record, empty where it is another's; None where it cannot be read."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else {}


def _downloaded(
    repo_id: str, revision: str | None, token: str | bool | None, cache_dir: str | Path | None = None
) -> Path | None:
    """The record of a repository; None where the Hub, or the last that its cache knows of it, has none."""
    try:
        return Path(
            hf_hub_download(repo_id, RECORD, repo_type="dataset", revision=revision, token=token, cache_dir=cache_dir)
        )
    except LocalEntryNotFoundError:
        if try_to_load_from_cache(repo_id, RECORD, cache_dir, revision, "dataset") is _CACHED_NO_EXIST:
            return None
        raise
    except (EntryNotFoundError, RepositoryNotFoundError):
        return None


def _parent(repo_id: str, token: str | bool | None, revision: str | None) -> str | None:
    """The newest commit of a repository that may be pushed to; None where there is no repository yet."""
    try:
        info = HfApi(token=token).dataset_info(repo_id, revision=revision)
    except RepositoryNotFoundError:
        return None
    files = [entry.rfilename for entry in info.siblings or ()]
    other = next((name for name in files if not _BESIDE.fullmatch(name)), None)
    path = None if other is None else _downloaded(repo_id, info.sha, token)
    if other is not None and (path is None or not (is_published(path) or _is_saved(path))):
        raise ValueError(
            f"{repo_id} holds {other} and is no condensed data set, which this push would replace; give a repository "
            "of its own"
        )
    return info.sha


def _read(
    source: str | Path,
    config: str | None,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | Path | None,
    local_files_only: bool,
) -> tuple[Dataset, Condensed]:
    """The stored images of a config, and all that belongs to them."""
    check_choice((None, PNG, EXACT), config=config)

    def find(patterns: list[str], at: str | None) -> Path:
        return hub.find(
            source, patterns, revision=at, token=token, cache_dir=cache_dir, local_files_only=local_files_only,
            repo_type="dataset",
        )  # fmt: skip

    root = find([RECORD, "condensed-*.safetensors"], revision)
    if not os.path.lexists(root / RECORD):
        where = " in the cache" if local_files_only and not Path(source).is_dir() else ""
        raise FileNotFoundError(
            f"{str(source)!r} holds no condensed data set{where}: it has no {RECORD}; give one that was pushed or saved"
        )
    path = hub.member(root, RECORD)
    if _is_saved(path):
        return _saved(root, config)
    record = hub.read_record(path, KIND, VERSION)
    config, file, size, digest = _entry(root, record, config)
    if not Path(source).is_dir():
        root = find([file], root.name)  # of the commit whose record was read
    stored = _table(root, file, size, digest)
    return stored, _condensed(root, record, config, file, stored)


def _saved(root: Path, config: str | None) -> tuple[Dataset, Condensed]:
    """A folder of ``Condensed.save``, as if it had been published."""
    condensed = Condensed.load(root)
    channels = condensed.images.shape[1]
    if config == PNG and channels not in MODES:
        raise ValueError(f"config={PNG!r} is of PNG images, which have no {channels} channels; give {EXACT!r}")
    stored = _stored(condensed, config or (PNG if channels in MODES else EXACT))
    return stored, as_png(condensed) if config == PNG else condensed


def _entry(root: Path, record: dict[str, Any], config: str | None) -> tuple[str, str, int, str]:
    """A config of a record, its first for None: name, file, bytes and SHA-256."""
    try:
        files = record["files"]
        config = config or next(name for name in (PNG, EXACT) if name in files)
        if config not in files:
            raise ValueError(f"config={config!r} is not among those of {root}; choose one of {', '.join(files)}")
        file, size, digest = (files[config][key] for key in ("file", "bytes", "sha256"))
        if not re.fullmatch(_FILES[config] + r"-[0-9a-f]{16}\.parquet", file, re.ASCII):
            raise TypeError(f"the file {file!r:.80}")
        if type(size) is not int or not isinstance(digest, str):
            raise TypeError(f"bytes={size!r:.40}, sha256={digest!r:.80}")
        return config, file, size, digest
    except (KeyError, TypeError, AttributeError, StopIteration) as e:
        raise _bad_record(root, e) from e


def _condensed(root: Path, record: dict[str, Any], config: str, file: str, stored: Dataset) -> Condensed:
    """The data set, where its file is what the record says."""
    try:
        made = {name: record[name] for name in _SETTINGS}
        made |= {name: tuple(made[name]) for name in ("mean", "std", "label_names") if made[name] is not None}
        shape = tuple(record["shape"])
        labels = torch.tensor(stored.with_format("arrow")["label"].to_pylist())
        expected = _features(config, shape, made["label_names"], int(labels.max()) + 1)
        if stored.features != expected or len(stored) != record["images"]:
            raise ValueError(f"{file} has {len(stored)} rows of {stored.features}, not of {expected}")
        if config == PNG and any(row["bytes"] is None for row in stored.with_format("arrow")["image"].to_pylist()):
            raise ValueError(f"{file} names images elsewhere and does not hold them")
        images = pixels(stored.with_format("numpy")["image"] if config == EXACT else stored["image"], file)
        if tuple(images.shape[1:]) != shape:
            raise ValueError(f"{file} has images of {tuple(images.shape[1:])}, not {shape}")
        return Condensed(images, labels, **{**made, "made": dict(made["made"])})
    except Exception as e:  # PIL, pyarrow and torch raise errors of many kinds
        raise _bad_record(root, e) from e


def _bad_record(root: Path, e: BaseException) -> ValueError:
    what = f"{type(e).__name__}: {e}" if not isinstance(e, ValueError) else e
    return ValueError(f"{root / RECORD} is no record of a condensed data set ({what}); save or download it again")


def _table(root: Path, file: str, size: int, digest: str) -> Dataset:
    """A parquet file of the folder, if it is the one that the record describes."""
    path = root / file
    if not os.path.lexists(path):
        raise ValueError(f"{root} lacks {file}, which {RECORD} names; save or download it again")
    content = hub.member(root, file).read_bytes()
    if len(content) != size:
        raise ValueError(f"{path} has {len(content)} bytes where {RECORD} says {size}; save or download it again")
    found = hashlib.sha256(content).hexdigest()
    if found != digest:
        raise ValueError(
            f"{path} has the checksum {found[:16]} where {RECORD} says {digest[:16]}; save or download it again"
        )
    try:
        return Dataset(pq.read_table(io.BytesIO(content)))
    except Exception as e:  # pyarrow and datasets raise errors of many kinds
        raise ValueError(f"{path} cannot be read as a parquet file ({e}); save or download it again") from e
