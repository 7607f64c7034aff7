"""A cache that every new ``generate`` finds in its stored state, whatever the last one left in it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch import Tensor
from transformers import Cache


@dataclass(frozen=True)
class GenerateCall:
    """What ``generate`` was called with.

    Attributes:
        input_ids: (B, L).
        mask_width: columns of the attention mask; L where none was given.
        kwargs: the other arguments of the model.
    """

    input_ids: Tensor
    mask_width: int
    kwargs: dict[str, Any]


class ReusableCache(Cache):
    """``generate`` sets ``_is_user_defined`` on a given cache at every call, before it feeds the first token.

    That is where the cache goes back to what it stores, also after an exception, and where ids and masks that do not
    fit are refused: later ``generate`` cuts ids away by the mask, and the text comes out wrong without a word.
    """

    def restore(self) -> None:
        """Drop what was asked and answered since the stored state."""
        raise NotImplementedError

    def _check_call(self, call: GenerateCall) -> None:
        """Raises ValueError for ids or a mask that do not go with what is stored."""
        raise NotImplementedError

    @property
    def _is_user_defined(self) -> bool:
        return True

    @_is_user_defined.setter
    def _is_user_defined(self, value: bool) -> None:
        self.restore()
        call = _find_call(sys._getframe(1))
        if call is not None:
            self._check_call(call)


def _find_call(frame: FrameType | None) -> GenerateCall | None:
    while frame is not None and not ({"input_ids", "model_kwargs"} <= frame.f_locals.keys()):
        frame = frame.f_back
    if frame is None or not isinstance(frame.f_locals["input_ids"], Tensor):
        return None
    ids, kwargs = frame.f_locals["input_ids"], frame.f_locals["model_kwargs"]
    if kwargs.get("inputs_embeds") is not None:
        raise ValueError("inputs_embeds cannot be compared with the cached context; give input_ids")
    mask = kwargs.get("attention_mask")  # None if it was all ones; then its length is noted on the config
    noted = getattr(frame.f_locals.get("generation_config"), "_mask_length", ids.shape[1])
    return GenerateCall(ids, noted if mask is None else mask.shape[1], kwargs)
