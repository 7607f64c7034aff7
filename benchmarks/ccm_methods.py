"""CCM and what it is compared with, all on the same frozen model, LoRA and training steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ccm_tasks as tasks
import torch
from dataopt.core.ccm import Layout
from dataopt.demo.ccm import adamw, descend
from dataopt.integrations.hf import CCMConfig, CCMModel
from dataopt.integrations.hf.ccm.comp_tokens import CompTokens, ParallelAttention, no_rows
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

RANK, RATE = 16, 1e-2
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Method:
    """A row of the tables.

    Attributes:
        kind: "ccm", "gisting" (one block behind the whole context), "pooled" or "recurrent".
        options: of :class:`CCMConfig`, for all but "recurrent".
        one_context: trained on rows of one context only.
    """

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    one_context: bool = False

    @property
    def slots(self) -> int:
        return int(self.options.get("comp_tokens", 1))

    def pairs(self, t: int, context: int) -> tuple[int, int]:
        """Key-value pairs per head that inference reads of t contexts, and the peak while they are compressed."""
        kept = self.slots if self.kind == "gisting" or self.options.get("mode") == "merge" else self.slots * t
        if self.kind == "gisting":
            return kept, t * context + self.slots
        before = kept if self.options.get("mode") == "merge" and t > 1 else self.slots * (t - 1)
        return kept, before + context + self.slots  # what is stored is held, also where contexts do not read it


def ccm(mode: str, n: int = 1, **options: Any) -> Method:
    return Method("ccm", {"mode": mode, "comp_tokens": n, **options})


METHODS: dict[str, Method] = {
    "CCM-concat": ccm("concat"),
    "CCM-merge": ccm("merge"),
    "CCM-concat, plain LoRA": ccm("concat", conditional=False),
    "CCM-merge, plain LoRA": ccm("merge", conditional=False),
    "Gisting-online": Method("ccm", {"mode": "concat", "recurrent": False}, one_context=True),
    "Gisting, fixed context": Method("gisting"),
    "pooled pairs (Compressive)": Method("pooled", {"mode": "concat", "conditional": False}),
    "recurrent soft prompts": Method("recurrent"),
    **{f"CCM-{mode}, {n} COMP tokens": ccm(mode, n) for mode in ("concat", "merge") for n in (2, 4, 8)},
}


# Rows


def flat_rows(rows: tasks.Rows, comp_ids: list[int]) -> dict[str, Tensor]:
    """Context, COMP tokens, question and answer, T times."""
    contexts, questions, answers = rows
    count, steps, width = contexts.shape
    n, asked = len(comp_ids), questions.shape[2] + 1
    comp = torch.tensor(comp_ids).expand(count, steps, n)
    ids = torch.cat([contexts, comp, questions, answers.unsqueeze(2)], 2)
    labels = torch.full_like(ids, -100)
    labels[:, :, -1] = answers
    segments = torch.tensor([1] * (width + n) + [2] * asked) + 2 * torch.arange(steps).unsqueeze(1)
    slots = torch.tensor([-1] * width + list(range(n)) + [-1] * asked).expand(steps, -1)
    return {
        "input_ids": ids.flatten(1),
        "labels": labels.flatten(1),
        "segment_ids": segments.flatten().expand(count, -1),
        "comp_slot": slots.flatten().expand(count, -1),
    }


def fixed_rows(rows: tasks.Rows, comp_ids: list[int], t: int) -> dict[str, Tensor]:
    """All contexts up to t as one, then its COMP tokens, the question and the answer."""
    contexts, questions, answers = rows
    one = (contexts[:, :t].reshape(len(contexts), 1, -1), questions[:, t - 1 : t], answers[:, t - 1 : t])
    return flat_rows(one, comp_ids)


# Baselines


@dataclass(frozen=True)
class PooledAttention(ParallelAttention):
    """The memory holds the mean of a context's keys and values, turned to one position, instead of COMP pairs."""

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        rows = self.layout
        place = self.pooling  # (B, L, L): row i averages the text of the context that token i ends
        at = rows.position_ids
        assert self.rotate is not None
        bare = self.rotate(key, -at)
        keys = self.rotate(torch.einsum("bij,bhjd->bhid", place, bare), at)
        values = torch.einsum("bij,bhjd->bhid", place, value)
        comp = place.any(2)[:, None, :, None]
        key, value = torch.where(comp, keys, key), torch.where(comp, values, value)
        return super().attend(module, query, key, value, mask, scale, softcap, sinks)

    @property
    def pooling(self) -> Tensor:
        rows: Layout = self.layout
        segment = rows.segment_ids
        comp = torch.zeros_like(segment).flatten().index_fill_(0, rows.comp_rows, 1).view_as(segment).bool()
        same = (segment.unsqueeze(2) == segment.unsqueeze(1)) & comp.unsqueeze(2) & ~comp.unsqueeze(1)
        weights = same.to(torch.float32)
        return weights / weights.sum(2, keepdim=True).clamp(min=1)


class PooledModel(CCMModel):
    """COMP tokens stand where the pooled pairs go; what they compute themselves is read by nobody."""

    def forward(self, input_ids: Tensor, segment_ids: Tensor, comp_slot: Tensor, labels: Any = None) -> Any:  # type: ignore[override]
        rows = self.layout(segment_ids, comp_slot)
        attending = PooledAttention(rows, self.rotation, "sdpa")
        with no_rows():
            return self.base_model(
                input_ids=input_ids,
                attention_mask=torch.zeros(1, 1, 1, 1),
                labels=labels,
                position_ids=rows.position_ids,
                use_cache=False,
                ccm=CompTokens(rows.comp_rows, attending),
            )


class RecurrentPrompts(nn.Module):
    """Summary embeddings, gathered over the steps and put in front of the next segment (AutoCompressor's form).

    They are the last hidden states of summary tokens, so each step needs those before it, in training too.
    """

    def __init__(self, base: Any, slots: int) -> None:
        super().__init__()
        lora = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=RANK, target_modules=TARGETS)
        self.model = get_peft_model(base, lora)
        size = base.config.hidden_size
        self.summary = nn.Parameter(
            base.get_input_embeddings().weight.detach().mean(0) + 0.02 * torch.randn(slots, size)
        )
        self.base = base

    def forward(self, rows: tasks.Rows) -> Tensor:
        """(B, T, V) logits of the answers."""
        contexts, questions, _ = rows
        count, embed = len(contexts), self.base.get_input_embeddings()
        memory = torch.zeros(count, 0, self.summary.shape[1])
        out = []
        for t in range(contexts.shape[1]):
            text = torch.cat([memory, embed(contexts[:, t]), self.summary.expand(count, -1, -1)], 1)
            hidden = self.base.model(inputs_embeds=text, use_cache=False).last_hidden_state
            memory = torch.cat([memory, hidden[:, -len(self.summary) :]], 1)
            asked = torch.cat([memory, embed(questions[:, t])], 1)
            out.append(self.base(inputs_embeds=asked, use_cache=False).logits[:, -1])
        return torch.stack(out, 1)


# Training and testing


def make(method: Method, base: Any, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    if method.kind == "recurrent":
        return RecurrentPrompts(base, method.slots)
    options = {"comp_tokens": 1, **method.options}
    fixed = {"r": RANK, "lora_alpha": RANK, "lora_dropout": 0.0, "target_modules": TARGETS}
    model = (PooledModel if method.kind == "pooled" else CCMModel)(base, CCMConfig(**fixed, **options))
    for name, weight in model.named_parameters():
        if "trainable_tokens" in name:
            weight.data.add_(0.02 * torch.randn_like(weight))
    return model


def train(method: Method, base: Any, draw: tasks.Draw, seed: int, steps: int) -> tuple[nn.Module, float]:
    """The trained method in eval mode, and seconds per step."""
    model = make(method, base, seed).train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer, schedule = adamw(weights, RATE, steps, 0.0)
    generator = torch.Generator().manual_seed(100 + seed)
    start = time.perf_counter()
    for _ in range(steps):
        rows = draw(tasks.BATCH, generator)
        if method.one_context:
            rows = (rows[0][:, :1], rows[1][:, :1], rows[2][:, :1])
        if method.kind == "recurrent":
            loss = cross_entropy(model(rows).flatten(0, 1), rows[2].flatten())
        elif method.kind == "gisting":
            t = int(torch.randint(1, tasks.STEPS + 1, (1,), generator=generator))
            loss = model(**fixed_rows(rows, model.comp_ids, t)).loss
        else:
            loss = model(**flat_rows(rows, model.comp_ids)).loss
        descend(loss, weights, optimizer, schedule)
    return model.eval(), (time.perf_counter() - start) / steps


@torch.no_grad()
def logits_of(method: Method, model: Any, rows: tasks.Rows) -> Tensor:
    """(B, T, V) logits of the answers."""
    if method.kind == "recurrent":
        out: Tensor = model(rows)
        return out
    if method.kind == "gisting":
        every = [model(**fixed_rows(rows, model.comp_ids, t)).logits[:, -2] for t in range(1, tasks.STEPS + 1)]
        return torch.stack(every, 1)
    made = flat_rows(rows, model.comp_ids)
    made.pop("labels")
    return model(**made).logits.unflatten(1, (tasks.STEPS, -1))[:, :, -2]


@torch.no_grad()
def without_memory(method: Method, model: Any, rows: tasks.Rows) -> float:
    """Nats per answer from the question alone, with the adapter as it is (section 7.3.1)."""
    inner = model.base if method.kind == "recurrent" else model.language_model
    return float(cross_entropy(tasks.no_context(inner, rows).flatten(0, 1), rows[2].flatten()))


def tested(logits: Callable[[tasks.Rows], Tensor], draw: tasks.Draw, count: int) -> list[float]:
    """Share of right answers after each context, over ``count`` new rows."""
    right, generator = torch.zeros(tasks.STEPS), torch.Generator().manual_seed(9)
    for start in range(0, count, 256):
        rows = draw(min(256, count - start), generator)
        right += (logits(rows)[..., : tasks.VOCABULARY].argmax(-1) == rows[2]).float().sum(0)
    return (right / count).tolist()
