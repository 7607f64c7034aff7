"""``dataopt ccm``: train, chat and stream, on tiny random models."""

import json
import math
import re

import pytest
import torch
from dataopt.ccm_commands import Asked, load
from dataopt.cli import app
from dataopt.integrations.hf import CCMCache, CCMConfig, CCMModel, CCMStream
from typer.testing import CliRunner

from .integrations.hf.kvzip.conftest import byte_tokenizer, tiny

SAID = ["I keep bees.", "How many?", "Nine hives."]


def run(*args, stdin=None):
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, ["ccm", *map(str, args)], input=stdin)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny(num_hidden_layers=2).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "talks.jsonl"
    turns = [[f"I have {i} bees.", "How many?", f"{i}, as I said.", "Oh."] for i in range(20)]
    path.write_text("\n".join(json.dumps({"dialog": t}) for t in turns))
    return path


TRAIN = ("--steps", 6, "--batch-size", 4, "--micro-batch", 4, "--test-rows", 4, "--lr", 0.01, "--comp-tokens", 1)


@pytest.fixture(scope="module")
def adapter(model, talks, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "adapter"
    result = run("train", talks, "--model", model, "--out", out, *TRAIN, "--multi-query", "--full-context-steps", 4)
    assert result.exit_code == 0, result.stderr
    assert "loss from" in result.stdout
    return out


def test_training_leaves_an_adapter_and_says_what_it_is_worth(adapter, talks):
    report = json.loads((adapter / "report.json").read_text())
    held = report["held_out"]
    assert list(held) == ["no context", "CCM", "full context"]
    assert all(0 < row["loss"] < 20 for row in held.values())
    # Queries behind one and two turns; one COMP token each; the text of the turns in bytes.
    lengths = [len(f"A: I have {i} bees.") for i in range(16, 20)]
    more = len("\nA: How many?")
    assert held["full context"]["pairs"] == pytest.approx(sum(2 * n + more for n in lengths) / 8)
    assert held["CCM"]["pairs"] == 1.5 and held["no context"]["pairs"] == 0
    found, tokenizer = load(str(adapter), Asked(None, "auto", "cpu", None))
    assert found.ccm_config.comp_tokens == 1
    assert (adapter / "base" / "model.safetensors").is_file()
    assert len(tokenizer) and not found.training


def test_a_stopped_run_goes_on(model, talks, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run("train", talks, "--model", model, "--out", whole, *TRAIN).exit_code == 0
    assert run("train", talks, "--model", model, "--out", cut, *TRAIN).exit_code == 0
    # As it would lie there, stopped after the last checkpoint but one.
    (cut / "adapter_model.safetensors").unlink()
    again = run("train", talks, "--model", model, "--out", cut, *TRAIN, "--resume")
    assert again.exit_code == 0, again.stderr
    a, b = (CCMModel.from_pretrained(tiny(num_hidden_layers=2), f) for f in (whole, cut))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    refused = run("train", talks, "--model", model, "--out", whole, *TRAIN)
    assert refused.exit_code == 1 and "not empty" in refused.stderr
    other = run("train", talks, "--model", model, "--out", cut, *TRAIN, "--seed", 5, "--resume")
    assert other.exit_code == 1 and "other values of seed" in other.stderr


@pytest.mark.parametrize(
    ("form", "row"),
    [
        ("demonstrations", {"demonstrations": [{"input": "a", "output": "b"}], "input": "c", "output": "d"}),
        ("profile", {"profile": ["x likes y"], "input": "what?", "output": "y"}),
    ],
)
def test_other_forms(form, row, model, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([json.dumps(row)] * 6))
    out = tmp_path / "out"
    result = run(
        "train", path, "--model", model, "--out", out, "--form", form, *TRAIN, "--mode", "merge", "--distill", 1
    )
    assert result.exit_code == 0, result.stderr
    assert (out / "adapter_model.safetensors").is_file()


def test_a_conversation_shows_what_it_costs(adapter, tmp_path):
    kept = tmp_path / "memory"
    result = run("chat", adapter, "--memory", kept, "--max-new-tokens", 4, stdin="\n".join(SAID) + "\n")
    assert result.exit_code == 0, result.stderr
    costs = [
        tuple(map(int, re.findall(r"[\d]+", line.replace(",", ""))))
        for line in result.stdout.splitlines()
        if "[memory" in line
    ]
    assert len(costs) == 3
    model, tokenizer = load(str(adapter), Asked(None, "auto", "cpu", None))
    per_pair = 2 * 2 * 2 * 32 * 4
    for pairs, nbytes, read, full in costs:
        assert nbytes == pairs * per_pair and full == read * per_pair
    assert costs[0][0] <= 2 and costs[-1][0] <= 6 and costs[-1][2] > sum(map(len, SAID))
    # The first answer is that of the memory by hand.
    memory = CCMCache(model, tokenizer)
    inputs = memory.inputs(f"A: {SAID[0]}\nA:")
    out = model.generate(**inputs, past_key_values=memory, max_new_tokens=4, do_sample=False)
    text = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert result.stdout.splitlines()[0] == text.split("\nA:")[0].strip() or "\n" in text
    again = run("chat", adapter, "--memory", kept, "--max-new-tokens", 4, stdin="Bye.\n")
    assert again.exit_code == 0, again.stderr
    assert int(re.search(r"memory: (\d+)", again.stdout)[1]) > costs[-1][0]


def test_a_text_is_read_within_the_limit(adapter, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(" ".join(SAID) * 12)
    sizes = ("--max-pairs", 40, "--memory", 4, "--chunk", 16)
    result = run("stream", adapter, file, *sizes, "--continue", 30)
    assert result.exit_code == 0, result.stderr
    model, tokenizer = load(str(adapter), Asked(None, "auto", "cpu", None))
    stream = CCMStream(model, tokenizer, max_pairs=40, memory=4, chunk=16)
    loss = -float(stream.feed(file.read_text())[1:].mean())
    assert f"perplexity {math.exp(loss):.2f}" in result.stdout
    assert int(re.search(r"at most (\d+) pairs", result.stdout)[1]) <= 41
    assert result.stdout.split("compressions\n")[1].strip()


def test_a_half_written_base_is_not_taken_for_one(model, talks, tmp_path):
    """What a kill leaves while the model of the first stage is saved."""
    out, more = tmp_path / "out", (*TRAIN, "--full-context-steps", 2)
    assert run("train", talks, "--model", model, "--out", out, *more).exit_code == 0
    (out / "base").rename(out / ".base")
    (out / ".base" / "model.safetensors").unlink()
    result = run("train", talks, "--model", model, "--out", out, *more, "--resume")
    assert result.exit_code == 0, result.stderr
    assert (out / "base" / "model.safetensors").is_file() and not (out / ".base").exists()


def test_refusals(adapter, model, talks, tmp_path):
    for args, says in (
        (
            ("train", talks, "--model", model, "--out", tmp_path / "a", "--column", "talk"),
            "'talk' is not among the columns",
        ),
        (("train", talks, "--model", model, "--out", tmp_path / "b", "--test-rows", 20), "leave none to train on"),
        (("train", talks, "--model", model, "--out", tmp_path / "c", "--ema", 0.5), "mode='merge'"),
        (("chat", model, "--model", model), "is missing"),
        (("stream", adapter, tmp_path / "nowhere.txt"), "No such file"),
        (("stream", adapter, talks, "--max-pairs", 10), "max_pairs=10 must be more than"),
    ):
        result = run(*args, stdin="")
        assert result.exit_code == 1 and says in result.stderr, (args, result.stderr)
        assert len(result.stderr.strip().splitlines()) == 1 or "|" in result.stderr
    assert not any((tmp_path / name).exists() for name in "abc")
    bare = tmp_path / "bare"
    CCMModel(tiny(num_hidden_layers=2), CCMConfig()).save_pretrained(bare)
    result = run("chat", bare, stdin="")
    assert result.exit_code == 1 and "name it with --model" in result.stderr
