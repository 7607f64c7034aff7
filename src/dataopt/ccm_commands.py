"""What ``dataopt ccm train``, ``chat`` and ``stream`` do."""

from __future__ import annotations

import importlib.metadata
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from .core.artifacts import write_whole
from .integrations.hf import (
    CCMCache,
    CCMConfig,
    CCMModel,
    CCMStream,
    CCMTrainer,
    decoder,
    demonstration_rows,
    dialogue_rows,
    finetune_full_context,
    hub,
    profile_rows,
    reserved_ids,
)
from .integrations.hf.ccm.data import first_ids
from .integrations.hf.ccm.rows import full_context_rows
from .language_models import Source, read_text
from .out_folder import WORK, claimed
from .sources import find_source, load_source

COLUMNS = {"dialogue": "dialog", "demonstrations": "demonstrations", "profile": "profile"}
BASE, REPORT, NOTE = "base", "report.json", "base_model.json"
_PIECE = 256  # tokens that a stream reads between two moves of the bar


@dataclass(frozen=True)
class Asked:
    """The options about a model that an adapter may know the name of."""

    model: str | None
    dtype: str
    device: str
    revision: str | None


# Training


def train(
    dataset: str,
    out: Path,
    source: Source,
    *,
    form: str,
    column: str | None,
    instruction_column: str | None,
    split: str | None,
    config: str | None,
    options: dict[str, Any],
    reserved_tokens: bool,
    multi_query: bool,
    max_tokens: int | None,
    steps: int,
    full_context_steps: int,
    batch_size: int,
    micro_batch: int,
    lr: float,
    distill: float,
    test_rows: int,
    checkpointing: bool,
    seed: int,
    resume: bool,
) -> None:
    """Train, measure on the rows that were kept out, save; checkpoints lie in ``work`` until then.

    Raises:
        ValueError: a bad option, a data set without the columns of its form, or a folder with something in it.
    """
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    asked = CCMConfig(**options)
    if instruction_column is not None and form != "profile":
        raise ValueError(
            f"--instruction-column {instruction_column} goes with --form profile and this is {form}; leave it out"
        )
    found = find_source(dataset, split, config, None)
    arguments = {
        "dataset": found, "form": form, "column": column, "instruction_column": instruction_column, "options": options,
        "reserved_tokens": reserved_tokens, "multi_query": multi_query, "max_tokens": max_tokens, "steps": steps,
        "full_context_steps": full_context_steps, "batch_size": batch_size, "lr": lr, "distill": distill,
        "test_rows": test_rows, "seed": seed, "model": source.model, "revision": source.revision, "dtype": source.dtype,
    }  # fmt: skip
    with claimed(out, arguments, resume, "dataopt ccm train", together=True):
        base, tokenizer = source.load()
        embedding: Any = base.get_input_embeddings()
        size = len(embedding.weight)
        if reserved_tokens:
            asked = asked.with_ids(_reserved(tokenizer, size, asked.comp_tokens))
        comp_ids = asked.comp_ids or list(range(size, size + asked.comp_tokens))  # those that CCMModel appends
        more: dict[str, Any] = {} if max_tokens is None else {"max_tokens": max_tokens}
        if instruction_column is not None:
            more["instruction"] = instruction_column
        more |= {"multi_query": multi_query, "sink": asked.sink, "seed": seed}
        rows = _rows(form, load_source(found), tokenizer, comp_ids, column, **more)
        if len(rows) <= test_rows:
            raise ValueError(f"{len(rows)} rows and --test-rows {test_rows} leave none to train on; keep out fewer")
    kept = rows.select(range(len(rows) - test_rows, len(rows)))
    rows = rows.select(range(len(rows) - test_rows))
    work = out / WORK
    common: dict[str, Any] = {
        "per_device_train_batch_size": micro_batch,
        "per_device_eval_batch_size": micro_batch,
        "learning_rate": lr,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "weight_decay": 0.0,
        "seed": seed,
        "report_to": "none",
        "use_cpu": base.device.type == "cpu",
        "gradient_checkpointing": checkpointing,
        "disable_tqdm": not sys.stderr.isatty(),
        "logging_steps": max(1, steps // 50),
        "logging_strategy": "steps",
    }

    def training(folder: str, count: int) -> TrainingArguments:
        """Several processes meet in the first of these: nothing may be written before."""
        args = TrainingArguments(output_dir=str(work / folder), max_steps=count, **common)
        args._n_gpu = min(args.n_gpu, 1)  # one process takes one GPU
        args.gradient_accumulation_steps = max(1, round(batch_size / (micro_batch * args.world_size)))
        return args

    torch.manual_seed(seed)
    if full_context_steps:
        args = training(BASE, full_context_steps)
        args.logging_strategy = "no"  # type: ignore[assignment]
        base = _first_stage(base, tokenizer, source, args, rows, out / BASE)
    torch.manual_seed(seed)
    model = CCMModel(base, asked)
    assert model.comp_ids == comp_ids
    args = training("adapter", steps)
    args.save_strategy, args.save_steps, args.save_total_limit = "steps", max(1, steps // 10), 1  # type: ignore[assignment]
    trainer = CCMTrainer(model, args, distill=distill, train_dataset=rows, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)  # off a terminal; the report holds the losses
    start = time.perf_counter()
    with args.main_process_first(local=False):  # it clears up, and the others find the same
        newest = _checkpoint(work / "adapter") if resume else None
    if newest and (state := TrainerState.load_from_json(str(Path(newest) / TRAINER_STATE_NAME))).global_step >= steps:
        trainer._load_from_checkpoint(newest)  # all was trained; train() would take one step more
        trainer.state = state
    else:
        trainer.train(resume_from_checkpoint=newest)
    seconds = time.perf_counter() - start
    if not trainer.is_world_process_zero():
        return
    model.eval()
    report: dict[str, Any] = {
        "seconds": seconds,
        "rows": len(rows),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "held_out": measured(model, tokenizer, kept, trainer.data_collator, micro_batch) if test_rows else None,
        "versions": {p: importlib.metadata.version(p) for p in ("dataopt", "torch", "transformers", "peft")},
    }
    model.save_pretrained(out)
    if not full_context_steps:
        write_whole(out / NOTE, json.dumps({"model": source.model, "revision": source.revision}) + "\n")
    write_whole(out / REPORT, json.dumps(arguments | report, indent=1) + "\n")
    losses = report["losses"]
    print(f"{len(rows):,} rows, {steps} steps in {seconds:.1f} s; loss from {losses[0]:.3f} to {losses[-1]:.3f}")
    if report["held_out"]:
        print(
            f"\n{len(kept)} rows that were kept out; nats per token of the answers, pairs per head before the input:\n"
        )
        print(table(report["held_out"]))
    print(f"\nWrote the adapter into {out}. Talk to it with: dataopt ccm chat {out}")


def _first_stage(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: Source,
    args: TrainingArguments,
    rows: Dataset,
    folder: Path,
) -> PreTrainedModel:
    """Thesis section 7.4: LoRA on full contexts, merged; kept, so that a resumed run finds it."""
    if not folder.exists():  # of several processes none ends the training before all have begun it
        tuned = finetune_full_context(base, args, rows)
        part = folder.with_name(f".{folder.name}")  # renamed when whole: what a kill leaves is not taken for the model
        with args.main_process_first(local=False):
            if args.process_index == 0:
                tokenizer.save_pretrained(part)
                tuned.save_pretrained(part)
                part.rename(folder)
    again, _ = replace(source, model=str(folder), revision=None).load()  # under its own name, as in a resumed run
    return again


def _checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that is whole; what a kill has left of newer ones goes."""
    while folder.is_dir() and (found := get_last_checkpoint(str(folder))):
        try:
            json.loads((Path(found) / TRAINER_STATE_NAME).read_text())  # the Trainer writes it last
            return found
        except (OSError, ValueError):
            shutil.rmtree(found)
    return None


def _reserved(tokenizer: PreTrainedTokenizerBase, size: int, count: int) -> list[int]:
    """The last ones of a vocabulary of this size: others that need a token, for padding say, take the first."""
    ids = [i for i in reserved_ids(tokenizer) if i < size][-count:]
    if len(ids) < count:
        raise ValueError(
            f"--reserved-tokens: the vocabulary has {len(ids)} reserved tokens and --comp-tokens is {count}; leave it "
            "out, and new ones are appended"
        )
    return ids


def _rows(
    form: str,
    data: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    comp_ids: Sequence[int],
    column: str | None,
    **options: Any,
) -> Dataset:
    forms: dict[str, tuple[Callable[..., Dataset], str]] = {
        "dialogue": (dialogue_rows, "turns"),
        "demonstrations": (demonstration_rows, "demonstrations"),
        "profile": (profile_rows, "profile"),
    }
    make, name = forms[form]
    return make(data, tokenizer, comp_ids, **{name: column or COLUMNS[form]}, **options)


@torch.no_grad()
def measured(
    model: CCMModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, collator: Any, batch: int
) -> dict[str, dict[str, float]]:
    """Loss of the answers without context, from the memory, and from the full context; and the pairs of each."""
    sums = {"no context": 0.0, "CCM": 0.0, "full context": 0.0}
    labels, asked, text, slots = 0, 0, 0, 0
    base, device = model.language_model, model.language_model.device
    for start in range(0, len(rows), batch):
        part = [rows[i] for i in range(start, min(start + batch, len(rows)))]
        made = {name: t.to(device) for name, t in collator(part).items()}
        count = int((made["labels"][:, 1:] != -100).sum())
        labels += count
        sums["CCM"] += float(model(**made).loss) * count
        full = model.full_context_logits(made["input_ids"], made["segment_ids"], made["comp_slot"])
        sums["full context"] += float(_loss(full, made["labels"]))
        for row in part:
            contexts = {s for s, slot in zip(row["segment_ids"], row["comp_slot"], strict=True) if slot >= 0}
            queries = sorted(set(row["segment_ids"]) - contexts - {0})
            for single, query in zip(full_context_rows(row), queries, strict=True):
                before = [s for s in contexts if s < query]
                length = row["segment_ids"].count(query)
                asked += 1
                text += len(single["input_ids"]) - length
                steps = len(before) if model.ccm_config.mode == "concat" else min(1, len(before))
                slots += row["segment_ids"].count(0) + steps * model.ccm_config.comp_tokens
                ids, answer = single["input_ids"][-length:], single["labels"][-length:]
                begin = single["input_ids"][: row["segment_ids"].count(0)] or first_ids(tokenizer)
                if len(single["input_ids"]) > length:  # else it is whole
                    ids, answer = [*begin, *ids], [*[-100] * len(begin), *answer]
                logits = base(torch.tensor([ids], device=device)).logits
                sums["no context"] += float(_loss(logits, torch.tensor([answer], device=device)))
    pairs = {"no context": 0.0, "CCM": slots / asked, "full context": text / asked}
    return {name: {"loss": total / labels, "pairs": pairs[name]} for name, total in sums.items()}


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum"
    )


def table(held_out: dict[str, dict[str, float]]) -> str:
    """A line for each method."""
    lines = [f"{'':14} {'loss':>7} {'perplexity':>11} {'pairs':>8}"]
    lines += [
        f"{name:14} {row['loss']:7.3f} {math.exp(min(row['loss'], 50)):11.2f} {row['pairs']:8.1f}"
        for name, row in held_out.items()
    ]
    return "\n".join(lines)


# Using it


def load(adapter: str, asked: Asked) -> tuple[CCMModel, PreTrainedTokenizerBase]:
    """The adapter on its base model.

    Raises:
        ValueError: no base model is known, or files that do not fit.
    """
    name, revision = asked.model, asked.revision
    if name is None:
        folder = hub.find(adapter, [NOTE, f"{BASE}/*", "adapter_config.json"])
        name = str(folder / BASE) if (folder / BASE).is_dir() else None
        for file, key in ((NOTE, "model"), ("adapter_config.json", "base_model_name_or_path")):
            if name is None and (folder / file).is_file():
                noted = json.loads(hub.member(folder, file).read_text())
                name, revision = noted.get(key), revision or noted.get("revision")
    if not name:
        raise ValueError(f"{adapter} does not say which model it belongs to; name it with --model")
    base, tokenizer = Source(name, asked.dtype, asked.device, revision).load()
    return CCMModel.from_pretrained(base, adapter), tokenizer


def chat(adapter: str, asked: Asked, folder: Path | None, max_new_tokens: int, separator: str) -> None:
    """A conversation in the terminal, or over stdin; both sides of every turn become contexts.

    Raises:
        ValueError: what cannot be loaded.
    """
    model, tokenizer = load(adapter, asked)
    config = model.language_model.config.get_text_config(decoder=True)
    if folder is not None and (folder / "ccm_memory.json").exists():
        memory = CCMCache.from_pretrained(folder, model, tokenizer)
    else:
        memory = CCMCache(model, tokenizer)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    spoken = 2 * config.num_hidden_layers * heads * head * model.language_model.dtype.itemsize
    read = sum(memory._memory.text) if memory._memory is not None else 0
    typed = sys.stdin.isatty()
    if typed:
        print("An empty line ends.")
    while True:
        try:
            said = input("> " if typed else "").strip()
        except EOFError:
            break
        if not said:
            break
        turn = f"{separator} {said}"
        if not memory.steps[0]:
            turn = turn.lstrip("\n")
        answer = _answer(model, tokenizer, memory, turn + separator, max_new_tokens, separator)
        for text in (turn, f"{separator} {answer}" if answer else ""):
            if text:
                memory.append(text)
                read += len(tokenizer(text, add_special_tokens=False).input_ids)
        print(answer)
        print(
            f"[memory: {memory.slots[0]} pairs, {memory.nbytes:,} bytes; full context: {read} pairs, "
            f"{read * spoken:,} bytes]",
            flush=True,
        )
        if folder is not None:
            memory.save_pretrained(folder)
    if typed:
        print()


def _answer(
    model: CCMModel,
    tokenizer: PreTrainedTokenizerBase,
    memory: CCMCache,
    question: str,
    max_new_tokens: int,
    separator: str,
) -> str:
    inputs = memory.inputs(question)
    generate: Any = model.language_model.generate
    stop = {"stop_strings": [separator], "tokenizer": tokenizer} if separator.strip() else {}
    out = generate(
        **inputs,
        **decoder.cache_argument(model.language_model, memory),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=decoder.pad_id(tokenizer),
        **stop,
    )
    text = str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return text.split(separator)[0].strip() if separator.strip() else text.strip()


def stream(adapter: str, file: str, asked: Asked, go_on: int, **sizes: int) -> None:
    """Read a text and print its perplexity, the pairs that it took, and a continuation.

    Raises:
        ValueError: sizes that do not go together, an empty text, or what cannot be loaded.
    """
    text = read_text(file)
    model, tokenizer = load(adapter, asked)
    reading = CCMStream(model, tokenizer, **sizes)
    ids = tokenizer(text).input_ids
    if not ids:
        raise ValueError(f"{file} is empty; give a text")
    start = time.perf_counter()
    scores = []
    with tqdm(total=len(ids), desc="reading", unit="token", disable=None, leave=False) as bar:
        for at in range(0, len(ids), _PIECE):
            piece = ids[at : at + _PIECE]
            scores.append(reading.feed(input_ids=piece))
            bar.update(len(piece))
    seconds = time.perf_counter() - start
    loss = -float(torch.cat(scores)[1:].mean()) if len(ids) > 1 else math.nan
    print(
        f"{len(ids):,} tokens in {seconds:.1f} s: perplexity {math.exp(loss):.2f} ({loss:.3f} nats per token); at most "
        f"{reading.peak_pairs} pairs per head, {reading.nbytes:,} bytes, {reading.steps} compressions"
    )
    if go_on:
        print(tokenizer.decode(reading.generate(max_new_tokens=go_on, do_sample=False), skip_special_tokens=True))
