"""One cache for every model of the attention interface: against transformers' own cache and a dense mask."""

import copy

import accelerate
import pytest
import torch
from dataopt.integrations.hf import KVzipCache
from transformers import AutoModelForCausalLM, DynamicCache

from .conftest import ARCHITECTURES, CONTEXT, GREEDY, HYBRIDS, full_ids, generate, tiny
from .reference import masked_logits

QUESTION = "Who sold the boat?"
EXACT = 5e-6
ALL = [pytest.param(k, {}, id=k) for k in ARCHITECTURES] + [
    pytest.param(k, c, id=f"{k}-sliding") for k, c in HYBRIDS.items()
]


@pytest.mark.parametrize(("kind", "changes"), ALL)
def test_ratio_1_is_transformers_own_cache(kind, changes, tokenizer):
    plain, model = tiny(kind, **changes), tiny(kind, **changes)
    cache = KVzipCache(model, tokenizer, CONTEXT, ratio=1.0)
    ids = full_ids(cache, QUESTION)
    expected, expected_logits = generate(plain, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    for _ in range(2):  # the second time from the restored state
        got, logits = generate(model, cache.inputs(QUESTION), cache)
        assert torch.equal(got, expected)
        torch.testing.assert_close(logits, expected_logits, rtol=EXACT, atol=EXACT)
    assert cache.nbytes == cache.full_nbytes


@pytest.mark.parametrize("ratio", [0.7, 0.3])
@pytest.mark.parametrize(("kind", "changes"), ALL)
def test_packed_is_full_attention_with_a_mask_per_head(kind, changes, ratio, tokenizer):
    model = tiny(kind, **changes)
    cache = KVzipCache(model, tokenizer, CONTEXT, ratio=ratio)
    answer, logits = generate(model, cache.inputs(QUESTION), cache)
    ids = full_ids(cache, QUESTION)
    expected = masked_logits(tiny(kind, **changes), cache, ids, answer)
    torch.testing.assert_close(logits, expected, rtol=2 * EXACT, atol=2 * EXACT)
    whole = tiny(kind, **changes)(torch.cat([ids, answer], 1)).logits[:, ids.shape[1] - 1 : -1]
    assert (whole - expected).abs().max() > 1e-2  # what was evicted matters to this model


@pytest.mark.parametrize("kind", HYBRIDS)
def test_sliding_windows_start_where_the_context_ended(kind, tokenizer):
    """Neither the scoring input nor a question may stay in them."""
    model = tiny(kind, **HYBRIDS[kind])
    cache = KVzipCache(model, tokenizer, CONTEXT, ratio=0.5)
    dense = DynamicCache(config=model.config)
    plain = tiny(kind, **HYBRIDS[kind])
    plain(torch.tensor([cache._states[0].ids]), past_key_values=dense)
    for _ in range(2):
        for mine, layer in zip(cache.layers, dense.layers, strict=True):
            if layer.is_sliding:
                torch.testing.assert_close(mine.keys, layer.keys, rtol=1e-5, atol=1e-5)
                assert mine.cumulative_length == layer.cumulative_length == cache.seen_tokens
        model.generate(**cache.inputs(QUESTION), past_key_values=cache, **GREEDY)
        cache.restore()
    assert cache.lengths.shape == (2, 2)  # only the full layers are packed


def test_ignored_sinks_or_softcap_would_show(tokenizer):
    """The two tests above can fail: both arguments move the logits far beyond their tolerance."""
    ids = torch.tensor([[*range(40, 100)]])
    sinks = tiny("gpt_oss")
    without = copy.deepcopy(sinks)
    for name, weight in without.named_parameters():
        if "sinks" in name:
            weight.data.fill_(-1e4)
    assert (sinks(ids).logits - without(ids).logits).abs().max() > 1e-2
    capped, open_ = tiny("gemma2"), tiny("gemma2", attn_logit_softcapping=1e4)
    assert (capped(ids).logits - open_(ids).logits).abs().max() > 1e-2


def test_a_soft_cap_is_never_lost(tokenizer):
    """Whatever attention a Gemma 2 gets by itself, context and question are read with its cap."""
    model = AutoModelForCausalLM.from_config(tiny("gemma2").config, attn_implementation=None).eval()
    cache = KVzipCache(model, tokenizer, CONTEXT, ratio=1.0)
    assert model.config._attn_implementation == "dataopt_eager"
    plain = tiny("gemma2")
    plain.load_state_dict(model.state_dict())
    ids = full_ids(cache, QUESTION)
    expected = generate(plain, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})[1]
    torch.testing.assert_close(generate(model, cache.inputs(QUESTION), cache)[1], expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_any_attention_that_was_set_before(attention, tokenizer):
    plain, model = tiny(), tiny()
    plain.set_attn_implementation(attention)
    model.set_attn_implementation(attention)
    cache = KVzipCache(model, tokenizer, CONTEXT, ratio=1.0)
    ids = full_ids(cache, QUESTION)
    expected = generate(plain, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    got = generate(model, cache.inputs(QUESTION), cache)
    assert torch.equal(got[0], expected[0])
    # And without our cache the switched model still computes what it computed before.
    for mask in (torch.ones_like(ids), torch.ones_like(ids).index_fill(1, torch.arange(3), 0)):
        inputs = {"input_ids": ids, "attention_mask": mask}
        assert torch.equal(generate(model, inputs)[1], generate(plain, inputs)[1])


@pytest.mark.parametrize("kind", ["llama", "gpt_oss", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(kind, dtype, tokenizer):
    """Half the bytes, the same pairs but for near ties, and logits as close as the precision allows."""
    model, reference = tiny(kind).to(dtype), tiny(kind)
    cache = KVzipCache(model, tokenizer, CONTEXT, ratio=1.0)
    whole = KVzipCache(reference, tokenizer, CONTEXT, ratio=1.0)
    assert 2 * cache.nbytes == whole.nbytes
    logits, expected = (generate(c.model, c.inputs(QUESTION), c, max_new_tokens=1)[1].float() for c in (cache, whole))
    ids = full_ids(cache, QUESTION)
    plain = tiny(kind).to(dtype)
    own_error = (plain(ids).logits[:, -1:].float() - expected).abs().max()
    assert 0 < (logits - expected).abs().max() <= 2 * own_error
    few, few_expected = (KVzipCache(m, tokenizer, CONTEXT, ratio=0.3).lengths for m in (model, reference))
    assert few.sum() == few_expected.sum()
    assert (few - few_expected).abs().sum() <= 0.15 * few.sum()


def test_device_map(tokenizer, tmp_path):
    """Loaded with a map, and with the hooks that accelerate puts around every module."""
    tiny().save_pretrained(tmp_path)
    mapped = type(tiny()).from_pretrained(tmp_path, device_map={"": "cpu"}).eval()
    hooked = accelerate.dispatch_model(tiny(), {"": "cpu"}, force_hooks=True)
    assert hooked._hf_hook is not None
    answers = []
    for model in (tiny(), mapped, hooked):
        cache = KVzipCache(model, tokenizer, CONTEXT, ratio=0.3)
        answers.append(model.generate(**cache.inputs(QUESTION), past_key_values=cache, **GREEDY))
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])


def test_a_compiled_model(tokenizer):
    """Layers between the attentions are compiled; the attention over ragged heads is called as it is."""
    model = tiny(num_hidden_layers=2)
    cache = KVzipCache(model, tokenizer, CONTEXT, ratio=0.3)
    expected, logits = generate(model, cache.inputs(QUESTION), cache, max_new_tokens=3)
    compiled = torch.compile(model, backend="eager")
    again = KVzipCache(compiled, tokenizer, CONTEXT, ratio=0.3)
    assert again.model is model and torch.equal(again.lengths, cache.lengths)
    got, compiled_logits = generate(compiled, again.inputs(QUESTION), again, max_new_tokens=3)
    assert torch.equal(got, expected)
    torch.testing.assert_close(compiled_logits, logits, rtol=1e-5, atol=1e-5)
