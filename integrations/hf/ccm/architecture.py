"""What CCM must know about a decoder: its attention modules, their linear layers, and its rotary embedding."""

from __future__ import annotations

from typing import Any

import torch
from dataopt.core.ccm import Rotation
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from .. import decoder

# Positions of the two probes; far enough for every frequency that matters, within every model's range.
_FROM, _TO = 1, 14


def check_architecture(model: PreTrainedModel) -> None:
    """Refuse models whose memory could not be read back exactly.

    Raises:
        TypeError: naming what is in the way.
    """
    decoder.check_decoder(model)
    name, config = type(model).__name__, model.config.get_text_config(decoder=True)
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=config).layers):
        raise TypeError(
            f"model: {name} has sliding-window layers, which would push the memory out; set config.sliding_window=None "
            "before the model is made, if its weights allow that"
        )
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise TypeError(f"model: {name} caps its attention scores, which CCM does not support")


def attention_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The attention of each layer by its name within the model.

    Raises:
        TypeError: there are not as many as layers.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "layer_idx", None), int) and type(module).__name__.endswith("Attention")
    }
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    if len(found) != layers:
        raise TypeError(
            f"model: {type(model).__name__} has {layers} layers and {len(found)} modules that look like their "
            "attention; CCM cannot place its adapter"
        )
    return found


def attention_targets(model: PreTrainedModel) -> list[str]:
    """Names of the attention's linear layers as PEFT's ``target_modules`` takes them."""
    attention = attention_modules(model)
    inner = {
        f"{name.rsplit('.', 1)[-1]}.{child}"
        for name, module in attention.items()
        for child, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    }
    outside = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(name.startswith(a + ".") for a in attention)
    }
    short = {name.rsplit(".", 1)[-1] for name in inner}
    return sorted(inner if short & outside else short)


@torch.no_grad()
def find_rotation(model: PreTrainedModel) -> Rotation:
    """The rotary embedding of all layers, checked on the model itself.

    A token that is read alone has the same hidden states at every position, so its keys at two positions must be
    rotations of each other.

    Raises:
        TypeError: no rotary embedding, several, or one that changes with the length of the text.
    """
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    rope: Any = getattr(config, "rope_parameters", None) or {}
    if any(isinstance(entry, dict) for entry in rope.values()):
        raise TypeError(f"model: {name} has several rotary embeddings, which CCM does not support")
    if rope.get("rope_type") == "dynamic":
        raise TypeError(
            f"model: {name} has dynamic NTK scaling, whose frequencies change with the length of the text, so stored "
            "keys cannot be moved; use a fixed rope_type"
        )
    found = [m for m in model.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)]
    if len(found) != 1:
        raise TypeError(
            f"model: {name} has {len(found)} rotary embeddings where CCM needs one; learned positions and ALiBi cannot "
            "be moved"
        )
    frequencies = found[0].inv_freq
    assert isinstance(frequencies, Tensor)
    if frequencies.is_meta:
        raise TypeError(f"model: {name} is on the meta device; load its weights first")
    training = model.training
    model.eval()
    try:
        before, after = _keys(model, _FROM), _keys(model, _TO)
    finally:
        model.train(training)
    for interleaved in (False, True):
        rotate = Rotation(frequencies.detach(), interleaved)
        moved = (rotate(k, torch.tensor([_TO - _FROM], device=k.device)) for k in before)
        if all(_same(one, other) for one, other in zip(moved, after, strict=True)):
            return rotate
    raise TypeError(
        f"model: {name} does not rotate its keys as a rotary embedding of its frequencies does, so they cannot be "
        "moved to other positions; CCM does not support it"
    )


def _keys(model: PreTrainedModel, position: int) -> list[Tensor]:
    device = decoder.input_device(model)
    cache = DynamicCache(config=model.config)
    ids = torch.zeros(1, 1, dtype=torch.long, device=device)
    decoder.forward(model, ids, cache, position_ids=torch.full_like(ids, position), attention_mask=torch.ones_like(ids))
    keys = []
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer) and layer.keys is not None
        keys.append(layer.keys)
    return keys


def _same(keys: Tensor, other: Tensor) -> bool:
    """Equal up to the rounding of their dtype; half precision rounds the tables of sines too."""
    tolerance = 1e-4 if keys.dtype in (torch.float32, torch.float64) else 0.05
    return bool((keys - other).abs().max() <= tolerance * other.abs().max())
