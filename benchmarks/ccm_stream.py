"""Streaming with CCM against attention sinks at equal key-value pairs (section 7.4.1, figure 7.8), on real text.

The text is the source of Python's standard library, files one after another: names and habits of a file come back far
behind. A small Llama is trained on nine tenths of the files; then it is frozen, and an adapter learns to compress
segments of 64 tokens. Both read the same stream of held-out files. The sinks' window is made as long as all pairs of
CCM at every step, so each token sees equally many.

One thread for each of two processes; a cell for each seed, resumable.
"""

from __future__ import annotations

import math
import random
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean, stdev

import common
import torch
from dataopt.core.artifacts import whole_file
from dataopt.demo.ccm import adamw, descend
from dataopt.integrations.hf import CCMConfig, CCMModel, CCMStream
from mixup import Job, run_cells
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

SEEDS = (0, 1, 2)
MODES = ("concat", "merge")
VOCABULARY, LENGTH = 2048, 256
SEGMENT, SEGMENTS, COMP = 64, 6, 2
MINUTES, WORKERS = 45, 2
PACKAGES = ("dataopt", "torch", "transformers", "peft", "tokenizers")
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "encodings", "pydoc_data"}


@dataclass(frozen=True)
class Setup:
    """Sizes; a stream has ``tokens`` of them, the sizes of its cache are those of the thesis."""

    base_steps: int = 1200
    adapter_steps: int = 200
    batch: int = 8
    tokens: int = 16_000
    max_pairs: int = 160
    memory: int = 8
    chunk: int = 64
    sink: int = 1


@cache
def files() -> tuple[list[str], list[str]]:
    """Training and held-out files, by their names in an order that does not change."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(p for p in root.rglob("*.py") if not SKIPPED & set(p.relative_to(root).parts))
    texts = [p.read_text(encoding="utf-8", errors="ignore") for p in paths]
    texts = [text for text in texts if len(text) > 4000]
    random.Random(0).shuffle(texts)
    cut = len(texts) // 10
    return texts[cut:], texts[:cut]


@cache
def tokenizer() -> Tokenizer:
    """Byte pairs of the training files."""
    out = Tokenizer(models.BPE())
    out.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    out.decoder = decoders.ByteLevel()
    out.train_from_iterator(
        files()[0],
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    return out


@cache
def tokens(held_out: bool) -> list[Tensor]:
    """(L,) ids of each file."""
    return [torch.tensor(e.ids) for e in tokenizer().encode_batch(files()[held_out])]


def pieces(count: int, length: int, generator: torch.Generator) -> Tensor:
    """(B, length) from random places of random training files, long ones more often."""
    texts = [t for t in tokens(False) if len(t) > length]
    sizes = torch.tensor([len(t) for t in texts], dtype=torch.float)
    chosen = torch.multinomial(sizes, count, replacement=True, generator=generator).tolist()
    starts = torch.rand(count, generator=generator).tolist()
    return torch.stack(
        [texts[i][int(s * (len(texts[i]) - length)) :][:length] for i, s in zip(chosen, starts, strict=True)]
    )


def small_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = {"hidden_size": 160, "intermediate_size": 432, "num_hidden_layers": 4, "num_attention_heads": 5}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=1024, tie_word_embeddings=True, **shape)
    )


def base_model(seed: int, setup: Setup, scratch: Path) -> LlamaForCausalLM:
    """Trained once for each seed, and kept."""
    path = scratch / "ccm" / f"stdlib-{seed}-{setup.base_steps}-{setup.batch}.safetensors"
    model = small_model(seed)
    if not path.exists():
        generator = torch.Generator().manual_seed(seed)
        weights = list(model.train().parameters())
        optimizer, schedule = adamw(weights, 2e-3, setup.base_steps, 0.01)
        for _ in range(setup.base_steps):
            ids = pieces(setup.batch, LENGTH, generator)
            descend(model(ids, labels=ids).loss, weights, optimizer, schedule)
        with whole_file(path) as temporary:
            save_file({name: t for name, t in model.state_dict().items() if name != "lm_head.weight"}, temporary)
    model.load_state_dict(load_file(path), strict=False)
    model.tie_weights()
    return model.eval()


def rows(model: CCMModel, ids: Tensor) -> dict[str, Tensor]:
    """Segments of one file; their tokens, but the first, are predicted from the memory and what precedes them."""
    count, n = len(ids), len(model.comp_ids)
    segments = ids.view(count, SEGMENTS, SEGMENT)
    comp = torch.tensor(model.comp_ids).expand(count, SEGMENTS, n)
    labels = torch.cat([segments, torch.full_like(comp, -100)], 2)
    labels[:, :, 0] = -100
    slots = torch.tensor([-1] * SEGMENT + list(range(n))).repeat(SEGMENTS)
    numbers = torch.arange(1, SEGMENTS + 1).repeat_interleave(SEGMENT + n)
    return {
        "input_ids": torch.cat([segments, comp], 2).flatten(1),
        "labels": labels.flatten(1),
        "segment_ids": numbers.expand(count, -1),
        "comp_slot": slots.expand(count, -1),
    }


def trained(base: LlamaForCausalLM, mode: str, seed: int, setup: Setup) -> CCMModel:
    torch.manual_seed(seed)
    model = CCMModel(base, CCMConfig(mode=mode, comp_tokens=COMP, r=16, lora_alpha=16, lora_dropout=0.0)).train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer, schedule = adamw(weights, 3e-3, setup.adapter_steps, 0.0)
    generator = torch.Generator().manual_seed(100 + seed)
    for _ in range(setup.adapter_steps):
        made = rows(model, pieces(setup.batch, SEGMENTS * SEGMENT, generator))
        descend(model(**made).loss, weights, optimizer, schedule)
    return model.eval()


@torch.no_grad()
def with_sinks(model: CCMModel, ids: Tensor, setup: Setup, slots: int) -> Tensor:
    """(L,) log probabilities with first tokens and a window; at every step as many pairs as CCM with ``slots``."""
    base, rotate = model.language_model, model.rotation
    assert rotate is not None
    cache = DynamicCache(config=base.config)
    out, held, upcoming, start = [], 0, None, 0
    while start < len(ids):
        length = cache.get_seq_length()
        if length >= setup.max_pairs:
            more = COMP if held < slots else 0  # slots that CCM's memory gains
            drop = setup.chunk - more
            held += more
            for layer in cache.layers:
                assert layer.keys is not None and layer.values is not None
                window = layer.keys[:, :, setup.sink + drop :]
                window = rotate(window, torch.full((window.shape[2],), -drop))
                layer.keys = torch.cat([layer.keys[:, :, : setup.sink], window], 2)
                layer.values = torch.cat([layer.values[:, :, : setup.sink], layer.values[:, :, setup.sink + drop :]], 2)
            length = cache.get_seq_length()
        part = ids[start : start + setup.max_pairs - length]
        logits = base(part.unsqueeze(0), past_key_values=cache).logits[0]
        first = logits.new_full((1, logits.shape[1]), torch.nan) if upcoming is None else upcoming
        scores = torch.cat([first, logits[:-1]]).log_softmax(-1)
        out.append(scores.gather(1, part.unsqueeze(1)).squeeze(1))
        upcoming, start = logits[-1:], start + len(part)
    return torch.cat(out)


def streamed(seed: int, setup: Setup, scratch: Path) -> common.Cell:
    base = base_model(seed, setup, scratch)
    ids = torch.cat(tokens(True))[: setup.tokens]
    out: common.Cell = {"tokens": len(ids)}
    for mode in MODES:
        model = trained(base_model(seed, setup, scratch), mode, seed, setup)
        memory = setup.memory if mode == "concat" else COMP
        sizes = {"max_pairs": setup.max_pairs, "memory": memory, "chunk": setup.chunk, "sink": setup.sink}
        stream = CCMStream(model, **sizes)
        ours = stream.feed(input_ids=ids)[1:]
        sinks = with_sinks(model, ids, setup, memory)[1:]
        settled = slice(setup.max_pairs, None)  # from the first compression on
        out[mode] = {
            "CCM": -float(ours[settled].mean()),
            "sinks": -float(sinks[settled].mean()),
            "peak": stream.peak_pairs,
            "early difference": float((ours[: setup.max_pairs - 1] - sinks[: setup.max_pairs - 1]).abs().max()),
            "curve": [[-float(part.mean()) for part in scores[settled].split(1000)] for scores in (ours, sinks)],
        }
    with torch.no_grad():
        blocks = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
        out["blocks"] = mean(float(base(b, labels=b).loss) for b in blocks.split(8))
    return out


def report(run: common.Run, plan: Sequence[str]) -> None:
    lines = []
    for mode in MODES:
        cells = [cell[mode] for cell in run.cells.values()]
        for name in ("CCM", "sinks"):
            losses = [cell[name] for cell in cells]
            lines.append([f"{name}{f'-{mode}' if name == 'CCM' else f', as many pairs as {mode}'}", *_row(losses)])
        gains = [cell["sinks"] - cell["CCM"] for cell in cells]
        lines.append([f"  gain of {mode}", *_row(gains)[:1], ""])
    blocks = [cell["blocks"] for cell in run.cells.values()]
    lines.append([f"blocks of {LENGTH} tokens, each read alone", *_row(blocks)])
    settings = run.settings
    parts = [
        f"{run.ran(plan)} {settings['tokens']} tokens of held-out files, at most {settings['max_pairs']} pairs, "
        f"{settings['chunk']} tokens compressed to {COMP}, mean +- standard deviation over the seeds, after the first "
        f"compression; peak with COMP pairs {max(cell['concat']['peak'] for cell in run.cells.values())}.",
        common.table(["cache", "nats per token", "perplexity"], lines),
    ]
    run.report(*parts)


def _row(losses: Sequence[float]) -> list[str]:
    both = [losses, [math.exp(x) for x in losses]]
    return [f"{mean(v):.3f} +- {stdev(v):.3f}" if len(v) > 1 else f"{v[0]:.3f}" for v in both]


def main() -> None:
    arguments = common.parser(__doc__)
    arguments.add_argument(
        "--minutes", type=float, default=MINUTES, help=f"no cell is begun that may not end within them ({MINUTES})"
    )
    args = arguments.parse_args()
    seeds, setup = SEEDS, Setup()
    if args.quick:
        seeds, setup = (0,), Setup(base_steps=2, adapter_steps=1, batch=2, tokens=600)
    settings = {**vars(setup), "vocabulary": VOCABULARY, "segment": SEGMENT, "segments": SEGMENTS, "comp_tokens": COMP}
    run = common.start(
        "ccm_stream", "Streaming with a compressed memory", args, 1, settings, WORKERS, PACKAGES, timed=False
    )
    plan: dict[str, Job] = {f"seed {seed}": (streamed, (seed, setup, run.scratch)) for seed in seeds}
    run_cells(run, {key: plan[key] for key in run.missing(list(plan))}, args.minutes, WORKERS)
    report(run, list(plan))


if __name__ == "__main__":
    main()
