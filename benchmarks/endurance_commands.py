"""The long commands as ``endurance.py`` runs them: tiny inputs, how each goes on, and what must be equal afterwards.

A command runs in a child that is forked from a process which has imported everything, so that a random moment of it is
one of its work and not of an import. What kills it is a real SIGKILL: from outside at a random time, or from inside
just before one of its file operations in the output folder, where half-written files come from.
"""

from __future__ import annotations

import csv
import hashlib
import http.client
import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

MODULES = (
    *(
        "clean",
        "ccm_commands",
        "condense_commands",
        "kvzip_commands",
        "review.server",
        "review.export",
        "review.folder",
    ),
    *("review.decisions", "integrations.timm.loop", "integrations.timm.train", "core.relation.tiles", "plots"),
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_EVENTS = ("os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir")
OUT = "out"  # the same for all runs: its name stands in reports and configurations
CLASSES = ("nought", "one", "two")

Result = dict[str, str]  # what is compared, by name: hashes, or the texts themselves


@dataclass(frozen=True)
class Command:
    """How to start a command, to go on with it after a kill, and what it leaves.

    Attributes:
        promise: what its page says about a stopped run.
        start: arguments, with the folder of the result as ``{out}`` and that of the inputs as ``{inputs}``.
        again: more arguments for a folder in which a run was killed.
        result: of a finished folder.
        whole: raises where a killed run left a result that would be taken for a whole one and is not.
    """

    name: str
    promise: str
    start: tuple[str, ...]
    again: Callable[[Path], tuple[str, ...]]
    result: Callable[[Path], Result]
    whole: Callable[[Path], None] = lambda out: None

    def arguments(self, inputs: Path, out: Path) -> list[str]:
        return [part.format(inputs=inputs, out=out) for part in self.start]


# Children


def import_all() -> None:
    """What the commands need, before anything is forked."""
    for name in MODULES:
        importlib.import_module(f"dataopt.{name}")


def begin(argv: list[str], out: Path, log: Path, die_at: int | None = None, count: Path | None = None) -> int:
    """Fork a child that runs the command, and return its number.

    Args:
        out: folder whose file operations are counted.
        log: where its output goes.
        die_at: the operation before which it kills itself.
        count: file for the number of operations of a run that comes to its end.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        seen = _watch(out, die_at)
        with log.open("w") as file, redirect_stdout(file), redirect_stderr(file):
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            code = _call(argv)
        if count:
            count.write_text(str(seen[0]))
    finally:
        os._exit(code)


def _call(argv: list[str]) -> int:
    from dataopt.cli import main

    try:
        main(argv)
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else bool(e.code)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _watch(out: Path, die_at: int | None) -> list[int]:
    """Count the operations that write below a folder, in this process; at one of them it dies."""
    seen, root = [0], str(out)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if not (isinstance(path, str) and path.startswith(root) and flags & _WRITING):
                return
        elif event in _EVENTS:
            relative = event in ("os.remove", "os.rmdir") and args[1] != -1  # shutil.rmtree, below an open folder
            if not relative and not any(isinstance(a, str | Path) and str(a).startswith(root) for a in args[:2]):
                return
        else:
            return
        seen[0] += 1
        if seen[0] == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return seen


def wait(pid: int, seconds: float | None = None) -> int:
    """The exit code of a child, negative for a signal; after so many seconds it is killed."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while deadline is not None:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            os.kill(pid, signal.SIGKILL)
            break
        time.sleep(0.001)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# Kills


@dataclass(frozen=True)
class Straight:
    """An uninterrupted run: its result, its seconds, and the number of its file operations."""

    result: Result
    seconds: float
    operations: int


@dataclass
class Tally:
    """What came of the kills of one command.

    Attributes:
        landed: kills while it ran.
        finished: runs that came to an end after kills, and were compared.
        unequal: names of what differed, for each of them where something did.
        refused: last lines of runs that would not go on.
        torn: results that a kill had left and that were not whole.
        leftovers: hidden temporary files that lay in finished folders.
        worst: the most kills that one finished run had survived.
    """

    landed: int = 0
    finished: int = 0
    unequal: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    torn: list[str] = field(default_factory=list)
    leftovers: int = 0
    worst: int = 0

    def cell(self) -> dict[str, Any]:
        return dict(vars(self))


def straight(command: Command, inputs: Path, folder: Path) -> Straight:
    """Run it to its end, without a kill."""
    out, log, count = folder / OUT, folder / "straight.log", folder / "count"
    shutil.rmtree(out, ignore_errors=True)
    begun = time.monotonic()
    code = wait(begin(command.arguments(inputs, out), out, log, count=count))
    seconds = time.monotonic() - begun
    if code:
        raise RuntimeError(f"{command.name} failed without a kill:\n{log.read_text()[-2000:]}")
    return Straight(command.result(out), seconds, int(count.read_text()))


def kills(
    command: Command, inputs: Path, folder: Path, times: int, kind: str, expected: Straight, seed: int = 0
) -> Tally:
    """Kill a command, go on with it, kill it again; compare whatever comes to its end.

    Args:
        times: kills that have to land.
        kind: ``"time"``: at a random time of the uninterrupted run; ``"file"``: before a random one of its file
            operations.
    """
    draw, tally, survived = random.Random(seed), Tally(), 0
    out, log = folder / OUT, folder / f"{kind}.log"
    shutil.rmtree(out, ignore_errors=True)
    while tally.landed < times or survived:
        more: tuple[str, ...] = ()
        if out.is_dir() and any(out.iterdir()):
            with _noted(tally.torn):
                command.whole(out)
            more = command.again(out)
        argv = [*command.arguments(inputs, out), *more]
        last = tally.landed >= times  # the last run goes to its end
        at = draw.randint(1, expected.operations) if kind == "file" and not last else None
        pid = begin(argv, out, log, die_at=at)
        code = wait(pid, draw.uniform(0, expected.seconds) if kind == "time" and not last else None)
        if code == -signal.SIGKILL:
            tally.landed += 1
            survived += 1
            continue
        if code:
            lines = log.read_text().strip().splitlines()
            tally.refused.append(lines[-1][-300:] if lines else f"exit code {code}")
        else:
            tally.finished += 1
            tally.worst = max(tally.worst, survived)
            with _noted(tally.unequal):
                different = unequal(expected.result, command.result(out))
                tally.unequal += [", ".join(different)[:300]] if different else []
            tally.leftovers += len(leftovers(out))
        shutil.rmtree(out)
        survived = 0
    return tally


@contextmanager
def _noted(where: list[str]) -> Iterator[None]:
    try:
        yield
    except Exception as e:
        where.append(f"{type(e).__name__}: {e}"[:300])


def unequal(one: Result, other: Result) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def leftovers(out: Path) -> list[Path]:
    """Temporary files of ``whole_file`` that a kill has left."""
    return [p for p in out.rglob(".*") if p.is_file() and len(p.suffix) == 9]  # .NAME.EXT.xxxxxxxx


# Results


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def of_tensors(path: Path) -> Result:
    with safe_open(path, "pt") as file:
        return {f"{path.name}:{name}": _of_tensor(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118


def _of_tensor(t: torch.Tensor) -> str:
    return f"{t.dtype} {tuple(t.shape)} {_hash(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes())}"


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
    return {name: _hash((out / name).read_bytes()) for name in (*names, "report.html", "record.json")}


def _condense_result(out: Path) -> Result:
    from dataopt.core.condense import Condensed

    Condensed.load(out)
    found = {k.partition(":")[2]: v for p in out.glob("condensed-*.safetensors") for k, v in of_tensors(p).items()}
    pictures = {name: _hash((out / name).read_bytes()) for name in ("condensed.png", "changed.png", "record.json")}
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
    return tensors | rest | {"kept.png": _hash((out / "kept.png").read_bytes())}


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
    model = ("--model", "{inputs}/language", "--device", "cpu")
    train = (
        *(
            "train",
            "--data-dir",
            "{inputs}/pictures",
            "--model",
            "test_resnet",
            "--num-classes",
            "3",
            "--img-size",
            "32",
        ),
        *("--batch-size", "8", "--epochs", epochs, "--warmup-epochs", "0", "--lr", "0.05", "--device", "cpu"),
        *("--workers", "0", "--mixup", "puzzle", "--output", "{out}", "--experiment", "run"),
    )
    ccm = (
        *("ccm", "train", "{inputs}/talks.jsonl", *model, "--out", "{out}", "--steps", "10", "--batch-size", "4"),
        *("--micro-batch", "4", "--test-rows", "4", "--lr", "0.01", "--comp-tokens", "1", "--full-context-steps", "4"),
    )
    all_of_them = (
        Command("dataopt train", "a resumed run goes on with the draws that it would have made", train, _train_again,
                _train_result),
        Command("dataopt clean", "a killed run goes on there with equal outputs; bitwise equal sums",
                ("clean", "{inputs}/reviews.csv", "--model", "{inputs}/text", "--out", "{out}", "--batch-size", "8"),
                _always("--resume"), _clean_result),
        Command("dataopt condense", "the same result, bit for bit",
                ("condense", "{inputs}/pictures", "--images-per-class", "1", "--width", "4", "--steps", steps, "--init",
                 "centres", "--device", "cpu", "--out", "{out}"), _always("--resume"), _condense_result),
        Command("dataopt ccm train", "goes on from its last checkpoint; no word on bits", ccm, _always("--resume"),
                _ccm_result),
        Command("dataopt kvzip compress", "no --resume; until the end an older save stays the valid one",
                ("kvzip", "compress", "{inputs}/note.txt", *model, "--out", "{out}"), _always("--overwrite"),
                _kvzip_result, _kvzip_whole),
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


# Decisions of a review


def review(folder: Path, work: Path, times: int, seed: int = 0) -> dict[str, Any]:
    """Decide over HTTP while the server is killed at a random moment, and start it again, so many times.

    Args:
        folder: of ``dataopt clean``.

    Returns:
        ``landed`` kills, ``decided`` answers that had come, ``lost`` ones among them that the file lacked, ``unasked``
        ones that it holds and nobody made, and whether the data set that is written at the end is the one of a review
        without kills.
    """
    from dataopt.review.decisions import Decisions, open_decisions
    from dataopt.review.folder import read_folder

    draw, out = random.Random(seed), work / "killed"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(folder, out)
    read = read_folder(out)
    rows, given = read.suspects.tolist(), read.scores["given_label"].to_dict()
    acked: dict[int, tuple[str, int | None]] = {}
    found = {"landed": 0, "decided": 0, "lost": 0, "unasked": 0, "suspects": len(rows)}
    while found["landed"] < times:
        log = work / "review.log"
        log.unlink(missing_ok=True)
        pid = begin(["review", str(out)], out, log)
        sent, stop = dict(acked), threading.Event()
        caller = threading.Thread(target=_decide, args=(log, rows, given, sent, acked, stop, draw.random(), found))
        caller.start()
        while not stop.is_set() and not os.waitpid(pid, os.WNOHANG)[0]:
            if log.exists() and "Ctrl+C" in log.read_text():
                break
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.4))
        os.kill(pid, signal.SIGKILL)
        wait(pid)
        stop.set()
        caller.join()
        found["landed"] += 1
        store = open_decisions(out, given)
        held = {row: (d.action, d.label) for row, d in store.all().items()}
        store.close()
        found["lost"] += sum(held.get(row) not in (value, sent[row]) for row, value in acked.items())
        found["unasked"] += sum(sent.get(row) != value and acked.get(row) != value for row, value in held.items())
        acked = held  # a decision in flight may or may not have been written
    plain = work / "plain"
    shutil.rmtree(plain, ignore_errors=True)
    shutil.copytree(folder, plain)
    store = Decisions(plain / "decisions.sqlite")
    for row, (action, label) in acked.items():
        store.decide(row, given[row], action, label)
    store.close()
    written = []
    for one in (out, plain):
        code = wait(begin(["review", str(one), "--export", str(one / "new")], one, work / "export.log"))
        written.append((code, _hash((one / "new" / "train.parquet").read_bytes()) if not code else ""))
    return found | {"equal": written[0] == written[1] and written[0][0] == 0, "rows_decided": len(acked)}


def _decide(
    log: Path, rows: list[int], given: dict[int, int], sent: dict[int, Any], acked: dict[int, Any],
    stop: threading.Event, seed: float, found: dict[str, Any],
) -> None:  # fmt: skip
    """Decide as fast as the server answers."""
    draw = random.Random(seed)
    while not (log.exists() and (at := re.search(r"http://\S+?/\?token=\S+", log.read_text()))):
        if stop.wait(0.005):
            return
    host = at[0].partition("/?")[0]
    with suppress(OSError, http.client.HTTPException):
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        opener.open(at[0], timeout=5).read()
        while not stop.is_set():
            row = draw.choice(rows)
            action = draw.choice(("keep", "drop", "relabel"))
            label = 1 - given[row] if action == "relabel" else None
            sent[row] = (action, label)
            body = json.dumps({"row": row, "action": action, "label": label}).encode()
            asked = urllib.request.Request(f"{host}/decide", body, {"Origin": host, "Content-Type": "application/json"})
            opener.open(asked, timeout=5).read()
            acked[row] = sent[row]
            found["decided"] += 1
