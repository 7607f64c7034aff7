"""A small language model reads a handbook once and answers from less and less of its cache."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files

from .. import plots
from ..integrations.hf import KVzipCache
from ..kvzip_commands import answers
from ..kvzip_sweep import pair_bytes
from ..language_models import SMOLLM2, Source
from .step import Step

RATIOS = (1.0, 0.5, 0.3, 0.1)
QUICK = (1.0, 0.3)
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
    return files("dataopt").joinpath("demo/handbook.txt").read_text(encoding="utf-8").strip()


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


def ask(ratios: Sequence[float], text: str | None = None, questions: Sequence[tuple[str, str]] = QUESTIONS) -> Step:
    """The step; ``text`` is read instead of the handbook."""
    model, tokenizer = Source(SMOLLM2, device="cpu").load()
    start = time.perf_counter()
    cache = KVzipCache(model, tokenizer, handbook() if text is None else text, ratio=1.0, keep_scores=True)
    seconds = time.perf_counter() - start
    results, kept = [], b""
    for ratio in ratios:
        results += run(cache, [ratio], questions)
        if ratio == SHOWN:
            kept = plots.to_png(plots.show_kept(cache.lengths.numpy(), cache.seen_tokens))
    count = len(questions)
    shown = next(r for r in results if r.ratio == SHOWN)
    return Step(
        "Ask a compressed text",
        f"SmolLM2-135M reads a handbook of {cache.seen_tokens:,} tokens once and scores its key-value pairs, in "
        f"{seconds:.1f} s. What does it still answer when most of the pairs are gone?",
        ["", *(f"{r.ratio:.0%} kept" for r in results)],
        [
            ["bytes", *(f"{r.nbytes:,}" for r in results)],
            [f"seconds, {count} answers", *(f"{r.seconds:.1f}" for r in results)],
            ["right", *(f"{r.right} of {count}" for r in results)],
            *([question, *(r.answers[i] for r in results)] for i, (question, _) in enumerate(questions)),
        ],
        f"With {SHOWN:.0%} of the pairs {shown.right} of {count} answers are right, with all {results[0].right}. "
        "Greedy answers: nothing here is left to chance.",
        ["dataopt kvzip compress FILE --model MODEL --ratio 0.3 --out notes", "dataopt kvzip ask notes 'a question'"],
        {"kvzip_kept.png": (f"What each head of each layer kept at {SHOWN:.0%}.", kept)},
        {
            "tokens": cache.seen_tokens,
            "seconds": seconds,
            "questions": [{"question": question, "right": word} for question, word in questions],
            "results": [asdict(r) for r in results],
        },
    )
