"""Condensed data sets in timm training: decoded before timm's transforms, whose reader would show the stored tiles.

``hfds/ID`` or ``hfds/FOLDER``, given as timm's ``--dataset`` or in the place of its ``DIR``, or the folder as ``DIR``.
Validation images come from another data set: ``--val-dataset``, ``--val-data-dir``.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from timm.data import ImageDataset
from timm.data.readers.reader import Reader

from .options import read_config, stop

_logger = logging.getLogger(__name__)

_READERS = ("hfds", "hfids")  # timm's, of the Hub
_OTHERS = ("torch", "tfds", "wds")
_PLACES = ("dataset", "data", "data_dir", "val_dataset", "val_data_dir")  # options that name data
_TRAIN = ("train", "training")
_RECORD = "condensed.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--val-dataset`` and ``--val-data-dir``."""
    group = parser.add_argument_group(
        "Validation data (dataopt)",
        "A condensed data set (hfds/ID, or a folder) is decoded before timm's transforms; it has training images only.",
    )
    group.add_argument("--val-dataset", default="", metavar="NAME", help="validate on this, as --dataset names it")
    group.add_argument("--val-data-dir", metavar="DIR", help="validate on this folder, as --data-dir names it")


def mentioned(argv: Sequence[str]) -> bool:
    """Whether a command line, or the ``-c`` file that it names, may be about a condensed data set."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("-c", "--config")
    given, rest = peek.parse_known_args(list(argv))
    values = [value for word in rest for value in (word, word.partition("=")[2])]
    if given.config:
        config = read_config(given.config)
        values += [str(config[name]) for name in _PLACES if config.get(name)]
        values += [name for name in ("--val-dataset", "--val-data-dir") if config.get(name[2:].replace("-", "_"))]
    return any(
        value.startswith("--val-data") or value.partition("/")[0].lower() in _READERS or _is_folder(value)
        for value in values
        if value
    )


def adopt(args: argparse.Namespace) -> None:
    """Take ``hfds/ID`` in the place of ``DIR`` as the data set."""
    if args.data and args.data.partition("/")[0].lower() in _READERS and not args.dataset:
        args.dataset, args.data = args.data, None


def teach(script: ModuleType, path: Path) -> None:
    """Teach timm's script to decode, and to validate on another data set."""
    missing = [name for name in ("parser", "_parse_args", "create_dataset") if not hasattr(script, name)]
    if missing:
        stop(
            f"{path} has no {', '.join(missing)}, so it is no train.py that dataopt knows; take that of another "
            "version of timm, or run without --train-script"
        )
    parse, create = script._parse_args, script.create_dataset
    add_arguments(script.parser)

    def parse_args() -> tuple:
        args, *more = parse()
        adopt(args)
        script.create_dataset = with_condensed(create, args)  # type: ignore[attr-defined]
        return args, *more

    script._parse_args = parse_args  # type: ignore[attr-defined]


def with_condensed(create: Callable[..., Any], args: argparse.Namespace) -> Callable[..., Any]:
    """timm's ``create_dataset``, decoding what is condensed.

    Args:
        create: timm's function.
        args: with ``val_dataset`` and ``val_data_dir``.
    """
    classes: dict[str, int] = {}  # of the condensed data

    def create_dataset(name: str, root: str | None = None, split: str = "validation", **kwargs: Any) -> Any:
        training = kwargs.get("is_training", False)
        elsewhere = not training and (args.val_dataset or args.val_data_dir)
        if elsewhere:
            name, root = args.val_dataset, args.val_data_dir
        source = _condensed(name, root)
        if source is None:
            dataset = create(name, root=root, split=split, **kwargs)
            if elsewhere:
                _check_classes(classes, getattr(getattr(dataset, "reader", dataset), "class_to_idx", None) or {})
            return dataset
        if not training and split not in _TRAIN:
            stop(f"{source} is condensed and has training images only, no split {split!r}; name data to validate on "
                 "with --val-dataset or --val-data-dir, or give --val-split ''")  # fmt: skip
        if split not in _TRAIN:
            stop(f"--train-split {split}: {source} is condensed and has the split train alone; leave it out")
        if kwargs.get("class_map"):
            stop(f"--class-map does not go with {source}, which is condensed: its labels are class ids; leave it out")
        try:
            reader = CondensedReader(source, cache_dir=root if source != root else None)
        except (ValueError, FileNotFoundError, PermissionError) as e:
            stop(str(e))
        classes.update(reader.class_to_idx)
        _logger.info("%s is condensed: %d images to train on", source, len(reader))
        return ImageDataset(root, reader=reader, input_img_mode=kwargs.get("input_img_mode", "RGB"))

    return create_dataset


def _is_folder(value: str) -> bool:
    return os.path.lexists(os.path.join(value, _RECORD))


def _condensed(name: str, root: str | None) -> str | None:
    """The repository or folder that timm's name and root stand for, if it is condensed."""
    prefix, _, rest = (name or "").partition("/")
    of_hub = prefix.lower() in _READERS and rest != ""
    if not of_hub and (not root or prefix.lower() in _OTHERS or not _is_folder(root)):
        return None
    from huggingface_hub.errors import LocalEntryNotFoundError

    from ..hf import is_condensed

    source = rest if of_hub else str(root)
    try:
        if not is_condensed(source, cache_dir=root if of_hub else None):
            return None
    except LocalEntryNotFoundError:
        stop(f"the Hub cannot be asked whether {source} is condensed, and its cache does not know; run once where the "
             f"Hub can be reached, or download it and give the folder: {prefix}/FOLDER")  # fmt: skip
    if prefix.lower() == "hfids":
        stop(f"{source} is condensed, and a stream of it would show stored tiles; give hfds/{source}")
    return source


class CondensedReader(Reader):
    """The decoded images of a condensed data set, as PNG files, for timm's ``ImageDataset``.

    Args:
        source: repository or folder.
        cache_dir: of the Hub's files; None is its own.

    Attributes:
        class_to_idx: class ids by name.
    """

    def __init__(self, source: str, cache_dir: str | None = None):
        from datasets import Image

        from ..hf import load_condensed

        super().__init__()
        dataset = load_condensed(source, cache_dir=cache_dir)
        if not isinstance(dataset.features["image"], Image):
            raise ValueError(
                f"{source} holds no PNG images but arrays of {dataset.features['image'].shape}, and timm reads images"
            )
        label = dataset.features["label"]
        self.dataset = dataset.cast_column("image", Image(decode=False))
        self.class_to_idx = {name: i for i, name in enumerate(label.names)}

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        row = self.dataset[index]
        return io.BytesIO(row["image"]["bytes"]), row["label"]

    def __len__(self) -> int:
        return len(self.dataset)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return f"{index}.png"


def _check_classes(ours: dict[str, int], theirs: dict[str, int]) -> None:
    """Stop where a class has another id in the validation data than in the condensed."""
    for name in sorted(ours.keys() & theirs.keys()):
        if ours[name] != theirs[name]:
            stop(f"class {name!r} is {ours[name]} in the condensed data and {theirs[name]} in the validation data; "
                 "give the classes there the same order")  # fmt: skip
