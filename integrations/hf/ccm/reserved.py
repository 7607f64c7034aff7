"""Ids of a vocabulary that wait for a meaning."""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase

# <|reserved_special_token_0|>, <unused0>, [unused1], <|extra_0|>, <|placeholder1|>, <|dummy_0|>, >>UNUSED_7<<,
# <｜place▁holder▁no▁0｜>: in brackets, one of these words, and a number.
_NAME = re.compile(r"[<\[>].*(reserved|unused|extra|place.?holder|dummy).*\d.*[>\]<]", re.IGNORECASE)


def reserved_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of tokens that a vocabulary set aside, such as ``<|reserved_special_token_0|>`` or ``<unused0>``.

    For ``CCMConfig(comp_ids=...)``: the vocabulary of the model need not grow then. They are found by their names, in
    brackets and with a number. One that serves as padding, say, or stands in the chat template is left out; a use that
    the tokenizer does not know of, as in prompts written by hand, cannot be seen.

    Args:
        tokenizer: of the model.

    Returns:
        The ids, ascending; empty where there are none.

    Example::

        CCMConfig(comp_tokens=2, comp_ids=reserved_ids(tokenizer)[-2:])
    """
    template = str(tokenizer.chat_template or "")
    roles = [role for role in tokenizer.special_tokens_map.values() if isinstance(role, str)]
    return sorted(
        i
        for name, i in tokenizer.get_vocab().items()
        if _NAME.fullmatch(name) and name not in roles and name not in template
    )
