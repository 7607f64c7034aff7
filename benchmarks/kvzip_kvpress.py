"""KVzip against kvpress: the bytes that a compressed cache takes, and the NLL of the same answers behind it.

Both get the same token ids of prefix, context, questions and answers, the same weights in float32, and keep the same
number of pairs. kvpress runs in an environment of its own, since it asks for other versions of transformers and wraps
every attention function when it is imported.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common
import kvzip_task as task
import torch
from dataopt.integrations.hf import KVzipCache
from dataopt.smollm2 import load_smollm2

SEEDS: tuple[int, ...] = (0,)
RATIOS: tuple[float, ...] = (0.5, 0.3, 0.1)
KINDS = ("codes", "repeat")
CHILD = Path(__file__).with_name("kvzip_kvpress_child.py")
HOW = (
    "give the Python of an environment with kvpress: python -m venv FOLDER && FOLDER/bin/pip install kvpress, then "
    "--kvpress-python FOLDER/bin/python"
)
AGREE = 1e-3  # nats: how far the full caches of both sides may be apart


def check_python(python: Path) -> None:
    """End with one line unless this Python has kvpress."""
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('kvpress') is None)"
    try:
        missing = subprocess.run([python, "-I", "-c", look], capture_output=True).returncode != 0
    except OSError as e:
        common.stop(f"--kvpress-python {python} does not run ({e.strerror}); {HOW}")
    if missing:
        common.stop(f"--kvpress-python {python} has no kvpress; {HOW}")


def measure(python: Path, model: Any, tokenizer: Any, seed: int, repeat: int, ratios: Sequence[float]) -> common.Cell:
    """One text; ``{cache: {ratio: {pairs, bytes, held, kind: {nll, accuracy}}}}``."""
    document = task.lines(seed, repeat)
    reading = task.read(model, tokenizer, document.text)
    whole, scores = reading.cache(), reading.kvzip()
    rows = {"codes": task.question_rows(whole, document.asks["codes"]), "repeat": task.repeat_rows(reading)}
    ours = {str(ratio): one(reading.cache(scores, ratio), rows) for ratio in ratios}
    full = one(whole, rows)
    theirs = kvpress(python, reading, rows, ratios)
    apart = max(abs(full[kind]["nll"] - theirs["results"]["full"]["1.0"][kind]["nll"]) for kind in KINDS)
    if apart > AGREE:
        raise RuntimeError(f"the full caches of both sides are {apart:.4f} nats apart, so nothing can be compared")
    return {
        "tokens": len(reading.ids),
        "prefix": reading.prefix,
        "versions": theirs["versions"],
        "full caches apart": apart,
        "caches": {"full": theirs["results"].pop("full"), "KVzip": ours, **theirs["results"]},
    }


def one(cache: KVzipCache, rows: dict[str, list[task.Row]]) -> common.Cell:
    tensors = [t for layer in cache._states[0].packed for t in (layer.keys, layer.values)]
    assert all(isinstance(t, torch.Tensor) for t in tensors)
    memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    out: common.Cell = {
        "pairs": int(cache.lengths.sum()),
        "bytes": sum(t.nbytes for t in tensors),
        "held": sum(memory.values()),
    }
    return out | {kind: task.forced(cache, rows[kind]) for kind in KINDS}


def kvpress(python: Path, reading: task.Reading, rows: dict[str, list[task.Row]], ratios: Sequence[float]) -> Any:
    """What the other environment measures, in one process."""
    request = {
        "folder": str(reading.model.name_or_path),
        "ids": reading.ids,
        "prefix": reading.prefix,
        "rows": {kind: [(list(start), list(answer)) for start, answer in part] for kind, part in rows.items()},
        "ratios": ratios,
        "threads": torch.get_num_threads(),
    }
    done = subprocess.run([python, "-I", CHILD], input=json.dumps(request), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"kvpress's side failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def report(run: common.Run, keys: Sequence[str]) -> None:
    cells = [run.cells[key] for key in keys]
    rows = []
    for name, by_ratio in cells[0]["caches"].items():
        for ratio in by_ratio:
            found = [c["caches"][name][ratio] for c in cells]
            mean = {k: statistics.mean(f[k] for f in found) for k in ("pairs", "bytes", "held")}
            nll = {kind: statistics.mean(f[kind]["nll"] for f in found) for kind in KINDS}
            right = statistics.mean(f["codes"]["accuracy"] for f in found)
            rows.append(
                [name, ratio, f"{mean['pairs']:.0f}", f"{mean['bytes'] / 1e6:.1f}", f"{mean['held'] / 1e6:.1f}",
                 f"{nll['codes']:.3f} / {right:.2f}", f"{nll['repeat']:.3f}"]
            )  # fmt: skip
    versions = ", ".join(f"{k} {v}" for k, v in cells[0]["versions"].items())
    tokens = ", ".join(str(c["tokens"]) for c in cells)
    run.report(
        f"SmolLM2-135M-Instruct, float32, lines of {tokens} tokens, {cells[0]['prefix']} of them the prefix"
        f"{f'; means over {len(cells)} texts' if len(cells) > 1 else ''}. Ratio: share of the context's pairs that "
        "stay, beside the prefix; kvpress, which counts the prefix too, gets the share that keeps as many pairs, up to "
        "rounding. kvpress's side: "
        f"{versions}. The same token ids on both sides, answers teacher-forced; the full caches of both are at most "
        f"{max(c['full caches apart'] for c in cells):.0e} nats apart.",
        common.table(["cache", "ratio", "pairs kept", "MB", "MB held", "codes NLL / accuracy", "repeat NLL"], rows),
        "MB: the key and value tensors, right after the compression. MB held: the memory behind them, with kvpress's "
        "lists of masked pairs. KVzipPress frees nothing: it lists pairs, whose keys are overwritten at every forward "
        "so that they get no attention; its tensors keep the full size, and until the first question they are parts of "
        "larger ones that hold the repeated context as well. SnapKVPress and ExpectedAttentionPress do shorten the "
        "tensors, by the same count in each head.",
        f"Pairs of the prefix, the chat template's own text, that are masked: {_masked(cells, 'KVzipPress')} by "
        f"KVzipPress, which protects its first 4 tokens alone; {_masked(cells, 'KVzipPress, n_sink=prefix')} with "
        "n_sink=prefix. What they took goes to the context instead. KVzip never evicts the prefix.",
    )


def _masked(cells: Sequence[common.Cell], name: str) -> str:
    """Share of the prefix's pairs that a press masks, by ratio."""
    parts = []
    for ratio in cells[0]["caches"][name]:
        shares = [
            c["caches"][name][ratio]["masked prefix"] * c["tokens"] / c["caches"]["full"]["1.0"]["pairs"] / c["prefix"]
            for c in cells
        ]
        parts.append(f"{100 * statistics.mean(shares):.0f} % at {ratio}")
    return ", ".join(parts)


def main() -> None:
    arguments = common.parser(__doc__)
    arguments.add_argument("--kvpress-python", type=Path, help="Python of an environment in which kvpress is installed")
    args = arguments.parse_args()
    seeds, ratios, repeat = SEEDS, RATIOS, 1
    if args.quick:
        seeds, ratios, repeat = (0,), (0.3,), 0
    settings = {"ratios": ratios, "repeat": repeat, "codes": task.CODES}
    run = common.start("kvzip_kvpress", "KVzip against kvpress", args, 1, settings, packages=task.PACKAGES)
    keys = {f"lines {seed}": seed for seed in seeds}
    missing = run.missing(list(keys))
    if missing and args.kvpress_python is None:
        print(f"Not measured: {HOW}.")
        return
    if missing:
        check_python(args.kvpress_python)
        model, tokenizer = load_smollm2(dtype=torch.float32)
        for key in missing:
            run.cell(key, partial(measure, args.kvpress_python, model, tokenizer, keys[key], repeat, ratios))
    report(run, list(keys))


if __name__ == "__main__":
    main()
