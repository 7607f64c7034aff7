"""``CCMModel(base, CCMConfig(...))``: an ordinary PEFT adapter that compresses contexts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from dataopt.core.artifacts import write_whole
from dataopt.core.ccm import Layout, layout
from peft import LoraConfig, PeftModel, PeftModelForCausalLM, load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import decoder, hub
from ..attention import switch_attention
from .architecture import attention_modules, attention_targets, check_architecture, find_rotation
from .comp_tokens import NOT_MERGED, CompEmbedding, CompTokens, ParallelAttention, attach, no_rows
from .config import FILE, CCMConfig
from .rows import segments_of

ADAPTER = "default"
WEIGHTS = "adapter_model.safetensors"
_IMPLEMENTATIONS = {"eager": "eager", "dataopt_eager": "eager", "flex_attention": "flex"}  # by that of the base


class CCMModel(PeftModelForCausalLM):  # type: ignore[misc]
    """A causal language model with the adapter of Compressed Context Memory (thesis section 7.3).

    The adapter is a LoRA on COMP tokens and their embeddings; the base model is frozen and answers as before. In
    training one forward pass over whole rows computes what the online steps of :class:`CCMCache` do one by one.

    Args:
        base: a causal language model of transformers with rotary positions and full attention. Its attention is
            switched to a function that computes everything else as before; COMP ids are never generated.
        config: how to compress.

    Raises:
        ValueError: COMP ids outside the vocabulary.
        TypeError: a model that cannot be served: no attention interface, no or changing rotary positions,
            sliding-window layers, MLA, or PEFT adapters.

    Example::

        model = CCMModel(base, CCMConfig(mode="merge", comp_tokens=2))
        loss = model(input_ids=ids, labels=labels, segment_ids=segments, comp_slot=slots).loss
    """

    def __init__(self, base: PreTrainedModel, config: CCMConfig) -> None:
        self._make(base, config, None)

    def _make(self, base: PreTrainedModel, config: CCMConfig, vocabulary: int | None) -> None:
        if isinstance(base, PeftModel) or hasattr(base, "peft_config"):
            raise TypeError("base carries PEFT adapters; merge them into it first (merge_and_unload)")
        if not isinstance(base, PreTrainedModel):
            raise TypeError(f"base: {type(base).__name__} is not a transformers model")
        check_architecture(base)
        flavour = base.config.get_text_config(decoder=True)._attn_implementation
        switch_attention(base)
        rotation = find_rotation(base)
        rows = _vocabulary(base)
        targets = list(config.target_modules or attention_targets(base))
        if not any(f".{name}".endswith(f".{t}") for name, _ in base.named_modules() for t in targets):
            raise ValueError(f"target_modules={targets} names no layer of the model; give the ends of layers' names")
        ids = _comp_ids(base, config, vocabulary)
        embedding = base.get_input_embeddings()
        name = next(name for name, module in base.named_modules() if module is embedding)
        lora = LoraConfig(
            task_type="CAUSAL_LM",
            r=config.r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=targets,
            trainable_token_indices={name.rsplit(".", 1)[-1]: ids},
        )
        super().__init__(base, lora, ADAPTER)
        self.ccm_config = config.with_ids(ids)
        self.rotation = rotation if config.positions == "cache" else None
        self._implementation = _IMPLEMENTATIONS.get(flavour, "sdpa")
        self._vocabulary_before = min(rows, vocabulary or rows)
        attach(base, ADAPTER, list(attention_modules(base).values()), config.conditional)
        embeddings = [m for m in base.modules() if isinstance(m, CompEmbedding)]
        for wrapped in embeddings:
            if isinstance(wrapped.base_layer, nn.Embedding):
                wrapped.trainable_tokens_delta[ADAPTER].data.copy_(_means(wrapped.base_layer.weight[:rows], len(ids)))
        suppressed = set(base.generation_config.suppress_tokens or ()) if base.generation_config else set()
        if base.generation_config is not None:
            base.generation_config.suppress_tokens = sorted(suppressed | set(ids))

    @property
    def language_model(self) -> PreTrainedModel:
        """The base model with the adapter in its layers."""
        return decoder.unwrap(self)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> Any:
        """Of PEFT, for adapters with ``conditional=False``; a conditional one is refused before anything changes."""
        return self._mergeable().merge_and_unload(*args, **kwargs)

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As :meth:`merge_and_unload`."""
        self._mergeable().merge_adapter(*args, **kwargs)

    def _mergeable(self) -> Any:
        if self.ccm_config.conditional:
            raise ValueError(NOT_MERGED)
        return self.base_model

    @property
    def comp_ids(self) -> list[int]:
        """The n COMP token ids."""
        assert self.ccm_config.comp_ids is not None
        return list(self.ccm_config.comp_ids)

    def layout(self, segment_ids: Tensor, comp_slot: Tensor) -> Layout:
        """:func:`dataopt.core.ccm.layout` with the options of this model."""
        config = self.ccm_config
        return layout(
            segment_ids,
            comp_slot,
            config.comp_tokens,
            mode=config.mode,
            recurrent=config.recurrent,
            positions=config.positions,
            ema=config.ema,
        )

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        segment_ids: Tensor | None = None,
        comp_slot: Tensor | None = None,
        distill: float = 0.0,
        **kwargs: Any,
    ) -> Any:
        """The parallel pass over whole rows (figure 7.3); without COMP tokens the base model's own forward.

        Args:
            input_ids: (B, L) int64.
            attention_mask: (B, L), 0 on padding; read only where segment_ids is not given.
            labels: (B, L) int64, -100 where nothing is predicted; shifted inside, as in every causal model.
            segment_ids, comp_slot: (B, L) int64, see :func:`dataopt.core.ccm.layout`. Without them a segment ends
                behind its COMP tokens, and what follows the last ones is the query.
            distill: weight of KL(full context || memory) at the labelled tokens in the loss; the full context is that
                of :meth:`full_context_logits`.

        Raises:
            ValueError: rows that :func:`dataopt.core.ccm.layout` refuses, or COMP ids as labels.
        """
        if kwargs.get("ccm") is not None or input_ids is None:
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)
        if segment_ids is None and comp_slot is None:
            marks = torch.isin(input_ids, torch.tensor(self.comp_ids, device=input_ids.device))
            if not bool(marks.any()):
                return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)
            segment_ids, comp_slot = segments_of(input_ids, self.comp_ids, attention_mask)
        if segment_ids is None or comp_slot is None:
            raise ValueError("segment_ids and comp_slot go together; give both or neither")
        for name in ("past_key_values", "cache"):  # its name changed in transformers 5.24
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} does not go with COMP tokens; CCMCache.append() compresses a context")
        if labels is not None and bool(torch.isin(labels, torch.tensor(self.comp_ids, device=labels.device)).any()):
            raise ValueError("labels holds COMP ids, which are never predicted; put -100 there")
        rows = self.layout(segment_ids, comp_slot)
        self._check_positions(rows)
        attending = ParallelAttention(rows, self.rotation, self._implementation)
        # A mask of four dimensions is passed on as it is; this one says nothing and is not read.
        nothing = torch.zeros(1, 1, 1, 1, device=input_ids.device)
        kwargs |= {"position_ids": rows.position_ids, "use_cache": False, "ccm": CompTokens(rows.comp_rows, attending)}
        with no_rows():
            out = super().forward(input_ids=input_ids, attention_mask=nothing, labels=labels, **kwargs)
        if distill and labels is not None:
            teacher = self.full_context_logits(input_ids, segment_ids, comp_slot)
            out.loss = out.loss + distill * divergence(teacher, out.logits, labels, kwargs.get("num_items_in_batch"))
        return out

    def _check_positions(self, rows: Layout) -> None:
        limit = decoder.positions(self.language_model)
        if limit is not None and int(rows.position_ids.max()) >= limit:
            advice = "drop contexts"
            if self.ccm_config.positions == "abs":
                advice = "positions='abs' counts all text: drop contexts, or train with positions='cache'"
            raise ValueError(
                f"a row reaches position {int(rows.position_ids.max())} and the model has {limit}; {advice}"
            )

    @torch.no_grad()
    def full_context_logits(self, input_ids: Tensor, segment_ids: Tensor, comp_slot: Tensor) -> Tensor:
        """What the base model without the adapter says when nothing is compressed (the bound of section 7.4).

        Every segment reads prefix, the text of all contexts before and itself; queries do not see each other.

        Args:
            input_ids, segment_ids, comp_slot: (B, L), as for :meth:`forward`.

        Returns:
            (B, L, V) logits; those of COMP tokens mean nothing.
        """
        config = self.ccm_config
        rows = layout(segment_ids, comp_slot, config.comp_tokens, positions="abs")
        seen = rows.full_context_mask(comp_slot)
        dtype = self.language_model.dtype
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
        with self.disable_adapter():
            out = self.language_model(
                input_ids=input_ids, attention_mask=mask, position_ids=rows.position_ids, use_cache=False
            )
        logits: Tensor = out.logits
        return logits

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """Write the adapter as PEFT does, and ``ccm_config.json``.

        Stock PEFT loads the files and does one online step, ``[context, COMP..]``, with them: a conditional adapter is
        written as an aLoRA that COMP tokens invoke.
        """
        # Of the base model nothing is saved; COMP rows are in the adapter.
        kwargs = {"save_embedding_layers": False} | kwargs
        adapter: Any = self.peft_config[ADAPTER]
        adapter.alora_invocation_tokens = self.comp_ids if self.ccm_config.conditional else None
        try:
            super().save_pretrained(str(save_directory), **kwargs)
        finally:
            adapter.alora_invocation_tokens = None
        if kwargs.get("is_main_process", True):
            path = Path(save_directory) / WEIGHTS
            self.ccm_config.save(
                path.parent, self._vocabulary_before, hub.file_checksum(path) if path.exists() else None
            )

    def create_or_update_model_card(self, output_dir: str) -> None:
        """What PEFT calls to write ``README.md``."""
        write_whole(Path(output_dir) / "README.md", _card(self))

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        model: PreTrainedModel,
        model_id: str | Path,
        *,
        is_trainable: bool = False,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> CCMModel:
        """Load an adapter from a folder or a Hub repository.

        Args:
            model: the base model that it was trained on.
            model_id: the folder or repository.
            is_trainable: to go on training; otherwise the model comes back in eval mode, without gradients.

        Raises:
            ValueError: files that are missing or damaged, or a base model of another vocabulary or shape.
        """
        folder = hub.find(
            model_id,
            [FILE, "adapter_*"],
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        config, vocabulary, checksum = CCMConfig.load(folder)
        path = hub.member(folder, WEIGHTS)
        weights = read_weights(path, checksum)
        ranks = {w.shape[0] for name, w in weights.items() if "lora_A" in name}
        if ranks != {config.r} or config.comp_ids is None:  # before anything is made as large as the options say
            raise ValueError(
                f"{folder / FILE} has r={config.r!r:.40} and comp_ids={config.comp_ids!r:.40}, and {path.name} was "
                "saved with others; save or download it again"
            )
        self = cls.__new__(cls)
        self._make(model, config, vocabulary)
        self._load(weights, path)
        if not is_trainable:
            self.requires_grad_(False)
            self.eval()
        return self

    def _load(self, weights: dict[str, Tensor], path: Path) -> None:
        own, part = self.named_parameters(), f".{ADAPTER}"
        mine = {name.replace(part, ""): p.shape for name, p in own if part in name}
        theirs = {name: w.shape for name, w in weights.items()}
        wrong = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
        if wrong:
            name = wrong[0]
            raise ValueError(
                f"{path} does not fit the base model: {name} is {_shape(theirs.get(name))} in the file and "
                f"{_shape(mine.get(name))} here; load it with the model that it was trained on"
            )
        if not all(bool(w.isfinite().all()) for w in weights.values()):
            raise ValueError(f"{path} holds non-finite values: the training had failed; train it again")
        set_peft_model_state_dict(self, weights, ADAPTER)


def read_weights(path: Path, checksum: str | None) -> dict[str, Tensor]:
    """The weights of an adapter.

    Args:
        checksum: of the file, as ``ccm_config.json`` beside it says.

    Raises:
        ValueError: a file that is damaged.
    """
    try:
        weights: dict[str, Tensor] = load_peft_weights(str(path.parent), device="cpu")
    except Exception as e:  # safetensors and PEFT raise errors of several kinds
        raise ValueError(f"{path} is damaged ({e}); save or download it again") from e
    if checksum not in (None, hub.file_checksum(path)):
        raise ValueError(f"{path} is damaged, or from another save than {FILE}; save or download it again")
    return weights


def divergence(teacher: Tensor, student: Tensor, labels: Tensor, items: Tensor | int | None = None) -> Tensor:
    """KL(teacher || student) of the next-token distributions that predict a label.

    Args:
        teacher, student: (B, L, V) logits.
        labels: (B, L) int64, -100 where nothing is predicted.
        items: what the sum is divided by; None takes the number of labels.
    """
    predicts = labels[:, 1:] != -100
    p = teacher[:, :-1][predicts].float().log_softmax(-1)
    q = student[:, :-1][predicts].float().log_softmax(-1)
    total = nn.functional.kl_div(q, p, reduction="sum", log_target=True)
    return total / (len(p) if items is None else items)


def _card(model: CCMModel) -> str:
    options, base = model.ccm_config, hub.base_model(model.language_model)
    kept = "the average of what its contexts became" if options.mode == "merge" else "what each context became"
    made = ", ".join(f"{name}={value!r}" for name, value in asdict(options).items())
    name = base or type(model.language_model).__name__
    body = f"""An adapter for {name} that compresses contexts, made by [CCM](https://arxiv.org/abs/2312.03414) (Kim et
al., ICLR 2024) with [dataopt](https://pypi.org/project/dataopt/): after each context {options.comp_tokens} COMP tokens
hold what it said, and the memory keeps {kept}. On text without COMP tokens the model answers as it does without the
adapter.

## Use

```python
from dataopt.integrations.hf import CCMCache, CCMModel  # pip install "dataopt[hf]"

model = CCMModel.from_pretrained(base, "path/to/this/folder/or/repository")
memory = CCMCache(model, tokenizer)
memory.append("a new context")
out = model.generate(**memory.inputs("a question"), past_key_values=memory, max_new_tokens=100)
print(tokenizer.decode(out[0], skip_special_tokens=True))
```

Stock PEFT loads the adapter and does one online step with it, `[context, COMP..]`; the memory needs dataopt.

## What made it

| setting | value |
|---|---|
| model | {name}, {model.language_model.dtype} |
| options | {made} |
| versions | torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__} |
"""
    return hub.card("A compressed context memory", body, ["ccm", "lora", "kv-cache"], base)


def _shape(shape: torch.Size | None) -> str:
    return "missing" if shape is None else str(tuple(shape))


def _vocabulary(base: PreTrainedModel) -> int:
    weight = base.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return len(weight)


def _comp_ids(base: PreTrainedModel, config: CCMConfig, vocabulary: int | None) -> list[int]:
    """The ids of the COMP tokens; new rows are appended where they are needed.

    Args:
        vocabulary: rows that the base had when a loaded adapter was made; None for a new one.
    """
    rows, count = _vocabulary(base), config.comp_tokens
    if config.comp_ids is not None:
        ids = list(config.comp_ids)
        appended = vocabulary is not None and ids == list(range(vocabulary, vocabulary + count))
        if vocabulary is not None and rows != vocabulary and not (appended and rows == vocabulary + count):
            raise ValueError(
                f"the adapter was made on a base model of {vocabulary} embedding rows and this one has {rows}; "
                "load it with the model that it was trained on"
            )
        if max(ids) < rows:
            return ids
        if not appended:
            raise ValueError(
                f"comp_ids={ids} lie outside the vocabulary of {rows} rows; choose ids below it, or None to append rows"
            )
    means = _means(base.get_input_embeddings().weight, count)
    base.resize_token_embeddings(rows + count, mean_resizing=False)
    with torch.no_grad():  # resizing leaves random values, which would differ at every load
        layers: tuple[Any, ...] = (base.get_input_embeddings(), base.get_output_embeddings())
        for layer in layers:
            if layer is not None:
                layer.weight[rows:] = means.to(layer.weight)
    return list(range(rows, rows + count))


@torch.no_grad()
def _means(weight: Any, count: int) -> Tensor:
    """(n, d): row k is the mean of every n-th row of the vocabulary from row k on, as in the released code."""
    table: Tensor = weight
    return torch.stack([table[k::count].float().mean(0) for k in range(count)]).to(table.dtype)
