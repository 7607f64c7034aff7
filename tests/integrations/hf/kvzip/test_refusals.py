"""Bad input: one sentence that names the argument and says what to do, never fluent wrong text."""

import pytest
import torch
from dataopt.integrations.hf import KVzipCache
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from .conftest import CHATML, CONTEXT, GREEDY, HYBRIDS, byte_tokenizer, full_ids, tiny

QUESTION = "Who sold the boat?"


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture
def cache(model, tokenizer) -> KVzipCache:
    return KVzipCache(model, tokenizer, CONTEXT, ratio=0.3)


def small(kind: str, **options):
    shape = {
        "vocab_size": 264, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
    }  # fmt: skip
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**shape, **options})).eval()


# Arguments


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"ratio": 0}, r"ratio=0 must be above 0 and at most 1: it is the share"),
        ({"ratio": 1.5}, r"ratio=1.5 must be above 0 and at most 1"),
        ({"ratio": -0.3}, r"ratio=-0.3 must be above 0"),
        ({"ratio": float("nan")}, r"ratio=nan must be above 0"),
        ({"ratio": True}, r"ratio=True must be above 0"),
        ({"ratio": "0.3"}, r"ratio='0.3' must be above 0"),
        ({"level": "layer"}, r"level='layer' must be one of 'pair', 'head'"),
        ({"budget": "heads"}, r"budget='heads' must be one of 'global', 'layer', 'uniform'"),
        ({"norm": "half"}, r"norm='half' must be one of 'full', 'subset'"),
        ({"bits": 3}, r"bits=3 must be one of None, 8, 4"),
        ({"chunk": 0}, r"chunk=0 must be a whole number of at least 1"),
        ({"chunk": 10.5}, r"chunk=10.5 must be a whole number"),
        ({"prefill_chunk": -1}, r"prefill_chunk=-1 must be a whole number of at least 1"),
        ({"recent": -1}, r"recent=-1 must be a whole number of at least 0"),
        ({"max_tokens": 0}, r"max_tokens=0 must be a whole number of at least 1"),
        ({"level": "head", "budget": "layer"}, r"level='head' compares all heads; leave budget='global'"),
        ({"level": "head", "max_tokens": 5}, r"level='head' compares all heads; .*max_tokens=None"),
        ({"head_scores": torch.zeros(4, 2)}, r"head_scores needs level='head', not level='pair'"),
        (
            {"head_scores": torch.zeros(2, 4), "level": "head"},
            r"head_scores has the shape \(2, 4\) and must be \(4, 2\)",
        ),
        (
            {"head_scores": torch.full((4, 2), torch.nan), "level": "head"},
            r"head_scores has the shape .* one number for",
        ),
    ],
)
def test_options(model, tokenizer, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        KVzipCache(model, tokenizer, CONTEXT, **options)


@pytest.mark.parametrize("context", ["", "  \n", None, ["a", "b"], 7])
def test_contexts_without_text(model, tokenizer, context):
    with pytest.raises(ValueError, match=r"context=.* must be a text with at least one word"):
        KVzipCache(model, tokenizer, context)


def test_a_group_that_does_not_divide_the_head(tokenizer):
    with pytest.raises(ValueError, match=r"group=32 must divide the head size 24"):
        KVzipCache(tiny(head_dim=24), tokenizer, CONTEXT, bits=8)


def test_no_room_for_the_scoring_input(tokenizer):
    """Positions go up to the context, the prompt and the chunk; the chunk shrinks first."""
    n = len(CONTEXT) + 6
    with pytest.raises(ValueError, match=rf"context has {n} tokens and the model {n} positions; shorten the context"):
        KVzipCache(tiny(max_position_embeddings=n), tokenizer, CONTEXT, ratio=1.0)
    tight = tiny(max_position_embeddings=n + 80)
    with pytest.raises(ValueError, match=r"context leaves 80 .* scoring prompt alone takes .*; shorten .* head_scores"):
        KVzipCache(tight, tokenizer, CONTEXT)
    heads = KVzipCache(tight, tokenizer, CONTEXT, level="head", head_scores=torch.rand(4, 2))
    assert heads.lengths.min() < n
    positions = []
    model = tiny(max_position_embeddings=n + 110)
    model.model.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: positions.append(int(kwargs["position_ids"].max())), with_kwargs=True
    )
    cache = KVzipCache(model, tokenizer, CONTEXT, ratio=0.3)
    assert max(positions) < n + 110 and len(positions) > 5  # several small chunks
    assert int(cache.lengths.sum()) - 8 * 6 == round(0.3 * 8 * len(CONTEXT))


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_a_rotary_embedding_that_changes_with_the_length(rope, tokenizer):
    n = len(CONTEXT) + 6
    parameters = {"rope_type": rope, "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": n + 200}
    if rope == "longrope":
        parameters |= {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
    changes = {"rope_parameters": parameters, "max_position_embeddings": 4 * n}
    if rope == "dynamic":
        changes["max_position_embeddings"] = n + 200
    model = tiny(**changes)
    cache = KVzipCache(model, tokenizer, CONTEXT, ratio=0.3)
    model.generate(**cache.inputs(QUESTION), past_key_values=cache, **GREEDY)
    with pytest.raises(ValueError, match=r"rotary embedding changes for all positions.*; shorten the context or"):
        model.generate(**cache.inputs("?" * 190), past_key_values=cache, **GREEDY)
    with pytest.raises(ValueError, match=r"shorten the context or the answer"):
        model.generate(**cache.inputs("?" * 180), past_key_values=cache, max_new_tokens=30, do_sample=False)
    again = model.generate(**cache.inputs(QUESTION), past_key_values=cache, **GREEDY)
    assert again.shape[1] > 12


# Models


def test_training_mode(tokenizer):
    with pytest.raises(ValueError, match=r"model is in training mode; call model.eval\(\)"):
        KVzipCache(tiny().train(), tokenizer, CONTEXT)


def test_things_that_are_no_model(tokenizer):
    with pytest.raises(TypeError, match="model: Linear is not a transformers model"):
        KVzipCache(torch.nn.Linear(2, 2), tokenizer, CONTEXT)
    with pytest.raises(TypeError, match="model: str is not a transformers model"):
        KVzipCache("me/llama", tokenizer, CONTEXT)


def mla():
    return small(
        "deepseek_v3", kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
        num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        first_k_dense_replace=2,
    )  # fmt: skip


def linear_attention():
    return small(
        "qwen3_next", layer_types=["linear_attention", "full_attention"], num_experts=4, num_experts_per_tok=2,
        linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        moe_intermediate_size=16, shared_expert_intermediate_size=16,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (mla, r"model: DeepseekV3ForCausalLM stores a shared latent \(MLA\)"),
        (linear_attention, r"model: Qwen3NextForCausalLM .*only full and sliding-window attention"),
        (lambda: small("bloom", n_layer=2, n_head=4), r"model: BloomForCausalLM .*_supports_attention_backend"),
        (lambda: small("mistral", sliding_window=32), r"model: MistralForCausalLM has sliding-window layers only"),
        (
            lambda: AutoModelForSeq2SeqLM.from_config(
                AutoConfig.for_model("t5", vocab_size=264, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
            ).eval(),
            r"model: T5ForConditionalGeneration is an encoder-decoder",
        ),
        (
            lambda: small("gemma3n_text", num_kv_shared_layers=1, num_hidden_layers=4, vocab_size_per_layer_input=264,
                          layer_types=["full_attention"] * 4, activation_sparsity_pattern=[0.0] * 4,
                          hidden_size_per_layer_input=8, laurel_rank=8, intermediate_size=[64] * 4),
            r"model: Gemma3nForCausalLM shares key-value pairs between layers",
        ),
    ],
    ids=["mla", "linear", "no interface", "sliding only", "encoder-decoder", "shared pairs"],
)  # fmt: skip
def test_models_that_cannot_be_served(make, sentence, tokenizer):
    with pytest.raises(TypeError, match=sentence):
        KVzipCache(make(), tokenizer, CONTEXT)


def test_keys_hidden_by_another_package(tokenizer):
    model = tiny()
    model.model.layers[1].self_attn.masked_key_indices = (torch.zeros(1), torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match=r"kvpress .*masked_key_indices .*delete them or reload"):
        KVzipCache(model, tokenizer, CONTEXT)


def test_attention_weights(tokenizer):
    asked = tiny()
    asked.set_attn_implementation("eager")
    asked.config.output_attentions = True
    with pytest.raises(ValueError, match=r"config.output_attentions=True: .*set it to False"):
        KVzipCache(asked, tokenizer, CONTEXT)
    for attention in ("eager", "sdpa"):
        model = tiny()
        model.set_attn_implementation(attention)
        cache = KVzipCache(model, tokenizer, CONTEXT, ratio=0.3)
        with pytest.raises(ValueError, match=r"output_attentions"):
            model.generate(
                **cache.inputs(QUESTION), past_key_values=cache, output_attentions=True, return_dict_in_generate=True
            )


def test_another_model_object(cache):
    """The same weights, another object; other weights; another shape."""
    for other in (tiny(), tiny(seed=1)):
        inputs = cache.inputs(QUESTION)
        with pytest.raises((ValueError, RuntimeError), match=r"(another model|model's attention|did not attend)"):
            other.generate(**inputs, past_key_values=cache, **GREEDY)
    other = tiny(seed=1)
    KVzipCache(other, cache.tokenizer, CONTEXT, ratio=1.0)  # its attention is switched too
    with pytest.raises(ValueError, match=r"belongs to another model object; compress the context, or load it, with"):
        other.generate(**cache.inputs(QUESTION), past_key_values=cache, **GREEDY)
    with pytest.raises(ValueError, match=r"2 heads of size 32 and was given 6 of size 32.*compress the context with"):
        tiny(num_key_value_heads=6).generate(**cache.inputs(QUESTION), past_key_values=cache, **GREEDY)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_switched_attention(tokenizer, attention):
    model = tiny()
    cache = KVzipCache(model, tokenizer, CONTEXT, ratio=0.3)
    answer = model.generate(**cache.inputs(QUESTION), past_key_values=cache, **GREEDY)
    model.set_attn_implementation(attention)
    with pytest.raises(RuntimeError, match=rf"attention was set to '{attention}' .*set_attn_implementation\('dataopt'"):
        model.generate(**cache.inputs(QUESTION), past_key_values=cache, **GREEDY)
    model.set_attn_implementation("dataopt")
    assert torch.equal(model.generate(**cache.inputs(QUESTION), past_key_values=cache, **GREEDY), answer)


def test_training_mode_when_more_text_comes(tokenizer):
    cache = KVzipCache(tiny(), tokenizer, CONTEXT, ratio=0.3)
    cache.model.train()
    with pytest.raises(ValueError, match=r"training mode; call model.eval\(\)"):
        cache.extend(" More.")


# Ids and masks


@pytest.mark.parametrize("length", [20, 400])
def test_a_question_without_its_mask(model, cache, length):
    """Shorter than the context, generate would cut it away; longer, it would answer something else, fluently."""
    ids = cache.inputs("x" * length)["input_ids"]
    for masks in ({}, {"attention_mask": torch.ones_like(ids)}):
        with pytest.raises(ValueError, match=r"pass \*\*cache.inputs\(question\)"):
            model.generate(ids, past_key_values=cache, **masks, **GREEDY)
    padded = torch.ones_like(ids).index_fill(1, torch.tensor([0]), 0)
    with pytest.raises(ValueError, match=r"pass \*\*cache.inputs\(question\)"):
        model.generate(ids, past_key_values=cache, attention_mask=padded, **GREEDY)


@pytest.mark.parametrize("change", [-1, 1, 30])
def test_a_mask_of_another_length(model, cache, change):
    inputs = cache.inputs(QUESTION)
    n = inputs["attention_mask"].shape[1] + change
    for mask in (
        torch.ones(1, n, dtype=torch.long),
        torch.ones(1, n, dtype=torch.long).index_fill(1, torch.tensor([n - 2]), 0),
    ):
        with pytest.raises(
            ValueError, match=rf"attention_mask covers {n} tokens, but the cache has 218 .*cache.inputs"
        ):
            model.generate(inputs["input_ids"], attention_mask=mask, past_key_values=cache, **GREEDY)


def test_padding_on_the_right(model, cache):
    """The answer would begin behind a token that is hidden."""
    inputs = cache.inputs(["Who sold the boat?", "Who sold the boats?"])
    ids, mask = (inputs[name].clone() for name in ("input_ids", "attention_mask"))
    ids[0], mask[0] = ids[0].roll(-1), 1
    mask[0, -1] = 0
    with pytest.raises(ValueError, match=r"hides the newest token: .*padded on the right.*cache.inputs\(question\)"):
        model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)


def test_the_ids_of_another_text(model, cache):
    ids = full_ids(cache, QUESTION)
    ids[0, 40] += 1
    with pytest.raises(ValueError, match=r"input_ids does not begin with the tokens that the cache has read"):
        model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **GREEDY)
    with pytest.raises(ValueError, match=r"input_ids does not begin with"):
        model.generate(ids, past_key_values=cache, **GREEDY)


def test_embeddings_instead_of_ids(model, cache):
    embeds = model.get_input_embeddings()(full_ids(cache, QUESTION))
    with pytest.raises(ValueError, match=r"inputs_embeds .*; give input_ids"):
        model.generate(inputs_embeds=embeds, past_key_values=cache, **GREEDY)


def test_no_tokens(model, cache):
    with pytest.raises(ValueError, match=r"the model was given no tokens: .*pass \*\*cache.inputs\(question\)"):
        cache.get_mask_sizes(0, 0)


@pytest.mark.parametrize("question", ["", [], [""], ["a", ""], ["a", None], 7 * [None]])
def test_questions_without_text(cache, question):
    with pytest.raises(ValueError, match=r"question=.* must be a text or a sequence of texts, none of them empty"):
        cache.inputs(question)


def test_both_or_neither(cache):
    for arguments in ({}, {"question": "a", "input_ids": [1]}):
        with pytest.raises(ValueError, match="give either question or input_ids"):
            cache.inputs(**arguments)
    with pytest.raises(ValueError, match=r"answer_prefix needs a question as text; append its tokens to input_ids"):
        cache.inputs(input_ids=[1], answer_prefix="It")
    with pytest.raises(ValueError, match=r"input_ids is empty; give the tokens of a question"):
        cache.inputs(input_ids=torch.zeros(1, 0))


def test_padding_on_sliding_layers(tokenizer):
    model = tiny("gemma3_text", **HYBRIDS["gemma3_text"])
    cache = KVzipCache(model, tokenizer, CONTEXT, ratio=0.5)
    with pytest.raises(ValueError, match=r"sliding-window layers.*; ?ask them one at a time|ask them one at a time"):
        cache.inputs(["Short?", "A longer question?"])
    inputs = cache.inputs(["Who is Ada?", "Who is Ben?"])
    both = model.generate(**inputs, past_key_values=cache, **GREEDY)
    for i, question in enumerate(["Who is Ada?", "Who is Ben?"]):
        assert torch.equal(both[i], model.generate(**cache.inputs(question), past_key_values=cache, **GREEDY)[0])


# Templates


@pytest.mark.parametrize(
    ("template", "times"),
    [
        (CHATML.replace("m['content']", "m['content'] | lower"), 0),
        (CHATML.replace("{{ m['content'] }}", ""), 0),
        (CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}{{ m['content'] }}"), 2),
    ],
    ids=["rewrites", "drops", "repeats"],
)
def test_templates_that_change_the_context(model, template, times):
    with pytest.raises(ValueError, match=rf"chat_template shows the user's text {times} times .*set another"):
        KVzipCache(model, byte_tokenizer(template), CONTEXT)


def test_a_template_without_a_second_turn(model):
    once = "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}" + CHATML
    cache = KVzipCache(model, byte_tokenizer(once), CONTEXT, ratio=0.3)
    out = model.generate(**cache.inputs(QUESTION), past_key_values=cache, **GREEDY)
    with pytest.raises(ValueError, match=r"chat_template does not render a second user turn"):
        cache.keep(out)


def test_messages_without_a_template(model):
    cache = KVzipCache(model, byte_tokenizer(None), CONTEXT, ratio=0.3)
    with pytest.raises(ValueError, match=r"tokenizer has no chat_template.*use inputs\(question\)"):
        cache.messages(QUESTION)


def test_messages_that_tokenise_differently_at_the_boundary(model):
    """A tokenizer that merges the full stop with the line break behind it."""
    alphabet = {
        c: i for i, c in enumerate(sorted(byte_tokenizer().get_vocab(), key=byte_tokenizer().get_vocab().get)[:256])
    }
    newline = byte_tokenizer().convert_ids_to_tokens(byte_tokenizer()("\n").input_ids)[0]
    merging = byte_tokenizer(tokenizer=Tokenizer(models.BPE({**alphabet, "." + newline: 256}, [(".", newline)])))
    assert merging(".\n").input_ids == [256]
    cache = KVzipCache(model, merging, CONTEXT, ratio=0.3)
    at = cache.seen_tokens - 1
    with pytest.raises(
        ValueError, match=rf"tokenise differently .* at token {at} of {at + 1}: .*use inputs\(question\)"
    ):
        cache.messages(QUESTION)
    model.generate(**cache.inputs(QUESTION), past_key_values=cache, **GREEDY)


# States


def test_keep_needs_one_answer(model, cache):
    with pytest.raises(ValueError, match=r"keep\(\) found no question and answer; call it after generate\(\)"):
        cache.keep()
    out = model.generate(**cache.inputs(QUESTION), past_key_values=cache, num_beams=2, **GREEDY)
    with pytest.raises(ValueError, match=r"keep\(\) needs one row and found 2: .*use fork\(\)"):
        cache.keep(out)
    out = model.generate(**cache.inputs(QUESTION), past_key_values=cache, **GREEDY)
    with pytest.raises(ValueError, match=r"output_ids has 12 tokens and the model was fed \d+; give what generate"):
        cache.keep(out[:, -12:])
    cache.keep(out)
    with pytest.raises(ValueError, match=r"keep\(\) found no question and answer"):
        cache.keep(out)


def test_a_kept_conversation_stands_in_the_way(model, tokenizer, tmp_path):
    cache = KVzipCache(model, tokenizer, CONTEXT, ratio=0.5, keep_scores=True)
    out = model.generate(**cache.inputs(QUESTION), past_key_values=cache, **GREEDY)
    cache.keep(out)
    for change in (
        lambda: cache.prune(0.2),
        lambda: cache.extend("More."),
        lambda: KVzipCache.stack([cache, cache]),
        lambda: cache.save_pretrained(tmp_path),
        lambda: cache.push_to_hub("me/cache"),
    ):
        with pytest.raises(ValueError, match=r"kept conversation.*call reset\(\)"):
            change()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"kept conversation cannot be given as messages; use inputs\(question\)"):
        cache.messages(QUESTION)
    cache.reset()
    cache.prune(0.2)
    assert cache.options.ratio == 0.2


def test_prune(model, tokenizer, cache):
    with pytest.raises(ValueError, match=r"no scores were kept.*compress with keep_scores=True"):
        cache.prune(0.2)
    kept = KVzipCache(model, tokenizer, CONTEXT, ratio=0.5, keep_scores=True)
    with pytest.raises(ValueError, match=r"ratio=0.7 is above the present 0.5; compress the context again"):
        kept.prune(0.7)
    with pytest.raises(ValueError, match=r"ratio=0 must be above 0"):
        kept.prune(0)

    heads = KVzipCache(model, tokenizer, CONTEXT, ratio=1.0, level="head")
    with pytest.raises(ValueError, match=r"no scores were kept.*compress with keep_scores=True"):
        heads.prune(0.6)
    tokens = KVzipCache(model, tokenizer, CONTEXT, max_tokens=40, keep_scores=True)
    tokens.prune(0.1)
    assert (tokens.options.ratio, tokens.options.max_tokens) == (0.1, None)
    with pytest.raises(ValueError, match=r"ratio=0.12 is above the present 0.1; compress the context again"):
        tokens.prune(0.12)


def test_extend(model, tokenizer, cache):
    for text in ("", None):
        with pytest.raises(ValueError, match=r"text=.* must not be empty"):
            cache.extend(text)
    limited = KVzipCache(model, tokenizer, CONTEXT, max_tokens=30)
    with pytest.raises(ValueError, match=r"extend\(\) with max_tokens needs keep_scores=True"):
        limited.extend("More.")
    tight = KVzipCache(tiny(max_position_embeddings=500), tokenizer, CONTEXT, ratio=0.3)
    before = tight.nbytes
    with pytest.raises(ValueError, match=r"context has \d+ tokens and the model 500 positions; shorten the context"):
        tight.extend("x" * 300)
    with pytest.raises(ValueError, match=r"scoring prompt alone takes"):
        tight.extend("x" * 200)
    assert tight.nbytes == before and tight.seen_tokens == 218


def test_head_scores_of_a_cache_without_scoring(model, tokenizer):
    with pytest.raises(ValueError, match=r"no pair was scored with ratio=1; compress with a lower ratio, or with keep"):
        KVzipCache(model, tokenizer, CONTEXT, ratio=1.0).head_scores()


def test_stacks(model, tokenizer, cache):
    with pytest.raises(ValueError, match="caches is empty; give at least one"):
        KVzipCache.stack([])
    other = tiny(seed=1)
    with pytest.raises(ValueError, match="caches of different models cannot be stacked"):
        KVzipCache.stack([cache, KVzipCache(other, tokenizer, CONTEXT, ratio=1.0)])
    pair = KVzipCache.stack([cache, cache])
    with pytest.raises(ValueError, match=r"3 questions for 2 stacked contexts; give one for each, or one"):
        pair.inputs(["a", "b", "c"])
    for what, use in {
        "keep": lambda: pair.keep(),
        "prune": lambda: pair.prune(0.1),
        "extend": lambda: pair.extend("More."),
        "messages": lambda: pair.messages("a"),
        "head_scores": lambda: pair.head_scores(),
        "save_pretrained": lambda: pair.save_pretrained("nowhere"),
        "lengths": lambda: pair.lengths,
    }.items():
        with pytest.raises(ValueError, match=rf"{what} works on one context and this cache stacks 2; use the single"):
            use()
    inputs = pair.inputs(["a", "b"])
    with pytest.raises(ValueError, match=r"a batch of 3 rows does not fit 2 stacked contexts; ask one question for"):
        model.generate(
            torch.cat([inputs["input_ids"], inputs["input_ids"][:1]]),
            attention_mask=torch.ones(3, inputs["attention_mask"].shape[1]).long().index_fill(1, torch.tensor([0]), 0),
            past_key_values=pair,
            **GREEDY,
        )


def test_crop_into_the_context(model, cache):
    model.generate(**cache.inputs(QUESTION), past_key_values=cache, **GREEDY)
    tail = cache.get_seq_length() - cache.seen_tokens
    cache.crop(-3)
    assert cache.get_seq_length() == cache.seen_tokens + tail - 3
    with pytest.raises(
        ValueError, match=rf"reaches into the compressed context, .*answer after it have {tail - 3} tok"
    ):
        cache.crop(-tail)


def test_offloading(cache):
    with pytest.raises(NotImplementedError, match="stays on the device of its model; it cannot be offloaded"):
        cache.layers[0].offload()
