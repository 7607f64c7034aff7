"""Full attention in which each key head sees only some pairs of the context: what a packed cache must equal."""

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from tests.core.kvzip.reference import naive

NAME = "one_mask_per_head"


def _attention(module, query, key, value, attention_mask, scaling, softcap=None, s_aux=None, **kwargs):
    keep = module.one_mask_per_head  # (H, n) bool over the context, or None
    seen = attention_mask.expand(1, query.shape[1], -1, -1).clone()
    if keep is not None:
        n = keep.shape[1]
        first = max(0, n - key.shape[2] + query.shape[2])  # query that is behind the context
        seen[:, :, first:, :n] &= keep.repeat_interleave(query.shape[1] // len(keep), 0).unsqueeze(1)
    out = naive(query, key, value, scaling, seen=seen, softcap=softcap, sinks=s_aux)[0]
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


def _mask(*args, **kwargs):
    return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **{**kwargs, "allow_is_causal_skip": False})


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


@torch.no_grad()
def masked_logits(model: PreTrainedModel, cache, ids: Tensor, answer: Tensor) -> Tensor:
    """(1, T, V) logits of the answer (1, T) behind all ids (1, L), the question seeing what ``cache`` kept.

    ``model`` is another object with the weights of the cache's model.
    """
    masks = kept_pairs(model, cache)
    model.set_attn_implementation(NAME)
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            module.one_mask_per_head = masks[module.layer_idx]
    return model(torch.cat([ids, answer], 1)).logits[:, ids.shape[1] - 1 : -1]


@torch.no_grad()
def kept_pairs(model: PreTrainedModel, cache) -> list[Tensor | None]:
    """For each layer (H, n) bool, by finding the stored keys among those of a plain prefill; None on sliding layers."""
    dense = DynamicCache(config=model.config)
    model(torch.tensor([cache._states[0].ids]), past_key_values=dense)
    masks: list[Tensor | None] = []
    for layer, stored in zip(dense.layers, cache._states[0].layers, strict=True):
        if not hasattr(stored, "lengths"):
            masks.append(None)
            continue
        heads = []
        for all_keys, all_values, (k, v) in zip(
            layer.keys[0], layer.values[0], stored.heads(layer.keys.dtype), strict=True
        ):
            keep = (
                (all_keys.unsqueeze(1) - k).abs().amax(-1).amin(1) < 1e-5
                if len(k)
                else all_keys.new_zeros(len(all_keys), dtype=torch.bool)
            )
            torch.testing.assert_close(all_keys[keep], k)
            torch.testing.assert_close(all_values[keep], v)
            heads.append(keep)
        masks.append(torch.stack(heads))
    return masks
