"""Small tasks whose answer lies in the contexts alone, and a small language model that reads them as a whole.

- *facts*: who keeps what, one fact a context, drawn anew for every row. Every context holds something distinct.
- *tables*: a context shows two entries of a hidden table from 8 inputs to 8 values; 30 % of the values shown are drawn
  at random. All contexts of a row speak about one table of a fixed set, which the model has met in its training.
  The question holds an id. Where it is tied to the table, the answer can be learned by heart.

The model is a Llama of 0.3 million parameters. It learns to answer from full contexts; then it is frozen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from dataopt.core.artifacts import whole_file
from dataopt.demo.ccm import adamw, descend
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

STEPS = 16  # T, contexts of a row
BATCH = 32
NAMES, THINGS = 32, 16
KEYS, VALUES, TABLES = 8, 8, 64
NOISE = 0.3
IDS = 2 * TABLES
# Blocks of the vocabulary: a word of a question is another token than the same word in a context.
_NAME, _THING = 0, NAMES
_ASKED = _THING + THINGS
_KEY = _ASKED + NAMES
_VALUE = _KEY + KEYS
_QUERY = _VALUE + VALUES
_ID = _QUERY + KEYS
VOCABULARY = _ID + IDS
BASE_STEPS = {"facts": 400, "16 tables": 700, "64 tables": 1000, "both": 1000}
RATE = 3e-3

Rows = tuple[Tensor, Tensor, Tensor]  # contexts (B, T, c), questions (B, T, q), answers (B, T)
Draw = Callable[[int, torch.Generator], Rows]


def facts(count: int, generator: torch.Generator, steps: int = STEPS, names: int = NAMES) -> Rows:
    """Questions are uniform over the facts so far."""
    who = torch.stack([torch.randperm(names, generator=generator)[:steps] for _ in range(count)])
    what = torch.randint(THINGS, (count, steps), generator=generator) + _THING
    asked = (torch.rand(count, steps, generator=generator) * torch.arange(1, steps + 1)).long()
    mark = torch.full_like(who, _ID)  # so that all questions have two tokens
    questions = torch.stack([mark, who.gather(1, asked) + _ASKED], 2)
    return torch.stack([who + _NAME, what], 2), questions, what.gather(1, asked)


def tables_of(seed: int) -> Tensor:
    """(64, 8) values of the hidden tables."""
    return torch.randint(VALUES, (TABLES, KEYS), generator=torch.Generator().manual_seed(1000 + seed))


@dataclass(frozen=True)
class Tables:
    """Rows about the tables ``first`` to ``last`` of a set.

    Attributes:
        tied: the id in a question is that of the table; otherwise it says nothing.
    """

    values: Tensor
    first: int
    last: int
    tied: bool = False

    def __call__(self, count: int, generator: torch.Generator, steps: int = STEPS) -> Rows:
        which = torch.randint(self.first, self.last, (count,), generator=generator)
        table = self.values[which]
        shown = torch.randint(KEYS, (count, steps, 2), generator=generator)
        clean = table.gather(1, shown.flatten(1)).view_as(shown)
        noise = torch.rand(count, steps, 2, generator=generator) < NOISE
        drawn = torch.randint(VALUES, shown.shape, generator=generator)
        values = torch.where(noise, drawn, clean)
        contexts = torch.stack([shown + _KEY, values + _VALUE], 3).flatten(2)
        key = torch.randint(KEYS, (count, steps), generator=generator)
        tied = which.unsqueeze(1).expand(-1, steps)
        ids = tied if self.tied else torch.randint(TABLES, (count, steps), generator=generator)
        return contexts, torch.stack([ids + _ID, key + _QUERY], 2), table.gather(1, key) + _VALUE


def small_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            initializer_range=0.06,
            **shape,
        )
    )
    # From small embeddings it learns to guess among what was said, and never to look it up.
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    return model


def base_draws(task: str, seed: int) -> list[Callable[[int, torch.Generator, float], Rows]]:
    """What a base model is trained on, by the share of its training that is over: facts begin with few names."""
    values = tables_of(seed)

    def some_facts(count: int, generator: torch.Generator, done: float) -> Rows:
        names = NAMES // 4 if done < 0.15 else NAMES // 2 if done < 0.3 else NAMES
        return facts(count, generator, min(STEPS, names), names)

    def some_tables(count: int, generator: torch.Generator, done: float) -> Rows:
        return Tables(values, 0, TABLES if task == "64 tables" else 16)(count, generator)

    return {"facts": [some_facts], "both": [some_facts, some_tables]}.get(task, [some_tables])


def train_base(task: str, seed: int, steps: int) -> LlamaForCausalLM:
    """Full contexts, an answer after each.

    At each value the model must also name what came before it, which teaches it early to look one token back.
    """
    model = small_model(seed).train()
    draws, generator = base_draws(task, seed), torch.Generator().manual_seed(seed)
    weights = list(model.parameters())
    optimizer, schedule = adamw(weights, RATE, steps, 0.01)
    for step in range(steps):
        contexts, questions, answers = draws[step % len(draws)](BATCH, generator, step / steps)
        ids = torch.cat([contexts, questions, answers.unsqueeze(2)], 2)
        logits = model(ids.flatten(1)).logits.unflatten(1, ids.shape[1:])
        loss = cross_entropy(logits[:, :, -2].flatten(0, 1), answers.flatten())
        before = logits[:, :, 1 : contexts.shape[2] : 2].flatten(0, 2)
        loss = loss + 0.3 * cross_entropy(before, contexts[:, :, 0::2].flatten())
        descend(loss, weights, optimizer, schedule)
    return model.eval()


def base_model(task: str, seed: int, steps: int, scratch: Path) -> LlamaForCausalLM:
    """The base model of a task and seed, trained once and kept."""
    path = scratch / "ccm" / f"{task.replace(' ', '-')}-{seed}-{steps}.safetensors"
    if not path.exists():
        model = train_base(task, seed, steps)
        with whole_file(path) as temporary:
            save_file(model.state_dict(), temporary)
    model = small_model(seed)
    model.load_state_dict(load_file(path))
    return model.eval()


@torch.no_grad()
def full_context(model: LlamaForCausalLM, rows: Rows) -> Tensor:
    """(B, T, V) logits of the answers from all contexts so far, without the questions before."""
    contexts, questions, _ = rows
    out = []
    for t in range(1, contexts.shape[1] + 1):
        out.append(model(torch.cat([contexts[:, :t].flatten(1), questions[:, t - 1]], 1)).logits[:, -1])
    return torch.stack(out, 1)


@torch.no_grad()
def with_questions(model: LlamaForCausalLM, rows: Rows) -> Tensor:
    """(B, T, V) logits of the answers from all contexts, questions and answers so far, as in the model's training."""
    contexts, questions, answers = rows
    ids = torch.cat([contexts, questions, answers.unsqueeze(2)], 2)
    return model(ids.flatten(1)).logits.unflatten(1, ids.shape[1:])[:, :, -2]


@torch.no_grad()
def no_context(model: Any, rows: Rows) -> Tensor:
    """(B, T, V) logits from the question alone."""
    questions = rows[1]
    logits = model(questions.flatten(0, 1)).logits[:, -1, :VOCABULARY]  # appended COMP tokens are no answers
    return logits.unflatten(0, questions.shape[:2])
