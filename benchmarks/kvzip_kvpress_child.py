"""kvpress's side of ``kvzip_kvpress.py``, run by the Python of an environment of its own.

Reads a request (JSON) on standard input and prints what it measured as the last line of standard output. Needs torch,
transformers and kvpress, nothing of this package. Contexts and answers go through the model as kvpress's own pipeline
sends them: the context whole, under the press, then each question behind it at the positions that follow.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from kvpress import ExpectedAttentionPress, KVzipPress, SnapKVPress
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

# name: the press for a share of pairs to remove and a prefix
PRESSES: dict[str, Callable[[float, int], Any]] = {
    "KVzipPress": lambda remove, prefix: KVzipPress(remove),
    "KVzipPress, n_sink=prefix": lambda remove, prefix: KVzipPress(remove, n_sink=prefix),
    "SnapKVPress": lambda remove, prefix: SnapKVPress(remove),
    "ExpectedAttentionPress": lambda remove, prefix: ExpectedAttentionPress(remove),
}
Row = tuple[list[int], list[int]]  # ids that are given, and ids of the answer


def compressed(model: Any, ids: Sequence[int], prefix: int, press: Any) -> DynamicCache:
    """The cache of a context that was read under a press; of the whole context without one."""
    cache = DynamicCache()
    with press(model) if press else nullcontext():
        model.model(input_ids=torch.tensor([list(ids)]), past_key_values=cache)
        found = getattr(press, "prefix_length", prefix)
        if found != prefix:
            raise RuntimeError(f"kvpress takes {found} tokens for the prefix, and it has {prefix}")
    return cache


def stored(model: Any, cache: DynamicCache, prefix: int) -> dict[str, int]:
    """What a cache holds right after the press, in pairs and in bytes.

    ``bytes`` are those of the key and value tensors, ``held`` those of the memory behind them, which is more where a
    tensor is a part of a larger one, with the lists of masked pairs.
    """
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    pairs = sum(layer.keys.shape[1] * layer.keys.shape[2] for layer in cache.layers)
    memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    masked = [getattr(layer.self_attn, "masked_key_indices", None) for layer in model.model.layers]
    lists = [part for parts in masked if parts is not None for part in parts]
    positions = [parts[2] for parts in masked if parts is not None]
    return {
        "pairs": pairs - sum(p.numel() for p in positions),
        "bytes": sum(t.nbytes for t in tensors),
        "held": sum(memory.values()) + sum(t.nbytes for t in lists),
        "masked": sum(p.numel() for p in positions),
        "masked prefix": sum(int((p < prefix).sum()) for p in positions),
    }


def forced(model: Any, cache: DynamicCache, seen: int, rows: Sequence[Row]) -> dict[str, float]:
    """Teacher-forced answers: NLL per token, and the share of answers with every token the most likely one."""
    total, tokens, right = 0.0, 0, 0
    lengths = [layer.keys.shape[2] for layer in cache.layers]
    for start, answer in rows:
        logits = feed(model, cache, torch.tensor([start + answer]), seen)[0, -len(answer) - 1 : -1]
        target = torch.tensor(answer)
        total += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
        tokens += len(answer)
        right += int((logits.argmax(-1) == target).all())
        cut(cache, lengths)
    return {"nll": total / tokens, "accuracy": right / len(rows)}


def feed(model: Any, cache: DynamicCache, ids: Tensor, at: int) -> Tensor:
    """Logits (1, Q, V) of ids at the positions from ``at`` on."""
    positions = torch.arange(at, at + ids.shape[1]).unsqueeze(0)
    return model(input_ids=ids, past_key_values=cache, position_ids=positions).logits


def cut(cache: DynamicCache, lengths: Sequence[int]) -> None:
    """Drop what came behind the first pairs of each layer."""
    for layer, length in zip(cache.layers, lengths, strict=True):
        layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]


@torch.no_grad()
def measure(request: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(request["threads"])
    model = AutoModelForCausalLM.from_pretrained(request["folder"], dtype=torch.float32).eval()
    ids, prefix = request["ids"], request["prefix"]

    def one(press: Any) -> dict[str, Any]:
        cache = compressed(model, ids, prefix, press)
        out: dict[str, Any] = stored(model, cache, prefix)
        return out | {kind: forced(model, cache, len(ids), rows) for kind, rows in request["rows"].items()}

    out: dict[str, Any] = {"full": {"1.0": one(None)}}
    for ratio in request["ratios"]:
        remove = (1 - ratio) * (len(ids) - prefix) / len(ids)  # kvpress counts the prefix too
        for name, press in PRESSES.items():
            out.setdefault(name, {})[str(ratio)] = one(press(remove, prefix))
    versions = {name: importlib.metadata.version(name) for name in ("kvpress", "transformers", "torch")}
    return {"results": out, "versions": {"python": platform.python_version(), **versions}}


if __name__ == "__main__":
    print(json.dumps(measure(json.load(sys.stdin))))
