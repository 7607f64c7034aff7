"""The long commands as ``endurance.py`` runs them: tiny inputs, how each goes on, and what must be equal afterwards."""

from __future__ import annotations

import csv
import hashlib
import importlib
import json
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from endurance_kills import Command, Result, wait
from PIL import Image
from safetensors import safe_open

MODULES = (
    *("clean", "ccm_commands", "condense_commands", "kvzip_commands", "core.relation.tiles", "plots"),
    *("review.server", "review.export", "review.folder", "review.decisions"),
    *("integrations.timm.loop", "integrations.timm.train"),
)
CLASSES = ("nought", "one", "two")


def import_all() -> None:
    """What the commands need, before anything is forked."""
    for name in MODULES:
        importlib.import_module(f"dataopt.{name}")


# Results


def short_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def of_tensors(path: Path) -> Result:
    with safe_open(path, "pt") as file:
        return {f"{path.name}:{name}": _of_tensor(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118


def _of_tensor(t: torch.Tensor) -> str:
    return f"{t.dtype} {tuple(t.shape)} {short_hash(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes())}"


def _walk(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """The tensors and plain values of a checkpoint."""
    if isinstance(value, torch.Tensor):
        yield name, _of_tensor(value) if value.numel() else str(tuple(value.shape))
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _walk(part, f"{name}.{key}")
    elif isinstance(value, int | float | str | list | tuple):
        yield name, repr(value)


def _train_result(out: Path) -> Result:
    found: Result = {}
    for name in ("last", "model_best"):
        state = torch.load(out / "run" / f"{name}.pth.tar", weights_only=False)
        kept = {key: state[key] for key in ("epoch", "metric", "state_dict", "optimizer")}
        found |= dict(_walk(kept, name))
    with (out / "run" / "summary.csv").open() as file:
        found["summary.csv"] = repr(list(csv.reader(file)))
    found["files"] = repr(sorted(p.name for p in (out / "run").iterdir() if p.name[0] != "."))
    return found


def _train_again(out: Path) -> tuple[str, ...]:
    last = out / "run" / "last.pth.tar"
    return ("--resume", str(last)) if last.exists() else ()


def _clean_result(out: Path) -> Result:
    names = ("scores.parquet", "relations.parquet", "map.parquet", "items.parquet", "cleaned/train.parquet")
    return {name: short_hash((out / name).read_bytes()) for name in (*names, "report.html", "record.json")}


def _condense_result(out: Path) -> Result:
    from dataopt.core.condense import Condensed

    Condensed.load(out)
    found = {k.partition(":")[2]: v for p in out.glob("condensed-*.safetensors") for k, v in of_tensors(p).items()}
    pictures = {name: short_hash((out / name).read_bytes()) for name in ("condensed.png", "changed.png", "record.json")}
    named = json.loads((out / "work" / "checkpoint-0of1.json").read_text())["tensors"]["file"]
    saved = {k.partition(":")[2]: v for k, v in of_tensors(out / "work" / named).items()}
    return found | pictures | {f"checkpoint {name}": v for name, v in saved.items()}


def _ccm_result(out: Path) -> Result:
    found = of_tensors(out / "adapter_model.safetensors") | of_tensors(out / "base" / "model.safetensors")
    report = json.loads((out / "report.json").read_text())
    found |= {name: repr(report[name]) for name in ("rows", "losses", "held_out")}
    return found | {"adapter_config.json": (out / "adapter_config.json").read_text()}


def _kvzip_result(out: Path) -> Result:
    _kvzip_whole(out)
    record = json.loads((out / "kvzip.json").read_text())
    tensors = {k.partition(":")[2]: v for k, v in of_tensors(out / record["tensors"]["file"]).items()}
    rest = {k: repr(v) for k, v in record.items() if k not in ("tensors", "checksum")}
    return tensors | rest | {"kept.png": short_hash((out / "kept.png").read_bytes())}


def _kvzip_whole(out: Path) -> None:
    """A record that is there names tensors that are whole."""
    if not (out / "kvzip.json").exists():
        return
    import xxhash
    from dataopt.integrations.hf import hub

    named = hub.read_record(out / "kvzip.json", "dataopt kvzip cache", 1)["tensors"]
    content = (out / named["file"]).read_bytes()
    if xxhash.xxh3_128(content).hexdigest() != named["xxh3_128"]:
        raise ValueError(f"{named['file']} is not what kvzip.json says")


def _always(*more: str) -> Callable[[Path], tuple[str, ...]]:
    return lambda out: more


def commands(quick: bool = False) -> dict[str, Command]:
    """By name; ``quick`` takes fewer steps."""
    steps, epochs = ("104", "2") if quick else ("220", "3")
    model = "--model {inputs}/language --device cpu"
    train = (
        "train --data-dir {inputs}/pictures --model test_resnet --num-classes 3 --img-size 32 --batch-size 8 "
        f"--epochs {epochs} --warmup-epochs 0 --lr 0.05 --device cpu --workers 0 --mixup puzzle "
        "--output {out} --experiment run"
    )
    ccm = (
        "ccm train {inputs}/talks.jsonl --out {out} "
        f"{model} --steps 10 --batch-size 4 --micro-batch 4 --test-rows 4 --lr 0.01 --comp-tokens 1 "
        "--full-context-steps 4"
    )
    all_of_them = (
        Command("dataopt train", "a resumed run goes on with the draws that it would have made", train, _train_again,
                _train_result),
        Command("dataopt clean", "a killed run goes on there with equal outputs; bitwise equal sums",
                "clean {inputs}/reviews.csv --model {inputs}/text --out {out} --batch-size 8", _always("--resume"),
                _clean_result),
        Command("dataopt condense", "the same result, bit for bit",
                "condense {inputs}/pictures --out {out} --images-per-class 1 --width 4 --init centres --device cpu "
                f"--steps {steps}", _always("--resume"), _condense_result),
        Command("dataopt ccm train", "goes on from its last checkpoint; no word on bits", ccm, _always("--resume"),
                _ccm_result),
        Command("dataopt kvzip compress", "no --resume; until the end an older save stays the valid one",
                "kvzip compress {inputs}/note.txt --out {out} " + model, _always("--overwrite"), _kvzip_result,
                _kvzip_whole),
    )  # fmt: skip
    return {command.name: command for command in all_of_them}


# Inputs


def make_inputs(folder: Path, sentences: int = 2100) -> None:
    """Pictures, sentences, talks, a text, a classifier and a language model; nothing is downloaded."""
    if (folder / "note.txt").exists():
        return
    pid = os.fork()  # what saving starts, as threads, stays out of the process that forks the commands
    if not pid:
        code = 1
        try:
            with suppress(SystemExit):
                _make_inputs(folder, sentences)
                code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if wait(pid):
        raise RuntimeError("the inputs could not be made")


def _make_inputs(folder: Path, sentences: int) -> None:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("validation", 4)):
        for c, name in enumerate(CLASSES):
            place = folder / "pictures" / split / name
            place.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = rng.integers(0, 128, (16, 16, 3), dtype=np.uint8)
                pixels[5 * c : 5 * c + 5, :, c] = 255
                Image.fromarray(pixels).save(place / f"{i}.png")
    words = ["good", "bad", "film", "very", "not", "a", "the"]
    lines = [" ".join(rng.choice(words, rng.integers(1, 13))) for _ in range(sentences)]
    rows = "".join(f"{line},{int('good' in line)}\n" for line in lines)
    (folder / "reviews.csv").write_text("text,label\n" + rows)
    torch.manual_seed(0)
    sizes = {"vocab_size": 9, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16, "max_position_embeddings": 16}
    text = DistilBertForSequenceClassification(DistilBertConfig(**sizes, num_labels=2))
    text.save_pretrained(folder / "text")
    _words(words).save_pretrained(folder / "text")
    turns = [[f"I have {i} bees.", "How many?", f"{i}, as I said.", "Oh."] for i in range(20)]
    (folder / "talks.jsonl").write_text("\n".join(json.dumps({"dialog": t}) for t in turns))
    language_model().save_pretrained(folder / "language")
    byte_tokenizer().save_pretrained(folder / "language")
    (folder / "note.txt").write_text("Ada keeps the blue key in a tin behind the oven. Ben sold his boat. " * 20)


def _words(words: list[str]) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    table = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def byte_tokenizer() -> Any:
    """One token for each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def language_model() -> Any:
    """A random one of two layers, 260 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, bos_token_id=256, eos_token_id=257, pad_token_id=257,
        initializer_range=0.15, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None  # answers of one length
    return model
