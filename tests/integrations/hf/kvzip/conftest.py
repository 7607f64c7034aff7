"""Tiny random models of many architectures, a tokenizer of bytes, and SmolLM2 where real text matters."""

import pytest
import torch
from dataopt.smollm2 import load_smollm2
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTEXT = (
    "Ada keeps the blue key in a tin behind the oven. Ben sold his boat to a painter from Ghent. The train to the "
    "coast leaves at nine. Nobody has seen the grey cat since Tuesday. Cleo owes eleven crowns to the baker."
)
GREEDY = {"max_new_tokens": 12, "do_sample": False}

_SHAPE = {
    "vocab_size": 264, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 2048, "initializer_range": 0.15,
    "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257, "tie_word_embeddings": False,
}  # fmt: skip
_FULL = ["full_attention"] * 4
_MIXED = ["sliding_attention", "full_attention"] * 2
# What a config needs beside the shape. Sliding windows are shorter than the context and the question.
ARCHITECTURES = {
    "llama": {},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "phi3": {"sliding_window": None},
    "gemma3_text": {"layer_types": _FULL, "query_pre_attn_scalar": 20},
    "olmo2": {},
    "cohere": {},
    "granite": {"attention_multiplier": 0.3},
    "gpt_neox": {"num_key_value_heads": None, "hidden_size": 48},
    "gpt_oss": {"layer_types": _FULL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma2": {"layer_types": _FULL, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 20},
}
HYBRIDS = {
    "gemma3_text": {"layer_types": _MIXED, "sliding_window": 32, "query_pre_attn_scalar": 20},
    "gpt_oss": {"layer_types": _MIXED, "sliding_window": 32, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma2": {"layer_types": _MIXED, "sliding_window": 32, "attn_logit_softcapping": 3.0},
}


def tiny(kind: str = "llama", seed: int = 0, **changes) -> PreTrainedModel:
    """A random model; the same arguments give the same weights."""
    shape = {**_SHAPE, **ARCHITECTURES.get(kind, {}), **changes}
    config = AutoConfig.for_model(kind, **{k: v for k, v in shape.items() if v is not None or k == "sliding_window"})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
        if kind == "gemma2":  # some versions let it run without its soft cap
            model.set_attn_implementation("eager")
        for name, weight in model.named_parameters():
            if "sinks" in name:  # zero, or whatever lay in memory, at construction
                weight.data.normal_(1.0, 1.0)
    model.generation_config.eos_token_id = None  # answers of one length
    return model


def byte_tokenizer(chat_template: str | None = CHATML, tokenizer: Tokenizer | None = None) -> PreTrainedTokenizerFast:
    """One token for each byte, and four special ones."""
    if tokenizer is None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    fast.chat_template = chat_template
    return fast


def full_ids(cache, question: str) -> torch.Tensor:
    """(1, L): everything from the first token of the prefix to the last of the question."""
    ids = cache.inputs(question)["input_ids"][0].tolist()
    return torch.tensor([[*cache._states[0].ids, *ids]])


def generate(model, inputs: dict, cache=None, **kwargs):
    """Tokens after the question, and the logits (B, T, V) of each."""
    options = {**GREEDY, "output_logits": True, "return_dict_in_generate": True, **kwargs}
    out = model.generate(**inputs, past_key_values=cache, **options)
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, 1)


@pytest.fixture(scope="package")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def llama() -> PreTrainedModel:
    return tiny()


@pytest.fixture(scope="package")
def smollm2():
    """The model and its tokenizer."""
    return load_smollm2()


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Figures repeat to the last bit, and the tests stay quick where other processes share the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
