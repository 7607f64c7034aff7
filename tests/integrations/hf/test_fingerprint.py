"""What identifies a model and its tokenizer, and how a difference is named."""

import json
import time

import pytest
import torch
from dataopt.integrations.hf import fingerprint
from tokenizers import Tokenizer, models, normalizers
from transformers import AutoModelForCausalLM

from .kvzip.conftest import ARCHITECTURES, HYBRIDS, byte_tokenizer, tiny


def of(model, tokenizer):
    return fingerprint.of_model(model) | fingerprint.of_tokenizer(tokenizer)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_it_survives_json_a_reload_and_another_attention(kind, tmp_path):
    model, tokenizer = tiny(kind), byte_tokenizer()
    saved = json.loads(json.dumps(of(model, tokenizer), allow_nan=False))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    again.config.pad_token_id, again.config.use_cache = 7, False
    fingerprint.compare(saved, of(again, byte_tokenizer()), "file")
    assert str(tmp_path) not in json.dumps(of(again, tokenizer))


def changed(tensor):
    model = tiny()
    weight = dict(model.named_parameters())[tensor]
    weight.data += 1e-5 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    return model


def lower_case():
    alphabet = byte_tokenizer().backend_tokenizer
    alphabet.normalizer = normalizers.Lowercase()
    return byte_tokenizer(tokenizer=alphabet)


def swapped():
    vocabulary = json.loads(byte_tokenizer().backend_tokenizer.to_str())["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    return byte_tokenizer(tokenizer=Tokenizer(models.BPE(vocabulary, [])))


def one_more():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<more>"])
    return tokenizer


ROPE = {"rope_type": "default", "rope_theta": 5e5}
CASES = {
    "layers": (lambda: tiny(num_hidden_layers=2), None, r"config\.num_hidden_layers was 4 and is 2"),
    "epsilon": (lambda: tiny(rms_norm_eps=1e-3), None, r"config\.rms_norm_eps was 1e-06 and is 0\.001"),
    "kind": (lambda: tiny("qwen3"), None, r"another model: config\."),
    "rope": (lambda: tiny(rope_parameters=ROPE), None, r"config\.rope_parameters was .*10000\.0.* is .*500000\.0"),
    "dtype": (lambda: tiny().bfloat16(), None, "its dtype was float32 and is bfloat16"),
    "seed": (lambda: tiny(seed=1), None, "its weights differ"),
    "norm": (lambda: changed("model.norm.weight"), None, "its weights differ"),
    "deep": (lambda: changed("model.layers.3.mlp.down_proj.weight"), None, "its weights differ"),
    "order": (None, swapped, "another tokenizer: its vocabulary differs"),
    "size": (None, one_more, "another tokenizer: its vocabulary differs"),
    "split": (None, lower_case, "another tokenizer: its way to split a text differs"),
    "template": (None, lambda: byte_tokenizer("{{ messages }}"), "another tokenizer: its chat_template differs"),
    "no template": (None, lambda: byte_tokenizer(None), "another tokenizer: its chat_template differs"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_field_that_differs_is_named(case):
    model, tokenizer, sentence = CASES[case]
    saved = of(tiny(), byte_tokenizer())
    now = of((model or tiny)(), (tokenizer or byte_tokenizer)())
    with pytest.raises(ValueError, match=f"^kvzip.json was made with .*{sentence}"):
        fingerprint.compare(saved, now, "kvzip.json")


def test_fields_that_came_with_another_version_are_no_difference():
    saved = of(tiny(), byte_tokenizer())
    del saved["config"]["mlp_bias"]
    saved["config"]["long_gone"] = True
    fingerprint.compare(saved, of(tiny(), byte_tokenizer()), "file")


@pytest.mark.parametrize("wrong", [None, [], "x", 3])
def test_an_incomplete_one_is_refused(wrong):
    now = of(tiny(), byte_tokenizer())
    for saved in (wrong, {}, {"config": {}}, {**now, "config": wrong}, {**now, "rope": wrong}):
        with pytest.raises(ValueError, match="file holds no complete fingerprint"):
            fingerprint.compare(saved, now, "file")


def test_offloaded_weights_are_named():
    model = tiny()
    model.lm_head.to("meta")
    with pytest.raises(ValueError, match=r"weight lm_head\.weight is offloaded"):
        fingerprint.of_model(model)


@pytest.mark.parametrize("kind", HYBRIDS)
def test_hybrids_with_several_rotary_embeddings(kind):
    model = tiny(kind, **HYBRIDS[kind])
    saved = fingerprint.of_model(model)
    assert saved["rope"]
    fingerprint.compare(json.loads(json.dumps(saved)), fingerprint.of_model(model), "file")


def test_it_reads_little_of_a_large_model():
    """A billion weights that no memory stands behind until they are read."""
    model = tiny()
    size = 1 << 15
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(1).expand(size, size), requires_grad=False)
    start = time.process_time()
    fingerprint.of_model(model)
    assert time.process_time() - start < 1
