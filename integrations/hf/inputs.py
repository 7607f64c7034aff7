"""Rows of a data set as a model takes them: texts, images and sounds through a processor or transform, and labels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from dataopt.integrations.heads import unwrapped
from dataopt.integrations.saliency_maps import default_view
from datasets import Audio, ClassLabel, Dataset, Image, Value
from PIL.Image import Image as Picture
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from . import audio, fingerprint

_PARTS = {"text": "tokenizer", "image": "image_processor", "audio": "feature_extractor"}  # of a processor of several
_DEEP = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")  # modes of more than 8 bits
_NO_LIMIT = 10**6  # tokenizers without a length limit say 1e30


def check_dataset(dataset: Any) -> None:
    """Refuse what is no ``datasets.Dataset`` with rows."""
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"dataset is a {type(dataset).__name__}; give a datasets.Dataset, for a DatasetDict one split at a time"
        )
    if not len(dataset):
        raise ValueError("dataset is empty; give at least one row")


def check_column(dataset: Dataset, **names: str) -> None:
    """Raise ValueError for the first argument that names no column."""
    for argument, name in names.items():
        if name not in dataset.column_names:
            raise ValueError(f"{argument}={name!r} is not among the columns {dataset.column_names}; name one of them")


@dataclass(frozen=True)
class Inputs:
    """A data set's input column, ready to be read in batches.

    Attributes:
        modality: ``"text"``, ``"image"``, ``"audio"`` or ``"other"``, what only a transform understands.
        columns: one name, or two for pairs of texts.
        settings: what the inputs depend on beside the data, for a cache.
    """

    modality: str
    columns: tuple[str, ...]
    settings: str
    _rows: Dataset
    _prepare: Callable[[list[list[Any]]], dict[str, Tensor]]

    def lengths(self) -> list[int]:
        """Characters of each row's text; 0 for other inputs, which are padded alike or not at all."""
        if self.modality != "text":
            return [0] * len(self._rows)
        columns = [self._rows[name][:] for name in self.columns]
        return [sum(len(text or "") for text in row) for row in zip(*columns, strict=True)]

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Arguments of the model's forward; a transform's plain tensors come under the key ``""``.

        Raises:
            TypeError, ValueError: a row that holds something else, named by its number.
        """
        read = self._rows[list(rows)]
        columns = [read[name] for name in self.columns]
        kinds: dict[str, type] = {"text": str, "image": Picture}
        for name, values in zip(self.columns, columns, strict=True):
            for row, value in zip(rows, values, strict=True):
                if self.modality in kinds and not isinstance(value, kinds[self.modality]):
                    raise TypeError(
                        f"input_column={name!r} holds {type(value).__name__} in row {row}, not {self.modality}; "
                        "leave the row out or cast the column"
                    )
        if self.modality == "image":
            for row, image in zip(rows, columns[0], strict=True):
                if image.mode in _DEEP:
                    raise ValueError(
                        f"row {row} is an image of mode {image.mode}, which is more than 8 bits hold; convert it first"
                    )
            columns = [[image.convert("RGB") for image in images] for images in columns]
        if self.modality == "audio":
            columns = [[_sound(value, row) for value, row in zip(columns[0], rows, strict=True)]]
        return self._prepare(columns)


def _sound(value: Any, row: int) -> audio.Sound:
    try:
        return audio.decode(value)
    except (TypeError, ValueError) as e:
        raise type(e)(f"row {row}: {e}") from e


def find_inputs(
    dataset: Dataset,
    model: nn.Module,
    column: str | Sequence[str] | None,
    processor: Any,
    transform: Callable[[Any], Any] | None,
) -> Inputs:
    """See :func:`dataopt.integrations.hf.model_outputs`.

    Raises:
        ValueError: a column that is missing or cannot be guessed, or neither a processor nor a transform.
    """
    columns = (column,) if isinstance(column, str) else tuple(column or _guess(dataset))
    for name in columns:
        check_column(dataset, input_column=name)
    rows = dataset.with_format(None).select_columns(list(columns))
    if isinstance(rows.features[columns[0]], Audio):
        rows = rows.cast_column(columns[0], Audio(decode=False))  # decoded here, so that torchcodec is not needed
    modality = _modality(rows, columns[0], processor)
    if len(columns) > 1 and modality != "text":
        raise ValueError(f"input_column={columns} names several columns; only pairs of texts go together")
    if transform is not None and processor is not None:
        raise ValueError("transform and processor are both given; give the one that makes the model's inputs")
    if processor is not None:
        prepare = _by_processor(processor, modality, model)
        return Inputs(modality, columns, _settings_of(processor, modality), rows, prepare)
    if transform is None:
        transform = _timm_transform(model)
    return Inputs(modality, columns, repr(transform), rows, _by_transform(transform))


def _guess(dataset: Dataset) -> list[str]:
    kinds: list[list[str]] = [
        [name for name, f in dataset.features.items() if isinstance(f, Image | Audio)],
        [
            name
            for name, f in dataset.features.items()
            if isinstance(f, Value) and f.dtype in ("string", "large_string")
        ],
    ]
    found = kinds[0] or kinds[1]
    if len(found) != 1:
        raise ValueError(
            f"the columns {dataset.column_names} do not tell which is the model's input; name it with input_column="
        )
    return found


def _modality(rows: Dataset, column: str, processor: Any) -> str:
    feature = rows.features[column]
    if isinstance(feature, Image):
        return "image"
    if isinstance(feature, Audio):
        return "audio"
    if isinstance(feature, Value) and feature.dtype in ("string", "large_string"):
        return "text"
    first = rows[0][column]
    if isinstance(first, dict) and first.keys() & {"array", "bytes"}:
        return "audio"
    if isinstance(first, bytes) and not isinstance(processor, PreTrainedTokenizerBase):
        return "audio"
    if isinstance(first, str):
        return "text"
    return "image" if isinstance(first, Picture) else "other"


def _by_processor(processor: Any, modality: str, model: nn.Module) -> Callable[[list[list[Any]]], dict[str, Tensor]]:
    if modality == "other":
        raise ValueError(
            "the input column holds no texts, images or sounds that processor= could read; cast it, or give transform="
        )
    part = getattr(processor, _PARTS[modality], None) or processor
    parameters = inspect.signature(unwrapped(model).forward).parameters.values()
    takes = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}

    def prepare(columns: list[list[Any]]) -> dict[str, Tensor]:
        if modality == "text":
            longest = _longest(part, model)
            made = part(*columns, padding=True, truncation=longest is not None, max_length=longest, return_tensors="pt")
        elif modality == "image":
            made = part(images=columns[0], return_tensors="pt")
        else:
            rate = part.sampling_rate
            padding = inspect.signature(part.__call__).parameters.get("padding")
            pad = {"padding": True} if padding is not None and padding.default is False else {}  # others have their own
            sounds = [audio.resampled(sound, rate) for sound in columns[0]]
            made = part(sounds, sampling_rate=rate, return_tensors="pt", **pad)
        return {name: value for name, value in made.items() if not takes or name in takes}  # PEFT takes anything

    return prepare


def _longest(tokenizer: Any, model: nn.Module) -> int | None:
    """Tokens that the model can take; None where nothing limits them."""
    if tokenizer.model_max_length < _NO_LIMIT:
        return int(tokenizer.model_max_length)
    return getattr(getattr(unwrapped(model), "config", None), "max_position_embeddings", None)


def _settings_of(processor: Any, modality: str) -> str:
    part = getattr(processor, _PARTS.get(modality, ""), None) or processor
    if isinstance(part, PreTrainedTokenizerBase):
        limits = (part.model_max_length, part.padding_side, part.truncation_side)
        return f"{fingerprint.of_tokenizer(part)} {limits}"
    return str(part.to_json_string())


def _by_transform(transform: Callable[[Any], Any]) -> Callable[[list[list[Any]]], dict[str, Tensor]]:
    def prepare(columns: list[list[Any]]) -> dict[str, Tensor]:
        values = list(zip(*columns, strict=True)) if len(columns) > 1 else columns[0]
        made = [transform(value) for value in values]
        if isinstance(made[0], dict):
            return {name: torch.stack([torch.as_tensor(m[name]) for m in made]) for name in made[0]}
        shapes = {tuple(torch.as_tensor(m).shape) for m in made}
        if len(shapes) > 1:
            raise ValueError(f"transform gives inputs of shapes {sorted(shapes)}; it must give one shape for all")
        return {"": torch.stack([torch.as_tensor(m) for m in made])}

    return prepare


def _timm_transform(model: nn.Module) -> Callable[[Any], Any]:
    inner = unwrapped(model)
    if not getattr(inner, "pretrained_cfg", None):
        raise ValueError(
            f"model {type(inner).__name__} does not tell how its inputs are made; give processor= (its tokenizer, "
            "image processor or feature extractor) or transform="
        )
    if getattr(inner, "in_chans", 3) != 3:
        return default_view(inner)
    from timm.data import create_transform, resolve_model_data_config

    return create_transform(**resolve_model_data_config(inner), is_training=False)


def read_labels(dataset: Dataset, column: str) -> tuple[Tensor, tuple[str, ...] | None]:
    """(n,) int64 class ids, and the names of the classes; None where the column holds plain integers.

    Texts get ids in alphabetical order.

    Raises:
        ValueError: a missing column, or a row without a label. TypeError: labels that are no classes.
    """
    check_column(dataset, label_column=column)
    feature = dataset.features[column]
    values = dataset.with_format(None).select_columns([column])[column][:]
    for row, value in enumerate(values):
        if value is None or (isinstance(feature, ClassLabel) and value < 0):
            raise ValueError(f"label_column={column!r} holds {value} in row {row}; leave rows without a label out")
    if all(isinstance(value, str) for value in values):
        known = sorted(set(values))
        place = {name: i for i, name in enumerate(known)}
        return torch.tensor([place[value] for value in values]), tuple(known)
    if any(isinstance(value, bool) or not isinstance(value, int) for value in values):
        wrong = next(v for v in values if isinstance(v, bool) or not isinstance(v, int))
        raise TypeError(f"label_column={column!r} holds {type(wrong).__name__}; give class ids, names or a ClassLabel")
    names = tuple(feature.names) if isinstance(feature, ClassLabel) else None
    return torch.tensor(values, dtype=torch.int64), names
