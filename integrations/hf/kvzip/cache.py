"""``model.generate(**cache.inputs("a question"), past_key_values=KVzipCache(...))``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicSlidingWindowLayer

from .. import decoder
from ..attention import NAMES
from ..chat import Chat, continued, render_ids, split_template
from ..reusable import GenerateCall, ReusableCache
from . import build
from .context import (
    Context,
    Options,
    compress,
    effective_ratio,
    head_maxima,
    joined,
    keep_pairs,
    pruned,
    read_head_scores,
    scoring_chunk,
)
from .layers import PackedLayer, SlidingState


class KVzipCache(ReusableCache):
    """The key-value cache of a context, compressed once and asked many times (thesis chapter 8).

    The context is read, then the model is made to repeat it, and the pairs that it attends to most while it does so
    stay; the rest is freed. ``generate`` takes the cache like any other, and every new ``generate`` finds it in its
    compressed state again.

    Args:
        model: a causal language model of transformers, in eval mode. Its attention is switched once to a function that
            serves this cache and computes everything else as before.
        tokenizer: of the model.
        context: the text. It becomes the beginning of the user's first turn.
        ratio: share of the context's pairs that stays, in (0, 1]; 1 skips the scoring pass. The system prompt and the
            template are never evicted and do not count.
        level: "pair" evicts single pairs; "head" keeps whole heads, ``ratio`` of them, and of the others the prefix and
            the last ``recent`` tokens (section 8.4.2; ``recent=0`` is the released code's form).
        budget: of level "pair": "global" compares all pairs, "layer" gives each layer the same share,
            "uniform" each head.
        max_tokens: pairs that a head keeps on average, instead of ``ratio``.
        instruction: a sentence before the context.
        chunk: context tokens per scoring pass (2000 in the thesis).
        prefill_chunk: tokens per step while the context is read.
        norm: "full" normalises attention over all keys, "subset" over prefix, chunk and input, as the released
            code does.
        recent: see ``level``.
        bits: 8 or 4 store the pairs as integers, in groups of 32 along the head; None keeps the model's precision.
        keep_scores: keep 4 bytes per pair so that :meth:`prune` can lower the ratio later.
        head_scores: (L, H) from :meth:`head_scores` of another cache, or a folder or Hub repository that holds them: no
            scoring pass then. Needs ``level="head"``.
        template_kwargs: for the chat template, such as ``{"enable_thinking": False}``.

    Raises:
        ValueError: a bad argument, an empty context, one that leaves no room in the model's positions for the scoring
            input, or a model in training mode.
        TypeError: a model that cannot be served: no attention interface, MLA, linear attention, shared pairs; or
            ``head_scores`` that are neither numbers nor a path.

    Example::

        cache = KVzipCache(model, tokenizer, text, ratio=0.3)
        out = model.generate(**cache.inputs("Who is Ada?"), past_key_values=cache)
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        context: str,
        ratio: float = 0.3,
        level: str = "pair",
        budget: str = "global",
        *,
        max_tokens: int | None = None,
        instruction: str | None = None,
        chunk: int = 1024,
        prefill_chunk: int = 2048,
        norm: str = "full",
        recent: int = 128,
        bits: int | None = None,
        keep_scores: bool = False,
        head_scores: Tensor | str | Path | None = None,
        template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        options = Options(
            ratio, level, budget, max_tokens, instruction, chunk, prefill_chunk, norm, recent, bits, keep_scores
        )
        if not isinstance(context, str) or not context.strip():
            raise ValueError(f"context={context!r} must be a text with at least one word")
        if head_scores is not None and level != "head":
            raise ValueError(f"head_scores needs level='head', not level={level!r}")
        inner = decoder.unwrap(model)
        build.check_model(inner)
        template_kwargs = dict(template_kwargs or {})
        chat = split_template(tokenizer, **template_kwargs)
        start = [*chat.prefix, *(chat.first(tokenizer, instruction + "\n\n") if instruction else ())]
        ids = (*start, *(continued if instruction else chat.first)(tokenizer, context))
        scores = None
        if head_scores is not None:
            scores = read_head_scores(head_scores, inner)
        state = compress(inner, tokenizer, chat, ids, len(start), context, options, template_kwargs, scores)
        self._set(inner, tokenizer, chat, [state])

    layers: list[Any]  # of transformers or of this package; the base class admits more kinds than check_model does

    def _set(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chat: Chat, states: list[Context]
    ) -> None:
        self.model, self.tokenizer, self._chat = model, tokenizer, chat
        self._config = model.config.get_text_config(decoder=True)
        self._rope_limit = decoder.changing_rope_limit(model)
        self._modules = frozenset(id(m) for m in model.modules())
        self._states = states
        self._kept = 0  # tokens of the tail that stay at a new generate
        self._kept_ids: list[int] | None = []  # those tokens, where they are known
        self._pending: list[int] = []  # the end of the kept answer that generate never fed to the model
        self._last: PackedLayer | None = None
        self._all_tokens: int | None = None  # where generate() was given all ids: it must cut the cached ones away
        self._start = [joined([s.layers[i] for s in states]) for i in range(len(states[0].layers))]
        seen = self.seen_tokens
        super().__init__(
            layers=[
                p.layer() if isinstance(p, SlidingState) else PackedLayer(p, seen, self._modules) for p in self._start
            ]
        )

    @classmethod
    def _of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, states: list[Context]) -> KVzipCache:
        cache = cls.__new__(cls)
        cache._set(model, tokenizer, split_template(tokenizer, **states[0].template_kwargs), states)
        return cache

    # What the cache says about itself

    @property
    def seen_tokens(self) -> int:
        """Tokens that were read, prefix included; of the longest context where several are stacked."""
        return max(len(s.ids) for s in self._states)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored contexts: pairs, sliding windows and kept scores; the tail of a running answer aside."""
        return sum(s.nbytes for s in self._states)

    @property
    def full_nbytes(self) -> int:
        """Bytes that transformers' own cache would take for the same contexts."""
        size = self.model.dtype.itemsize
        total = 0
        for state in self._states:
            for p in state.layers:
                if isinstance(p, SlidingState):
                    total += p.nbytes
                else:
                    total += len(state.ids) * len(p.lengths) * (p.head_dim + p.value_dim) * size
        return total

    @property
    def lengths(self) -> Tensor:
        """(L, H) int64: pairs that each head of the full-attention layers holds, prefix included."""
        return torch.tensor([p.lengths for p in self._one("lengths").packed])

    @property
    def options(self) -> Options:
        """How the context was compressed."""
        return self._states[0].options

    def __repr__(self) -> str:
        held = ", ".join(f"{len(s.ids)} tokens" for s in self._states)
        return f"KVzipCache({held}, ratio={self.options.ratio}, {self.nbytes:,} of {self.full_nbytes:,} bytes)"

    # Asking

    def inputs(
        self, question: str | Sequence[str] | None = None, answer_prefix: str | None = None, *, input_ids: Any = None
    ) -> dict[str, Tensor]:
        """What ``generate`` needs for one or several questions, each asked alone.

        Args:
            question: a text, or several: one row of the batch each. Of stacked contexts, row i is asked of context i; a
                single text is asked of all.
            answer_prefix: the beginning of the answer.
            input_ids: tokens instead of a text, (L,) or (B, L): of the question with its template, or of everything
                from the first token of the prefix, in which case they must begin with what the cache has read.

        Returns:
            ``input_ids`` (B, L) of the questions, padded on the left, and ``attention_mask`` (B, seen + L).

        Raises:
            ValueError: no question, or one that cannot be asked of this cache.
        """
        self.restore()
        if (question is None) == (input_ids is None):
            raise ValueError("give either question or input_ids")
        if input_ids is not None:
            if answer_prefix is not None:
                raise ValueError("answer_prefix needs a question as text; append its tokens to input_ids")
            rows = self._own_rows(torch.as_tensor(input_ids))
        else:
            texts = [question] if isinstance(question, str) else list(question or ())
            if not texts or any(not isinstance(t, str) or not t for t in texts):
                raise ValueError(f"question={question!r} must be a text or a sequence of texts, none of them empty")
            rows = [self._question_ids(t, answer_prefix) for t in texts]
        return self._batch(rows)

    def _question_ids(self, text: str, answer_prefix: str | None) -> list[int]:
        if self._kept:
            assert self._chat.between is not None
            between = list(self._chat.between)
            if self._pending and between and self._pending[-1] == between[0]:
                between = between[1:]  # the answer ended with the token that closes a turn
            start = [*self._pending, *between, *continued(self.tokenizer, (self._chat.lead or "") + text)]
        else:
            start = list(continued(self.tokenizer, "\n\n" + text))
        return [*start, *self._chat.suffix, *(continued(self.tokenizer, answer_prefix) if answer_prefix else ())]

    def _own_rows(self, ids: Tensor) -> list[list[int]]:
        ids = (ids if ids.ndim == 2 else ids.unsqueeze(0)).cpu()
        if ids.numel() == 0:
            raise ValueError("input_ids is empty; give the tokens of a question")
        known = self._known_ids()
        if known is not None and ids.shape[1] > len(known) and (ids[:, : len(known)] == torch.tensor(known)).all():
            ids = ids[:, len(known) :]
        return ids.tolist()

    def _batch(self, rows: list[list[int]]) -> dict[str, Tensor]:
        if len(self._states) > 1 and len(rows) == 1:
            rows = rows * len(self._states)
        if len(self._states) > 1 and len(rows) != len(self._states):
            raise ValueError(
                f"{len(rows)} questions for {len(self._states)} stacked contexts; give one for each, or one"
            )
        width = max(map(len, rows))
        if min(map(len, rows)) < width and any(isinstance(p, SlidingState) for p in self._start):
            raise ValueError(
                "questions of different length cannot be batched on a model with sliding-window layers, since padding "
                "would push the context out of the window; ask them one at a time"
            )
        self._check_room(width)
        seen = self.seen_tokens
        ids = torch.full((len(rows), width), decoder.pad_id(self.tokenizer))
        mask = torch.zeros(len(rows), seen + self._kept + width, dtype=torch.long)
        for i, row in enumerate(rows):
            own = len(self._states[i if len(self._states) > 1 else 0].ids)
            ids[i, width - len(row) :] = torch.tensor(row)
            mask[i, seen - own : seen + self._kept] = 1
            mask[i, seen + self._kept + width - len(row) :] = 1
        device = decoder.input_device(self.model)
        return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}

    def messages(self, question: str) -> list[dict[str, str]]:
        """The conversation for ``pipeline("text-generation")``: ``pipe(cache.messages(q), past_key_values=cache)``.

        Raises:
            ValueError: a tokenizer without a chat template, or rendered tokens that do not begin with those that the
                cache has read: some tokenizers merge the end of the context with the line break behind it.
        """
        state = self._one("messages")
        self.restore()
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError("tokenizer has no chat_template, so there are no messages; use inputs(question)")
        head = f"{state.options.instruction}\n\n" if state.options.instruction else ""
        messages = [{"role": "user", "content": f"{head}{state.text}\n\n{question}"}]
        ids = render_ids(self.tokenizer, messages, **state.template_kwargs)[0].tolist()
        if self._kept:
            raise ValueError(
                "a kept conversation cannot be given as messages; use inputs(question), or a fork() without it"
            )
        if tuple(ids[: len(state.ids)]) != state.ids:
            at = next((i for i, (a, b) in enumerate(zip(ids, state.ids, strict=False)) if a != b), len(ids))
            raise ValueError(
                f"the messages tokenise differently from the cached context at token {at} of {len(state.ids)}: the "
                "tokenizer merges across the end of the context, or the template changes it; use inputs(question)"
            )
        return messages

    # State

    def restore(self) -> None:
        """Drop what was asked and answered since the context was compressed, or since the last :meth:`keep`."""
        for layer, start in zip(self.layers, self._start, strict=True):
            if isinstance(start, SlidingState):
                start.restore(layer)
            else:
                layer.restore(self._kept)
        self._last = self._all_tokens = None

    def reset(self) -> None:
        """Back to the compressed context, without a kept conversation; never to an empty cache."""
        if self._kept:
            self._set(self.model, self.tokenizer, self._chat, self._states)
        self.restore()

    def keep(self, output_ids: Tensor | None = None) -> None:
        """Keep the last question and answer: the next question continues the conversation.

        Args:
            output_ids: (1, L) or (L,), what ``generate`` returned. It holds the last token, which is not fed to the
                model any more; without it that token is left out of the conversation.

        Raises:
            ValueError: several rows (beams, samples or questions), nothing to keep, or a template without a second
                turn.
        """
        self._one("keep")
        layer = next(p for p in self.layers if isinstance(p, PackedLayer))
        if layer.keys is None or layer.tail == self._kept:
            raise ValueError("keep() found no question and answer; call it after generate()")
        if len(layer.keys) != 1:
            raise ValueError(
                f"keep() needs one row and found {len(layer.keys)}: beams, samples or several questions; use fork()"
            )
        if self._chat.between is None:
            raise ValueError(
                "tokenizer.chat_template does not render a second user turn, so nothing can be kept; set another one"
            )
        new, fed, pending = None, layer.tail - self._kept, []
        if output_ids is not None:
            new = torch.as_tensor(output_ids).flatten().tolist()
            known = self._known_ids()
            if known is not None and new[: len(known)] == known:
                new = new[len(known) :]
            if not fed <= len(new):
                raise ValueError(
                    f"output_ids has {len(new)} tokens and the model was fed {fed}; give what generate returned"
                )
            pending = new[fed:]
        self._kept_ids = None if new is None or self._kept_ids is None else [*self._kept_ids, *new[:fed]]
        self._kept, self._pending = layer.tail, pending
        self._start = [
            SlidingState.of(p) if isinstance(p, DynamicSlidingWindowLayer) else s
            for p, s in zip(self.layers, self._start, strict=True)
        ]

    def fork(self) -> KVzipCache:
        """Another cache on the same stored context, for a request of its own; nothing is copied."""
        other = KVzipCache._of(self.model, self.tokenizer, self._states)
        other._kept, other._kept_ids, other._pending, other._start = (
            self._kept,
            self._kept_ids,
            self._pending,
            self._start,
        )
        for layer, mine in zip(other.layers, self.layers, strict=True):
            if isinstance(layer, PackedLayer) and self._kept:
                layer.keys, layer.values = mine.keys, mine.values
        other.restore()
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> KVzipCache:
        return self.fork()

    @classmethod
    def stack(cls, caches: Sequence[KVzipCache]) -> KVzipCache:
        """One batch over several contexts of any length: row i of a batch of questions is asked of context i.

        Raises:
            ValueError: no caches, kept conversations, or caches of different models.
        """
        if not caches:
            raise ValueError("caches is empty; give at least one")
        first = caches[0]
        if any(c.model is not first.model for c in caches):
            raise ValueError("caches of different models cannot be stacked; give those of one")
        if any(c._kept for c in caches):
            raise ValueError("a kept conversation cannot be stacked; call reset() on the cache first")
        return cls._of(first.model, first.tokenizer, [s for c in caches for s in c._states])

    # Changing the context

    def extend(self, text: str) -> None:
        """Read more text behind the context, score it alone, and keep the same share of it.

        The cost follows the new text. With ``max_tokens`` the whole context is pruned to it again, which needs
        ``keep_scores=True``.

        Raises:
            ValueError: an empty text, a kept conversation, or no room in the model's positions.
        """
        state = self._one("extend")
        if not isinstance(text, str) or not text:
            raise ValueError(f"text={text!r} must not be empty")
        if self._kept:
            raise ValueError("extend() would go behind a kept conversation; call reset() first")
        options = state.options
        if options.max_tokens is not None and not options.keep_scores:
            raise ValueError("extend() with max_tokens needs keep_scores=True, to make room among the old pairs")
        self.restore()
        build.check_model(self.model)
        ids, old = continued(self.tokenizer, text), len(state.ids)
        seen = old + len(ids)
        room = build.room(self.model, seen)
        layers = build.prefill_more(self.model, state.layers, old, ids, options.prefill_chunk, self._modules)
        needed = options.level == "pair" and (effective_ratio(options, seen - state.prefix) < 1 or options.keep_scores)
        scores = None
        if needed:
            chunk = scoring_chunk(self.tokenizer, self._chat, options, room)
            before = state.ids[state.prefix :][-build.LAST :]
            scores = build.reconstruct(
                self.model, self.tokenizer, self._chat, layers, seen, state.prefix, ids, before, chunk, options.norm
            )
        merged = keep_pairs(layers, scores, 0, options, state.head_scores)
        head_scores = state.head_scores
        if head_scores is not None and scores is not None:
            head_scores = torch.maximum(head_scores, head_maxima(scores, 0))
        new = replace(state, layers=merged, ids=(*state.ids, *ids), text=state.text + text, head_scores=head_scores)
        if options.max_tokens is not None:
            new = pruned(new, effective_ratio(options, seen - state.prefix))
        self._set(self.model, self.tokenizer, self._chat, [new])

    def prune(self, ratio: float) -> None:
        """Lower the ratio without another pass; the same pairs stay as with that ratio from the start.

        Raises:
            ValueError: a ratio above the present one, or no scores were kept.
        """
        state = self._one("prune")
        if self._kept:
            raise ValueError("prune() would change the context under a kept conversation; call reset() first")
        new = pruned(state, ratio)
        new = replace(new, options=replace(new.options, ratio=ratio, max_tokens=None))
        self._set(self.model, self.tokenizer, self._chat, [new])

    def head_scores(self) -> Tensor:
        """(L, H) float32: the largest log score of each head of the full-attention layers.

        They belong to the model more than to the context: ``KVzipCache(..., level="head", head_scores=...)`` compresses
        other contexts by them without a scoring pass (section 8.4.2).

        Raises:
            ValueError: this cache was made without scoring.
        """
        scores = self._one("head_scores").head_scores
        if scores is None:
            raise ValueError("no pair was scored with ratio=1; compress with a lower ratio, or with keep_scores=True")
        return scores.clone()

    # Keeping it

    def _context_alone(self, what: str) -> Context:
        if self._kept:
            raise ValueError(f"{what}() would leave the kept conversation out; call reset() first")
        return self._one(what)

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **hub_kwargs: Any) -> None:
        """Write ``kvzip-*.safetensors``, ``kvzip.json``, ``head_scores.json`` and a card. They contain the document.

        A save that is there already is replaced in one step.

        Args:
            hub_kwargs: for :meth:`push_to_hub`, with ``repo_id``.

        Raises:
            ValueError: stacked contexts, or a kept conversation.
        """
        from . import artifact

        artifact.save(self._context_alone("save_pretrained"), self.model, self.tokenizer, Path(save_directory))
        if push_to_hub:
            self.push_to_hub(hub_kwargs.pop("repo_id", Path(save_directory).name), **hub_kwargs)

    def push_to_hub(self, repo_id: str, *, private: bool | None = True, token: str | None = None, **kwargs: Any) -> str:
        """Upload the saved files; the repository is private unless ``private=False``, since it holds the document.

        Args:
            kwargs: for ``HfApi.upload_folder``: ``revision``, ``commit_message``, ``create_pr``.

        Returns:
            The address of the commit.
        """
        from . import artifact

        context = self._context_alone("push_to_hub")
        return artifact.push(context, self.model, self.tokenizer, repo_id, private, token, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        repo_id_or_dir: str | Path,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> KVzipCache:
        """Load a saved cache for the model that made it.

        Raises:
            ValueError: files that are damaged, of another kind or of a newer format, or another model or tokenizer; the
                sentence names what differs.
        """
        from . import artifact

        inner = decoder.unwrap(model)
        build.check_model(inner)
        state = artifact.load(
            repo_id_or_dir,
            inner,
            tokenizer,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        return cls._of(inner, tokenizer, [state])

    def save_head_scores(self, save_directory: str | Path) -> None:
        """Write ``head_scores.json`` alone, which does not contain the document."""
        from . import artifact

        artifact.save_head_scores(self.head_scores(), self.model, Path(save_directory))

    # What generate and the model call

    def _check_call(self, call: GenerateCall) -> None:
        """Refuse ids and masks that do not fit."""
        ids, width = call.input_ids, call.mask_width
        seen = self.seen_tokens + self._kept
        if width == seen + ids.shape[1]:
            return  # only the question was given, and a mask over everything
        known = self._known_ids()
        if width != ids.shape[1] or known is None or ids.shape[1] <= seen:
            raise ValueError(
                f"attention_mask covers {width} tokens, but the cache has {seen} and the input {ids.shape[1]}; "
                "pass **cache.inputs(question)"
            )
        if not (ids[:, :seen].cpu() == torch.tensor(known)).all():
            raise ValueError(
                "input_ids does not begin with the tokens that the cache has read: either the attention_mask is "
                "missing or the text is another one; pass **cache.inputs(question)"
            )
        self._all_tokens = ids.shape[1]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if layer_idx == 0:
            if self._all_tokens is not None and key_states.shape[2] >= self._all_tokens:
                raise ValueError(
                    "the model was fed the cached context again, as assisted decoding does when input_ids hold it; "
                    "pass **cache.inputs(question)"
                )
            self._all_tokens = None
            self._check_room(key_states.shape[2])
        if self._last is not None and self._last.waiting:
            self._last.waiting = False
            self._check_attention()
            raise RuntimeError(
                "a layer of the model did not attend through its cache; this model cannot use KVzipCache"
            )
        self._check_attention()
        layer = self.layers[layer_idx]
        if isinstance(layer, PackedLayer):
            self._last = layer
        elif layer.keys is not None and len(key_states) > len(layer.keys) > 0:
            layer.batch_repeat_interleave(len(key_states) // len(layer.keys))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _check_attention(self) -> None:
        name = self._config._attn_implementation
        if name not in NAMES:
            raise RuntimeError(
                f"the model's attention was set to {name!r} after the cache was made, which sees only the question; "
                "call model.set_attn_implementation('dataopt'), or make the cache again"
            )

    def _check_room(self, new: int) -> None:
        if self._rope_limit is None:
            return
        limit, total = self._rope_limit, self.get_seq_length() + new
        if self.seen_tokens <= limit < total:
            raise ValueError(
                f"{total} tokens pass the length of {limit} at which this model's rotary embedding changes for all "
                "positions, cached ones included; shorten the context or the answer"
            )

    def _known_ids(self) -> list[int] | None:
        if len(self._states) > 1 or self._kept_ids is None:
            return None
        return [*self._states[0].ids, *self._kept_ids]

    def _one(self, what: str) -> Context:
        if len(self._states) > 1:
            raise ValueError(
                f"{what} works on one context and this cache stacks {len(self._states)}; use the single caches"
            )
        return self._states[0]
