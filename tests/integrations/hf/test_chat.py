"""Where a template is cut, with a tokenizer that puts a space before every text, as SentencePiece does."""

import string

import pytest
import torch
from dataopt.integrations.hf import KVzipCache
from dataopt.integrations.hf.chat import continued, encode, split_template
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .kvzip.conftest import CHATML, byte_tokenizer, full_ids, tiny

# of Llama 2: a space stands before and behind the user's text
LLAMA_2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} {{ eos_token }}{{ bos_token }}{% endif %}{% endfor %}"
)


def spaced(template: str | None) -> PreTrainedTokenizerFast:
    """A token for each character, for some words with the space before them, and for "▁" alone."""
    words = ["▁Ada", "▁keeps", "▁the", "▁key", "▁Who", "Ada", "Who", "INST", "keeps", "[/"]
    alphabet = ["<unk>", "<s>", "</s>", "▁", "\n", *string.ascii_letters, *string.digits, *"[]/?.,:;'-", *words]
    scores = [(token, -1.0 if len(token) == 1 else -0.5) for token in alphabet]
    inner = Tokenizer(models.Unigram(scores, unk_id=0))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.chat_template = template
    return fast


def test_a_text_goes_on_another_without_a_space_of_its_own():
    tokenizer = spaced(None)
    tokens = tokenizer.convert_ids_to_tokens
    assert tokens(encode(tokenizer, "Ada")) == ["▁Ada"] and tokens(continued(tokenizer, "Ada")) == ["Ada"]
    assert tokens(continued(tokenizer, " Ada")) == ["▁Ada"] and tokens(continued(tokenizer, "\n\nWho")) == [
        "\n",
        "\n",
        "Who",
    ]
    plain = byte_tokenizer()
    for text in ("Ada", "\n\nWho?", " x", ":;", "", "\nx"):
        assert continued(plain, text) == encode(plain, text)


@pytest.mark.parametrize("template", [LLAMA_2, CHATML])
def test_the_pieces_are_the_tokens_of_the_whole(template):
    tokenizer = spaced(template)
    cache = KVzipCache(tiny(), tokenizer, "Ada keeps the key. " * 8 + "Ada", ratio=0.5)
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Ada keeps the key. " * 8 + "Ada\n\nWho?"}],
        tokenize=True,
        add_generation_prompt=True,
    )
    assert full_ids(cache, "Who?")[0].tolist() == list(rendered["input_ids"])
    assert cache.messages("Who?")[0]["content"].endswith("Ada\n\nWho?")


def test_a_kept_turn_and_an_instruction_have_no_space_too_many():
    tokenizer = spaced(LLAMA_2)
    cache = KVzipCache(tiny(), tokenizer, "Ada keeps the key. " * 8, ratio=0.5, instruction="the text:")
    read = tokenizer.convert_ids_to_tokens(cache._states[0].ids)
    assert "".join(read).startswith("<s>[INST]▁the▁text:\n\nAda▁keeps") and "▁▁" not in "".join(read)
    chat = split_template(tokenizer)
    turn = [*chat.between, *continued(tokenizer, chat.lead + "Who?"), *chat.suffix]
    assert "".join(tokenizer.convert_ids_to_tokens(turn)) == "▁</s><s>[INST]▁Who?▁[/INST]"


def test_without_a_template_a_context_begins_as_any_text():
    tokenizer = spaced(None)
    cache = KVzipCache(tiny(), tokenizer, "Ada keeps the key. " * 8, ratio=0.5)
    whole = encode(tokenizer, "Ada keeps the key. " * 8)
    assert tuple(cache._states[0].ids) == (*split_template(tokenizer).prefix, *whole)
    assert torch.equal(cache.inputs("Who?")["input_ids"][0, :3], torch.tensor(continued(tokenizer, "\n\nWho")))
