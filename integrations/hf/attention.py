"""One attention function for every model of the attention interface: cache layers may compute the attention themselves.

A cache layer that wants to do so marks the keys that its ``update`` returns. An object that goes through the model's
forward as ``ccm=`` may do so for all layers. Everything else goes to the implementation that the model had before.
"""

from __future__ import annotations

import sys
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SDPA, EAGER = "dataopt", "dataopt_eager"  # by what unmarked keys are handed to
NAMES = (SDPA, EAGER)
_MARK = "_dataopt_layer"
# Arguments that attention functions receive and that change nothing for a causal decoder with a mask.
_HARMLESS = {
    "dropout", "sliding_window", "is_causal", "position_ids", "cache_position", "use_cache", "output_hidden_states",
    "return_dict", "num_items_in_batch", "logits_to_keep", "output_router_logits", "cache", "past_key_values",
}  # fmt: skip


class AttendingLayer(Protocol):
    """A cache layer that computes the attention over its own pairs."""

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
        """(B, Hq, Q, d) queries, the pairs that ``update`` returned, a mask over them -> (B, Hq, Q, dv)."""
        ...


def mark(key: Tensor, layer: AttendingLayer) -> Tensor:
    """The same keys, marked: the attention function gives them back to ``layer``."""
    key = key.view_as(key)
    setattr(key, _MARK, layer)
    return key


def switch_attention(model: PreTrainedModel) -> None:
    """Let the model attend through this module from now on; unmarked keys are computed as before.

    Raises:
        TypeError: the model does not follow the attention interface.
    """
    config = model.config.get_text_config(decoder=True)
    if config._attn_implementation in NAMES:
        return
    if not getattr(model, "_supports_attention_backend", False):
        raise TypeError(
            f"model: {type(model).__name__} does not use the attention interface of transformers, so its cache cannot "
            "be replaced; take a model whose class sets _supports_attention_backend"
        )
    name = config._attn_implementation
    if name is not None and name not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise TypeError(
            f"model: its attention implementation {name!r} has no mask function, so whatever is cached would be read "
            "without a mask; call model.set_attn_implementation('sdpa') first"
        )
    # Flash and flex kernels want masks of another form; sdpa computes the same and takes a mask that covers the tail.
    # It knows no soft cap, though, and some versions let such a model run with it.
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    eager = capped or config._attn_implementation == "eager" or not getattr(model, "_supports_sdpa", False)
    model.set_attn_implementation(EAGER if eager else SDPA)
    if config._attn_implementation not in NAMES:
        raise TypeError(f"model: {type(model).__name__} does not let its attention implementation be set")


@torch.compiler.disable
def _attend(
    base: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    # The keyword is taken out in any case: no other implementation knows it.
    layer: AttendingLayer | None = getattr(kwargs.pop("ccm", None), "attending", None) or getattr(key, _MARK, None)
    if layer is None:
        return _base(base, module)(module, query, key, value, attention_mask, **kwargs)
    scale = kwargs.pop("scaling", None)
    softcap, sinks = kwargs.pop("softcap", None), kwargs.pop("s_aux", None)
    if kwargs.pop("output_attentions", False):
        raise ValueError("output_attentions=True: attention over a compressed cache forms no weights; set it to False")
    strange = [k for k, v in kwargs.items() if v is not None and v is not False and k not in _HARMLESS]
    if strange:
        raise TypeError(
            f"{type(module).__name__} passes {', '.join(strange)} to its attention, which a compressed cache does not "
            "know; use this model with transformers' own cache"
        )
    if scale is None:
        scale = query.shape[-1] ** -0.5
    out = layer.attend(module, query, key, value, attention_mask, scale, softcap, sinks)
    return out.transpose(1, 2).contiguous(), None


def _base(name: str, module: nn.Module) -> Any:
    if name != "eager":
        return ALL_ATTENTION_FUNCTIONS[name]
    # Every modelling file has its own, which knows what is special about the model.
    return sys.modules[type(module).__module__].eager_attention_forward


def _sdpa(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    return _attend("sdpa", *args, **kwargs)


def _eager(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    return _attend("eager", *args, **kwargs)


for _name, _function, _mask in ((SDPA, _sdpa, "sdpa"), (EAGER, _eager, "eager")):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, ALL_MASK_ATTENTION_FUNCTIONS[_mask])
