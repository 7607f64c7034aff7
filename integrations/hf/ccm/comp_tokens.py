"""What is special about COMP tokens inside a PEFT model: their rows of the LoRA, and their embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from dataopt.core.ccm import Layout, Rotation, add_lora_rows, memory_attention
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from torch import Tensor, nn

NOT_MERGED = "a conditional LoRA works on COMP tokens only and cannot be merged into the weights; keep the adapter"
# The COMP rows of the forward pass that is running in this thread. Set anew before every attention module, so that
# gradient checkpointing, which runs them again much later and in other threads, finds its own.
_rows: ContextVar[Tensor | None] = ContextVar("comp_rows", default=None)


@dataclass(frozen=True)
class CompTokens:
    """Travels through the model's forward as ``ccm=``.

    Attributes:
        rows: (R,) int64, the COMP tokens among all tokens of the batch.
        attending: computes the attention of every layer; None leaves it to the model.
    """

    rows: Tensor
    attending: ParallelAttention | None = None


@dataclass(frozen=True)
class ParallelAttention:
    """The attention of one parallel forward pass; an ``AttendingLayer``."""

    layout: Layout
    rotate: Rotation | None
    implementation: str

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
        if softcap is not None or sinks is not None:
            raise TypeError(f"{type(module).__name__} caps its scores or has learned sinks, which CCM does not support")
        dropout = float(getattr(module, "attention_dropout", 0.0) or 0.0) if module.training else 0.0
        return memory_attention(
            query, key, value, self.layout, self.rotate, scale, dropout, implementation=self.implementation
        )


def publish_rows(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward-pre-hook of attention modules: the LoRA layers in and behind them read the rows."""
    comp = kwargs.get("ccm")
    _rows.set(comp.rows if isinstance(comp, CompTokens) else None)


@contextmanager
def no_rows() -> Iterator[None]:
    """Forget the rows at the end, so that a later forward without attention hooks cannot find them."""
    try:
        yield
    finally:
        _rows.set(None)


class ConditionalLora(LoraVariant):  # type: ignore[misc]
    """LoRA on the COMP rows (eq. 7.4); others keep every bit of the base model's output."""

    def supports_lora_conversion(self) -> bool:
        return False

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs: Any) -> None:
        pass

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        raise ValueError(NOT_MERGED)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        ConditionalLora.merge_safe(module, active_adapter, orig_weight)

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        raise ValueError("a conditional LoRA is never merged")

    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        rows = _rows.get()
        if rows is None or not len(rows):
            return result
        down: Any = module.lora_A[active_adapter]
        up: Any = module.lora_B[active_adapter]
        dropout, scaling = module.lora_dropout[active_adapter], module.scaling[active_adapter]

        def update(hidden: Tensor) -> Tensor:
            out: Tensor = up(down(dropout(hidden.to(down.weight.dtype)))) * scaling
            return out

        return add_lora_rows(result, x, rows.to(x.device), update)


class CompEmbedding(TrainableTokensLayer):  # type: ignore[misc]
    """PEFT's trainable tokens without a copy of the whole table at every forward.

    The head of a model with tied embeddings is left alone: COMP tokens are never predicted.
    """

    def forward_adapters(self, x: Tensor, active_adapters: Any, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or not isinstance(self.base_layer, nn.Embedding):
            return result
        scale = getattr(self.base_layer, "embed_scale", 1.0)  # some embeddings scale what they return
        for name in active_adapters:
            ids = torch.tensor(self.token_indices[name], device=x.device)
            match = x.unsqueeze(-1) == ids
            rows = (self.trainable_tokens_delta[name] * scale).to(result.dtype)
            result = torch.where(match.any(-1, keepdim=True), rows[match.int().argmax(-1)], result)
        return result


def attach(model: nn.Module, adapter: str, attention: list[nn.Module], conditional: bool) -> None:
    """Make the LoRA layers of an adapter conditional and its trainable tokens cheap."""
    for module in model.modules():
        if isinstance(module, TrainableTokensLayer):
            module.__class__ = CompEmbedding
        elif conditional and isinstance(module, LoraLayer) and adapter in module.lora_A:
            module.lora_variant[adapter] = ConditionalLora()
            module.cast_input_dtype_enabled = False  # the rows are cast; not the whole input
    for module in attention:
        module.register_forward_pre_hook(publish_rows, with_kwargs=True)
