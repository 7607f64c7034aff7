"""A compressed context as files: saved, checked and loaded, and shared on the Hub.

``kvzip.json`` names the file of tensors that belongs to it, so replacing it is the one step that replaces a save.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from dataopt.core.artifacts import alone_in, whole_file, write_whole
from dataopt.core.kvzip import PackedHeads, Quantised
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicSlidingWindowLayer

from .. import decoder, fingerprint, hub
from ..chat import split_template
from .context import Context, Options
from .layers import SlidingState

KIND, HEADS_KIND = "dataopt kvzip cache", "dataopt kvzip head scores"
VERSION = 1
RECORD, HEADS, CARD = "kvzip.json", "head_scores.json", "README.md"
TENSORS = "kvzip-*.safetensors"  # a name of its own for every save


def save(context: Context, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tensors, ``head_scores.json`` if pairs were scored, a card, and last ``kvzip.json``.

    Until that last step an older save in the folder stays the valid one.

    Raises:
        ValueError: the path is a file, or template_kwargs that JSON cannot hold.
    """
    _save(context, model, tokenizer, folder, None)


def push(
    context: Context,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    repo_id: str,
    private: bool | None,
    token: str | bool | None,
    **kwargs: Any,
) -> str:
    """Upload what :func:`save` writes in one commit; the address of the commit. Older tensors there go with it."""

    def write(folder: Path) -> None:
        _save(context, model, tokenizer, folder, repo_id)

    old = [TENSORS, *([HEADS] if context.head_scores is None else [])]
    return hub.push(write, repo_id, private=private, token=token, delete_patterns=old, **kwargs)


def load(
    source: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Context:
    """Read a folder or a Hub repository; the tensors land where the model's layers are.

    Raises:
        ValueError: anything missing, damaged or inconsistent, a newer format, or another model or tokenizer.
        The errors of huggingface_hub for a repository.
    """
    folder = hub.find(
        source,
        [RECORD, TENSORS],
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    path = hub.member(folder, RECORD)
    record = hub.read_record(path, KIND, VERSION)
    now = fingerprint.of_model(model) | fingerprint.of_tokenizer(tokenizer)
    fingerprint.compare(record.get("fingerprint"), now, str(path))
    context = _context(record, folder, model)
    try:
        split_template(tokenizer, **context.template_kwargs)
    except Exception as e:  # templates raise errors of their own kinds
        raise ValueError(
            f"{path}: template_kwargs does not suit the chat template ({e}); save or download it again"
        ) from e
    return context


def save_head_scores(scores: Tensor, model: PreTrainedModel, folder: Path) -> None:
    """Write (L, H) scores as ``head_scores.json``. It holds nothing of the document, and belongs to the model alone."""
    hub.check_folder(folder)
    _write_head_scores(scores, fingerprint.of_model(model), folder)


def load_head_scores(source: str | Path, model: PreTrainedModel) -> Tensor:
    """(L, H) float32 from ``head_scores.json``, given as the file, its folder or a Hub repository.

    Raises:
        ValueError: as :func:`load`.
    """
    path = Path(source) if Path(source).is_file() else hub.member(hub.find(source, [HEADS]), HEADS)
    record = hub.read_record(path, HEADS_KIND, VERSION)
    fingerprint.compare(record.get("fingerprint"), fingerprint.of_model(model), str(path))
    rows = record.get("scores")
    if not _is_table(rows):
        raise ValueError(f"{path}: scores must be a table of numbers, a row for each layer; save or download it again")
    scores = torch.tensor(rows)
    if not scores.isfinite().all():
        raise ValueError(f"{path}: scores holds non-finite values; save or download it again")
    return scores


def _is_table(rows: Any) -> bool:
    if not isinstance(rows, list) or not rows or any(not isinstance(row, list) or not row for row in rows):
        return False
    return all(len(row) == len(rows[0]) and all(type(x) is float for x in row) for row in rows)


def _write_head_scores(scores: Tensor, made_with: fingerprint.Fingerprint, folder: Path) -> None:
    content = {"scores": scores.float().tolist(), "fingerprint": made_with}
    hub.write_record(folder / HEADS, HEADS_KIND, VERSION, content)


def _save(
    context: Context, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, repo_id: str | None
) -> None:
    hub.check_folder(folder)
    of_model = fingerprint.of_model(model)
    tensors = _tensors(context)
    name = TENSORS.replace("*", secrets.token_hex(4))
    with alone_in(folder) as alone:
        old = [*folder.glob(TENSORS), *folder.glob(f".{TENSORS}.*")] if alone else _tensors_of_save(folder)
        with whole_file(folder / name) as temporary:
            save_file(tensors, temporary)
            size, checksum = temporary.stat().st_size, hub.file_checksum(temporary)
        if context.head_scores is None:
            (folder / HEADS).unlink(missing_ok=True)
        else:
            _write_head_scores(context.head_scores, of_model, folder)
        write_whole(folder / CARD, _card(context, model, size, repo_id))
        content = {
            "tensors": {"file": name, "bytes": size, "xxh3_128": checksum},
            "base_model": hub.base_model(model),
            "options": asdict(context.options),
            "template_kwargs": context.template_kwargs,
            "text": context.text,
            "prefix": context.prefix,
            "seen": len(context.ids),
            "dtype": str(_pairs_dtype(context)).removeprefix("torch."),
            "layers": [_layer_entry(p) for p in context.layers],
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "fingerprint": of_model | fingerprint.of_tokenizer(tokenizer),
        }
        try:
            hub.write_record(folder / RECORD, KIND, VERSION, content)
        except BaseException:
            (folder / name).unlink(missing_ok=True)
            raise
        for path in old:  # of the save before, and of those that were killed
            path.unlink(missing_ok=True)


def _tensors_of_save(folder: Path) -> list[Path]:
    """The tensors of the save that a new one will replace."""
    try:
        record = hub.read_record(folder / RECORD, KIND, VERSION)
        return [hub.member(folder, _file_name(record, folder / RECORD))]
    except (OSError, ValueError):
        return []  # no save, or one that cannot be loaded either


# Tensors and their description


def _tensors(context: Context) -> dict[str, Tensor]:
    out = {"token_ids": torch.tensor(context.ids, dtype=torch.int32)}
    if context.head_scores is not None:
        out["head_scores"] = context.head_scores.float().contiguous()
    for i, p in enumerate(context.layers):
        for name, pairs in (("keys", p.keys), ("values", p.values)):
            if isinstance(pairs, Quantised):
                parts = (("codes", pairs.codes), ("scale", pairs.scale), ("minimum", pairs.minimum))
                out |= {f"{i}.{name}.{part}": t.contiguous() for part, t in parts}
            else:
                out[f"{i}.{name}"] = pairs.contiguous()
        if isinstance(p, PackedHeads) and p.scores is not None:
            out[f"{i}.scores"] = p.scores.contiguous()
    return out


def _layer_entry(p: PackedHeads | SlidingState) -> dict[str, Any]:
    if isinstance(p, SlidingState):
        return {"attention": "sliding", "window": p.window, "seen": p.seen, "shape": _pair_shape(p)}
    return {"attention": "full", "lengths": list(p.lengths), "scores": p.scores is not None, "shape": _pair_shape(p)}


def _pair_shape(p: PackedHeads | SlidingState) -> list[int]:
    return [int(p.keys.shape[-1]), int(p.values.shape[-1])]


def _pairs_dtype(context: Context) -> torch.dtype:
    """Of the pairs that are not quantised; all layers of a model compute in the same one."""
    for p in context.layers:
        if isinstance(p.keys, Tensor):
            return p.keys.dtype
    return torch.uint8


class _Checked:
    """The record and the tensors, handed out only as what they should be; every refusal is a ValueError."""

    def __init__(self, record: dict[str, Any], path: Path, folder: Path) -> None:
        self.record, self.path = record, path
        self.name = _file_name(record, path)
        self.file = hub.member(folder, self.name)
        entry = record["tensors"]
        if self.file.stat().st_size != entry.get("bytes") or hub.file_checksum(self.file) != entry.get("xxh3_128"):
            raise ValueError(
                f"{self.file} is damaged, cut off, or from another save than {path.name}; save or download it again"
            )
        try:
            with safe_open(self.file, "pt") as file:
                self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as e:
            raise ValueError(f"{self.file} is no file of tensors ({e}); save or download it again") from e

    def bad(self, what: str) -> ValueError:
        return ValueError(f"{self.path}: {what}; save or download it again")

    def value(self, entry: Any, key: str, *types: type) -> Any:
        value = entry.get(key) if isinstance(entry, dict) else None
        if type(value) not in types:
            raise self.bad(f"{key}={value!r:.80} must be of type {' or '.join(t.__name__ for t in types)}")
        return value

    def count(self, entry: Any, key: str, least: int, most: int) -> int:
        value = self.value(entry, key, int)
        if not least <= value <= most:
            raise self.bad(f"{key}={value} must be from {least} to {most}")
        return value

    def tensor(self, name: str, dtype: torch.dtype, *shape: int | None) -> Tensor:
        """Take a tensor out; None stands for any size."""
        t = self.tensors.pop(name, None)
        if t is None:
            raise ValueError(f"{self.file} has no tensor {name}; save or download it again")
        fits = len(shape) == t.ndim and all(n in (None, m) for n, m in zip(shape, t.shape, strict=True))
        if t.dtype != dtype or not fits:
            raise ValueError(
                f"{self.file}: {name} is {t.dtype} {tuple(t.shape)} and must be {dtype} "
                f"{tuple('any' if n is None else n for n in shape)}; save or download it again"
            )
        return t

    def finite(self, name: str, dtype: torch.dtype, *shape: int | None) -> Tensor:
        t = self.tensor(name, dtype, *shape)
        if t.numel() and not torch.stack(t.aminmax()).isfinite().all():
            raise ValueError(f"{self.file}: {name} holds non-finite values; compress the context again")
        return t

    def pairs(self, name: str, dtype: torch.dtype, bits: int | None, count: int, size: int) -> Tensor | Quantised:
        if bits is None:
            return self.finite(name, dtype, count, size)
        codes = self.tensor(f"{name}.codes", torch.uint8, count, size * bits // 8)
        scale = self.finite(f"{name}.scale", torch.float16, count, None)
        minimum = self.finite(f"{name}.minimum", torch.float16, count, scale.shape[1])
        if scale.shape[1] < 1 or size % scale.shape[1]:
            raise ValueError(
                f"{self.file}: {name} has {scale.shape[1]} groups of {size} columns; save or download it again"
            )
        return Quantised(codes, scale, minimum, bits)


def _context(record: dict[str, Any], folder: Path, model: PreTrainedModel) -> Context:
    file = _Checked(record, folder / RECORD, folder)
    options = _options(file)
    seen = file.count(record, "seen", 1, 1 << 31)
    prefix = file.count(record, "prefix", 0, seen)
    dtype = getattr(torch, file.value(record, "dtype", str), None)
    if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8):
        raise file.bad(f"dtype={record['dtype']!r:.80} must be a floating type")
    ids = file.tensor("token_ids", torch.int32, seen)
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, Tensor)
    if not ((ids >= 0) & (ids < len(embedding))).all():
        raise ValueError(f"{file.file}: token_ids are outside the vocabulary of the model; save or download it again")
    entries = file.value(record, "layers", list)
    kinds = [
        "sliding" if isinstance(p, DynamicSlidingWindowLayer) else "full"
        for p in DynamicCache(config=model.config).layers
    ]
    if [e.get("attention") if isinstance(e, dict) else None for e in entries] != kinds:
        raise file.bad("layers are not those of the model")
    where, shapes = decoder.layer_devices(model), decoder.pair_shapes(model)
    layers = tuple(
        _layer(file, i, entry, options, seen, prefix, dtype, where.get(i, where[-1])) for i, entry in enumerate(entries)
    )
    for i, (p, shape) in enumerate(zip(layers, shapes, strict=True)):
        count = len(p.lengths) if isinstance(p, PackedHeads) else p.keys.shape[1]
        if (count, *_pair_shape(p)) != shape:
            found = f"{count} heads with keys and values of {_pair_shape(p)} numbers"
            raise file.bad(f"layer {i} has {found} where the model has {shape[0]} of {list(shape[1:])}")
    head_scores = None
    if "head_scores" in file.tensors:
        heads = [len(p.lengths) for p in layers if isinstance(p, PackedHeads)]
        head_scores = file.finite("head_scores", torch.float32, len(heads), heads[0])
    elif options.level == "head" and options.ratio < 1:
        raise ValueError(f"{file.file} has no tensor head_scores; save or download it again")
    if file.tensors:
        raise ValueError(
            f"{file.file} has tensors too many, such as {min(file.tensors)!r:.80}; save or download it again"
        )
    text = file.value(record, "text", str)
    template_kwargs = file.value(record, "template_kwargs", dict)
    return Context(layers, tuple(ids.tolist()), prefix, text, options, template_kwargs, head_scores)


def _options(file: _Checked) -> Options:
    entry = file.value(file.record, "options", dict)
    names = [f.name for f in fields(Options)]
    if sorted(entry) != sorted(names):
        raise file.bad(f"options must be {', '.join(names)}")
    # Most have the type of their default; Options itself checks the values.
    types: dict[str, tuple[type, ...]] = {f.name: (type(f.default),) for f in fields(Options)}
    types |= {"ratio": (float, int), "max_tokens": (int, type(None)), "bits": (int, type(None))}
    types["instruction"] = (str, type(None))
    values = {name: file.value(entry, name, *types[name]) for name in names}
    try:
        return Options(**values)
    except ValueError as e:
        raise file.bad(f"options: {e}") from e


def _layer(
    file: _Checked,
    i: int,
    entry: dict[str, Any],
    options: Options,
    seen: int,
    prefix: int,
    dtype: torch.dtype,
    device: torch.device,
) -> PackedHeads | SlidingState:
    shape = file.value(entry, "shape", list)
    if len(shape) != 2 or any(type(n) is not int or not 1 <= n < 1 << 16 for n in shape):
        raise file.bad(f"layer {i}: shape={shape!r:.80} must be the sizes of a key and a value")
    if entry["attention"] == "sliding":
        window, read = file.count(entry, "window", 1, 1 << 31), file.count(entry, "seen", seen, seen)
        recent = file.finite(f"{i}.keys", dtype, 1, None, None, shape[0])
        theirs = file.finite(f"{i}.values", dtype, 1, recent.shape[1], recent.shape[2], shape[1])
        return SlidingState(recent.to(device), theirs.to(device), window, read)
    lengths = file.value(entry, "lengths", list)
    if not lengths or any(type(n) is not int or not prefix <= n <= seen for n in lengths):
        raise file.bad(f"layer {i}: lengths must be numbers from {prefix} to {seen}, one for each head")
    count = sum(lengths)
    keys = file.pairs(f"{i}.keys", dtype, options.bits, count, shape[0])
    values = file.pairs(f"{i}.values", dtype, options.bits, count, shape[1])
    scores = None
    if file.value(entry, "scores", bool):
        scores = file.tensor(f"{i}.scores", torch.float32, count)
        if scores.isnan().any():
            raise ValueError(f"{file.file}: {i}.scores holds NaN; compress the context again")
    return PackedHeads(keys, values, tuple(lengths), prefix, scores).to(device)


# The file of tensors


def _file_name(record: dict[str, Any], path: Path) -> str:
    entry = record.get("tensors")
    name = entry.get("file") if isinstance(entry, dict) else None
    if not isinstance(name, str) or not re.fullmatch(r"kvzip-[0-9a-f]+\.safetensors", name, re.ASCII):
        raise ValueError(
            f"{path} names {name!r:.80} as its file of tensors, which no save does; save or download it again"
        )
    return name


# The card


def _card(context: Context, model: PreTrainedModel, size: int, repo_id: str | None) -> str:
    options, base = context.options, hub.base_model(model)
    pairs = sum(sum(p.lengths) for p in context.packed)
    full = sum(len(p.lengths) for p in context.packed) * len(context.ids)
    kind = type(model).__name__
    made = ", ".join(f"{name}={value!r}" for name, value in asdict(options).items() if name != "instruction")
    body = f"""A text of {len(context.ids):,} tokens, read once by {base or kind} and compressed by
[KVzip](https://arxiv.org/abs/2505.23416) (Kim et al., NeurIPS 2025) with [dataopt](https://pypi.org/project/dataopt/).
That model answers questions about the text from these files.

## Use

```python
from dataopt.integrations.hf import KVzipCache  # pip install "dataopt[hf]"

cache = KVzipCache.from_pretrained({repo_id or "path/to/this/folder"!r}, model, tokenizer)
out = model.generate(**cache.inputs("a question"), past_key_values=cache, max_new_tokens=100)
print(tokenizer.decode(out[0], skip_special_tokens=True))
```

## Before you share it

- **The files contain the document**: its text and tokens are in `{RECORD}` and in the tensors. Whoever can read them
  can read it. Only `{HEADS}` holds nothing of it.
- **Eviction can weaken refusals.** With part of the pairs gone a model may answer what it declines to answer with the
  whole cache: in table 8.1 of the thesis behind this method LLaMA3.1-8B withheld a phone number that stood in its
  context, and gave it away once the cache was cut to 40 %. Test this before you serve the cache to others.

## What made it

| setting | value |
|---|---|
| model | {base or kind}, {model.get_input_embeddings().weight.dtype} |
| pairs kept | {pairs:,} of {full:,} |
| file of tensors | {size:,} bytes |
| options | {made} |
| versions | torch {torch.__version__}, transformers {transformers.__version__}, format {VERSION} |

Another model, dtype, tokenizer or chat template is refused when the files are loaded.
"""
    return hub.card("A document as a KVzip cache", body, ["kvzip", "kv-cache"], base)
