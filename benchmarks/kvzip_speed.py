"""Bytes and times of a compressed cache against DynamicCache with sdpa, with the NLL of the same run.

SmolLM2-135M-Instruct in float32, two threads, lines of 1,000 to 6,000 tokens. Decoding steps of all caches take turns,
so that a change of the machine's speed hits all of them alike. An empty cache is the floor: what a step costs without
any context.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import common
import kvzip_task as task
import torch
from dataopt.integrations.hf import KVzipCache
from dataopt.integrations.hf.kvzip import build
from dataopt.smollm2 import load_smollm2
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

THREADS, CHUNK, STEPS, REPETITIONS, PACKED = 2, 1024, 31, 3, (1.0, 0.3)
LENGTHS: tuple[int, ...] = (1024, 2048, 4096, 6144)
ROWS = (1, 8)
QUESTION = "What is this text about?"
FLOOR = "no context"
FILES = ("save", "load", "safetensors save", "safetensors load", "fsynced save")


def seconds(call: Callable[[], Any], repetitions: int) -> float:
    """Median time."""
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def dense_cache(reading: task.Reading, rows: int) -> DynamicCache:
    """Transformers' own cache with the context in each row."""
    cache = DynamicCache(config=reading.model.config)
    for i, layer in enumerate(reading.layers):
        cache.update(layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1), i)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.contiguous(), layer.values.contiguous()
    return cache


@torch.inference_mode()
def decoding(reading: task.Reading, caches: dict[str, Any], rows: int, steps: int) -> dict[str, float]:
    """Median seconds of a decoding step of each cache, in turns; the first two steps do not count."""
    model = reading.model
    whole = reading.cache()
    given = whole.inputs([QUESTION] * rows)
    token, mask = given["input_ids"][:, -1:], given["attention_mask"]
    # the mask of an empty cache covers the question alone
    unseen = {name: len(reading.ids) if name == FLOOR else 0 for name in caches}
    for name, cache in caches.items():
        task.forward(cache, given | {"attention_mask": mask[:, unseen[name] :]}, 1, model)
    times: dict[str, list[float]] = {name: [] for name in caches}
    for _ in range(steps + 2):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        for name, cache in caches.items():
            start = time.perf_counter()
            task.forward(cache, {"input_ids": token, "attention_mask": mask[:, unseen[name] :]}, 1, model)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[2:]) for name, values in times.items()}


def measure(model: Any, tokenizer: Any, length: int, repetitions: int, steps: int, chunk: int) -> common.Cell:
    """One context length."""
    document = task.lines(0, 1 if length <= 1100 else 1 + (length - 300) // 1000)
    reading = task.read(model, tokenizer, document.text, length, chunk)
    n = len(reading.ids)
    # the same work for both: chunks of one size, no language-model head
    prefill = seconds(lambda: build.prefill(model, reading.ids, chunk), repetitions)
    score = seconds(lambda: (reading.kept.clear(), reading.kvzip(chunk)), repetitions)
    scores = reading.kvzip(chunk)
    rows = task.repeat_rows(reading)
    packed = {ratio: reading.cache(scores if ratio < 1 else None, ratio) for ratio in PACKED}
    nll = {str(ratio): task.forced(cache, rows)["nll"] for ratio, cache in packed.items()}
    out: common.Cell = {"tokens": n, "prefill": prefill, "scoring": score, "nll": nll, "decode": {}, "bytes": {}}
    size = packed[1.0].full_nbytes
    for count in ROWS:
        caches = {
            FLOOR: DynamicCache(config=model.config),
            "DynamicCache": dense_cache(reading, count),
            **{str(r): c for r, c in packed.items()},
        }
        out["decode"][str(count)] = decoding(reading, caches, count, steps)
        out["bytes"][str(count)] = {
            FLOOR: 0,
            "DynamicCache": count * size,
            **{str(r): c.nbytes for r, c in packed.items()},
        }
        for cache in packed.values():
            cache.restore()
        del caches
    out["files"] = files(packed[0.3], repetitions)
    return out


def files(cache: KVzipCache, repetitions: int) -> common.Cell:
    """Seconds of saving and loading, and of safetensors' own calls on the same tensors.

    A save of ours is on the disk when it returns; safetensors' is in the system's memory, hence the third save.
    """
    folder = Path(tempfile.mkdtemp())
    tensors = {}
    for i, layer in enumerate(cache._states[0].packed):
        tensors |= {f"{i}.k": layer.keys, f"{i}.v": layer.values}
    plain = folder / "plain.safetensors"

    def save_to_disk() -> None:
        save_file(tensors, plain)
        with plain.open("rb+") as file:
            os.fsync(file.fileno())

    try:
        model, tokenizer = cache.model, cache.tokenizer
        cache.save_pretrained(folder / "warm")  # the fingerprint of a model is computed once
        return {
            "save": seconds(lambda: cache.save_pretrained(folder / "cache"), repetitions),
            "load": seconds(lambda: KVzipCache.from_pretrained(folder / "cache", model, tokenizer), repetitions),
            "safetensors save": seconds(lambda: save_file(tensors, plain), repetitions),
            "safetensors load": seconds(lambda: load_file(plain), repetitions),
            "fsynced save": seconds(save_to_disk, repetitions),
        }
    finally:
        shutil.rmtree(folder)


def report(run: common.Run, lengths: tuple[int, ...]) -> None:
    cells = {length: run.cells[f"n={length}"] for length in lengths}
    first = [
        [
            c["tokens"],
            f"{c['prefill']:.2f}",
            f"{c['scoring']:.2f}",
            f"{c['scoring'] / c['prefill']:.2f}",
            *(f"{1000 * c['files'][k]:.0f}" for k in FILES),
        ]
        for c in cells.values()
    ]
    second = []
    for c in cells.values():
        for count, times in c["decode"].items():
            base, size = times["DynamicCache"], c["bytes"][count]
            for name, value in times.items():
                nll = c["nll"].get("1.0" if name == "DynamicCache" else name)
                second.append(
                    [
                        c["tokens"],
                        count,
                        f"KVzip {name}" if name in c["nll"] else name,
                        f"{1000 * value:.1f}",
                        f"{value / base:.2f}",
                        f"{size[name] / 1e6:.1f}",
                        f"{size[name] / size['DynamicCache']:.3f}",
                        "" if nll is None else f"{nll:.3f}",
                    ]
                )
    parts = [
        f"SmolLM2-135M-Instruct, float32. Median of {run.settings['repetitions']}; chunks of {run.settings['chunk']} "
        "tokens in prefill and scoring, neither with the language-model head:",
        common.table(
            ["tokens", "prefill s", "scoring s", "ratio", "save ms", "load ms", *(f"{name} ms" for name in FILES[2:])],
            first,
        ),
        f"One decoding step, median of {run.settings['steps']}; NLL of repeating parts of the text; "
        f"{FLOOR} is an empty cache, the floor of a step:",
        common.table(["tokens", "questions", "cache", "ms", "times Dynamic", "MB", "share", "NLL"], second),
        "\n".join(_verdicts(cells)),
    ]
    run.report(*parts)


def _verdicts(cells: dict[int, common.Cell]) -> list[str]:
    out = [
        common.verdict(f"scoring over prefill, n={n}", c["scoring"] / c["prefill"], most=1.8) for n, c in cells.items()
    ]
    for n, c in cells.items():
        one, eight = c["decode"]["1"], c["decode"]["8"]
        out.append(common.verdict(f"decode at 1.0 over DynamicCache, n={n}", one["1.0"] / one["DynamicCache"], most=1))
        if n == 4096:
            sizes = c["bytes"]["8"]
            out += [
                common.verdict("decode at 0.3 over DynamicCache, n=4096", one["0.3"] / one["DynamicCache"], most=0.65),
                f"A step without any context takes {one[FLOOR] / one['DynamicCache']:.2f}.",
                common.verdict("the same, eight questions", eight["0.3"] / eight["DynamicCache"], most=0.25),
                common.verdict("share of the bytes, eight questions", sizes["0.3"] / sizes["DynamicCache"], most=0.06),
            ]
    for n, c in cells.items():
        f = c["files"]
        ours, load = f["save"] + f["load"], f["safetensors load"]
        ratio = ours / (f["safetensors save"] + load)
        out.append(common.verdict(f"save and load over safetensors' calls, n={n}", ratio, most=2))
        out.append(
            f"Over the same calls with an fsync, as ours has, n={n}: {ours / (f['fsynced save'] + load):.2f}; the "
            f"fsync alone takes {1000 * (f['fsynced save'] - f['safetensors save']):.0f} ms."
        )
    return out


def main() -> None:
    args = common.parser(__doc__).parse_args()
    lengths, repetitions, steps, chunk = LENGTHS, REPETITIONS, STEPS, CHUNK
    if args.quick:
        lengths, repetitions, steps, chunk = (256,), 1, 2, 128
    settings = {
        "lengths": lengths, "repetitions": repetitions, "steps": steps, "chunk": chunk, "floor": FLOOR, "files": FILES,
    }  # fmt: skip
    run = common.start("kvzip_speed", "KVzip: bytes and times", args, THREADS, settings, packages=task.PACKAGES)
    keys = {f"n={n}": n for n in lengths}
    missing = run.missing(list(keys))
    if missing:
        model, tokenizer = load_smollm2(dtype=torch.float32)
        for key in missing:
            run.cell(key, partial(measure, model, tokenizer, keys[key], repetitions, steps, chunk))
    report(run, lengths)


if __name__ == "__main__":
    main()
