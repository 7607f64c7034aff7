"""What a transformers model reads, as something that can be mixed: images, sound, and the embeddings of text."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from dataopt.core.mixup import CoMixed, Mixed
from dataopt.core.mixup.mixed import one_hot
from torch import Tensor, nn
from torch.nn import functional as F

from ..heads import logits_of

TEXT = "input_ids"


def find_input(inputs: dict[str, Any], key: str) -> Tensor:
    """The entry of a batch that is mixed.

    Raises:
        ValueError: the batch holds no such tensor.
    """
    found = inputs.get(key)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"the batch holds {sorted(inputs)} and no tensor {key!r}; name the model's input with "
            "mixup={'input_key': ...}"
        )
    return found


def as_signal(t: Tensor) -> Tensor:
    """Images (B, C, H, W) as they are, spectrograms (B, T, F) as (B, 1, T, F), sound (B, L) as (B, 1, L).

    Raises:
        ValueError: another shape.
    """
    if t.ndim == 4:
        return t
    if t.ndim in (2, 3):
        return t.unsqueeze(1)
    raise ValueError(
        f"the model's input has the shape {tuple(t.shape)}; (B, C, H, W), (B, T, F) or (B, L) can be mixed"
    )


class Logits(nn.Module):
    """A model as a function of one input, the others being fixed: (B, ...) to (B, K)."""

    def __init__(self, model: nn.Module, key: str, rest: dict[str, Any], back: Callable[[Tensor], Tensor]):
        super().__init__()
        self.model = model
        self.key = key
        self.rest = rest
        self.back = back

    def forward(self, x: Tensor) -> Tensor:
        return logits_of(self.model(**{self.key: self.back(x)}, **self.rest))


def signal_mask(mask: Tensor, mixed: Mixed | CoMixed) -> Tensor:
    """(B', L) attention of mixed sound: attended wherever something attended is shown.

    Raises:
        ValueError: a mask that is not aligned with the input.
    """
    if mixed.inputs.ndim != 3 or mask.shape[1:] != mixed.inputs.shape[2:]:
        raise ValueError(
            f"attention_mask has the shape {tuple(mask.shape)} beside inputs {tuple(mixed.inputs.shape)}; only masks "
            "of sound (B, L) can be mixed, so leave it out of the batch"
        )
    return (mixed.apply(mask.float()) > 0).to(mask.dtype)


def padded_length(length: int, grids: Any) -> int:
    """The next length that all grids (ints) divide."""
    divisor = math.lcm(*grids)
    return -(-length // divisor) * divisor


def padded_embeddings(embedded: Tensor, length: int) -> Tensor:
    """(B, L, D) embeddings as (B, D, length) sequences, zeros at the end."""
    return F.pad(embedded.transpose(1, 2), (0, length - embedded.shape[1]))


def mix_text(
    embedded: Tensor, inputs: dict[str, Any], y: Tensor, mixed: Mixed, num_classes: int
) -> tuple[dict[str, Tensor], Tensor]:
    """The plan of a batch of text, applied to its tokens.

    A place shows the tokens that the mask says, as far as they are attended: where one of two is padding, the other
    one is shown alone. Labels are weighted by the attended tokens that are shown of each text, not by area.

    Args:
        embedded: (B, L, D), through which gradients flow.
        inputs: the batch; ``attention_mask`` and ``token_type_ids`` are read.
        y: (B,) class ids.
        mixed: of the padded embeddings.
        num_classes: K.

    Returns:
        what replaces ``input_ids`` in the model's inputs, and (B, K) targets.
    """
    length, partner = embedded.shape[1], mixed.partner
    attention = inputs.get("attention_mask")
    attended = torch.ones(embedded.shape[:2], device=embedded.device) if attention is None else attention.float()
    mask = mixed.mask[:, :length]
    first, second = mask * attended, (1 - mask) * attended[partner]
    nothing = (first + second).sum(1, keepdim=True) == 0  # the mask shows padding alone
    first, second = torch.where(nothing, attended, first), second.masked_fill(nothing, 0)
    total = first + second
    weight = torch.where(total > 0, first / total.clamp(min=1e-12), 1.0).to(embedded.dtype).unsqueeze(2)
    out = {"inputs_embeds": torch.lerp(embedded[partner], embedded, weight)}
    if attention is not None:
        out["attention_mask"] = (total > 0).to(attention.dtype)
    kinds = inputs.get("token_type_ids")
    if kinds is not None:
        out["token_type_ids"] = torch.where(first >= second, kinds, kinds[partner])
    labels = one_hot(y, num_classes, len(y)).to(embedded.device)
    share = (first.sum(1) / total.sum(1)).unsqueeze(1)
    return out, labels * share + labels[partner] * (1 - share)


def check_reads_embeddings(model: nn.Module, inputs: dict[str, Any], pad: int | None) -> None:
    """Raise unless the model says the same of embeddings as of the tokens, padding included.

    Args:
        model: in evaluation mode.
        inputs: a batch without labels; its last column is made padding.
        pad: the id of the padding token.

    Raises:
        ValueError: it does not; decoders that look for the last token among ``input_ids`` for instance.
    """
    ids, attention = inputs[TEXT].clone(), inputs.get("attention_mask")
    rest = {key: value for key, value in inputs.items() if key != TEXT}
    if ids.shape[1] > 1:
        if pad is not None:
            ids[:, -1] = pad
        if attention is not None:
            rest["attention_mask"] = attention.clone()
            rest["attention_mask"][:, -1] = 0
    name = type(model).__name__
    remedy = "mixing text needs an encoder that takes inputs_embeds, such as BERT"
    with torch.no_grad():
        expected = logits_of(model(input_ids=ids, **rest))
        try:
            found = logits_of(model(inputs_embeds=token_embeddings(model)(ids), **rest))
        except (TypeError, ValueError, NotImplementedError, AttributeError) as e:
            raise ValueError(f"{name} cannot start from embeddings ({e}); {remedy}") from e
    if not torch.allclose(found.float(), expected.float(), rtol=1e-3, atol=1e-4):
        raise ValueError(f"{name} reads more from input_ids than their embeddings, the padding for instance; {remedy}")


def token_embeddings(model: nn.Module) -> nn.Module:
    """The layer that embeds ``input_ids``."""
    found: Any = model.get_input_embeddings()  # type: ignore[operator]
    return found
