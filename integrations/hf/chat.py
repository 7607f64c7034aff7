"""The text around a context and its questions, taken from the tokenizer's own chat template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

_MARKS = ("FirstPlaceholder7Q", "SecondPlaceholder7Q", "ThirdPlaceholder7Q")


@dataclass(frozen=True)
class Chat:
    """Token ids around a user's turn.

    Attributes:
        prefix: from the start to the user's text: system turn and the opening of the first user turn.
        suffix: from the end of the user's text to the start of the answer.
        between: from the end of an answer to the text of the next user turn; None if the template has no such place.
        lead: what stands before the user's text in its own tokens: a space, which belongs to the word behind it, or
            nothing; None where there is no template, so that a context begins as any text does.
    """

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    between: tuple[int, ...] | None
    lead: str | None = None

    def first(self, tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
        """Ids of a user's text behind ``prefix``."""
        return encode(tokenizer, text) if self.lead is None else continued(tokenizer, self.lead + text)


def split_template(tokenizer: PreTrainedTokenizerBase, **template_kwargs: Any) -> Chat:
    """Render the chat template around placeholders and cut it there.

    Without a template the prefix is what the tokenizer puts before a text, and line breaks stand between the turns.

    Args:
        template_kwargs: for ``apply_chat_template``, such as ``enable_thinking=False``.

    Raises:
        ValueError: the template drops or rewrites the user's text.
    """
    if not getattr(tokenizer, "chat_template", None):
        start = [i for i in tokenizer("").input_ids if i != tokenizer.eos_token_id or i == tokenizer.bos_token_id]
        return Chat(tuple(start), continued(tokenizer, "\n"), continued(tokenizer, "\n\n"))
    first, answer, second = _MARKS
    prefix, suffix = _cut(_render(tokenizer, [("user", first)], template_kwargs), first)
    lead = " " if prefix.endswith(" ") else ""
    try:
        turns = _render(tokenizer, [("user", first), ("assistant", answer), ("user", second)], template_kwargs)
        between = continued(tokenizer, _cut(_cut(turns, answer)[1], second)[0].removesuffix(lead))
    except Exception:  # templates raise errors of their own kinds for a form that they do not know
        between = None
    return Chat(encode(tokenizer, prefix.removesuffix(lead)), continued(tokenizer, suffix), between, lead)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Token ids of a text, with nothing added."""
    return tuple(tokenizer(text, add_special_tokens=False).input_ids)


def continued(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Token ids of a text that goes on another one: alone, SentencePiece would put a space of its own before it."""
    for mark in ("\n", ":"):
        before, whole = encode(tokenizer, mark), encode(tokenizer, mark + text)
        if before and whole[: len(before)] == before:
            return whole[len(before) :]
    return encode(tokenizer, text)


def render_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **template_kwargs: Any) -> Tensor:
    """(1, L) ids of the rendered messages, up to where the answer starts."""
    rendered: Any = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True, **template_kwargs
    )
    return rendered["input_ids"]


def _render(tokenizer: PreTrainedTokenizerBase, turns: list[tuple[str, str]], template_kwargs: dict[str, Any]) -> str:
    messages = [{"role": role, "content": text} for role, text in turns]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **template_kwargs))


def _cut(text: str, mark: str) -> tuple[str, str]:
    parts = text.split(mark)
    if len(parts) != 2:
        raise ValueError(
            f"tokenizer.chat_template shows the user's text {len(parts) - 1} times instead of once, so a context "
            "cannot be cached apart from its questions; set another chat_template"
        )
    return parts[0], parts[1]
