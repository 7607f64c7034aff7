"""The long commands with one or two options spoiled: they do what they are told, or refuse in a sentence."""

import importlib
import shutil
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import transformers  # noqa: F401  its log would go to the first command's output for good
import typer
from dataopt.cli import app
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from .budget import tries

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
COMMANDS = {
    "clean": "clean {i}/reviews.csv --model {i}/text --out {out} --device cpu",
    "condense": "condense {i}/pictures --out {out} --images-per-class 1 --width 4 --early-steps 2 --steps 2 "
    "--init centres",
    "ccm train": "ccm train {i}/talks.jsonl --model {i}/language --out {out} --steps 2 --batch-size 4 --test-rows 4",
    "kvzip compress": "kvzip compress {i}/note.txt --model {i}/language --out {out} --device cpu",
}
# no name that the Hub could know, and no number of steps that takes long
VALUES = (
    "", "  ", "x y", "-1", "0", "1", "2", "7", "0.5", "1.5", "1e30", "nan", "inf", "1e-320", "/nonexistent/a", "é",
    "None", "cuda:7", "meta", "{i}", "{i}/note.txt", "{i}/reviews.csv", "{i}/pictures", "{i}/text", "{i}/language",
    "[1,2]", "-", "float16", "train", "timm:", "'", "label", "head", "merge", "noise",
)  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    sys.path.insert(0, str(BENCHMARKS))
    try:
        importlib.import_module("endurance_commands").make_inputs(folder, 60)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return folder


def options(words: list[str]) -> list[typer.core.TyperOption]:
    command = typer.main.get_command(app)
    for word in words:
        command = command.commands.get(word, command) if hasattr(command, "commands") else command
    command = command.commands["data"] if hasattr(command, "commands") else command  # of condense
    return [p for p in command.params if p.opts[0].startswith("--") and p.name not in ("help", "push")]


@pytest.mark.parametrize("name", COMMANDS)
@tries(8)
@given(data=st.data())
def test_spoiled_options(name, inputs, data):
    out = inputs.parent / f"out of {name}"
    shutil.rmtree(out, ignore_errors=True)
    words = COMMANDS[name].split()
    spoiled = data.draw(st.lists(st.sampled_from(options(words)), min_size=1, max_size=2, unique=True), "spoiled")
    for option in spoiled:
        flag, value = option.opts[0], data.draw(st.sampled_from(VALUES), option.opts[0])
        if option.is_flag:
            words.append(flag)
        elif flag in words:
            words[words.index(flag) + 1] = value
        else:
            words += [flag, value]
    places = {"i": str(inputs), "out": str(out)}
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(inputs.parent)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # the environment is read at import only
        result = CliRunner().invoke(app, [w.format(**places) if "{i}" in w or w == "{out}" else w for w in words])
    torch.set_num_threads(threads)
    if not isinstance(result.exception, SystemExit | None):
        raise result.exception
    assert result.exit_code in (0, 1, 2) and "Traceback" not in result.output
    if result.exit_code == 1:
        last = result.stderr.strip().splitlines()[-1]
        assert len(last) > 10, result.output
