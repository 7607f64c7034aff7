"""``memory.append("a new context"); model.generate(**memory.inputs("a question"), past_key_values=memory)``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from dataopt.core.ccm import concatenated, merged
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .. import decoder
from ..chat import encode
from ..reusable import GenerateCall, ReusableCache
from .comp_tokens import CompTokens, no_rows
from .data import first_ids
from .layers import MemoryLayer
from .memory import Memory, empty_like, single, stacked
from .model import CCMModel


class CCMCache(ReusableCache):
    """The compressed memory of a conversation (thesis section 7.3.1), a cache for ``generate``.

    :meth:`append` reads a new context, keeps its COMP pairs and forgets the rest. Every new ``generate`` finds the
    memory as it was; :meth:`keep` makes the last turn a part of it.

    Args:
        model: in eval mode.
        tokenizer: of the model; None to give token ids only.

    Raises:
        ValueError: a model in training mode, or ``sink=True`` without a tokenizer that has a first token.

    Example::

        memory = CCMCache(model, tokenizer)
        memory.append("I am Ada, and I collect beetles.")
        out = model.generate(**memory.inputs("What do I collect?"), past_key_values=memory)
    """

    layers: list[Any]

    def __init__(self, model: CCMModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        if not isinstance(model, CCMModel):
            raise TypeError(f"model: {type(model).__name__} is not a CCMModel; wrap the base model in one")
        _check_mode(model)
        self._set(model, tokenizer, None)
        if model.ccm_config.sink:
            self._read_sink()

    def _set(self, model: CCMModel, tokenizer: PreTrainedTokenizerBase | None, memory: Memory | None) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._base = model.language_model
        config = self._base.config.get_text_config(decoder=True)
        super().__init__(layers=[MemoryLayer() for _ in range(config.num_hidden_layers)])
        self._prefix = 0
        self._store(memory)

    def _store(self, memory: Memory | None) -> None:
        self._memory = memory
        dtype = self._base.dtype
        for i, layer in enumerate(self.layers):
            layer.start = None if memory is None else tuple(t.to(dtype) for t in memory.layers[i])
        self.restore()

    @classmethod
    def _of(cls, like: CCMCache, memory: Memory | None) -> CCMCache:
        cache = cls.__new__(cls)
        cache._set(like.model, like.tokenizer, memory)
        cache._prefix = like._prefix
        return cache

    # What the memory says about itself

    @property
    def nbytes(self) -> int:
        """Bytes of the stored pairs, the running turn aside; constant in the number of contexts when they merge."""
        return 0 if self._memory is None else self._memory.nbytes

    @property
    def steps(self) -> tuple[int, ...]:
        """Contexts that the memory of each user holds."""
        return (0,) if self._memory is None else self._memory.steps

    @property
    def slots(self) -> tuple[int, ...]:
        """Key-value pairs per head of each user, prefix included."""
        return (0,) if self._memory is None else tuple(self._memory.valid.sum(1).tolist())

    @property
    def users(self) -> int:
        """Rows of the batch."""
        return len(self.steps)

    def __repr__(self) -> str:
        config = self.model.ccm_config
        return f"CCMCache({config.mode}, steps={list(self.steps)}, pairs={list(self.slots)}, {self.nbytes:,} bytes)"

    # Compressing

    def append(self, context: str | Sequence[str] | None = None, *, input_ids: Any = None) -> None:
        """Compress a new context into the memory: h(t) of eq. 7.1, then eq. 7.2.

        Args:
            context: a text; of a stacked cache one for each user. The text is taken as it is: nothing is added, except
                the tokenizer's first token before a user's first context, unless that is the sink.
            input_ids: token ids instead, (L,), (B, L) or a list of one list for each user; taken as they are.

        Raises:
            ValueError: an empty context, COMP ids in it, another number of contexts than users, one that does not fit
                the model's positions, or a model in training mode.
        """
        _check_mode(self.model)
        rows = self._rows(context, input_ids, "context")
        if len(rows) != self.users:
            raise ValueError(f"{len(rows)} contexts for {self.users} users; give one for each")
        if input_ids is None:
            rows = [[*(self._first() if t == 0 else ()), *row] for row, t in zip(rows, self.steps, strict=True)]
        self.restore()
        self._compress(rows)

    def _first(self) -> list[int]:
        """The token that begins a text, if the tokenizer has one and the sink does not hold it."""
        return [] if self.tokenizer is None or self._prefix else first_ids(self.tokenizer)

    @torch.no_grad()
    def _compress(self, rows: list[list[int]]) -> None:
        config, device = self.model.ccm_config, decoder.input_device(self._base)
        n, width = config.comp_tokens, max(map(len, rows))
        own = torch.tensor([len(r) for r in rows])
        ids, mask = self._padded([[*row, *self.model.comp_ids] for row in rows])
        seen = self._seen_mask(config.recurrent)
        start = self._start(config.recurrent)
        # From the left padding on, which nobody sees, places count up to the COMP tokens.
        positions = (start.unsqueeze(1) + torch.arange(width + n) - (width - own).unsqueeze(1)).clamp(min=0)
        self._check_positions(int((start + own).max()) + n)
        comp = torch.arange(len(rows)).unsqueeze(1) * (width + n) + torch.arange(width, width + n)
        with no_rows():
            decoder.forward(
                self._base,
                ids.to(device),
                self,
                attention_mask=torch.cat([seen, mask], 1).to(device),
                position_ids=positions.to(device),
                ccm=CompTokens(comp.flatten().to(device)),
            )
        # From the positions of the COMP tokens to those of their slots.
        used = start - self._prefix if config.positions == "cache" else None
        shift = None
        if used is not None:
            slots = torch.tensor(self.slots) - self._prefix if config.mode == "concat" else torch.zeros(len(rows))
            shift = (slots.long() - used - own).unsqueeze(1).expand(-1, n)
        self._store(self._updated(shift, own))

    def _updated(self, shift: Tensor | None, own: Tensor) -> Memory:
        config, old = self.model.ccm_config, self._memory
        n, merge = config.comp_tokens, config.mode == "merge"
        steps = tuple(t + 1 for t in self.steps)
        layers = []
        for i, layer in enumerate(self.layers):
            keys, values = layer.newest(n)
            if shift is not None and self.model.rotation is not None:
                keys = self.model.rotation(keys, shift.to(keys.device))
            dtype = torch.promote_types(keys.dtype, torch.float32) if merge else keys.dtype
            before = old.layers[i] if old is not None else (empty_like(keys, 0), empty_like(values, 0))
            pairs = []
            for stored, new in zip(before, (keys, values), strict=True):
                prefix, slots = stored[:, :, : self._prefix].to(dtype), stored[:, :, self._prefix :].to(dtype)
                if merge:
                    slots = slots if slots.shape[2] else empty_like(new, n).to(dtype)
                    slots = merged(slots, new, torch.tensor(steps), config.ema)
                else:
                    slots = concatenated(slots, new)
                pairs.append(torch.cat([prefix, slots], 2))
            layers.append((pairs[0], pairs[1]))
        if merge:
            valid = torch.ones(len(steps), self._prefix + n, dtype=torch.bool)
        else:
            seen = old.valid if old is not None else torch.ones(len(steps), 0, dtype=torch.bool)
            valid = torch.cat([seen, torch.ones(len(steps), n, dtype=torch.bool)], 1)
        text = own.tolist() if old is None else [a + b for a, b in zip(old.text, own.tolist(), strict=True)]
        return Memory(tuple(layers), valid, steps, tuple(text))

    def _read_sink(self) -> None:
        first = getattr(self.tokenizer, "bos_token_id", None)
        if first is None:
            raise ValueError("sink=True needs a tokenizer with a bos_token, which is what stays visible to all")
        device = decoder.input_device(self._base)
        with torch.no_grad():
            decoder.forward(self._base, torch.tensor([[first]], device=device), self)
        merge = self.model.ccm_config.mode == "merge"
        pairs = []
        for layer in self.layers:
            dtype = torch.promote_types(layer.keys.dtype, torch.float32) if merge else layer.keys.dtype
            pairs.append((layer.keys.to(dtype), layer.values.to(dtype)))
        self._prefix = 1
        self._store(Memory(tuple(pairs), torch.ones(1, 1, dtype=torch.bool), (0,), (0,)))

    def _seen_mask(self, memory: bool) -> Tensor:
        """(B, P + m) int64: what is visible of the stored pairs."""
        if self._memory is None:
            return torch.ones(1, 0, dtype=torch.long)
        seen = self._memory.valid.long().cpu()
        if not memory:
            seen = seen.clone()
            seen[:, self._prefix :] = 0
        return seen

    def _start(self, memory: bool = True) -> Tensor:
        """(B,) position of the first new token."""
        if self.model.ccm_config.positions == "abs":
            return self._prefix + torch.tensor(self.steps if self._memory is None else self._memory.text)
        return self._seen_mask(memory).sum(1)

    def _check_positions(self, last: int) -> None:
        limit = decoder.positions(self._base)
        if limit is not None and last > limit:
            advice = "shorten it"
            if self.model.ccm_config.positions == "abs":
                advice = "positions='abs' counts all text; train with positions='cache' for longer conversations"
            raise ValueError(f"the text would reach position {last} and the model has {limit}; {advice}")

    # Asking

    def inputs(self, question: str | Sequence[str] | None = None, *, input_ids: Any = None) -> dict[str, Tensor]:
        """What ``generate`` needs to answer from the memory (eq. 7.3).

        Args:
            question: a text, or several. Of a stacked cache row i is asked of user i, a single text of all; of one
                user's cache each is asked alone.
            input_ids: token ids instead, as for :meth:`append`.

        Returns:
            ``input_ids`` (B, L), padded on the left, ``attention_mask`` (B, stored + L), and with positions "abs"
            ``position_ids`` (B, L).

        Raises:
            ValueError: no question, or another number of questions than users.
        """
        rows = self._rows(question, input_ids, "question")
        if self.users > 1 and len(rows) == 1:
            rows = rows * self.users
        if self.users > 1 and len(rows) != self.users:
            raise ValueError(f"{len(rows)} questions for {self.users} users; give one for each, or one")
        if input_ids is None:
            steps = self.steps if self.users > 1 else self.steps * len(rows)
            rows = [[*(self._first() if t == 0 else ()), *row] for row, t in zip(rows, steps, strict=True)]
        self.restore()
        self._check_positions(int(self._start().max()) + max(map(len, rows)))
        ids, mask = self._padded(rows)
        seen = self._seen_mask(True).expand(len(rows), -1)
        device = decoder.input_device(self._base)
        out = {"input_ids": ids.to(device), "attention_mask": torch.cat([seen, mask], 1).to(device)}
        if self.model.ccm_config.positions == "abs":
            places = self._start().expand(len(rows)).unsqueeze(1) + mask.cumsum(1) - 1
            out["position_ids"] = places.clamp(min=0).to(device)
        return out

    def _rows(self, text: str | Sequence[str] | None, input_ids: Any, what: str) -> list[list[int]]:
        if (text is None) == (input_ids is None):
            raise ValueError(f"give either {what} or input_ids")
        if input_ids is not None:
            rows = input_ids.tolist() if isinstance(input_ids, Tensor) else [*input_ids]
            rows = rows if rows and not isinstance(rows[0], int) else [rows]
            rows = [list(row) for row in rows]
        else:
            texts = [text] if isinstance(text, str) else list(text or ())
            if any(not isinstance(t, str) for t in texts):
                raise ValueError(f"{what}={text!r} must be a text or a sequence of texts")
            if self.tokenizer is None:
                raise ValueError(f"{what} as a text needs a tokenizer; make the CCMCache with one, or give input_ids")
            rows = [list(encode(self.tokenizer, t)) for t in texts]
        if not rows or not all(rows):
            raise ValueError(f"{what} is empty; it needs at least one token")
        taken = set(self.model.comp_ids)
        if any(i in taken for row in rows for i in row):
            raise ValueError(f"{what} holds COMP tokens; leave them out, they are added where they belong")
        return rows

    def _padded(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """(B, L) ids and mask, padded on the left."""
        width, pad = max(map(len, rows)), decoder.pad_id(self.tokenizer)
        ids = [[pad] * (width - len(row)) + row for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        return torch.tensor(ids), torch.tensor(mask)

    # State

    def restore(self) -> None:
        """Drop the running turn; the memory stays."""
        for layer in self.layers:
            layer.restore()

    def reset(self) -> None:
        """The same as :meth:`restore`: a cache never loses its memory; make a new one for a new conversation."""
        self.restore()

    def keep(self, output_ids: Tensor) -> None:
        """Compress the last turn, question and answer, as the next context c(t + 1) (section 7.2).

        Args:
            output_ids: what ``generate`` returned, one row for each user.

        Raises:
            ValueError: another number of rows (beams, samples or several questions to one user).
        """
        ids = torch.as_tensor(output_ids)
        ids = ids if ids.ndim == 2 else ids.unsqueeze(0)
        if len(ids) != self.users:
            raise ValueError(f"output_ids has {len(ids)} rows for {self.users} users; choose one answer for each")
        self.append(input_ids=[self._without_padding(row) for row in ids.tolist()])

    def _without_padding(self, row: list[int]) -> list[int]:
        """An answer as one user's alone would be: inputs() pads before it, and generate() behind its end."""
        settings = self._base.generation_config
        found = getattr(settings, "eos_token_id", None)
        ends = [] if found is None else [found] if isinstance(found, int) else [*found]
        pad = getattr(settings, "pad_token_id", None)
        pads = set(ends[:1]) if pad is None else {pad}  # as generate() chooses
        start, end = 0, len(row)
        if self.users > 1:
            before = decoder.pad_id(self.tokenizer)
            pads.add(before)
            while start < end - 1 and row[start] == before:
                start += 1
        while end > start + 1 and row[end - 1] in pads:
            end -= 1
        if end < len(row) and row[end] in ends and row[end - 1] not in ends:
            end += 1  # where padding is an end token, the first of them is the answer's
        return row[start:end]

    def fork(self) -> CCMCache:
        """Another cache on the same memory, for a request of its own; nothing is copied."""
        return CCMCache._of(self, self._memory)

    def __deepcopy__(self, memo: dict[int, Any]) -> CCMCache:
        return self.fork()

    @classmethod
    def stack(cls, caches: Sequence[CCMCache]) -> CCMCache:
        """One batch over several users, whose memories may hold different numbers of contexts.

        Raises:
            ValueError: no caches, or caches of different models.
        """
        if not caches:
            raise ValueError("caches is empty; give at least one")
        first = caches[0]
        if any(c.model is not first.model for c in caches):
            raise ValueError("memories of different models cannot be stacked; give those of one")
        if all(c._memory is None for c in caches):
            raise ValueError("no memory holds a context; append one to at least one of them")
        return cls._of(first, stacked([c._memory for c in caches], first._prefix))

    def unstack(self) -> list[CCMCache]:
        """One cache for each user."""
        if self._memory is None:
            return [self.fork()]
        return [CCMCache._of(self, single(self._memory, i)) for i in range(self.users)]

    # Files

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write one user's memory: ``ccm_memory.json`` and a file of tensors.

        Raises:
            ValueError: several users (save those of :meth:`unstack`), or an empty memory.
        """
        from . import artifact

        if self.users > 1 or self._memory is None:
            raise ValueError(f"save_pretrained needs the memory of one user and this cache has {self.users}, {self!r}")
        artifact.save(self._memory, self.model, self._prefix, Path(save_directory))

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, model: CCMModel, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> CCMCache:
        """Load a memory for the model and adapter that made it.

        Raises:
            ValueError: files that are missing, damaged or of a newer format, or another model or adapter.
        """
        from . import artifact

        cache = cls(model, tokenizer)
        memory = artifact.load(Path(directory), model, cache._prefix)
        cache._store(memory)
        return cache

    # What generate and the model call

    def _check_call(self, call: GenerateCall) -> None:
        ids, stored = call.input_ids, 0 if self._memory is None else self._memory.valid.shape[1]
        if call.mask_width != stored + ids.shape[1]:
            raise ValueError(
                f"attention_mask covers {call.mask_width} tokens, but the memory has {stored} and the input "
                f"{ids.shape[1]}; pass **memory.inputs(question)"
            )
        if len(ids) % self.users:
            raise ValueError(f"input_ids has {len(ids)} rows for {self.users} users; pass **memory.inputs(questions)")
        if self.model.ccm_config.positions == "abs":
            self._check_places(call, stored)

    def _check_places(self, call: GenerateCall, stored: int) -> None:
        """generate() makes positions itself where none were given, which count pairs and not text."""
        places, mask = call.kwargs.get("position_ids"), call.kwargs.get("attention_mask")
        rows, width = call.input_ids.shape
        own = torch.full((rows,), width) if mask is None else mask[:, stored:].sum(1).cpu()
        last = self._start().repeat_interleave(rows // self.users) + own - 1
        if not isinstance(places, Tensor) or not torch.equal(places[:, -1].cpu().expand(rows), last):
            raise ValueError("a model with positions='abs' needs position_ids; pass **memory.inputs(question)")


def _check_mode(model: CCMModel) -> None:
    if model.training:
        raise ValueError("model is in training mode; call model.eval() first")
