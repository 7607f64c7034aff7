"""One parallel forward pass is the online steps, one by one: values and gradients (section 7.3.1)."""

import itertools

import pytest
import torch
from dataopt.integrations.hf import CCMCache, decoder
from dataopt.integrations.hf.ccm.comp_tokens import CompTokens
from transformers.cache_utils import DynamicCache

from ..kvzip.conftest import tiny
from .conftest import CONTEXTS, KINDS, QUERY, answered, batch, ccm, exact, row

OPTIONS = [
    dict(mode=mode, positions=positions, recurrent=recurrent, comp_tokens=n, ema=ema)
    for (mode, ema), positions, recurrent, n in itertools.product(
        [("concat", None), ("merge", None), ("merge", 0.3)], ["cache", "abs"], [True, False], [1, 3]
    )
]


def names(options):
    return "-".join(str(v) for v in options.values())


@pytest.mark.parametrize("options", OPTIONS, ids=names)
@pytest.mark.parametrize("sink", [False, True])
def test_parallel_is_recursive(options, sink, tokenizer):
    model = exact(ccm(dtype=torch.float64, **options, sink=sink))
    prefix = [tokenizer.bos_token_id] if sink else []
    users = [CONTEXTS, CONTEXTS[2:] + CONTEXTS[:1]]  # four contexts and three
    rows = [row(model, contexts, QUERY, prefix=prefix) for contexts in users]
    for left in (False, True):
        made = batch(rows, left)
        logits = model(**made).logits
        for i, contexts in enumerate(users):
            memory = CCMCache(model, tokenizer if sink else None)
            for context in contexts:
                memory.append(input_ids=context)
            at = [k for k, s in enumerate(made["segment_ids"][i].tolist()) if s == len(contexts) + 1]
            expected = answered(model, memory, QUERY)[0]
            assert (logits[i, at] - expected).abs().max() < 1e-10
            assert expected.abs().max() > 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["concat", "merge"])
def test_every_architecture(kind, mode):
    model = exact(ccm(kind, dtype=torch.float64, mode=mode, comp_tokens=2))
    logits = model(**batch([row(model, CONTEXTS, QUERY)])).logits[0, -len(QUERY) :]
    memory = CCMCache(model)
    for context in CONTEXTS:
        memory.append(input_ids=context)
    assert (logits - answered(model, memory, QUERY)[0]).abs().max() < 1e-10
    alone = answered(model, CCMCache(model), QUERY)[0]
    assert (logits - alone).abs().max() > 1e-2  # the memory is read


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_query_of_several_reads_the_whole_memory_and_no_other_query(kind):
    model = ccm(kind, dtype=torch.float64, comp_tokens=1)
    one = model(**batch([row(model, CONTEXTS[:2], QUERY)])).logits[0, -5:]
    two = model(**batch([row(model, CONTEXTS[:2], [9, 9, 9], QUERY)])).logits[0, -5:]
    assert (one - two).abs().max() < 1e-9


def test_a_query_between_contexts_reads_what_came_before():
    model = ccm(dtype=torch.float64, comp_tokens=2)
    parts = row(model, CONTEXTS[:2])
    first = len(CONTEXTS[0]) + 2
    mixed = {
        "input_ids": parts["input_ids"][:first] + QUERY + parts["input_ids"][first:],
        "segment_ids": [1] * first + [2] * 5 + [3] * (len(CONTEXTS[1]) + 2),
        "comp_slot": parts["comp_slot"][:first] + [-1] * 5 + parts["comp_slot"][first:],
    }
    got = model(**batch([mixed])).logits[0]
    assert (
        got[first : first + 5] - model(**batch([row(model, CONTEXTS[:1], QUERY)])).logits[0, -5:]
    ).abs().max() < 1e-9
    both = model(**batch([parts])).logits[0]
    assert (got[first + 5 :] - both[first:]).abs().max() < 1e-9


def test_segments_follow_from_the_comp_tokens():
    model = ccm(comp_tokens=2)
    given = batch([row(model, CONTEXTS, QUERY), row(model, CONTEXTS[:2], QUERY)])
    mask = (given["segment_ids"] >= 0).long()
    derived = model(input_ids=given["input_ids"], attention_mask=mask).logits
    expected = model(**given).logits
    assert torch.equal(derived * mask.unsqueeze(2), expected * mask.unsqueeze(2))


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_every_attention_that_was_set_before(attention):
    base = tiny()
    base.set_attn_implementation(attention)
    model, reference = ccm(base=base, mode="merge"), ccm(mode="merge")
    with torch.no_grad():
        got, expected = (m(**batch([row(m, CONTEXTS, QUERY)])).logits for m in (model, reference))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, reference = ccm(mode="merge").to(dtype), ccm(mode="merge")
    made = batch([row(model, CONTEXTS, QUERY)])
    memory = CCMCache(model)
    for context in CONTEXTS:
        memory.append(input_ids=context)
    assert memory._memory.layers[0][0].dtype == torch.float32  # an average
    expected = reference(**made).logits[0, -5:]
    assert (model(**made).logits[0, -5:].float() - expected).abs().max() < 0.15 * expected.abs().max()
    assert (answered(model, memory, QUERY)[0].float() - expected).abs().max() < 0.15 * expected.abs().max()


def trained(model):
    return {name: p for name, p in model.named_parameters() if "lora_" in name or "trainable_tokens" in name}


def recursive_loss(model, contexts, query):
    """The online steps with gradients, straight on a cache of transformers ("cache" positions, no sink)."""
    config, base, n = model.ccm_config, model.get_base_model(), len(model.comp_ids)
    memory = None  # per layer: keys, values
    for t, context in enumerate(contexts, 1):
        cache = DynamicCache(config=base.config)
        if memory is not None:
            for i, (k, v) in enumerate(memory):
                cache.update(k, v, i)
        seen, own = cache.get_seq_length(), len(context)
        ids = torch.tensor([[*context, *model.comp_ids]])
        places = torch.arange(seen, seen + own + n).unsqueeze(0)
        mask = torch.ones(1, seen + own + n, dtype=torch.long)
        comp = CompTokens(torch.arange(own, own + n))
        decoder.forward(base, ids, cache, position_ids=places, attention_mask=mask, ccm=comp)
        new = [(layer.keys[:, :, -n:], layer.values[:, :, -n:]) for layer in cache.layers]
        to = seen if config.mode == "concat" else 0
        new = [(model.rotation(k, torch.full((n,), to - seen - own)), v) for k, v in new]
        if memory is None:
            memory = new
        elif config.mode == "concat":
            memory = [(torch.cat([a, k], 2), torch.cat([b, v], 2)) for (a, b), (k, v) in zip(memory, new, strict=True)]
        else:
            memory = [(a + (k - a) / t, b + (v - b) / t) for (a, b), (k, v) in zip(memory, new, strict=True)]
    cache = DynamicCache(config=base.config)
    for i, (k, v) in enumerate(memory):
        cache.update(k, v, i)
    seen = cache.get_seq_length()
    places = torch.arange(seen, seen + len(query)).unsqueeze(0)
    mask = torch.ones(1, seen + len(query), dtype=torch.long)
    ids = torch.tensor([query])
    logits = base(ids, past_key_values=cache, position_ids=places, attention_mask=mask).logits
    return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])


def labelled(made, count):
    """Labels on all but the first of the last ``count`` tokens."""
    labels = torch.full_like(made["input_ids"], -100)
    labels[:, -count + 1 :] = made["input_ids"][:, -count + 1 :]
    return labels


@pytest.mark.parametrize("mode", ["concat", "merge"])
def test_gradients_are_those_of_the_recursion(mode):
    model = exact(ccm(dtype=torch.float64, mode=mode, comp_tokens=2, lora_dropout=0.0))
    wanted = trained(model)
    made = batch([row(model, CONTEXTS, QUERY)])
    # The loss of transformers is computed in float32.
    logits = model(**made).logits[0, -len(QUERY) : -1]
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(QUERY[1:]))
    parallel = torch.autograd.grad(loss, list(wanted.values()))
    other = recursive_loss(model, CONTEXTS, QUERY)
    # What the last layer makes of a COMP token's query is read by nobody.
    recursive = torch.autograd.grad(other, list(wanted.values()), allow_unused=True, materialize_grads=True)
    assert abs(loss.item() - other.item()) < 1e-10
    for name, a, b in zip(wanted, parallel, recursive, strict=True):
        assert (a - b).abs().max() < 1e-9, name
    assert max(g.abs().max().item() for g in parallel) > 1e-3


def test_gradient_checkpointing_changes_nothing_even_with_two_forwards_before_backward():
    losses = []
    for checkpointing in (False, True):
        model = ccm(dtype=torch.float64, mode="merge", lora_dropout=0.0)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        first, second = batch([row(model, CONTEXTS, QUERY)]), batch([row(model, CONTEXTS[1:3], QUERY)])
        loss = model(**first, labels=labelled(first, 5)).loss
        other = model(**second, labels=labelled(second, 5)).loss
        (loss + 2 * other).backward()
        losses.append({name: p.grad.clone() for name, p in trained(model).items()})
    assert all(torch.equal(losses[0][name], losses[1][name]) for name in losses[0])
    assert any(g.abs().max() > 1e-3 for g in losses[0].values())
