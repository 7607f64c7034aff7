"""An ordinary PEFT adapter: conditional, small, saved and loaded, also by stock PEFT."""

import json
import re
import shutil
from pathlib import Path

import peft
import pytest
import torch
from dataopt.integrations.hf import CCMCache, CCMConfig, CCMModel
from safetensors.torch import load_file
from transformers import AttentionInterface, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.hub import fixtures
from tests.hub.fixtures import run_client

from ..kvzip.conftest import tiny
from .conftest import CONTEXTS, GREEDY, KINDS, QUERY, answered, batch, ccm, row

hub = fixtures.hub


def memory_of(model, contexts=CONTEXTS):
    memory = CCMCache(model)
    for context in contexts:
        memory.append(input_ids=context)
    return memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_text_alone_is_the_base_model_bit_for_bit(kind, dtype):
    base = tiny(kind, tie_word_embeddings=True).to(dtype)
    model = ccm(base=tiny(kind, tie_word_embeddings=True).to(dtype)).to(dtype)
    ids = torch.tensor([QUERY + CONTEXTS[0]])
    expected = base(ids).logits
    assert torch.equal(model(ids).logits[..., : expected.shape[-1]], expected)
    assert torch.equal(model.get_base_model()(ids).logits[..., : expected.shape[-1]], expected)


def test_ordinary_tokens_of_a_context_are_those_of_the_base_model():
    """Their keys in the first context, which sees no memory."""
    model, base = ccm(), tiny()
    seen = {}
    name, module = next((n, m) for n, m in model.named_modules() if n.endswith("layers.3.self_attn.k_proj"))
    module.register_forward_hook(lambda m, args, out: seen.update(keys=out))
    model(**batch([row(model, CONTEXTS[:1], QUERY)]))
    cache = DynamicCache(config=base.config)
    base.model.layers[3].self_attn.k_proj.register_forward_hook(lambda m, args, out: seen.update(base=out))
    base(torch.tensor([CONTEXTS[0]]), past_key_values=cache)
    own = len(CONTEXTS[0])
    torch.testing.assert_close(seen["keys"][0, :own], seen["base"][0], rtol=1e-5, atol=1e-5)
    assert name


def test_without_lora_the_memory_is_that_of_the_base_model():
    """B = 0 and untouched embeddings: COMP tokens are ordinary ones with the embedding they have."""
    model = CCMModel(tiny(), CCMConfig(comp_ids=[60, 61])).eval()
    for m in model.modules():
        if hasattr(m, "trainable_tokens_delta"):
            m.trainable_tokens_delta["default"].data.copy_(m.base_layer.weight[[60, 61]])
    memory = memory_of(model, CONTEXTS[:1])
    cache = DynamicCache(config=model.get_base_model().config)
    tiny()(torch.tensor([[*CONTEXTS[0], 60, 61]]), past_key_values=cache)
    for layer, (keys, values) in zip(cache.layers, memory._memory.layers, strict=True):
        turned = model.rotation(layer.keys[:, :, -2:], torch.tensor([-5, -5]))
        torch.testing.assert_close(keys, turned, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(values, layer.values[:, :, -2:], rtol=1e-4, atol=1e-5)


def test_only_the_adapter_is_trained():
    model = CCMModel(tiny(), CCMConfig(r=4))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in n or "trainable_tokens_delta" in n for n in trained)
    assert sum("trainable_tokens" in n for n in trained) == 1


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt_neox"])
def test_the_lora_sits_on_the_attention(kind):
    model = CCMModel(tiny(kind), CCMConfig())
    layers = {n.rsplit(".lora_A", 1)[0] for n, _ in model.named_parameters() if "lora_A" in n}
    attention = "attention" if kind == "gpt_neox" else "self_attn"
    assert all(f".{attention}." in name for name in layers)
    assert len(layers) == 4 * (4 if kind == "llama" else 2)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("comp_ids", [None, [61, 60]])
def test_saved_and_loaded_is_bit_identical(tied, comp_ids, tmp_path):
    def base():
        return tiny(tie_word_embeddings=tied)

    model = ccm(base=base(), comp_ids=comp_ids, mode="merge", positions="abs")
    model.save_pretrained(tmp_path)
    again = CCMModel.from_pretrained(base(), tmp_path)
    assert again.ccm_config == model.ccm_config and not again.training
    made = batch([row(model, CONTEXTS, QUERY)])
    assert torch.equal(again(**made).logits, model(**made).logits)
    card = (tmp_path / "README.md").read_text()
    assert re.findall("^## (.*)", card, re.MULTILINE) == ["Use", "What made it"]
    assert "mode='merge'" in card and "More Information" not in card and "library_name: dataopt" in card
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    rows = [t for n, t in tensors.items() if "lora_" not in n]
    assert len(rows) == 1 and rows[0].shape == (2, 48)
    trainable = CCMModel.from_pretrained(base(), tmp_path, is_trainable=True)
    assert {n for n, p in trainable.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def test_options_given_as_tuples_come_back_equal(tmp_path):
    model = ccm(comp_ids=(61, 60), target_modules=("q_proj", "v_proj"))
    model.save_pretrained(tmp_path)
    assert CCMModel.from_pretrained(tiny(), tmp_path).ccm_config == model.ccm_config


def test_stock_peft_does_the_online_step(tmp_path):
    model = ccm(comp_ids=[60, 61])
    model.save_pretrained(tmp_path)
    stock = peft.PeftModel.from_pretrained(tiny(), tmp_path).eval()
    cache = DynamicCache(config=stock.config)
    stock(torch.tensor([[*CONTEXTS[0], 60, 61]]), past_key_values=cache)
    memory = memory_of(model, CONTEXTS[:1])
    for layer, (keys, values) in zip(cache.layers, memory._memory.layers, strict=True):
        turned = model.rotation(layer.keys[:, :, -2:], torch.tensor([-5, -5]))
        torch.testing.assert_close(keys, turned, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(values, layer.values[:, :, -2:], rtol=1e-5, atol=1e-5)


def test_a_conditional_adapter_cannot_be_merged():
    model = ccm()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="cannot be merged"):
            merge()
        after = model.state_dict()
        assert list(after) == list(before) and all(torch.equal(t, before[name]) for name, t in after.items())
    plain = ccm(conditional=False)
    ids = torch.tensor([QUERY])
    logits = plain(ids).logits
    torch.testing.assert_close(plain.merge_and_unload()(ids).logits, logits, rtol=1e-4, atol=1e-4)


def test_layers_that_are_not_there_leave_the_base_as_it_was():
    base = tiny()
    rows = len(base.get_input_embeddings().weight)
    with pytest.raises(ValueError, match=r"target_modules=\['q_prj'\] names no layer of the model"):
        CCMModel(base, CCMConfig(target_modules=("q_prj",)))
    assert len(base.get_input_embeddings().weight) == rows
    assert CCMModel(base, CCMConfig(target_modules=("q_proj",), comp_tokens=2)).comp_ids == [rows, rows + 1]


def test_comp_tokens_do_not_go_with_a_cache_under_either_name():
    model = ccm()
    ids = torch.tensor([[*QUERY, *model.comp_ids, *QUERY]])
    for name in ("past_key_values", "cache"):
        with pytest.raises(ValueError, match=f"{name} does not go with COMP tokens"):
            model(input_ids=ids, **{name: DynamicCache()})


def test_a_disabled_adapter_is_the_base_model():
    model, base = ccm(comp_ids=[60, 61]), tiny()
    ids = torch.tensor([[*QUERY, 60, 61]])
    with model.disable_adapter():
        assert torch.equal(model.get_base_model()(ids).logits, base(ids).logits)


def test_comp_tokens_are_never_generated():
    model = ccm(comp_ids=[60, 61])
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else model.get_base_model().lm_head
    with torch.no_grad():
        head.weight[60] = 0
        head.weight[60, :] = 100 * torch.randn(48, generator=torch.Generator().manual_seed(0))
        head.weight[61] = -head.weight[60]  # one of the two always wins
    memory = memory_of(model)
    out = model.generate(**memory.inputs(input_ids=QUERY), past_key_values=memory, **GREEDY)
    assert not {60, 61} & set(out[0, len(QUERY) :].tolist())
    assert answered(model, memory, QUERY)[0, -1].argmax() in (60, 61)


def test_new_rows_do_not_depend_on_the_random_state():
    rows = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = CCMModel(tiny(), CCMConfig())
        rows.append(model.get_base_model().get_input_embeddings().weight[-2:].clone())
    assert torch.equal(*rows)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"mode": "sum"}, "mode='sum'"),
        ({"comp_tokens": 0}, "comp_tokens=0"),
        ({"r": 0}, "r=0"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
        ({"comp_ids": [1]}, "comp_tokens=2 different"),
        ({"comp_ids": [1, 1]}, "different token ids"),
        ({"comp_ids": [-1, 1]}, "different token ids"),
        ({"target_modules": "q_proj"}, "list of names"),
        ({"ema": 0.5}, "mode='merge'"),
        ({"sink": 1}, "sink=1"),
    ],
)
def test_bad_options_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        CCMConfig(**wrong)


def test_bad_bases_are_refused():
    with pytest.raises(ValueError, match="outside the vocabulary of 264"):
        CCMModel(tiny(), CCMConfig(comp_ids=[263, 264]))
    with pytest.raises(TypeError, match="carries PEFT adapters"):
        CCMModel(ccm(), CCMConfig())
    with pytest.raises(TypeError, match="not a transformers model"):
        CCMModel(torch.nn.Linear(2, 2), CCMConfig())
    with pytest.raises(TypeError, match="sliding-window layers"):
        CCMModel(tiny("mistral", sliding_window=16), CCMConfig())
    with pytest.raises(TypeError, match="caps its attention scores"):
        CCMModel(tiny("gemma2"), CCMConfig())
    with pytest.raises(TypeError, match="dynamic NTK"):
        rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
        CCMModel(tiny(rope_parameters=rope), CCMConfig())
    with pytest.raises(TypeError, match="0 rotary embeddings"):
        CCMModel(tiny("gpt2", n_embd=48, n_head=6, n_layer=4, num_key_value_heads=None), CCMConfig())


def test_an_attention_without_a_mask_function_is_refused():
    AttentionInterface.register("bare", ALL_ATTENTION_FUNCTIONS["sdpa"])
    base = tiny()
    base.config._attn_implementation = "bare"
    with pytest.raises(TypeError, match="'bare' has no mask function"):
        CCMModel(base, CCMConfig())


CLIENT = """
import torch
from dataopt.integrations.hf import CCMConfig, CCMModel
from tests.integrations.hf.kvzip.conftest import tiny

model = CCMModel(tiny(), CCMConfig(mode="merge", comp_ids=[60, 61]))
for name, p in model.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(p)
model.push_to_hub("me/adapter", private=True)
again = CCMModel.from_pretrained(tiny(), "me/adapter")
assert again.ccm_config == model.ccm_config
assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
print("ok")
"""


def test_pushed_and_loaded_through_the_hub(hub):
    assert run_client(hub, CLIENT, PYTHONPATH=str(Path(__file__).parents[4])).strip().endswith("ok")
    assert {"adapter_config.json", "adapter_model.safetensors", "ccm_config.json"} <= hub.files("me/adapter").keys()


def test_bad_rows_are_refused():
    model = ccm(comp_ids=[60, 61])
    made = batch([row(model, CONTEXTS, QUERY)])
    with pytest.raises(ValueError, match="never predicted"):
        model(**made, labels=made["input_ids"])
    with pytest.raises(ValueError, match="together"):
        model(input_ids=made["input_ids"], segment_ids=made["segment_ids"])
    with pytest.raises(ValueError, match="past_key_values"):
        model(**made, past_key_values=DynamicCache())
    far = ccm(positions="abs", changes={"max_position_embeddings": 20})
    far(**batch([row(far, CONTEXTS[:2], QUERY)]))
    with pytest.raises(ValueError, match="reaches position 26 and the model has 20; positions='abs' counts all text"):
        far(**batch([row(far, CONTEXTS, QUERY)]))


def change(path, **changes):
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | changes))


def test_damaged_files_are_refused(tmp_path):
    model = ccm()
    good = tmp_path / "good"
    model.save_pretrained(good)

    def copy(name):
        return shutil.copytree(good, tmp_path / name)

    weights = "adapter_model.safetensors"
    folder = copy("cut")
    (folder / weights).write_bytes((good / weights).read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged"):
        CCMModel.from_pretrained(tiny(), folder)
    content = bytearray((good / weights).read_bytes())
    content[-5] ^= 1
    (folder / weights).write_bytes(content)
    with pytest.raises(ValueError, match="is damaged, or from another save"):
        CCMModel.from_pretrained(tiny(), folder)
    folder = copy("none")
    (folder / "ccm_config.json").unlink()
    with pytest.raises(ValueError, match="is missing"):
        CCMModel.from_pretrained(tiny(), folder)
    folder = copy("changed")
    change(folder / "ccm_config.json", vocabulary=3)
    with pytest.raises(ValueError, match="was changed"):
        CCMModel.from_pretrained(tiny(), folder)
    folder = copy("newer")
    change(folder / "ccm_config.json", format_version=99)
    with pytest.raises(ValueError, match="newer format 99"):
        CCMModel.from_pretrained(tiny(), folder)
    folder = copy("infinite")
    infinite = ccm()
    next(w for n, w in infinite.named_parameters() if "lora_" in n).data.fill_(torch.inf)
    infinite.save_pretrained(folder)
    with pytest.raises(ValueError, match="non-finite"):
        CCMModel.from_pretrained(tiny(), folder)
    with pytest.raises(ValueError, match="does not fit the base model"):
        CCMModel.from_pretrained(tiny(num_hidden_layers=3), good)
    with pytest.raises(ValueError, match="264 embedding rows and this one has 270"):
        CCMModel.from_pretrained(tiny(vocab_size=270), good)
