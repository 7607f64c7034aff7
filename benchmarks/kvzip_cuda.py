"""On a GPU: attention latency, scoring and memory at up to 128k tokens.

The model is built from a config of Llama-3.1-8B's shape with random bfloat16 weights (16 GB), so nothing is downloaded;
``--model`` takes any model of the Hub instead. Random weights say nothing about quality, and their scores spread over
the heads in their own way; times and bytes are what is measured. Without a GPU the script says so and ends.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import common
import kvzip_task as task
import torch
from dataopt.core.kvzip import attention, ragged_attention
from dataopt.integrations.hf.chat import Chat, split_template
from dataopt.integrations.hf.kvzip import build
from dataopt.integrations.hf.kvzip.context import Options, keep_pairs
from dataopt.smollm2 import load_smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

LENGTHS = (8_192, 32_768, 65_536, 131_072)
CHUNK, RATIO, STEPS = 2048, 0.3, 20
ROOM = 4096  # positions behind the context for the scoring input


def llama(layers: int | None) -> Any:
    """Llama-3.1-8B's shape, random weights on the GPU."""
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=layers or 32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=LENGTHS[-1] + ROOM,
        rope_theta=500_000.0,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def timed(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """The result, its seconds, and the peak of memory above what was held before, in bytes."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    out = call()
    end.record()
    torch.cuda.synchronize()
    return out, start.elapsed_time(end) / 1000, torch.cuda.max_memory_allocated() - before


def median_ms(call: Callable[[], Any], steps: int = STEPS) -> float:
    for _ in range(3):
        call()
    return 1000 * statistics.median(timed(call)[1] for _ in range(steps))


@torch.inference_mode()
def measure(model: Any, tokenizer: Any, chat: Chat, length: int) -> common.Cell:
    """One context of random tokens."""
    generator = torch.Generator().manual_seed(length)
    vocabulary = min(model.config.get_text_config().vocab_size, len(tokenizer))
    ids = torch.randint(10, vocabulary, (length,), generator=generator).tolist()
    prefix = 16
    layers, read_seconds, _ = timed(lambda: build.prefill(model, ids, CHUNK))
    scores, score_seconds, score_peak = timed(
        lambda: build.reconstruct(model, tokenizer, chat, layers, length, prefix, ids[prefix:], (), CHUNK, "full")
    )
    packed = keep_pairs(layers, scores, prefix, Options(ratio=RATIO), None)
    dense_bytes = sum(p.keys.nbytes + p.values.nbytes for p in layers)
    packed_bytes = sum(p.nbytes for p in packed)
    lengths = torch.tensor([p.lengths for p in packed])
    k, v = layers[0].keys, layers[0].values
    middle = packed[len(packed) // 2]
    heads = model.config.get_text_config().num_attention_heads
    out: common.Cell = {
        "prefill": read_seconds, "scoring": score_seconds, "scoring peak": score_peak, "dense bytes": dense_bytes,
        "packed bytes": packed_bytes, "shortest head": int(lengths.min()), "longest head": int(lengths.max()),
    }  # fmt: skip
    scale = k.shape[-1] ** -0.5
    for rows in (1, 8):
        q = torch.randn(rows, heads, 1, k.shape[-1], dtype=k.dtype, device=k.device)
        own = torch.randn(rows, k.shape[1], 1, k.shape[-1], dtype=k.dtype, device=k.device)
        wide = (k.repeat(rows, 1, 1, 1), v.repeat(rows, 1, 1, 1))  # as DynamicCache holds it
        sdpa = partial(torch.nn.functional.scaled_dot_product_attention, q, *wide, scale=scale, enable_gqa=True)
        out[f"attention, {rows}"] = {
            "sdpa": median_ms(sdpa),
            "flash, dense": median_ms(partial(attention, q, *wide, scale)),
            "packed": median_ms(partial(ragged_attention, q, [middle], own, own, scale)),
        }
    gc.collect()
    torch.cuda.empty_cache()
    return out


def report(run: common.Run) -> None:
    rows, times = [], []
    for key, c in run.cells.items():
        rows.append(
            [
                key,
                f"{c['prefill']:.2f}",
                f"{c['scoring']:.2f}",
                f"{c['scoring'] / c['prefill']:.2f}",
                f"{c['scoring peak'] / 1e9:.2f}",
                f"{c['dense bytes'] / 1e9:.2f}",
                f"{c['packed bytes'] / 1e9:.2f}",
                f"{c['shortest head']} to {c['longest head']}",
            ]
        )
        for count in (1, 8):
            t = c[f"attention, {count}"]
            times.append([key, count, *(f"{t[k]:.3f}" for k in t), f"{t['packed'] / t['sdpa']:.2f}"])
    run.report(
        f"{run.settings['model']}, bfloat16, ratio {RATIO}, chunks of {CHUNK}; no language-model head.",
        common.table(
            [
                "context",
                "prefill s",
                "scoring s",
                "ratio",
                "scoring peak GB",
                "dense GB",
                "packed GB",
                "pairs of a head",
            ],
            rows,
        ),
        "Attention of one layer for one new token, median ms:",
        common.table(["context", "questions", "sdpa", "flash, dense", "packed", "packed / sdpa"], times),
    )


def main() -> None:
    arguments = common.parser(__doc__)
    arguments.add_argument("--model", help="a model of the Hub instead of random weights")
    arguments.add_argument("--layers", type=int, help="fewer layers than 32, for a GPU of less memory")
    arguments.add_argument("--lengths", type=int, nargs="+", help="context lengths in tokens")
    args = arguments.parse_args()
    if not torch.cuda.is_available():
        print("kvzip_cuda: torch finds no GPU here, so nothing is measured.")
        return
    lengths = args.lengths or ((2048,) if args.quick else LENGTHS)
    layers = args.layers or (2 if args.quick else None)
    name = args.model or f"Llama-3.1-8B's shape, {layers or 32} layers, random weights"
    settings = {"model": name, "chunk": CHUNK, "ratio": RATIO, "steps": STEPS}
    title = f"KVzip on {torch.cuda.get_device_name()}"
    run = common.start("kvzip_cuda", title, args, 1, settings, packages=task.PACKAGES)
    keys = {f"{n} tokens": n for n in lengths}
    missing = run.missing(list(keys))
    if missing:
        if args.model:
            model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16, device_map="cuda").eval()
            tokenizer = AutoTokenizer.from_pretrained(args.model)
        else:  # random weights need no tokenizer of their own: its ids only have to be in the vocabulary
            model, tokenizer = llama(layers), load_smollm2()[1]
        build.check_model(model)
        chat = split_template(tokenizer)
        for key in missing:
            run.cell(key, partial(measure, model, tokenizer, chat, keys[key]))
    report(run)


if __name__ == "__main__":
    main()
