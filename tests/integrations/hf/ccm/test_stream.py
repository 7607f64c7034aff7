"""Streaming against keys that are stored unrotated and rotated anew at every step, as the released code does."""

import pytest
import torch
from dataopt.integrations.hf import CCMStream, decoder
from dataopt.integrations.hf.ccm.comp_tokens import CompTokens
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicCache

from .conftest import ccm, exact

SIZES = dict(max_pairs=24, memory=4, chunk=6, sink=1)


def text(length, seed=0):
    return torch.randint(0, 250, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


class Unrotated:
    """One token at a time. Keys lie unrotated in lists, and each step builds a cache with all of them in place."""

    def __init__(self, model, max_pairs, memory, chunk, sink):
        self.model, self.base, self.n = model, model.get_base_model(), len(model.comp_ids)
        self.limit, self.memory, self.chunk, self.sink = max_pairs, memory, chunk, sink
        layers = self.base.config.num_hidden_layers
        self.first, self.slots, self.window = ([[] for _ in range(layers)] for _ in range(3))
        self.steps, self.peak = 0, 0

    def pairs(self):
        return len(self.first[0]) + len(self.slots[0]) + len(self.window[0])

    def cache(self, entries):
        cache = DynamicCache(config=self.base.config)
        for i, layer in enumerate(entries):
            if layer:
                keys = torch.cat([k for k, _ in layer], 2)
                keys = self.model.rotation(keys, torch.arange(keys.shape[2]))
                cache.update(keys, torch.cat([v for _, v in layer], 2), i)
        return cache

    def run(self, entries, ids, comp=None):
        cache = self.cache(entries)
        seen = len(entries[0])
        places = torch.arange(seen, seen + len(ids)).unsqueeze(0)
        mask = torch.ones(1, seen + len(ids), dtype=torch.long)
        out = self.base(torch.tensor([ids]), past_key_values=cache, position_ids=places, attention_mask=mask, ccm=comp)
        new = []
        for layer in cache.layers:
            keys = self.model.rotation(layer.keys[:, :, seen:], -places[0])
            new.append([(keys[:, :, j : j + 1], layer.values[:, :, seen + j : seen + j + 1]) for j in range(len(ids))])
        return out.logits[0, -1], new

    def step(self, token):
        if self.pairs() >= self.limit:
            self.compress()
        every = [f + s + w for f, s, w in zip(self.first, self.slots, self.window, strict=True)]
        logits, new = self.run(every, [token])
        for first, window, entry in zip(self.first, self.window, new, strict=True):
            (first if len(first) < self.sink else window).append(entry[0])
        return logits

    def compress(self):
        old = [f + s + w[: self.chunk] for f, s, w in zip(self.first, self.slots, self.window, strict=True)]
        _, new = self.run(old, self.model.comp_ids, CompTokens(torch.arange(self.n)))
        self.steps += 1
        for i, entry in enumerate(new):
            if self.model.ccm_config.mode == "concat":
                self.slots[i] = (self.slots[i] + entry)[-self.memory :]
            elif self.slots[i]:
                t = self.steps
                self.slots[i] = [
                    (k + (a - k) / t, v + (b - v) / t) for (k, v), (a, b) in zip(self.slots[i], entry, strict=True)
                ]
            else:
                self.slots[i] = entry
            self.window[i] = self.window[i][self.chunk :]


@pytest.mark.parametrize("mode", ["concat", "merge"])
@pytest.mark.parametrize("sink", [0, 1, 3])
@torch.no_grad()
def test_equals_unrotated_storage(mode, sink):
    model = exact(ccm(dtype=torch.float64, mode=mode, comp_tokens=2, changes={"num_hidden_layers": 2}))
    sizes = SIZES | {"sink": sink, "memory": 4 if mode == "concat" else 2}
    stream, reference = CCMStream(model, **sizes), Unrotated(model, **sizes)
    ids = text(120)
    got = stream.feed(input_ids=ids)
    logits = torch.stack([reference.step(t) for t in ids])
    expected = logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1)
    assert torch.isnan(got[0])
    assert (got[1:] - expected).abs().max() < 1e-5  # the stream's probabilities are float32
    assert (stream._next - logits[-1]).abs().max() < 1e-5
    assert stream.steps == reference.steps > 10 and stream.pairs == reference.pairs()
    for layer, first, slots, window in zip(
        stream._layers(), reference.first, reference.slots, reference.window, strict=True
    ):
        keys = model.rotation(torch.cat([k for k, _ in first + slots + window], 2), torch.arange(stream.pairs))
        assert (layer.keys - keys).abs().max() < 1e-10
        assert (layer.values - torch.cat([v for _, v in first + slots + window], 2)).abs().max() < 1e-10


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8))
@settings(max_examples=10, deadline=None)
def test_feeding_in_pieces_changes_nothing(pieces):
    model = ccm(comp_tokens=2, changes={"num_hidden_layers": 1})
    ids = text(sum(pieces))
    whole, parts = CCMStream(model, **SIZES), CCMStream(model, **SIZES)
    expected, got, start = whole.feed(input_ids=ids), [], 0
    for count in pieces:
        got.append(parts.feed(input_ids=ids[start : start + count]))
        start += count
    torch.testing.assert_close(torch.cat(got), expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_pairs_and_positions_never_pass_the_limit():
    model = ccm(comp_tokens=2, changes={"num_hidden_layers": 1})
    largest = []
    model.get_base_model().model.rotary_emb.register_forward_hook(
        lambda m, args, kwargs, out: largest.append(int(kwargs.get("position_ids", args[-1]).max())), with_kwargs=True
    )
    stream = CCMStream(model, **SIZES)
    for start in range(0, 5000, 500):
        stream.feed(input_ids=text(500, start))
        assert stream.pairs <= 24
    assert stream.peak_pairs <= 24 + 2
    assert max(largest) < 24
    assert stream.steps > 700


@torch.no_grad()
def test_generation_goes_on_beyond_the_limit():
    model = exact(ccm(dtype=torch.float64, comp_tokens=2, changes={"num_hidden_layers": 2}))
    stream, reference = CCMStream(model, **SIZES), Unrotated(model, **SIZES)
    prompt = text(30)
    answer = stream.generate(input_ids=prompt, max_new_tokens=50, do_sample=False)
    assert len(answer) == 50
    for token in prompt:
        logits = reference.step(token)
    for token in answer.tolist():
        logits[model.comp_ids] = -torch.inf
        assert int(logits.argmax()) == token
        logits = reference.step(token)
    assert stream.pairs == reference.pairs() and stream.steps == reference.steps
    more = stream.feed(input_ids=[7])
    assert (more[0] - logits.log_softmax(-1)[7]).abs() < 1e-5
    logits = reference.step(7)
    for token in stream.generate(max_new_tokens=5, do_sample=False).tolist():
        logits[model.comp_ids] = -torch.inf
        assert int(logits.argmax()) == token
        logits = reference.step(token)


def test_generation_stops_at_the_end_token():
    model = ccm(comp_tokens=2, changes={"num_hidden_layers": 1})
    stream = CCMStream(model, **SIZES)
    first = stream.generate(input_ids=text(30), max_new_tokens=40, do_sample=False)
    end = int(first[25])
    again = CCMStream(model, **SIZES)
    stopped = again.generate(input_ids=text(30), max_new_tokens=40, do_sample=False, eos_token_id=end)
    assert stopped.tolist() == first[: first.tolist().index(end) + 1].tolist()


def test_an_error_leaves_the_stream_as_it_was(monkeypatch):
    model = ccm(comp_tokens=2, changes={"num_hidden_layers": 1})
    stream, other = CCMStream(model, **SIZES), CCMStream(model, **SIZES)
    for each in (stream, other):
        each.feed(input_ids=text(30))
    base, calls = model.language_model, []
    generate, compress = base.generate, CCMStream._compress

    def stopped(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:  # in the midst of the answer
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(base, "generate", stopped)
        stream.generate(input_ids=text(8, 1), max_new_tokens=60, do_sample=False)
    with pytest.raises(ValueError, match="nonsense"):
        stream.generate(input_ids=text(8, 1), nonsense=1)

    def failing(self):
        compress(self)
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no memory"):
        patch.setattr(CCMStream, "_compress", failing)
        stream.feed(input_ids=text(40, 2))
    assert (stream.pairs, stream.steps, stream.peak_pairs) == (other.pairs, other.steps, other.peak_pairs)
    more = text(20, 3)
    assert torch.equal(stream.feed(input_ids=more), other.feed(input_ids=more))
    empty = CCMStream(model, **SIZES)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no memory"):
        patch.setattr(CCMStream, "_compress", failing)
        empty.feed(input_ids=text(40, 2))
    fresh = CCMStream(model, **SIZES)
    assert torch.equal(empty.feed(input_ids=more)[1:], fresh.feed(input_ids=more)[1:])


def test_bad_sizes_and_models_are_refused(tokenizer):
    model = ccm(comp_tokens=2)
    for wrong, says in (
        ({"max_pairs": 11}, "max_pairs=11 must be more than"),
        ({"memory": 3}, "memory=3 must be a multiple of comp_tokens=2"),
        ({"memory": 0}, "memory=0"),
        ({"chunk": 0}, "chunk=0"),
        ({"sink": -1}, "sink=-1"),
        ({"max_pairs": 2048}, "max_pairs=2048 must be at most 2046"),
    ):
        with pytest.raises(ValueError, match=says):
            CCMStream(model, **(SIZES | wrong))
    with pytest.raises(ValueError, match="memory=4 must be comp_tokens=2"):
        CCMStream(ccm(mode="merge", comp_tokens=2), **SIZES)
    for options in ({"positions": "abs"}, {"recurrent": False}):
        with pytest.raises(ValueError, match="positions='cache' and recurrent=True"):
            CCMStream(ccm(**options), **SIZES)
    stream = CCMStream(model, tokenizer, **SIZES)
    with pytest.raises(ValueError, match="empty"):
        stream.feed("")
    with pytest.raises(ValueError, match="COMP tokens"):
        stream.feed(input_ids=model.comp_ids)
    with pytest.raises(ValueError, match="the stream is empty"):
        stream.generate()
    with pytest.raises(ValueError, match="one row"):
        stream.generate("a", num_beams=2)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        CCMStream(model, **SIZES).feed("a")
    assert decoder.unwrap(model) is model.get_base_model()
