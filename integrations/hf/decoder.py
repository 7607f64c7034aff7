"""What every cache of this package needs to know about a decoder of transformers."""

from __future__ import annotations

import inspect
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

_pair_shapes: WeakKeyDictionary[PreTrainedModel, list[tuple[int, int, int]]] = WeakKeyDictionary()


def unwrap(model: Any) -> PreTrainedModel:
    """The transformers model inside ``torch.compile`` and PEFT wrappers.

    Raises:
        TypeError: there is none.
    """
    model = getattr(model, "_orig_mod", model)
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: {type(model).__name__} is not a transformers model")
    return model


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go."""
    return next(model.get_input_embeddings().parameters()).device  # ``weight`` of PEFT's trainable tokens is a copy


def layer_devices(model: PreTrainedModel) -> dict[int, torch.device]:
    """Where each layer attends, by number; -1 for those that do not say."""
    where = {-1: input_device(model)}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and (weight := next(module.parameters(), None)) is not None:
            where.setdefault(index, weight.device)
    return where


def pad_id(*holders: Any) -> int:
    """The token that fills rows up, of the first tokenizer or config that has one; masks hide it, so any will do."""
    for holder in holders:
        for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
            value = getattr(holder, name, None)
            if isinstance(value, int):
                return value
    return 0


def check_decoder(model: PreTrainedModel) -> None:
    """Refuse models whose keys and values do not lie in one cache layer per decoder layer, per head.

    Raises:
        TypeError: naming what is in the way.
    """
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise TypeError(f"model: {name} is an encoder-decoder, whose context is not in the decoder's cache")
    if getattr(config, "kv_lora_rank", None):
        raise TypeError(
            f"model: {name} stores a shared latent (MLA) instead of keys per head, which cannot be compressed per head"
        )
    if getattr(config, "num_kv_shared_layers", None) or getattr(config, "kv_sharing_modes", None):
        raise TypeError(f"model: {name} shares key-value pairs between layers, which is not supported")
    for layer in DynamicCache(config=config).layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise TypeError(
                f"model: {name} has {type(layer).__name__}s; only full and sliding-window attention can be cached"
            )


def cache_argument(model: nn.Module, cache: Cache) -> dict[str, Cache]:
    """The cache under the name that the model has for it: it changed in transformers 5.24, and the old one warns."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: cache}


def forward(model: PreTrainedModel, ids: Tensor, cache: Cache, **kwargs: Any) -> Any:
    """Run (B, L) ids through the layers, without the language-model head."""
    body = model.base_model
    return body(input_ids=ids, use_cache=True, **cache_argument(body, cache), **kwargs)


@torch.no_grad()
def pair_shapes(model: PreTrainedModel) -> list[tuple[int, int, int]]:
    """Heads, and the sizes of a key and a value, in each layer's cache; one token is read to see them, once a model."""
    if model not in _pair_shapes:
        cache = DynamicCache(config=model.config)
        forward(model, torch.zeros(1, 1, dtype=torch.long, device=input_device(model)), cache)
        layers: list[Any] = list(cache.layers)
        _pair_shapes[model] = [(x.keys.shape[1], x.keys.shape[3], x.values.shape[3]) for x in layers]
    return _pair_shapes[model]


def changing_rope_limit(model: PreTrainedModel) -> int | None:
    """The length beyond which the model's rotary frequencies change for all positions, if it has one."""
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    for entry in [rope, *(v for v in rope.values() if isinstance(v, dict))]:
        if entry.get("rope_type") in ("dynamic", "longrope"):
            original = entry.get("original_max_position_embeddings")
            return int(
                original or getattr(config, "original_max_position_embeddings", 0) or config.max_position_embeddings
            )
    return None


def positions(model: PreTrainedModel) -> int | None:
    """Positions that the model has, up to where its rotary frequencies would change; None where it has no limit."""
    changing = changing_rope_limit(model)
    if changing is not None:
        return changing
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return None if limit is None else int(limit)
