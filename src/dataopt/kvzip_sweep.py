"""Bytes, time and quality of one text at several ratios, from a single scoring pass."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .integrations.hf import KVzipCache, decoder
from .integrations.hf.chat import encode
from .integrations.hf.kvzip import build

PIECES, PIECE = 8, 64  # parts of the text that the model has to repeat, and tokens of each
STEPS = 16


@dataclass(frozen=True)
class Row:
    """One ratio.

    Attributes:
        ratio: share of the pairs that stays.
        nbytes: of the stored pairs.
        step_seconds: median time of one decoding step.
        reconstruction: negative log-likelihood per token of repeating parts of the text.
        answers: the same of the given answers, or None without questions.
        right: share of the answers all of whose tokens are the most likely ones, or None.
    """

    ratio: float
    nbytes: int
    step_seconds: float
    reconstruction: float
    answers: float | None = None
    right: float | None = None


def read_ratios(text: str) -> list[float]:
    """Ratios from "1,.5,.1", from the highest down, each once.

    Raises:
        ValueError: no numbers in (0, 1].
    """
    try:
        ratios = sorted({float(part) for part in text.split(",")}, reverse=True)
    except ValueError:
        ratios = []
    if not ratios or not all(0 < r <= 1 for r in ratios):
        raise ValueError(f"ratios={text!r} must be numbers above 0 and up to 1, with commas between them")
    return ratios


def read_questions(text: str) -> list[tuple[str, str]]:
    """Questions and answers from lines with a tab between them; empty lines do not count.

    Raises:
        ValueError: another form, or no line at all.
    """
    pairs = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        question, _, answer = (part.strip() for part in line.partition("\t"))
        if not question or not answer:
            raise ValueError(f"questions, line {number}: {line!r:.80} must be a question, a tab and its answer")
        pairs.append((question, answer))
    if not pairs:
        raise ValueError("questions is empty; give a question, a tab and its answer on each line")
    return pairs


def measure(cache: KVzipCache, ratios: Sequence[float], questions: Sequence[tuple[str, str]] = ()) -> list[Row]:
    """Prune a cache from ratio to ratio, and measure it at each.

    Args:
        cache: made with ``ratio=1, keep_scores=True``; the lowest ratio is left in it.
        ratios: falling.
        questions: with their answers.
    """
    rows = []
    for ratio in tqdm(ratios, desc="ratios", unit="ratio", disable=None, leave=False):
        if ratio < cache.options.ratio:
            cache.prune(ratio)
        kept = [_answer(cache, question, answer) for question, answer in questions]
        rows.append(
            Row(
                ratio,
                pair_bytes(cache),
                step_seconds(cache),
                reconstruction(cache),
                sum(n for n, _, _ in kept) / sum(tokens for _, tokens, _ in kept) if kept else None,
                mean(right for _, _, right in kept) if kept else None,
            )
        )
    return rows


def pair_bytes(cache: KVzipCache) -> int:
    """Bytes of the stored context without the scores that were kept for pruning."""
    return cache.nbytes - sum(p.scores.nbytes for s in cache._states for p in s.packed if p.scores is not None)


def reconstruction(cache: KVzipCache, pieces: int = PIECES, size: int = PIECE) -> float:
    """Negative log-likelihood per token of parts of the context, teacher-forced behind the prompt to repeat them.

    The parts lie evenly in the text and, in all but short ones, begin elsewhere than the chunks that were scored.
    """
    state = cache._states[0]
    ids = state.ids[state.prefix :]
    size = min(size, len(ids))
    starts = sorted({round((i + 0.5) * (len(ids) - size) / pieces) for i in range(pieces)})
    total, tokens = 0.0, 0
    for start in starts:
        part = ids[start : start + size]
        before = ids[max(0, start - build.LAST) : start]
        prompt = build.repeat_prompt(cache.tokenizer, cache._chat, before)
        losses, _ = _forced(cache, torch.tensor([[*prompt, *part]]), len(part))
        total, tokens = total + float(losses.sum()), tokens + len(part)
    return total / tokens


def _answer(cache: KVzipCache, question: str, answer: str) -> tuple[float, int, bool]:
    """Summed negative log-likelihood of an answer, its tokens, and whether each is the most likely one."""
    own = encode(cache.tokenizer, answer)
    asked = cache.inputs(question)["input_ids"][0].tolist()
    losses, likely = _forced(cache, torch.tensor([[*asked, *own]]), len(own))
    return float(losses.sum()), len(own), bool(likely.all())


@torch.inference_mode()
def _forced(cache: KVzipCache, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Losses of the last ``count`` of (1, L) ids behind the context, and whether each is the most likely token."""
    logits = _forward(cache, cache.inputs(input_ids=ids))[0, -count - 1 : -1].float()
    target = ids[0, -count:].to(logits.device)
    return torch.nn.functional.cross_entropy(logits, target, reduction="none"), logits.argmax(-1) == target


@torch.inference_mode()
def step_seconds(cache: KVzipCache, steps: int = STEPS) -> float:
    """Median time of feeding one token behind a question; the first two steps do not count."""
    inputs = cache.inputs("What is this text about?")
    token = inputs["input_ids"][:, -1:]
    _forward(cache, inputs)
    mask = inputs["attention_mask"]
    seconds = []
    for _ in range(steps + 2):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        start = time.perf_counter()
        _forward(cache, {"input_ids": token, "attention_mask": mask})
        if token.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return median(seconds[2:])


def _forward(cache: KVzipCache, inputs: dict[str, Tensor]) -> Tensor:
    return cache.model(**inputs, **decoder.cache_argument(cache.model, cache), use_cache=True).logits


def table(rows: Sequence[Row]) -> str:
    """A line for each ratio; losses are in nats per token."""
    asked = rows[0].answers is not None
    head = f"{'ratio':>6} {'bytes':>15} {'ms per step':>12} {'loss, repeating':>16}"
    lines = [head + (f" {'loss, answers':>14} {'right':>7}" if asked else "")]
    for r in rows:
        line = f"{r.ratio:6g} {r.nbytes:15,} {1000 * r.step_seconds:12.1f} {r.reconstruction:16.3f}"
        lines.append(line + (f" {r.answers:14.3f} {r.right:7.0%}" if asked else ""))
    return "\n".join(lines)
