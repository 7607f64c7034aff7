"""Rows and batches, by hand, and there and back."""

import pytest
import torch
from dataopt.core.ccm import layout
from dataopt.integrations.hf import (
    CCMCollator,
    Query,
    ccm_row,
    demonstration_rows,
    dialogue_rows,
    profile_rows,
)
from dataopt.integrations.hf.ccm.data import segments_of
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

COMP = [900, 901]


def letters(bos=False):
    """A token for each character; with ``bos`` a text begins with ``^``."""
    alphabet = ["^", "$", *map(chr, range(32, 94)), *map(chr, range(97, 127)), "\n"]
    ids = {c: i for i, c in enumerate(dict.fromkeys(alphabet))}
    inner = Tokenizer(models.WordLevel(ids, unk_token="$"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="^ $A", special_tokens=[("^", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="^" if bos else None, eos_token="$")


def shown(tokenizer, row):
    """Segments as text, ``|`` for a COMP token and capitals in brackets for what is learned."""
    out, last = "", None
    for i, label, s, slot in zip(row["input_ids"], row["labels"], row["segment_ids"], row["comp_slot"], strict=True):
        if last is not None and s != last:
            out += "/"
        last = s
        text = "|" if slot >= 0 else tokenizer.convert_ids_to_tokens(i)
        out += f"[{text}]" if label != -100 else text
        assert label in (-100, i)
    return out.replace("][", "")


def test_a_row_by_hand():
    row = ccm_row([[5, 6], Query([7], [8, 9]), [4]], COMP, prefix=[1])
    assert row == {
        "input_ids": [1, 5, 6, 900, 901, 7, 8, 9, 4, 900, 901],
        "labels": [-100, -100, -100, -100, -100, -100, 8, 9, -100, -100, -100],
        "segment_ids": [0, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3],
        "comp_slot": [-1, -1, -1, 0, 1, -1, -1, -1, -1, 0, 1],
    }


@pytest.mark.parametrize(
    ("steps", "prefix", "says"),
    [
        ([[1]], (), "no Query"),
        ([[], Query([1], [2])], (), r"steps\[0\]: the context is empty"),
        ([[1], Query([1], [])], (), r"steps\[1\]: the answer is empty"),
        ([[1, 900], Query([1], [2])], (), r"steps\[0\] holds COMP"),
        ([[1], Query([1], [901])], (), r"steps\[1\] holds COMP"),
        ([[1], Query([1], [2])], (900,), "prefix holds COMP"),
    ],
)
def test_bad_steps_are_refused(steps, prefix, says):
    with pytest.raises(ValueError, match=says):
        ccm_row(steps, COMP, prefix)


ids = st.lists(st.integers(0, 99), min_size=1, max_size=5)
context = ids
query = st.builds(Query, ids, ids)


@given(
    st.lists(
        st.tuples(st.lists(context, min_size=0, max_size=4), query, st.lists(st.one_of(context, query), max_size=3)),
        min_size=1, max_size=3,
    ),
    st.booleans(), st.sampled_from([None, 8]),
)  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_rows_and_batches_there_and_back(parts, left, multiple):
    examples = [[*contexts, asked, *more] for contexts, asked, more in parts]
    rows = [ccm_row(steps, COMP, prefix=[1]) for steps in examples]
    batch = CCMCollator(0, "left" if left else "right", multiple)(rows)
    width = batch["input_ids"].shape[1]
    assert multiple is None or width % multiple == 0
    layout(batch["segment_ids"], batch["comp_slot"], 2)  # takes them as they are
    for i, (steps, row) in enumerate(zip(examples, rows, strict=True)):
        real = batch["attention_mask"][i].bool()
        assert int(real.sum()) == len(row["input_ids"])
        for name in row:
            assert batch[name][i][real].tolist() == row[name]
        assert (batch["labels"][i][~real] == -100).all() and (batch["segment_ids"][i][~real] == -1).all()
        for number, step in enumerate(steps, 1):
            at = (batch["segment_ids"][i] == number) & (batch["comp_slot"][i] < 0)
            text = [*step.input, *step.answer] if isinstance(step, Query) else step
            assert batch["input_ids"][i][at].tolist() == text
    full = CCMCollator(0, "left" if left else "right", full_context=True)(rows)
    expected = []
    for steps in examples:
        seen = [1]
        for step in steps:
            if isinstance(step, Query):
                expected.append(([*seen, *step.input, *step.answer], list(step.answer)))
            else:
                seen += step
    assert set(full) == {"input_ids", "labels", "attention_mask"} and len(full["labels"]) == len(expected)
    for i, (text, answer) in enumerate(expected):
        assert full["input_ids"][i][full["attention_mask"][i].bool()].tolist() == text
        assert full["labels"][i][full["labels"][i] != -100].tolist() == answer


@given(st.lists(context, max_size=4), query, st.booleans())
@settings(max_examples=30, deadline=None)
def test_segments_from_ids_alone(contexts, asked, left):
    rows = [ccm_row([*contexts, asked], COMP), ccm_row([[1], Query([1], [2])], COMP)]
    batch = CCMCollator(0, "left" if left else "right")(rows)
    segments, slots = segments_of(batch["input_ids"], COMP, batch["attention_mask"])
    assert torch.equal(segments, batch["segment_ids"]) and torch.equal(slots, batch["comp_slot"])


# Forms


def test_dialogues():
    tokenizer = letters()
    chats = Dataset.from_dict({"dialog": [["hi ", "yo", "ok", "by"], ["one", "two"]]})
    rows = dialogue_rows(chats, tokenizer, COMP, multi_query=True)
    assert len(rows) == 1  # two turns leave no context
    assert shown(tokenizer, rows[0]) == "A: hi||/\nA: yo\nA:[ ok$]/\nA: yo||/\nA: ok\nA:[ by$]"
    drawn = {shown(tokenizer, dialogue_rows(chats, tokenizer, COMP, seed=s)[0]) for s in range(20)}
    assert drawn == {"A: hi||/\nA: yo\nA:[ ok$]", "A: hi||/\nA: yo||/\nA: ok\nA:[ by$]"}
    short = dialogue_rows(chats, tokenizer, COMP, multi_query=True, max_tokens=17)
    assert shown(tokenizer, short[0]) == "\nA: yo||/\nA: ok\nA:[ by$]"  # the oldest context went


def test_demonstrations():
    tokenizer = letters()
    data = {"demonstrations": [[{"input": "a", "output": "b"}, {"input": "c", "output": "d"}]], "input": ["e"]}
    rows = demonstration_rows(Dataset.from_dict(data | {"output": ["f"]}), tokenizer, COMP)
    assert shown(tokenizer, rows[0]) == "Input: a Output: b||/\nInput: c Output: d||/\nInput: e Output:[ f$]"
    rows = demonstration_rows(Dataset.from_dict(data | {"output": ["f"]}), tokenizer, COMP, multi_query=True)
    assert shown(tokenizer, rows[0]) == (
        "Input: a Output: b||/\nInput: c Output:[ d$]/\nInput: c Output: d||/\nInput: e Output:[ f$]"
    )
    rows = demonstration_rows(Dataset.from_dict(data | {"output": ["f"]}), tokenizer, COMP, max_tokens=45)
    assert shown(tokenizer, rows[0]) == "Input: a Output: b||/\nInput: e Output:[ f$]"
    rows = demonstration_rows(Dataset.from_dict(data | {"output": ["f"]}), tokenizer, COMP, max_context_tokens=7)
    assert shown(tokenizer, rows[0]).startswith("Input: ||/\nInput:||/")


def test_profiles():
    tokenizer = letters()
    users = Dataset.from_dict({"profile": [["x", "y"], []], "input": ["q", "q"], "output": ["r", "r"]})
    rows = profile_rows(users, tokenizer, COMP)
    assert len(rows) == 1
    assert shown(tokenizer, rows[0]) == "x||/, y||/\nInput: q\nOutput:[ r$]"
    every = profile_rows(users, tokenizer, COMP, multi_query=True)
    assert shown(tokenizer, every[0]).count("\nInput: q\nOutput:[ r$]") == 2
    many = Dataset.from_dict({"profile": [[str(i) for i in range(10)]], "input": ["q"], "output": ["r"]})
    drawn = [shown(tokenizer, profile_rows(many, tokenizer, COMP, contexts=3, seed=s)[0]) for s in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1] and len(set(drawn)) == 3 and drawn[0].count("||") == 3


def test_the_first_token_begins_the_first_context_or_is_the_sink():
    tokenizer = letters(bos=True)
    chats = Dataset.from_dict({"dialog": [["hi", "yo", "ok"]]})
    assert shown(tokenizer, dialogue_rows(chats, tokenizer, COMP)[0]) == "^A: hi||/\nA: yo\nA:[ ok$]"
    assert shown(tokenizer, dialogue_rows(chats, tokenizer, COMP, sink=True)[0]) == "^/A: hi||/\nA: yo\nA:[ ok$]"
    with pytest.raises(ValueError, match="sink=True needs a tokenizer"):
        dialogue_rows(chats, letters(), COMP, sink=True)


def test_bad_data_is_refused():
    chats = Dataset.from_dict({"dialog": [["hi", "yo", "ok"], ["hi", None, "ok"], None]})
    with pytest.raises(ValueError, match="'talk' is not among the columns"):
        dialogue_rows(chats, letters(), COMP, turns="talk")
    for row in (1, 2):
        with pytest.raises(ValueError, match="row 1 has no value"):
            dialogue_rows(chats.select([0, row]), letters(), COMP)
    with pytest.raises(ValueError, match="max_tokens=0"):
        dialogue_rows(chats, letters(), COMP, max_tokens=0)
    users = Dataset.from_dict({"profile": [["", "y"]], "input": ["q"], "output": ["r"]})
    with pytest.raises(ValueError, match="row 0 holds an empty text"):
        profile_rows(users, letters(), COMP)
    with pytest.raises(ValueError, match="padding_side='top'"):
        CCMCollator(0, "top")
