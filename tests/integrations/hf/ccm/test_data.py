"""Rows and batches, by hand, and there and back."""

import numpy as np
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
from dataopt.integrations.hf.ccm.rows import segments_of
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

COMP = [900, 901]


def letters(bos=False, llama=False):
    """A token for each character; with ``bos`` a text begins with ``^``; ``llama`` puts ``_`` before texts, as it does.

    The latter is how LLaMA's tokenizer marks spaces, and the start of a text like one.
    """
    alphabet = ["^", "$", *map(chr, range(32, 94)), *map(chr, range(97, 127)), "\n", "_"]
    ids = {c: i for i, c in enumerate(dict.fromkeys(alphabet))}
    inner = Tokenizer(models.WordLevel(ids, unk_token="$"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if llama:
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("_"), normalizers.Replace(" ", "_")])
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
        ([[1], Query([900], [2])], (), r"steps\[1\] holds COMP"),
        ([torch.tensor([900]), Query([1], [2])], (), r"steps\[0\] holds COMP"),
        ([[1], Query([1], [-100])], (), r"steps\[1\].answer holds -100"),
    ],
)
def test_bad_steps_are_refused(steps, prefix, says):
    with pytest.raises(ValueError, match=says):
        ccm_row(steps, COMP, prefix)


def test_what_is_no_list_of_ids_is_refused():
    query = Query([1], [2])
    for wrong in ("ab", [1.5], torch.ones(1, 3, dtype=torch.long), ["a"]):
        with pytest.raises(TypeError, match=r"steps\[0\] must be one list of token ids"):
            ccm_row([wrong, query], COMP)
    for comp in ([], [9, 9]):  # with none, a context would be taken for a query
        with pytest.raises(ValueError, match="comp_ids"):
            ccm_row([[1], query], comp)


def test_arrays_of_ids_are_taken():
    row = ccm_row([np.array([5, 6]), Query(torch.tensor([7]), np.array([8]))], COMP, prefix=torch.tensor([1]))
    assert row == ccm_row([[5, 6], Query([7], [8])], COMP, prefix=[1])
    assert all(type(value) is int for values in row.values() for value in values)


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
    short = dialogue_rows(chats, tokenizer, COMP, multi_query=True, max_tokens=18)
    assert shown(tokenizer, short[0]) == "A: yo||/\nA: ok\nA:[ by$]"  # the oldest context went


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
    users = Dataset.from_dict(
        {"profile": [["x", "y"], []], "input": ["q", "q"], "output": ["r", "r"], "do": ["d", "d"]}
    )
    rows = profile_rows(users, tokenizer, COMP)
    assert len(rows) == 1
    contexts = "Instruction: x\n||/\n, and y\n||/"
    assert shown(tokenizer, rows[0]) == contexts + "\nInput: q\nOutput:[ r$]"
    rows = profile_rows(users, tokenizer, COMP, instruction="do")
    assert shown(tokenizer, rows[0]) == contexts + ". d\nInput: q\nOutput:[ r$]"
    every = profile_rows(users, tokenizer, COMP, multi_query=True)
    asked = "\nInput: q\nOutput:[ r$]"
    assert shown(tokenizer, every[0]) == f"Instruction: x\n||/{asked}/\n, and y\n||/{asked}"
    many = Dataset.from_dict({"profile": [[str(i) for i in range(10)]], "input": ["q"], "output": ["r"]})
    drawn = [shown(tokenizer, profile_rows(many, tokenizer, COMP, contexts=3, seed=s)[0]) for s in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1] and len(set(drawn)) == 3 and drawn[0].count("||") == 3


def test_the_first_token_begins_the_first_context_or_is_the_sink():
    tokenizer = letters(bos=True)
    chats = Dataset.from_dict({"dialog": [["hi", "yo", "ok"]]})
    assert shown(tokenizer, dialogue_rows(chats, tokenizer, COMP)[0]) == "^A: hi||/\nA: yo\nA:[ ok$]"
    assert shown(tokenizer, dialogue_rows(chats, tokenizer, COMP, sink=True)[0]) == "^/A: hi||/\nA: yo\nA:[ ok$]"
    for sink in (True, False):  # it counts: 6, 9 and 4 tokens
        assert len(dialogue_rows(chats, tokenizer, COMP, sink=sink, max_tokens=19)[0]["input_ids"]) == 19 + 2
        with pytest.raises(ValueError, match="none of 1 rows"):
            dialogue_rows(chats, tokenizer, COMP, sink=sink, max_tokens=18)
    with pytest.raises(ValueError, match="sink=True needs a tokenizer"):
        dialogue_rows(chats, letters(), COMP, sink=True)


@given(
    st.lists(st.text("abc", min_size=1, max_size=6), min_size=3, max_size=6),
    st.integers(12, 60), st.booleans(), st.booleans(), st.booleans(),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_rows_keep_to_max_tokens_and_begin_with_the_first_token(said, most, multi_query, sink, long):
    """With the newest contexts that fit, whatever is left out; a row of which not even one fits is left out itself."""
    tokenizer = letters(bos=True)
    chats = Dataset.from_dict({"dialog": [said, ["a", "b", "c"]]})  # the second is 17 tokens with BOS
    most = max(most, 17)
    rows = dialogue_rows(chats, tokenizer, COMP, multi_query=multi_query, max_tokens=10**6 if long else most, sink=sink)
    for row in rows:
        text = sum(slot < 0 for slot in row["comp_slot"])
        assert long or text <= most
        assert row["input_ids"][0] == 0 and 0 not in row["input_ids"][1:]
        assert row["segment_ids"][0] == (0 if sink else 1)
        assert shown(tokenizer, row).removeprefix("^").removeprefix("/").startswith("A: ")
    assert shown(tokenizer, rows[len(rows) - 1]) == ("^/" if sink else "^") + "A: a||/\nA: b\nA:[ c$]"
    if long and multi_query:
        texts = "".join(shown(tokenizer, rows[0]).split("|"))
        assert all(f"A: {turn}" in texts for turn in said[:-1]) and texts.endswith(f"[ {said[-1]}$]")


def test_rows_that_are_too_long_with_one_context_are_left_out():
    users = {"profile": [["x"], ["x"]], "input": ["q" * 50, "q"], "output": ["r", "r"]}
    rows = profile_rows(Dataset.from_dict(users), letters(), COMP, max_tokens=35)
    assert [len(row["input_ids"]) for row in rows] == [
        35 + 2
    ]  # 15 of the entry, 17 of the question, 3 of the answer, and COMP
    with pytest.raises(ValueError, match="none of 2 rows has a context and fits into max_tokens=34"):
        profile_rows(Dataset.from_dict(users), letters(), COMP, max_tokens=34)


def test_draws_depend_on_the_seed_and_the_number_of_the_row_alone():
    tokenizer = letters()
    chats = Dataset.from_dict({"dialog": [[str(i) for i in range(8)]] * 1200})  # more than one batch of map
    rows = dialogue_rows(chats, tokenizer, COMP, seed=3)
    again = dialogue_rows(chats.select(range(1100)), tokenizer, COMP, seed=3)
    assert again["input_ids"][:] == rows["input_ids"][:1100]
    assert rows["input_ids"][:200] != rows["input_ids"][1000:]  # each batch draws anew
    turns = [max(row) + 1 for row in rows["segment_ids"]]  # contexts, query, answer
    assert set(turns) == set(range(3, 9))
    counts = np.bincount(turns)[3:]
    assert abs(counts - 200).max() < 5 * np.sqrt(1200 * 5 / 36)  # uniform


def test_answers_hold_no_space_of_the_tokenizer_s_own():
    """LLaMA's tokenizer begins every text with a space, the answer has one already, as text that goes on would."""
    tokenizer = letters(llama=True)
    chats = Dataset.from_dict({"dialog": [["hi", "yo", "ok"]]})
    assert shown(tokenizer, dialogue_rows(chats, tokenizer, COMP)[0]).endswith("A:_yo\nA:[_ok$]")


def test_bad_data_is_refused():
    chats = Dataset.from_dict({"dialog": [["hi", "yo", "ok"], ["hi", None, "ok"], None]})
    with pytest.raises(ValueError, match="'talk' is not among the columns"):
        dialogue_rows(chats, letters(), COMP, turns="talk")
    for row in (1, 2):
        with pytest.raises(ValueError, match="row 1: 'dialog' has no value"):
            dialogue_rows(chats.select([0, row]), letters(), COMP)
    with pytest.raises(TypeError, match="one split at a time"):
        dialogue_rows(DatasetDict(train=chats), letters(), COMP)
    with pytest.raises(ValueError, match="max_tokens=0"):
        dialogue_rows(chats, letters(), COMP, max_tokens=0)
    with pytest.raises(ValueError, match=r"row 0: .* holds COMP tokens"):
        dialogue_rows(chats.select([0]), letters(), letters().convert_tokens_to_ids(["o", "k"]))


GOOD = {
    "dialog": ["a", "b", "c"],
    "profile": ["x"],
    "shown": [{"input": "a", "output": "b"}],
    "input": "q",
    "output": "r",
}


@pytest.mark.parametrize(
    ("make", "column", "value", "error", "says"),
    [
        (dialogue_rows, "dialog", ["a", " ", "c"], ValueError, "'dialog' holds an empty text"),
        (dialogue_rows, "dialog", ["a", "b", ""], ValueError, "'dialog' holds an empty text"),
        (dialogue_rows, "dialog", "abcd", TypeError, "'dialog' holds str where a list belongs"),
        (dialogue_rows, "dialog", [{"role": "user"}] * 3, TypeError, "'dialog' holds dict where a text belongs"),
        (profile_rows, "profile", ["x", ""], ValueError, "'profile' holds an empty text"),
        (profile_rows, "profile", [{"text": "x"}], TypeError, "'profile' holds dict where a text belongs"),
        (profile_rows, "profile", "x", TypeError, "'profile' holds str where a list belongs"),
        (profile_rows, "output", 3, TypeError, "'output' holds int where a text belongs"),
        (profile_rows, "output", "", ValueError, "'output' holds an empty text"),
        (profile_rows, "input", None, ValueError, "'input' has no value"),
        (demonstration_rows, "shown", [{"input": "a", "output": None}], ValueError, "'shown.output' has no value"),
        (demonstration_rows, "shown", [{"x": "a"}], TypeError, '"input": .., "output": ..'),
        (demonstration_rows, "shown", ["a"], TypeError, '"input": .., "output": ..'),
        (demonstration_rows, "output", " ", ValueError, "'output' holds an empty text"),
    ],
)
def test_values_of_another_kind_are_refused(make, column, value, error, says):
    """Instead of a row that trains on "None", on letters for turns, or on a space."""
    more = {"demonstrations": "shown"} if make is demonstration_rows else {}
    good = {name: [given] for name, given in GOOD.items()}
    make(Dataset.from_dict(good), letters(), COMP, **more)
    with pytest.raises(error, match=f"row 0: .*{says}"):
        make(Dataset.from_dict(good | {column: [value]}), letters(), COMP, **more)


@pytest.mark.parametrize("contexts", [0, -1, 1.5])
def test_contexts_are_counted(contexts):
    users = Dataset.from_dict({"profile": [["x", "y"]], "input": ["q"], "output": ["r"]})
    with pytest.raises(ValueError, match=f"contexts={contexts}"):
        profile_rows(users, letters(), COMP, contexts=contexts)


def test_bad_batches_are_refused():
    with pytest.raises(ValueError, match="padding_side='top'"):
        CCMCollator(0, "top")
    with pytest.raises(TypeError, match="pad_token_id=None"):
        CCMCollator(None)
    with pytest.raises(ValueError, match="pad_to_multiple_of=-8"):
        CCMCollator(0, pad_to_multiple_of=-8)
    silent = {"input_ids": [1, *COMP], "labels": [-100] * 3, "segment_ids": [1] * 3, "comp_slot": [-1, 0, 1]}
    with pytest.raises(ValueError, match="1 rows hold no query"):
        CCMCollator(0, full_context=True)([silent])
