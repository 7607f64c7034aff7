"""A small model is told sixteen things one after another, and remembers them in one pair each.

Who keeps what is drawn anew for every conversation, so the answer can only come from the conversation. First the model
learns to read such conversations as a whole; then its weights are frozen and the adapter of CCM is trained.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .. import plots
from ..integrations.hf import CCMCache, CCMConfig, CCMModel, decoder
from .step import Step

NAMES = (
    "Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gil", "Hana", "Ida", "Jon", "Kai", "Lea", "Max", "Nora", "Otto", "Pia",
    "Quin", "Rosa", "Sam", "Tess", "Uma", "Vic", "Wim", "Xena", "Yara", "Zoe", "Amir", "Bea", "Cid", "Dora", "Emil",
    "Fay",
)  # fmt: skip
THINGS = (
    "bees", "boats", "books", "bikes", "cats", "clocks", "coins", "cups", "dogs", "ducks", "goats", "hens", "kites",
    "maps", "pots", "roses",
)  # fmt: skip
ASK = "?"
WORDS = [*NAMES, *THINGS, ASK, "[UNK]"]
FACTS = 16  # of a conversation
STEPS = {"model": 300, "adapter": 150}
BATCH = 32
SHOWN = (1, 2, 4, 8, 16)
TESTS = 512  # conversations


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", pad_token="[UNK]")


def small_model() -> LlamaForCausalLM:
    """A Llama of 0.3 million parameters. Its embeddings start at unit size: from small ones it only learnt to guess."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS), hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=512, tie_word_embeddings=False, initializer_range=0.06,
        )
    )  # fmt: skip
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    return model


def conversations(count: int, facts: int, names: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Facts (B, T, 2), "Ada bees", and after each a question about one of those so far with its answer (B, T, 3)."""
    who = torch.stack([torch.randperm(names, generator=generator)[:facts] for _ in range(count)])
    what = torch.randint(len(THINGS), (count, facts), generator=generator) + len(NAMES)
    asked = (torch.rand(count, facts, generator=generator) * torch.arange(1, facts + 1)).long()
    mark = torch.full_like(who, WORDS.index(ASK))
    return torch.stack([who, what], 2), torch.stack([mark, who.gather(1, asked), what.gather(1, asked)], 2)


def train_model(generator: torch.Generator, steps: int, move: Callable[[], object]) -> LlamaForCausalLM:
    """Learn to answer from a whole conversation, with few names at first.

    At every thing the model must also say whose it is, which teaches it early to look one word back.
    """
    model = small_model().train()
    weights = list(model.parameters())
    optimizer, schedule = adamw(weights, 3e-3, steps, 0.01)
    for step in range(steps):
        names = 8 if step < 0.2 * steps else 16 if step < 0.4 * steps else len(NAMES)
        facts, queries = conversations(BATCH, min(FACTS, names), names, generator)
        ids = torch.cat([facts, queries], 2)
        logits = model(ids.flatten(1)).logits.unflatten(1, ids.shape[1:])
        answers = cross_entropy(logits[:, :, 3].flatten(0, 1), ids[:, :, 4].flatten())
        owners = cross_entropy(logits[:, :, 1].flatten(0, 1), ids[:, :, 0].flatten())
        descend(answers + 0.3 * owners, weights, optimizer, schedule)
        move()
    return model.eval()


def train_adapter(
    base: LlamaForCausalLM, mode: str, generator: torch.Generator, steps: int, move: Callable[[], object]
) -> CCMModel:
    """One COMP token for each fact; the question after each fact is answered from the memory alone."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = CCMConfig(mode=mode, comp_tokens=1, r=16, lora_alpha=16, lora_dropout=0.0, target_modules=targets)
    model = CCMModel(base, config).train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer, schedule = adamw(weights, 1e-2, steps, 0.0)
    for _ in range(steps):
        loss = model(**rows(model, *conversations(BATCH, FACTS, len(NAMES), generator))).loss
        descend(loss, weights, optimizer, schedule)
        move()
    return model.eval()


def rows(model: CCMModel, facts: Tensor, queries: Tensor) -> dict[str, Tensor]:
    """Each fact with its COMP tokens, then its question, for the parallel pass; labels on the answers."""
    count, steps, n = len(facts), facts.shape[1], len(model.comp_ids)
    comp = torch.tensor(model.comp_ids).expand(count, steps, n)
    ids = torch.cat([facts, comp, queries], 2)
    labels = torch.full_like(ids, -100)
    labels[:, :, -1] = ids[:, :, -1]
    segments = torch.tensor([1] * (2 + n) + [2] * 3) + 2 * torch.arange(steps).unsqueeze(1)
    slots = torch.tensor([-1, -1, *range(n), -1, -1, -1]).expand(steps, -1)
    return {
        "input_ids": ids.flatten(1),
        "labels": labels.flatten(1),
        "segment_ids": segments.flatten().expand(count, -1),
        "comp_slot": slots.flatten().expand(count, -1),
    }


@torch.no_grad()
def accuracy(model: CCMModel, generator: torch.Generator) -> dict[str, list[float]]:
    """Share of right answers after each fact: from the memory, from the whole conversation, and from nothing."""
    facts, queries = conversations(TESTS, FACTS, len(NAMES), generator)
    made = rows(model, facts, queries)
    right = queries[:, :, 2]

    def share(logits: Tensor) -> list[float]:
        said = logits.unflatten(1, (FACTS, -1))[:, :, -2].argmax(-1)
        return [float(x) for x in (said == right).float().mean(0)]

    labels = made.pop("labels")
    assert labels is not None
    base = model.language_model
    alone = base(queries.flatten(0, 1)[:, :2]).logits[:, -1].argmax(-1).view(TESTS, FACTS)
    return {
        "nothing": [float(x) for x in (alone == right).float().mean(0)],
        "CCM": share(model(**made).logits),
        "everything": share(model.full_context_logits(**made)),
    }


def talk(model: CCMModel, words: PreTrainedTokenizerFast, generator: torch.Generator) -> list[dict[str, Any]]:
    """One conversation through ``CCMCache`` and ``generate``: what is said, asked and answered, and the pairs kept."""
    facts, queries = conversations(1, FACTS, len(NAMES), generator)
    memory = CCMCache(model, words)
    out = []
    for step in range(1, FACTS + 1):
        fact, query = facts[0, step - 1].tolist(), queries[0, step - 1].tolist()
        memory.append(words.decode(fact))
        if step in SHOWN:
            generate: Any = model.language_model.generate
            inputs = memory.inputs(words.decode(query[:2])) | decoder.cache_argument(model.language_model, memory)
            said = generate(**inputs, max_new_tokens=1, do_sample=False)
            who, thing = (WORDS[i] for i in query[1:])
            out.append(
                {"step": step, "told": [WORDS[i] for i in fact], "asked": who, "right": thing,
                 "said": words.decode(said[0, -1:]), "pairs": memory.slots[0], "bytes": memory.nbytes}
            )  # fmt: skip
    return out


def converse(steps: dict[str, int], say: Callable[[str], Callable[[], object]]) -> Step:
    """The step; ``say`` is of the demo's ``progress``."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    base = train_model(generator, steps["model"], say("the model"))
    model = train_adapter(base, "concat", generator, steps["adapter"], say("the adapter"))
    seconds = time.perf_counter() - start
    known = accuracy(model, torch.Generator().manual_seed(1))
    said = talk(model, tokenizer(), torch.Generator().manual_seed(2))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = sum(p.numel() for p in base.parameters()) - trained
    turn = said[-1]
    told = list(range(1, FACTS + 1))
    curves = {"right answers, %": {name: (told, [100 * v for v in values]) for name, values in known.items()}}
    return Step(
        "Keep a conversation in a small memory",
        f"A Llama of {weights:,} parameters with an adapter of {trained:,}, trained here in {seconds:.1f} s, is told "
        f"sixteen facts one by one. What does it know of them in {TESTS} new conversations, with one key-value pair a "
        "head and layer for each fact, and with everything before it?",
        [
            "facts",
            "nothing kept: right, %",
            "CCM: right, %",
            "everything kept: right, %",
            "pairs, CCM",
            "pairs, everything",
        ],
        [
            [
                str(step),
                *(f"{100 * known[name][step - 1]:.1f}" for name in ("nothing", "CCM", "everything")),
                str(step),
                str(2 * step),
            ]
            for step in SHOWN
        ],
        f"After fact {turn['step']}: What does {turn['asked']} keep? {turn['said']} ({turn['right']} is right; the "
        f"memory has {turn['bytes']:,} bytes). One training; the table's standard error is at most "
        f"{50 / math.sqrt(TESTS):.1f} points.",
        ["dataopt ccm train DATASET --model MODEL --form dialogue --out memory", "dataopt ccm chat memory"],
        {"ccm.png": ("Right answers over the facts told.", plots.to_png(plots.show_curves(curves, "facts told")))},
        {"steps": steps, "seconds": seconds, "accuracy": known, "conversation": said},
    )


def adamw(weights: list[Any], rate: float, steps: int, decay: float) -> tuple[Any, Any]:
    """AdamW with a warm-up of a twentieth and a cosine: optimizer and schedule."""
    optimizer = torch.optim.AdamW(weights, rate, betas=(0.9, 0.98), weight_decay=decay)
    warm = max(1, steps // 20)

    def factor(step: int) -> float:
        return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / steps)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def descend(loss: Tensor, weights: list[Any], optimizer: Any, schedule: Any) -> None:
    """One step."""
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()
    schedule.step()
