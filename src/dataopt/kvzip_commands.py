"""What ``dataopt kvzip compress``, ``ask`` and ``sweep`` do."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from . import kvzip_sweep
from .core.artifacts import write_whole
from .integrations.hf import KVzipCache, decoder, hub
from .integrations.hf.kvzip import artifact
from .integrations.hf.kvzip.context import Options
from .integrations.hf.kvzip.layers import SlidingState
from .language_models import Source, check_out, decode, read_text

_DTYPES = ("float64", "float32", "bfloat16", "float16")
_ROWS = 8  # questions that are answered at once


def compress(
    file: str, out: Path, source: Source, overwrite: bool, head_scores: str | None = None, **options: Any
) -> None:
    """Compress a text and save it with a picture.

    Args:
        options: of :class:`KVzipCache`.

    Raises:
        ValueError: a bad option, a text that is no UTF-8, or a folder with something in it.
    """
    check_out(out, overwrite)
    Options(**options)  # a bad one is refused before a model is loaded
    context = read_text(file)
    model, tokenizer = source.load()
    start = time.perf_counter()
    cache = KVzipCache(model, tokenizer, context, head_scores=head_scores, **options)
    seconds = time.perf_counter() - start
    drawn = picture(cache)
    cache.save_pretrained(out)
    if drawn:
        write_whole(out / "kept.png", drawn)
    print(
        f"{cache.seen_tokens:,} tokens read and compressed in {seconds:.1f} s: {cache.full_nbytes:,} bytes before, "
        f"{cache.nbytes:,} after ({cache.nbytes / cache.full_nbytes:.1%})"
    )
    print(f"Wrote the cache{' and kept.png' if drawn else ''} into {out}. The files contain the text.")
    if not drawn:
        print('No picture without matplotlib; get it with: pip install "dataopt[plots]"')


def picture(cache: KVzipCache) -> bytes | None:
    """``kept.png``: the share that each head kept; None without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from . import plots

    return plots.to_png(plots.show_kept(cache.lengths.numpy(), cache.seen_tokens))


def ask(
    source: str,
    questions: Sequence[str],
    model: str | None,
    device: str,
    revision: str | None,
    cache_revision: str | None,
    max_new_tokens: int,
    conversation: bool,
) -> None:
    """Answer the questions; without any, those on stdin, or those typed at a prompt.

    Raises:
        ValueError: no question, no model known, or a cache that cannot be loaded.
    """
    typed = not questions and sys.stdin.isatty()
    if not questions and not typed:
        questions = [line.strip() for line in sys.stdin if line.strip()]
    if not typed and not all(q.strip() for q in questions or [""]):
        raise ValueError("no question was given, or an empty one; give them as arguments, or one a line on stdin")
    folder = hub.find(source, [artifact.RECORD], revision=cache_revision)
    record = hub.read_record(hub.member(folder, artifact.RECORD), artifact.KIND, artifact.VERSION)
    name, noted = model or record.get("base_model"), record.get("fingerprint")
    dtype = noted.get("dtype") if isinstance(noted, dict) else None
    if name is None:
        raise ValueError(f"{source} was not made with a model of the Hub; name the model with --model")
    loaded, tokenizer = Source(name, dtype if dtype in _DTYPES else "auto", device, revision).load()
    cache = KVzipCache.from_pretrained(source, loaded, tokenizer, revision=cache_revision)
    if typed:
        _prompt(cache, max_new_tokens, conversation)
        return
    rows = 1 if conversation else _ROWS
    for start in range(0, len(questions), rows):
        part = questions[start : start + rows]
        for question, answer in zip(part, answers(cache, part, max_new_tokens, keep=conversation), strict=True):
            print(answer if len(questions) == 1 else f"> {question}\n{answer}\n", flush=True)


def answers(cache: KVzipCache, questions: Sequence[str], max_new_tokens: int, keep: bool = False) -> list[str]:
    """Greedy answers to several questions, as one batch where the model allows it.

    Args:
        keep: the next question continues this one, which must be the only one.
    """
    sliding = any(isinstance(p, SlidingState) for p in cache._states[0].layers)  # then no padding: one at a time
    batches = [[q] for q in questions] if sliding else [list(questions)]
    texts = []
    for batch in batches:
        inputs = cache.inputs(batch)
        out = _generate(cache, inputs, max_new_tokens)
        if keep:
            cache.keep(out)
        texts += cache.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def _prompt(cache: KVzipCache, max_new_tokens: int, conversation: bool) -> None:
    """Ask until the input ends; answers appear word by word."""
    streamer = TextStreamer(cache.tokenizer, skip_prompt=True, skip_special_tokens=True)
    print(f"{cache.seen_tokens:,} tokens were read. An empty line ends.")
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            print()
            return
        if not question:
            return
        out = _generate(cache, cache.inputs(question), max_new_tokens, streamer=streamer)
        if conversation:
            cache.keep(out)


def _generate(cache: KVzipCache, inputs: dict[str, Any], max_new_tokens: int, **kwargs: Any) -> torch.Tensor:
    generate: Any = cache.model.generate
    return generate(
        **inputs,
        **decoder.cache_argument(cache.model, cache),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=decoder.pad_id(cache.tokenizer),
        **kwargs,
    )


def sweep(
    file: str, out: Path, source: Source, overwrite: bool, ratios: str, questions: Path | None, **options: Any
) -> None:
    """Measure a text at several ratios, print the table, write ``sweep.json`` and ``sweep.png``.

    Raises:
        ValueError: a bad option, ratios or questions that cannot be read, or a folder with something in it.
    """
    check_out(out, overwrite)
    wanted = kvzip_sweep.read_ratios(ratios)
    Options(**options)
    pairs = kvzip_sweep.read_questions(decode(questions.read_bytes(), str(questions))) if questions else []
    context = read_text(file)
    model, tokenizer = source.load()
    start = time.perf_counter()
    cache = KVzipCache(model, tokenizer, context, ratio=1.0, keep_scores=True, **options)
    seconds = time.perf_counter() - start
    print(
        f"{cache.seen_tokens:,} tokens read and scored in {seconds:.1f} s on {model.device}, "
        f"threads: {torch.get_num_threads()}; {cache.full_nbytes:,} bytes in transformers' own cache\n"
    )
    rows = kvzip_sweep.measure(cache, wanted, pairs)
    table = kvzip_sweep.table(rows)
    print(table)
    report = {
        "model": source.model,
        "tokens": cache.seen_tokens,
        "full_bytes": cache.full_nbytes,
        "seconds": seconds,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "versions": {p: importlib.metadata.version(p) for p in ("dataopt", "torch", "transformers")},
        "options": options,
        "questions": len(pairs),
        "rows": [asdict(r) for r in rows],
        "table": table.splitlines(),
    }
    drawn = None
    if importlib.util.find_spec("matplotlib"):
        from . import plots

        quality: dict[str, list[float]] = {"reconstruction": [r.reconstruction for r in rows]}
        if answered := [r.answers for r in rows if r.answers is not None]:
            quality["answers"] = answered
        drawn = plots.to_png(plots.show_sweep([r.ratio for r in rows], [r.nbytes for r in rows], quality))
        write_whole(out / "sweep.png", drawn)
    write_whole(out / "sweep.json", json.dumps(report, indent=2) + "\n")
    print(f"\nWrote {out / 'sweep.json'}{' and ' + str(out / 'sweep.png') if drawn else ''}.")
    if not drawn:
        print('No picture without matplotlib; get it with: pip install "dataopt[plots]"')
