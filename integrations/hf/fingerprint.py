"""What a saved cache must agree on with the model and tokenizer that load it."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Fingerprint = dict[str, Any]  # of JSON values

# Fields of a config that say where a model came from or how it is run, and not what it computes.
_NO_MATTER = {
    "architectures", "attn_implementation", "auto_map", "chunk_size_feed_forward", "dtype", "experts_implementation",
    "id2label", "label2id", "output_attentions", "output_hidden_states", "problem_type", "quantization_config",
    "return_dict", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
_ROPE = {"partial_rotary_factor", "rope_local_base_freq", "rope_parameters", "rope_scaling", "rope_theta"}
_ELEMENTS = 5  # of a weight tensor
_TOKENS = 2048  # of a vocabulary
# Spaces, cases, digits, accents, scripts, code: where tokenizers of one vocabulary part company.
_PROBE = "The  Quick\tbrown fox's 3rd jump: 12345.67 €\n\nNaïve ﬁ Straße, Ёлка 東京 🦊\u200d if(x!=y){return;}  \r\n e"


def of_model(model: PreTrainedModel) -> Fingerprint:
    """Configuration, rotary parameters, dtype and a few elements of every weight tensor, by name.

    The elements lie on fixed places, so a training step, a merged adapter or other rounding shows and little is read;
    a change of single rows may not show.

    Raises:
        ValueError: weights that are not in memory.
    """
    config = _plain(model.config.get_text_config(decoder=True).to_dict())
    return {
        "config": {
            k: v
            for k, v in config.items()
            if k not in _NO_MATTER | _ROPE and not k.startswith("_") and not k.endswith("_token_id")
        },
        "rope": {k: v for k, v in config.items() if k in _ROPE},
        "dtype": str(next(model.get_input_embeddings().parameters()).dtype).removeprefix("torch."),
        "weights": _weights(model),
    }


def of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Fingerprint:
    """Vocabulary (added tokens and up to 4095 others), how a probe is tokenised, and the chat template."""
    size = len(tokenizer)
    ids = list(range(0, size, max(1, size // _TOKENS)))
    added = sorted(tokenizer.get_added_vocab().items())
    return {
        "vocabulary": _hash([size, tokenizer.convert_ids_to_tokens(ids), added]),
        "tokenisation": _hash([tokenizer(_PROBE).input_ids, tokenizer(_PROBE, add_special_tokens=False).input_ids]),
        "chat_template": _hash(getattr(tokenizer, "chat_template", None)),
    }


_SAYS = {
    "dtype": ("model", "dtype"),
    "weights": ("model", "weights"),
    "vocabulary": ("tokenizer", "vocabulary"),
    "tokenisation": ("tokenizer", "way to split a text"),
    "chat_template": ("tokenizer", "chat_template"),
}


def compare(saved: Any, now: Fingerprint, file: str) -> None:
    """Refuse a file that was made with something else.

    Args:
        saved: what stands in the file.
        now: of the model and tokenizer at hand; its fields are compared.
        file: for the sentence.

    Raises:
        ValueError: naming the field that differs.
    """
    if not isinstance(saved, dict) or not now.keys() <= saved.keys():
        raise ValueError(f"{file} holds no complete fingerprint of its model; save or download it again")
    for name in ("config", "rope"):
        old, new = saved[name], now[name]
        if not isinstance(old, dict):
            raise ValueError(f"{file} holds no complete fingerprint of its model; save or download it again")
        # A field that one side lacks came or went with a version of transformers.
        for key in sorted(old.keys() & new.keys()) if name == "config" else sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                raise ValueError(
                    f"{file} was made with another model: config.{key} was {_short(old.get(key))} and is "
                    f"{_short(new.get(key))}; load it with the model that made it, or make it again with this one"
                )
    for name, (owner, field) in _SAYS.items():
        if name in now and saved[name] != now[name]:
            values = f"was {saved[name]} and is {now[name]}" if name == "dtype" else "differs"
            values = "differ" if name == "weights" else values
            raise ValueError(
                f"{file} was made with another {owner}: its {field} {values}; load it with the {owner} that made it, "
                "or make it again with this one"
            )


def _weights(model: PreTrainedModel) -> str:
    digest, elements = hashlib.blake2b(digest_size=16), []
    for name, weight in model.named_parameters():
        if weight.is_meta:
            raise ValueError(f"model: weight {name} is offloaded and cannot be compared; load it without offloading")
        digest.update(f"{name.replace('_orig_mod.', '')} {tuple(weight.shape)} ".encode())
        if weight.numel():
            elements.append(weight.detach()[_places(tuple(weight.shape))].cpu().double())
    digest.update(torch.cat(elements).numpy().tobytes())
    return digest.hexdigest()


@lru_cache(maxsize=256)
def _places(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Indices of a few elements, spread over the tensor."""
    step = torch.arange(_ELEMENTS) * 0.618
    return tuple(((step + 0.37 * d) % 1 * n).long() for d, n in enumerate(shape))


def _hash(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


def _plain(value: Any) -> Any:
    """The value as it comes back from JSON."""
    return json.loads(json.dumps(value, default=str))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."
