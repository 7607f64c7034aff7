"""``dataopt ccm``: train, chat and stream, on tiny random models."""

import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from dataopt import ccm_commands
from dataopt.ccm_commands import Asked, load
from dataopt.cli import app
from dataopt.devices import find_device
from dataopt.integrations.hf import CCMCache, CCMConfig, CCMModel, CCMStream
from dataopt.out_folder import claimed
from safetensors.torch import load_file
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
    other = run("train", talks, "--model", model, "--out", cut, *TRAIN, "--dtype", "float16", "--resume")
    assert other.exit_code == 1 and "other values of dtype" in other.output
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


def test_the_instruction_of_a_profile_has_a_column(model, tmp_path, monkeypatch):
    path, out = tmp_path / "rows.jsonl", tmp_path / "out"
    row = {"profile": ["x likes y"], "input": "what?", "output": "y", "task": "Name it"}
    path.write_text("\n".join([json.dumps(row)] * 6))
    made, make = [], ccm_commands.profile_rows
    monkeypatch.setattr(ccm_commands, "profile_rows", lambda *a, **k: made.append(make(*a, **k)) or made[0])
    profile = ("train", path, "--model", model, "--out", out, "--form", "profile", *TRAIN)
    result = run(*profile, "--instruction-column", "job")
    assert result.exit_code == 1 and "'job' is not among the columns" in result.stderr
    result = run(*profile, "--instruction-column", "task")
    assert result.exit_code == 0, result.stderr
    assert ". Name it\nInput: what?\nOutput: y" in byte_tokenizer().decode(made[0][0]["input_ids"])
    other = run(*profile, "--resume")
    assert other.exit_code == 1 and "other values of instruction_column" in other.stderr


def test_reserved_tokens_leave_the_vocabulary_as_it_is(model, talks, tmp_path):
    reserved, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(model, reserved)
    tokenizer = byte_tokenizer()
    # The tiny model has 264 rows, and of the 260 tokens before these bytes and special ones.
    tokenizer.add_tokens([f"<unused{i}>" for i in range(6)])
    tokenizer.save_pretrained(reserved)
    options = (*TRAIN, "--reserved-tokens", "--comp-tokens")
    result = run("train", talks, "--model", reserved, "--out", out, *options, 5)
    assert result.exit_code == 1 and "the vocabulary has 4 reserved tokens and --comp-tokens is 5" in result.stderr
    result = run("train", talks, "--model", reserved, "--out", out, *options, 2)
    assert result.exit_code == 0, result.stderr
    found, _ = load(str(out), Asked(None, "auto", "cpu", None))
    assert found.comp_ids == [262, 263] and len(found.language_model.get_input_embeddings().weight) == 264


# ---- several processes


def torchrun(*args):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dataopt"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "ccm", *map(str, args)], env=env, capture_output=True, text=True, timeout=200, check=False
    )


def test_two_processes_train_together_and_the_first_one_writes(model, talks, tmp_path):
    out = tmp_path / "out"
    sizes = ("--steps", 6, "--batch-size", 4, "--micro-batch", 2, "--test-rows", 4, "--comp-tokens", 1, "--lr", 0.01)
    train = ("train", talks, "--model", model, "--out", out, *sizes, "--full-context-steps", 3, "--device", "cpu")
    result = torchrun(*train)
    assert result.returncode == 0, result.stderr[-5000:]
    assert result.stdout.count("Wrote the adapter") == 1
    state = out / "work" / "adapter" / "checkpoint-6" / "trainer_state.json"
    assert json.loads(state.read_text())["epoch"] == 6 * 4 / 16  # four rows a step, of both
    report = json.loads((out / "report.json").read_text())
    assert len(report["losses"]) == 6 and report["rows"] == 16
    load(str(out), Asked(None, "auto", "cpu", None))
    assert not list(out.rglob(".*"))
    # Stopped while it wrote its last checkpoint: both go on from what is whole, here the base, to the same weights.
    files = [out / "adapter_model.safetensors", out / "base" / "model.safetensors"]
    before = [load_file(file) for file in files]
    files[0].unlink()
    state.write_text("{")
    again = torchrun(*train, "--resume")
    assert again.returncode == 0, again.stderr[-5000:]
    for old, file in zip(before, files, strict=True):
        new = load_file(file)
        assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)


def test_the_first_of_several_processes_claims_for_all(tmp_path, monkeypatch):
    """The second one found the notes of the first, and refused the folder."""
    out, command = tmp_path / "out", "dataopt ccm train"
    begun = out / "work" / "arguments.json"
    with pytest.raises(RuntimeError), claimed(out, {"a": 1}, False, command, together=True):
        monkeypatch.setenv("RANK", "1")
        with claimed(out, {"a": 1}, False, command, together=True):
            assert begun.exists()
        with pytest.raises(TypeError), claimed(out, {"a": 2}, False, command, together=True):
            raise TypeError  # a launch that was refused, since another one is at work there
        assert begun.exists()
        with pytest.raises(TypeError), claimed(out, {"a": 1}, False, command, together=True):
            raise TypeError  # one that fails takes the claim back, whoever is quicker
        assert not begun.exists()
        raise RuntimeError
    monkeypatch.setenv("RANK", "0")
    with claimed(out, {"a": 2}, False, command, together=True):
        pass
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match="not empty"), claimed(out, {"a": 2}, False, command):
        pass  # a command that knows nothing of several processes


def test_each_process_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: None)
    assert find_device("auto") == torch.device("cuda")
    for rank, gpu in (("0", 0), ("1", 1), ("3", 1)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert find_device("auto") == torch.device("cuda", gpu) and find_device("cpu").type == "cpu"


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
    made = load_file(out / "base" / "model.safetensors")
    (out / "base").rename(out / ".base")
    (out / ".base" / "model.safetensors").unlink()
    result = run("train", talks, "--model", model, "--out", out, *more, "--resume")
    assert result.exit_code == 0, result.stderr
    again = load_file(out / "base" / "model.safetensors")
    assert all(torch.equal(made[name], again[name]) for name in made) and not (out / ".base").exists()


def test_refusals(adapter, model, talks, tmp_path):
    for args, says in (
        (
            ("train", talks, "--model", model, "--out", tmp_path / "a", "--column", "talk"),
            "'talk' is not among the columns",
        ),
        (("train", talks, "--model", model, "--out", tmp_path / "b", "--test-rows", 20), "leave none to train on"),
        (("train", talks, "--model", model, "--out", tmp_path / "c", "--ema", 0.5), "mode='merge'"),
        (
            ("train", talks, "--model", model, "--out", tmp_path / "d", "--instruction-column", "task"),
            "--instruction-column task goes with --form profile",
        ),
        (
            ("train", talks, "--model", model, "--out", tmp_path / "e", "--reserved-tokens"),
            "--reserved-tokens: the vocabulary has 0 reserved tokens",
        ),
        (("chat", model, "--model", model), "is missing"),
        (("stream", adapter, tmp_path / "nowhere.txt"), "No such file"),
        (("stream", adapter, talks, "--max-pairs", 10), "max_pairs=10 must be more than"),
    ):
        result = run(*args, stdin="")
        assert result.exit_code == 1 and says in result.stderr, (args, result.stderr)
        assert len(result.stderr.strip().splitlines()) == 1 or "|" in result.stderr
    assert not any((tmp_path / name).exists() for name in "abcde")
    bare = tmp_path / "bare"
    CCMModel(tiny(num_hidden_layers=2), CCMConfig()).save_pretrained(bare)
    result = run("chat", bare, stdin="")
    assert result.exit_code == 1 and "name it with --model" in result.stderr
