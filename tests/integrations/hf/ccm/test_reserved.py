"""Reserved tokens are found by name, and serve as COMP tokens without a larger vocabulary."""

import pytest
import torch
from dataopt.integrations.hf import CCMCache, CCMConfig, CCMModel, reserved_ids
from tokenizers import AddedToken

from ..kvzip.conftest import byte_tokenizer, tiny

FREE = [
    "<|reserved_special_token_0|>",
    "<|reserved_200017|>",
    "<reserved_106>",
    "<unused0>",
    "[unused1]",
    "[UNUSED_TOKEN_146]",
    "<|extra_0|>",
    "<|EXTRA_9_TOKEN|>",
    "<|placeholder1|>",
    "<|dummy_83|>",
    ">>UNUSED_1897<<",
    "<｜place▁holder▁no▁799｜>",
]
TAKEN = ["<mask_1>", "<0x0A>", "[INST]", "<|tool_call|>", "unused1", "<unused>", "an extra 7", "<h1>"]


def with_tokens(*names, **options):
    tokenizer = byte_tokenizer(**options)
    tokenizer.add_tokens([AddedToken(name, special=i % 2 == 0) for i, name in enumerate(names)])
    return tokenizer


def test_they_are_known_by_their_names():
    tokenizer = with_tokens(*[name for pair in zip(FREE, TAKEN, strict=False) for name in pair], *FREE[len(TAKEN) :])
    assert tokenizer.convert_ids_to_tokens(reserved_ids(tokenizer)) == FREE  # in the order of their ids
    assert reserved_ids(byte_tokenizer()) == []


def test_those_in_use_are_left_out():
    tokenizer = with_tokens(*FREE[:4], chat_template="{{ messages }}<reserved_106>")
    tokenizer.pad_token = FREE[0]
    assert tokenizer.convert_ids_to_tokens(reserved_ids(tokenizer)) == [FREE[1], FREE[3]]


@pytest.mark.parametrize("tied", [False, True])
def test_they_serve_as_comp_tokens(tied):
    tokenizer = with_tokens("<unused0>", "<unused1>", "<unused2>")
    base = tiny(vocab_size=len(tokenizer), tie_word_embeddings=tied)
    ids = reserved_ids(tokenizer)[-2:]
    model = CCMModel(base, CCMConfig(comp_ids=ids)).eval()
    assert model.comp_ids == ids and len(base.get_input_embeddings().weight) == len(tokenizer)
    memory = CCMCache(model, tokenizer)
    memory.append("nine hives")
    assert memory.slots == (2,)
    with pytest.raises(ValueError, match="COMP"):  # a user who writes one does not reach into the memory
        memory.append("nine <unused2> hives")
    inputs = memory.inputs("how many?")
    base.get_output_embeddings().weight.data[ids] = 10 * torch.ones(2, base.config.hidden_size)
    out = model.generate(**inputs, past_key_values=memory, max_new_tokens=8, do_sample=False)
    assert not set(out[0, inputs["input_ids"].shape[1] :].tolist()) & set(ids)
