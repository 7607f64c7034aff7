"""One valid artifact of every loader, how to load it, and what it holds as plain values."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from dataopt.core.condense import Condensed, Condenser
from dataopt.core.mixup import PuzzleMix
from dataopt.core.relation import RelationGraph
from dataopt.integrations.hf import (
    CCMCache,
    CCMModel,
    KVzipCache,
    hub,
    load_condensed,
    load_relation_scores,
    save_condensed,
    save_relation_scores,
)
from dataopt.integrations.hf.condensed import read_condensed
from dataopt.integrations.hf.features import _Store as Outputs
from dataopt.integrations.hf.kvzip import artifact as kvzip_artifact
from dataopt.integrations.hf.mixup import build_mixing, restore
from dataopt.integrations.label_cleaning import _read_data, _save_data
from dataopt.integrations.snapshots import Snapshot, epoch_folder, read_snapshots
from dataopt.integrations.timm import SaliencyFolder
from dataopt.out_folder import claim
from dataopt.review.decisions import open_decisions
from dataopt.review.folder import read_folder
from dataopt.review.server import describe
from PIL import Image

from ..core.condense.problem import made, tiny_net
from ..integrations.hf.ccm.conftest import ccm
from ..integrations.hf.kvzip.conftest import byte_tokenizer, tiny
from ..test_review import make_folder

CONTEXT = "Ada keeps the blue key in a tin behind the oven. Ben sold his boat."
ASKED = {"data": "cifar", "seed": 3}


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A loader and its food.

    Attributes:
        make: writes a valid one into an empty folder.
        load: reads it back; what it returns must equal the first answer, or it refuses.
        missing: the documented error where there is nothing to load, beside ValueError.
        optional: patterns of files without which the loader begins anew.
        unsigned: patterns of files without a checksum: a changed one may load, as something valid.
        shared: it comes from other people, so that nothing outside its folder may be read.
    """

    make: Callable[[Path], Any]
    load: Callable[[Path], Any]
    missing: tuple[type[Exception], ...] = ()
    optional: tuple[str, ...] = ()
    unsigned: tuple[str, ...] = ()
    shared: bool = False


def plain(x: Any) -> Any:
    """Values that can be compared with ``==``, NaN and dtypes included."""
    if isinstance(x, torch.Tensor):
        return str(x.dtype), tuple(x.shape), x.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(x, np.ndarray):
        return str(x.dtype), x.shape, x.tobytes() if x.dtype != object else [plain(v) for v in x.tolist()]
    if isinstance(x, pd.DataFrame):
        return {str(c): plain(x[c].to_numpy()) for c in x}, plain(dict(x.attrs))
    if isinstance(x, Image.Image):
        return x.mode, x.size, x.tobytes()
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return {f.name: plain(getattr(x, f.name)) for f in dataclasses.fields(x)}
    if isinstance(x, Mapping):
        return {str(k): plain(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [plain(v) for v in x]
    return x if isinstance(x, str | bytes | int | float | bool | type(None)) else repr(x)


@functools.cache
def tokenizer() -> Any:
    return byte_tokenizer()


@functools.cache
def llama() -> Any:
    return tiny(num_hidden_layers=2)


@functools.cache
def adapted(mode: str) -> CCMModel:
    return ccm(changes={"num_hidden_layers": 2}, mode=mode, comp_ids=[258, 259])


def condensed() -> Condensed:
    g = torch.Generator().manual_seed(0)
    return Condensed(
        torch.rand(4, 3, 8, 8, generator=g), torch.tensor([0, 0, 1, 1]), 2, mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.25),
        made={"seed": 3, "source": {"sha256": "ab"}}, label_names=("cat", "dog"),
    )  # fmt: skip


def _published(folder: Path) -> Any:
    stored = load_condensed(folder)
    return [stored[i] for i in range(len(stored))]


def _kvzip(bits: int | None, level: str) -> Artifact:
    def make(folder: Path) -> None:
        cache = KVzipCache(
            llama(), tokenizer(), CONTEXT, ratio=0.5, bits=bits, level=level, keep_scores=level == "pair"
        )
        cache.save_pretrained(folder)

    def load(folder: Path) -> Any:
        cache = KVzipCache.from_pretrained(folder, llama(), tokenizer())
        with torch.no_grad():
            logits = llama()(**cache.inputs("Who?"), past_key_values=cache).logits
        cache.restore()
        state = cache._states[0]
        return plain({f.name: getattr(state, f.name) for f in dataclasses.fields(state) if f.name != "layers"}), logits

    return Artifact(make, load, shared=True)


def _memory(mode: str) -> Artifact:
    def make(folder: Path) -> None:
        memory = CCMCache(adapted(mode), tokenizer())
        memory.append("the boat")
        memory.append("the key")
        memory.save_pretrained(folder)

    def load(folder: Path) -> Any:
        memory = CCMCache.from_pretrained(folder, adapted(mode), tokenizer())
        with torch.no_grad():
            logits = adapted(mode).get_base_model()(**memory.inputs("Who?"), past_key_values=memory).logits
        memory.restore()
        return memory._memory, logits

    return Artifact(make, load, shared=True)


def _adapter(folder: Path) -> Any:
    base = tiny(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, head_dim=8, intermediate_size=16)
    model = CCMModel.from_pretrained(base, folder)
    return model.ccm_config, {n: p for n, p in model.named_parameters() if "default" in n}


def _save_adapter(folder: Path) -> None:
    changes = dict(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, head_dim=8, intermediate_size=16)
    ccm(changes=changes, comp_ids=[258, 259], r=2).save_pretrained(folder)


def outputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    y = torch.arange(24) % 3
    return torch.randn(24, 5, generator=g), torch.rand(24, 3, generator=g).softmax(1), y


def _save_scores(folder: Path) -> None:
    n = np.arange(6)
    table = pd.DataFrame({"is_label_issue": n > 4, "label_score": n / 6, "given_label": n % 2})
    save_relation_scores(table, folder, label_names=["a", "b"], model="tiny")


def _save_snapshots(folder: Path) -> None:
    for epoch in (1, 2):
        Snapshot(epoch, *outputs()).save(epoch_folder(folder, epoch))


def _sums(folder: Path) -> Any:
    found = RelationGraph(*outputs(), resume=folder / "sums").label_noise()
    return found.noisiness, found.noisy, found.suggested


def _save_outputs(folder: Path) -> None:
    features, probs, labels = outputs()
    Outputs(folder, "key").save(0, {"features": features, "probs": probs, "labels": labels})


def _checkpoint(folder: Path) -> Any:
    x, y = made(2, 4, (1, 8, 8))
    net = functools.partial(tiny_net, 1, 2, 2)
    return Condenser(net, 1, 2, steps=2, early_steps=0, seed=1).fit(x, y, resume=folder / "run", progress=False).images


class _Model(torch.nn.Sequential):
    def __init__(self) -> None:
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(48, 2))
        g = torch.Generator().manual_seed(0)
        self[1].weight.data.copy_(torch.randn(2, 48, generator=g))
        self[1].bias.data.zero_()
        self.pretrained_cfg = {"input_size": (3, 4, 4), "mean": (0.5,) * 3, "std": (0.5,) * 3}


def _sidecar(folder: Path) -> Any:
    return SaliencyFolder(folder / "images", _Model(), cache=folder / "saliency.safetensors", grid=4).saliency


def _save_sidecar(folder: Path) -> None:
    for i, name in enumerate("aabb"):
        path = folder / "images" / name / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4, 3), 40 * i, np.uint8)).save(path)
    _sidecar(folder)


def _review(folder: Path) -> Any:
    read = read_folder(folder / "out")
    shown = [describe(read, int(row)) for row in read.suspects]
    decisions = open_decisions(read.path, read.scores["given_label"].to_dict())
    try:
        return read.scores, shown, {row: dataclasses.astuple(d) for row, d in decisions.all().items()}
    finally:
        decisions.close()


def _save_review(folder: Path) -> None:
    out = make_folder(folder)
    decisions = open_decisions(out, read_folder(out).scores["given_label"].to_dict())
    decisions.decide(0, 0, "relabel", 2)
    decisions.decide(1, 1, "drop")
    decisions.decide(0, 0, "keep")
    decisions.close()
    sign_review(out)


def sign_review(out: Path) -> None:
    record = json.loads((out / "record.json").read_text())
    sign(out / "record.json", record | {"files": {p.name: hub.file_checksum(p) for p in out.glob("*.parquet")}})


def sign(path: Path, record: dict[str, Any]) -> None:
    """Write a record with the checksum that it must have."""
    record.pop("checksum", None)
    path.write_text(json.dumps(record | {"checksum": hub._checksum(record)}))


def _state(folder: Path) -> dict[str, int]:
    mixing = build_mixing(PuzzleMix, 3, "pixel_values", {})
    restore(mixing, folder / "mixing.json")
    return mixing.state_dict()


def _write(name: str, content: Any) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(json.dumps(content)) and None


ARTIFACTS = {
    "condensed": Artifact(condensed().save, Condensed.load, (FileNotFoundError,), shared=True),
    "condensed from a saved folder": Artifact(condensed().save, _published, (FileNotFoundError,), shared=True),
    "published": Artifact(lambda f: save_condensed(condensed(), f), _published, (FileNotFoundError,), shared=True),
    "published, exact": Artifact(
        lambda f: save_condensed(condensed(), f),
        lambda f: read_condensed(f, config="exact"),
        (FileNotFoundError,),
        shared=True,
    ),
    "kvzip": _kvzip(None, "pair"),
    "kvzip, 4 bits": _kvzip(4, "pair"),
    "kvzip, heads": _kvzip(None, "head"),
    "head scores": Artifact(
        lambda f: KVzipCache(llama(), tokenizer(), CONTEXT).save_head_scores(f),
        lambda f: kvzip_artifact.load_head_scores(f, llama()),
        shared=True,
    ),
    "ccm memory, concat": _memory("concat"),
    "ccm memory, merge": _memory("merge"),
    "ccm adapter": Artifact(_save_adapter, _adapter, shared=True),
    "relation scores": Artifact(_save_scores, load_relation_scores, shared=True),
    "snapshots": Artifact(_save_snapshots, lambda f: list(read_snapshots(f))),
    "relation sums": Artifact(_sums, _sums, optional=("lane-*",)),
    "model outputs": Artifact(_save_outputs, lambda f: Outputs(f, "key").load(0), optional=("outputs-*",)),
    "condenser checkpoint": Artifact(_checkpoint, _checkpoint, (OSError,), optional=("checkpoint-*.json",)),
    "sidecar": Artifact(_save_sidecar, _sidecar, optional=("saliency.safetensors",)),
    "cleaned labels": Artifact(
        lambda f: _save_data(f / "data.safetensors", torch.arange(6) % 3, torch.ones(6)),
        lambda f: _read_data(f / "data.safetensors"),
    ),
    "review": Artifact(
        _save_review, _review, optional=("decisions.sqlite",), unsigned=("decisions.sqlite*",), shared=True
    ),
    "mixing state": Artifact(_write("mixing.json", {"seed": 3, "step": 8}), _state, unsigned=("mixing.json",)),
    "out folder": Artifact(
        lambda f: claim(f / "out", ASKED, False, "dataopt train"),
        lambda f: claim(f / "out", ASKED, True, "dataopt train"),
    ),
}
