"""Tiny models with a random adapter, and rows with their online steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from dataopt.integrations.hf import CCMCache, CCMConfig, CCMModel
from torch import Tensor, nn

from ..kvzip.conftest import byte_tokenizer, tiny

# Those that issue a rotary embedding of one kind and full attention.
KINDS = ["llama", "qwen2", "qwen3", "mistral", "phi3", "gemma", "gpt_neox", "olmo2", "cohere", "granite"]
CONTEXTS = [[11, 7, 200, 31, 9], [5, 6, 7, 8, 90, 91, 92], [40, 41, 40, 42], [1, 99, 2, 98, 3, 97]]
QUERY = [17, 18, 19, 20, 21]
GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


def ccm(
    kind: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 1, base: Any = None, **options: Any
) -> CCMModel:
    """A model whose adapter does something, in eval mode."""
    changes = options.pop("changes", {})
    config = CCMConfig(**options)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CCMModel(base if base is not None else tiny(kind, **changes).to(dtype), config)
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.data.normal_(0, 0.3)
            if "trainable_tokens" in name:
                weight.data.add_(0.3 * torch.randn_like(weight))
    return model.to(dtype).eval()


def exact(model: nn.Module) -> nn.Module:
    """Norms and rotary tables in the dtype of the model: transformers computes both in float32 even in float64."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") or type(module).__name__ == "CohereLayerNorm":
            module.forward = _norm.__get__(module)
        if hasattr(module, "inv_freq"):
            module.forward = _tables.__get__(module)
    return model


def _norm(self: Any, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True) if "LayerNorm" in type(self).__name__ else x
    eps = getattr(self, "variance_epsilon", getattr(self, "eps", 1e-6))
    scaled = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    return scaled * (1 + self.weight if "Gemma" in type(self).__name__ else self.weight)


def _tables(self: Any, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    angle = position_ids.double().unsqueeze(-1) * self.inv_freq.double()
    both = angle.repeat_interleave(2, -1) if "Cohere" in type(self).__name__ else torch.cat([angle, angle], -1)
    return both.cos().to(x) * self.attention_scaling, both.sin().to(x) * self.attention_scaling


def row(
    model: CCMModel, contexts: Sequence[list[int]], *queries: list[int], prefix: Sequence[int] = ()
) -> dict[str, list[int]]:
    """One training row, its queries at the end."""
    ids, segments, slots = list(prefix), [0] * len(prefix), [-1] * len(prefix)
    for number, part in enumerate([*contexts, *queries], 1):
        comp = model.comp_ids if number <= len(contexts) else []
        ids += [*part, *comp]
        segments += [number] * (len(part) + len(comp))
        slots += [-1] * len(part) + list(range(len(comp)))
    return {"input_ids": ids, "segment_ids": segments, "comp_slot": slots}


def batch(rows: Sequence[dict[str, list[int]]], left: bool = False) -> dict[str, Tensor]:
    """Padded with token 3."""
    width = max(len(r["input_ids"]) for r in rows)

    def padded(values: list[int], fill: int) -> list[int]:
        gap = [fill] * (width - len(values))
        return gap + values if left else values + gap

    fills = {"input_ids": 3, "segment_ids": -1, "comp_slot": -1}
    return {name: torch.tensor([padded(r[name], fill) for r in rows]) for name, fill in fills.items()}


def answered(model: CCMModel, memory: CCMCache, query: list[int]) -> Tensor:
    """(B, L, V) logits of a query over a memory, without generate."""
    inputs = memory.inputs(input_ids=query)
    logits = model.get_base_model()(**_positions(inputs), past_key_values=memory).logits
    memory.restore()
    return logits


def _positions(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What generate adds: positions count what the mask shows."""
    width = inputs["input_ids"].shape[1]
    places = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)[:, -width:]
    return {"position_ids": places} | inputs
