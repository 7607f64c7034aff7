"""The language model out of a pip package."""

import torch
from dataopt.smollm2 import find_smollm2, load_smollm2


def test_it_is_loaded_in_any_precision_and_answers():
    model, tokenizer = load_smollm2(torch.bfloat16)
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    assert config.max_position_embeddings == 8192
    assert model.dtype == torch.bfloat16 and not model.training
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    out = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, ids["input_ids"].shape[1] :])


def test_its_file_is_found():
    assert find_smollm2().suffix == ".gguf" and find_smollm2().stat().st_size > 50e6
