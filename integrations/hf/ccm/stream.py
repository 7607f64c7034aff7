"""Unlimited text at a fixed number of key-value pairs: sink, memory and sliding window (figure 7.9)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from dataopt.core.ccm import concatenated, merged, without_oldest
from torch import Tensor
from transformers import Cache, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from .. import decoder
from ..chat import encode
from .comp_tokens import CompTokens, no_rows
from .model import CCMModel

_STATE = ("_slots", "_steps", "_averages", "_next", "_last", "_peak")  # beside the pairs


class CCMStream:
    """A language model that reads on for ever (thesis section 7.4.1, "Streaming with sliding window").

    The pairs are ``[sink | memory | window]``. When they reach the limit, the oldest tokens of the window are
    compressed into the memory, which emits its oldest slots when it is full; what stays moves to the positions from 0
    on, so positions never pass the limit.

    Args:
        model: in eval mode, with ``positions="cache"`` and ``recurrent=True``.
        tokenizer: of the model; None to give token ids only.
        max_pairs: the limit. While a chunk is compressed, its COMP pairs come on top.
        memory: slots of the memory, a multiple of ``comp_tokens``; a merged memory has ``comp_tokens`` of them.
        chunk: tokens that are compressed at a time.
        sink: first tokens that stay; the thesis' runs keep the first one.

    Raises:
        ValueError: sizes that leave no room for a window, or a model that cannot stream.

    Example::

        stream = CCMStream(model, tokenizer, max_pairs=160, memory=8, chunk=64)
        log_probabilities = stream.feed(book)
        print(tokenizer.decode(stream.generate("\\n\\nIn short:", max_new_tokens=200)))
    """

    def __init__(
        self,
        model: CCMModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        max_pairs: int = 160,
        memory: int = 8,
        chunk: int = 64,
        sink: int = 1,
    ) -> None:
        if not isinstance(model, CCMModel):
            raise TypeError(f"model: {type(model).__name__} is not a CCMModel; wrap the base model in one")
        config, n = model.ccm_config, model.ccm_config.comp_tokens
        if model.training:
            raise ValueError("model is in training mode; call model.eval() first")
        if config.positions != "cache" or not config.recurrent:
            raise ValueError("a stream needs an adapter with positions='cache' and recurrent=True; train one")
        for name, value, least in (("chunk", chunk, 1), ("sink", sink, 0), ("max_pairs", max_pairs, 1)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")
        if not isinstance(memory, int) or memory < n or memory % n or (config.mode == "merge" and memory != n):
            wanted = f"comp_tokens={n}" if config.mode == "merge" else f"a multiple of comp_tokens={n}, at least that"
            raise ValueError(f"memory={memory!r} must be {wanted}")
        if max_pairs <= sink + memory + chunk:
            raise ValueError(
                f"max_pairs={max_pairs} must be more than sink + memory + chunk = {sink + memory + chunk}; the rest is "
                "the window that stays"
            )
        self.model, self.tokenizer = model, tokenizer
        self.max_pairs, self.memory, self.chunk, self.sink = max_pairs, memory, chunk, sink
        self._base = model.language_model
        limit = decoder.positions(self._base)
        if limit is not None and max_pairs + n > limit:
            raise ValueError(f"max_pairs={max_pairs} must be at most {limit - n}, what the model's positions allow")
        layers = self._base.config.get_text_config(decoder=True).num_hidden_layers
        self._cache = Cache(layers=[DynamicLayer() for _ in range(layers)])
        self._slots = 0  # pairs of the memory at present
        self._steps = 0
        self._averages: list[tuple[Tensor, Tensor]] = []  # of each layer, in float32 or better, where they merge
        self._next: Tensor | None = None  # (V,) logits of the token to come
        self._last: Tensor | None = None  # (1,) the token that was read last
        self._peak = 0

    @property
    def peak_pairs(self) -> int:
        """The most pairs per head so far, COMP pairs of a compression included."""
        return self._peak

    @property
    def pairs(self) -> int:
        """Key-value pairs per head at present."""
        return int(self._cache.get_seq_length())

    @property
    def steps(self) -> int:
        """Chunks that were compressed so far."""
        return self._steps

    @property
    def nbytes(self) -> int:
        """Bytes of all pairs."""
        pairs = [t for layer in self._layers() for t in (layer.keys, layer.values) if t is not None]
        return sum(t.nbytes for t in [*pairs, *(t for both in self._averages for t in both)])

    @torch.no_grad()
    def feed(self, text: str | None = None, *, input_ids: Any = None) -> Tensor:
        """Read on.

        Args:
            text: taken as it is.
            input_ids: token ids instead, (L,) or (1, L).

        Returns:
            (L,) float32 log probabilities of the tokens, each given all before it; NaN for the stream's first.

        Raises:
            ValueError: no token, or COMP tokens.
        """
        ids = self._ids(text, input_ids)
        out, start = [], 0
        with self._whole():
            while start < len(ids):
                if self.pairs >= self.max_pairs:
                    self._compress()
                part = ids[start : start + self.max_pairs - self.pairs]
                logits = self._read(part)
                first = logits.new_full((logits.shape[1],), torch.nan) if self._next is None else self._next
                scores = torch.cat([first.unsqueeze(0), logits[:-1]]).log_softmax(-1)
                out.append(scores.gather(1, part.unsqueeze(1)).squeeze(1))
                self._next = logits[-1]
                start += len(part)
        return torch.cat(out)

    @torch.no_grad()
    def generate(
        self, prompt: str | None = None, *, input_ids: Any = None, max_new_tokens: int = 64, **kwargs: Any
    ) -> Tensor:
        """Read a prompt, if there is one, and write on, beyond the limit too.

        transformers' own ``generate`` runs between two compressions. Prompt and answer become part of the stream; after
        an error neither is.

        Args:
            prompt, input_ids: as for :meth:`feed`; without them the text that was read goes on.
            max_new_tokens: longest answer.
            kwargs: for ``generate``. What looks at earlier tokens, such as a repetition penalty, sees those since the
                last compression.

        Returns:
            (L,) int64 ids of the answer.

        Raises:
            ValueError: an empty prompt, none and nothing read before, or several beams or answers.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
        if kwargs.get("num_beams", 1) != 1 or kwargs.get("num_return_sequences", 1) != 1:
            raise ValueError("a stream has one row: num_beams and num_return_sequences must be 1")
        with self._whole():
            if prompt is not None or input_ids is not None:
                self.feed(prompt, input_ids=input_ids)
            if self._last is None:
                raise ValueError("the stream is empty; feed it a text, or give a prompt")
            return self._written(self._last, max_new_tokens, kwargs)

    def _written(self, last: Tensor, max_new_tokens: int, kwargs: dict[str, Any]) -> Tensor:
        self._cache.crop(-1)  # generate() wants a token to feed
        answer = last[:0]
        config = kwargs.get("generation_config") or self._base.generation_config
        ends = kwargs.get("eos_token_id", config.eos_token_id if config is not None else None)
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        while len(answer) < max_new_tokens:
            if self.pairs >= self.max_pairs:
                self._compress()
            count = min(max_new_tokens - len(answer), self.max_pairs - self.pairs)
            mask = torch.ones(1, self.pairs + 1, dtype=torch.long, device=last.device)
            model: Any = self._base
            held = decoder.cache_argument(self._base, self._cache)
            out = model.generate(last.unsqueeze(0), attention_mask=mask, max_new_tokens=count, **held, **kwargs)
            self._count()
            new = out[0, 1:]
            answer, last = torch.cat([answer, new]), new[-1:]
            if int(last) in ends or len(new) < count:
                break
        if self.pairs >= self.max_pairs:
            self._compress()
        self._next = self._read(last)[-1]  # generate() does not feed its last token
        return answer

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """An error inside leaves the stream as it was: tensors are replaced, never written to."""
        pairs = [(layer, layer.keys, layer.values, layer.is_initialized) for layer in self._layers()]
        state = {name: value for name, value in vars(self).items() if name in _STATE}
        try:
            yield
        except BaseException:
            for layer, keys, values, begun in pairs:
                layer.keys, layer.values, layer.is_initialized = keys, values, begun
            vars(self).update(state)
            raise

    def _ids(self, text: str | None, input_ids: Any) -> Tensor:
        if (text is None) == (input_ids is None):
            raise ValueError("give either a text or input_ids")
        if text is not None:
            if self.tokenizer is None:
                raise ValueError("a text needs a tokenizer; make the CCMStream with one, or give input_ids")
            input_ids = encode(self.tokenizer, text)
        ids = torch.as_tensor(input_ids, dtype=torch.long).flatten().to(decoder.input_device(self._base))
        if not len(ids):
            raise ValueError("the text is empty; it needs at least one token")
        if bool(torch.isin(ids, torch.tensor(self.model.comp_ids, device=ids.device)).any()):
            raise ValueError("the text holds COMP tokens; leave them out")
        return ids

    def _layers(self) -> list[DynamicLayer]:
        return [layer for layer in self._cache.layers if isinstance(layer, DynamicLayer)]

    def _count(self) -> None:
        self._peak = max(self._peak, self.pairs)

    def _read(self, ids: Tensor) -> Tensor:
        """(L, V) float32 logits."""
        mask = torch.ones(1, self.pairs + len(ids), dtype=torch.long, device=ids.device)
        held = decoder.cache_argument(self._base, self._cache)
        out = self._base(ids.unsqueeze(0), attention_mask=mask, use_cache=True, **held)
        self._count()
        self._last = ids[-1:]
        logits: Tensor = out.logits[0].float()
        return logits

    def _compress(self) -> None:
        """The oldest chunk of the window becomes a part of the memory."""
        config, n = self.model.ccm_config, self.model.ccm_config.comp_tokens
        device = decoder.input_device(self._base)
        front = self.sink + self._slots  # pairs before the window
        end = front + self.chunk
        inner = Cache(layers=[DynamicLayer() for _ in self._layers()])
        for i, layer in enumerate(self._layers()):
            assert layer.keys is not None and layer.values is not None
            inner.update(layer.keys[:, :, :end], layer.values[:, :, :end], i)
        ids = torch.tensor([self.model.comp_ids], device=device)
        with no_rows():
            decoder.forward(
                self._base,
                ids,
                inner,
                attention_mask=torch.ones(1, end + n, dtype=torch.long, device=device),
                position_ids=torch.arange(end, end + n, device=device).unsqueeze(0),
                ccm=CompTokens(torch.arange(n, device=device)),
            )
        self._peak = max(self._peak, self.pairs + n)
        self._steps += 1
        rotate = self.model.rotation
        assert rotate is not None
        merge = config.mode == "merge"
        drop = max(0, self._slots + n - self.memory) if not merge else 0
        slots = n if merge else self._slots - drop + n
        averages = []
        for i, (layer, compressed) in enumerate(zip(self._layers(), inner.layers, strict=True)):
            assert layer.keys is not None and layer.values is not None
            assert isinstance(compressed, DynamicLayer) and compressed.keys is not None
            assert compressed.values is not None
            new_keys, new_values = compressed.keys[:, :, -n:], compressed.values[:, :, -n:]
            new_keys = rotate(new_keys, _shift(n, self.sink + slots - n - end, new_keys))
            if merge:
                step = torch.tensor([self._steps])
                before = self._averages[i] if self._averages else (new_keys, new_values)
                both = [_averaged(m, h, step, config.ema) for m, h in zip(before, (new_keys, new_values), strict=True)]
                averages.append((both[0], both[1]))
                keys, values = (t.to(new_keys.dtype) for t in both)
            else:
                keys, values = layer.keys[:, :, self.sink : front], layer.values[:, :, self.sink : front]
                keys, values = without_oldest(keys, values, drop, rotate)
                keys, values = concatenated(keys, new_keys), concatenated(values, new_values)
            window = layer.keys[:, :, end:]
            window = rotate(window, _shift(window.shape[2], self.sink + slots - end, window))
            layer.keys = torch.cat([layer.keys[:, :, : self.sink], keys, window], 2)
            layer.values = torch.cat([layer.values[:, :, : self.sink], values, layer.values[:, :, end:]], 2)
        self._slots, self._averages = slots, averages


def _shift(count: int, by: int, like: Tensor) -> Tensor:
    return torch.full((count,), by, device=like.device)


def _averaged(memory: Tensor, new: Tensor, step: Tensor, ema: float | None) -> Tensor:
    dtype = torch.promote_types(new.dtype, torch.float32)
    return merged(memory.to(dtype), new, step, ema)
