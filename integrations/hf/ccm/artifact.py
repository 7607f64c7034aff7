"""One user's memory as files. ``ccm_memory.json`` names its file of tensors, so replacing it replaces a save."""

from __future__ import annotations

import re
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from dataopt.core.artifacts import alone_in
from dataopt.core.tensor_file import load_tensors, save_tensors
from torch import Tensor

from .. import decoder, fingerprint, hub
from .memory import Memory
from .model import CCMModel

KIND, VERSION, RECORD = "dataopt ccm memory", 1, "ccm_memory.json"
TENSORS = re.compile(r"ccm-[0-9a-f]+\.safetensors", re.ASCII)


def save(memory: Memory, model: CCMModel, prefix: int, folder: Path) -> None:
    """Write the tensors, then the record; until that last step an older save stays the valid one.

    Raises:
        ValueError: the path is a file.
    """
    hub.check_folder(folder)
    name = f"ccm-{secrets.token_hex(8)}.safetensors"
    tensors: dict[str, Tensor] = {}
    for i, (keys, values) in enumerate(memory.layers):
        tensors |= {f"{i}.keys": keys.contiguous().cpu(), f"{i}.values": values.contiguous().cpu()}
    content = {
        "tensors": name,
        "prefix": prefix,
        "pairs": memory.valid.shape[1],
        "steps": memory.steps[0],
        "text": memory.text[0],
        **_made_with(model),
    }
    with alone_in(folder):
        save_tensors(folder / name, tensors, {})
        hub.write_record(folder / RECORD, KIND, VERSION, content)
        for path in list(folder.iterdir()):
            if TENSORS.fullmatch(path.name) and path.name != name:
                path.unlink(missing_ok=True)


def load(folder: Path, model: CCMModel, prefix: int) -> Memory:
    """Read what :func:`save` wrote; the tensors land where the model's layers are.

    Raises:
        ValueError: anything missing, damaged or inconsistent, a newer format, or another model or adapter.
    """
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is no folder; give one that a memory was saved to")
    path = hub.member(folder, RECORD)
    record = hub.read_record(path, KIND, VERSION)
    made_with = _made_with(model)
    fingerprint.compare(record.get("fingerprint"), made_with["fingerprint"], str(path))
    theirs: Any = record.get("options")
    if theirs != made_with["options"]:
        theirs = theirs if isinstance(theirs, dict) else {}
        name = next((k for k, v in made_with["options"].items() if theirs.get(k) != v), "?")
        raise ValueError(
            f"{path} was made with another adapter: {name} was {theirs.get(name)!r} and is "
            f"{made_with['options'].get(name)!r}; load it with the adapter that made it"
        )
    pairs, steps = _count(record, "pairs", path), _count(record, "steps", path)
    text = _count(record, "text", path)
    if record.get("prefix") != prefix:
        raise ValueError(
            f"{path} has a prefix of {record.get('prefix')!r} tokens and the model {prefix}; save or download it again"
        )
    n = model.ccm_config.comp_tokens
    expected = prefix + (n * steps if model.ccm_config.mode == "concat" else n * min(steps, 1))
    if pairs != expected:
        raise ValueError(
            f"{path} says {pairs} pairs for {steps} contexts, which would be {expected}; save or download it again"
        )
    name = record.get("tensors")
    if not isinstance(name, str) or not TENSORS.fullmatch(name):
        raise ValueError(
            f"{path} names {name!r:.80} as its file of tensors, which no save does; save or download it again"
        )
    file = hub.member(folder, name)
    try:
        tensors, _ = load_tensors(file)
    except ValueError as e:
        raise ValueError(f"{file} is damaged ({e}); save or download it again") from e
    layers = _layers(tensors, model, pairs, file)
    return Memory(layers, torch.ones(1, pairs, dtype=torch.bool), (steps,), (text,))


def _layers(tensors: dict[str, Tensor], model: CCMModel, pairs: int, file: Path) -> tuple[tuple[Tensor, Tensor], ...]:
    base = model.language_model
    count = base.config.get_text_config(decoder=True).num_hidden_layers
    if tensors.keys() != {f"{i}.{part}" for i in range(count) for part in ("keys", "values")}:
        raise ValueError(f"{file} does not hold keys and values of {count} layers; save or download it again")
    dtype = base.dtype
    if model.ccm_config.mode == "merge":
        dtype = torch.promote_types(dtype, torch.float32)
    shapes: dict[str, tuple[int, int, int, int]] = {}
    for i, (heads, key, value) in enumerate(decoder.pair_shapes(base)):
        shapes |= {f"{i}.keys": (1, heads, pairs, key), f"{i}.values": (1, heads, pairs, value)}
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name] or tensor.dtype != dtype:
            raise ValueError(
                f"{file}: {name} is {tuple(tensor.shape)} {tensor.dtype}, not {shapes[name]} {dtype}; save or download "
                "it again"
            )
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{file}: {name} holds non-finite values; compress the contexts again")
    where = decoder.layer_devices(model.language_model)
    return tuple((tensors[f"{i}.keys"].to(where[i]), tensors[f"{i}.values"].to(where[i])) for i in range(count))


def _made_with(model: CCMModel) -> dict[str, Any]:
    options = asdict(model.ccm_config)
    return {"fingerprint": fingerprint.of_model(model.language_model), "options": options}


def _count(record: dict[str, Any], name: str, path: Path) -> int:
    value = record.get(name)
    if type(value) is not int or value < 0:
        raise ValueError(f"{path}: {name}={value!r:.80} must be a whole number; save or download it again")
    return value
