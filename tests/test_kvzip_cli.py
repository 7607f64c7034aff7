"""``dataopt kvzip``: compress, ask and sweep, on tiny random models."""

import io
import json
import os
import pty
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from dataopt import kvzip_sweep, plots
from dataopt.cli import app
from dataopt.integrations.hf import KVzipCache
from dataopt.integrations.hf.chat import encode
from dataopt.language_models import Source
from PIL import Image
from typer.testing import CliRunner

from .hub.fixtures import hub, run_client
from .integrations.hf.kvzip.conftest import HYBRIDS, byte_tokenizer, tiny
from .test_cli import dataopt_command

__all__ = ["hub"]  # a fixture

TEXT = (
    "Ada keeps the blue key in a tin behind the oven. Ben sold his boat to a painter from Ghent. The train to the "
    "coast leaves at nine. Nobody has seen the grey cat since Tuesday."
)
QUESTIONS = ["Where is the key?", "Who bought the boat?", "When does it leave, the train to the coast?"]


def run(*args, stdin=None):
    # wide, so that a line of a message stays a line
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, ["kvzip", *map(str, args)], input=stdin)


def saved(folder: Path, kind="llama", **changes) -> Path:
    tiny(kind, **changes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "note.txt"
    path.write_text(TEXT + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def compressed(model, text, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out") / "cache"
    result = run("compress", text, "--model", model, "--ratio", "0.4", "--out", out)
    assert result.exit_code == 0, result.stderr
    return out


def loaded(model: Path, folder: Path) -> KVzipCache:
    return KVzipCache.from_pretrained(folder, *Source(str(model)).load())


def greedy(cache: KVzipCache, question: str, tokens: int) -> str:
    """What plain ``generate`` answers, and the tail stays in the cache."""
    inputs = cache.inputs(question)
    out = cache.model.generate(**inputs, past_key_values=cache, max_new_tokens=tokens, do_sample=False)
    cache.output = out
    return cache.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("compress", ("FILE", "--ratio", "--max-tokens", "--bits", "--head-scores", "--keep-scores", "--overwrite")),
        ("ask", ("CACHE", "QUESTION", "--model", "--max-new-tokens", "--conversation", "--cache-revision")),
        ("sweep", ("FILE", "--ratios", "--questions", "--chunk", "--out")),
    ],
)
def test_help(command, words):
    shown = dataopt_command("kvzip", command, "--help", without="torch,transformers")
    assert shown.returncode == 0, shown.stderr
    for word in words:
        assert word in shown.stdout


def test_compress_writes_a_cache_that_is_the_librarys(model, text, compressed):
    cache = loaded(model, compressed)
    direct = KVzipCache(cache.model, cache.tokenizer, TEXT, ratio=0.4)
    assert cache.lengths.tolist() == direct.lengths.tolist() and cache.nbytes == direct.nbytes
    assert greedy(cache, QUESTIONS[0], 12) == greedy(direct, QUESTIONS[0], 12)
    assert Image.open(compressed / "kept.png").format == "PNG"


def test_compress_passes_every_option_on(model, text, tmp_path):
    given = {
        "ratio": 0.5, "level": "pair", "budget": "layer", "max_tokens": 60, "instruction": "Read this.", "chunk": 50,
        "prefill_chunk": 70, "norm": "subset", "recent": 9, "bits": 8, "keep_scores": True,
    }  # fmt: skip
    flags = [
        part
        for name, value in given.items()
        for part in ([f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)]))
    ]
    result = run("compress", text, "--model", model, "--out", tmp_path / "a", "--dtype", "bfloat16", *flags)
    assert result.exit_code == 0, result.stderr
    record = json.loads((tmp_path / "a/kvzip.json").read_text())
    assert record["options"] == given and record["fingerprint"]["dtype"] == "bfloat16"
    cache = KVzipCache.from_pretrained(tmp_path / "a", *Source(str(model), "bfloat16").load())
    assert f"{cache.full_nbytes:,} bytes before, {cache.nbytes:,} after" in result.stdout
    # and heads by the scores of that cache, without a scoring pass
    scores = tmp_path / "heads"
    cache.save_head_scores(scores)
    args = ("--level", "head", "--head-scores", scores, "--dtype", "bfloat16", "--recent", 9)
    result = run("compress", "-", "--model", model, "--out", tmp_path / "b", *args, stdin=TEXT)
    assert result.exit_code == 0, result.stderr
    assert json.loads((tmp_path / "b/kvzip.json").read_text())["options"]["level"] == "head"


@pytest.mark.parametrize(
    ("args", "content", "words"),
    [
        (("--ratio", "0"), TEXT, "ratio=0.0"),
        (("--ratio", "nan"), TEXT, "ratio=nan"),
        (("--chunk", "0"), TEXT, "chunk=0"),
        (("--max-tokens", "0"), TEXT, "max_tokens=0"),
        (("--level", "head", "--budget", "layer"), TEXT, "level='head'"),
        (("--head-scores", "heads"), TEXT, "head_scores needs level='head'"),
        (("--device", "cuda:99"), TEXT, "device='cuda:99' cannot be used"),
        (("--device", "nonsense"), TEXT, "device='nonsense' cannot be used"),
        (("--model", "smollm2", "--revision", "main"), TEXT, "is a pip package; leave it out"),
        (("--model", "/no/such/folder"), TEXT, "/no/such/folder"),
        ((), b" \n", "must be a text with at least one word"),
        ((), b"caf\xe9", "is not UTF-8 text (byte 3)"),
        ((), None, "No such file"),
    ],
)
def test_compress_refuses_in_one_line_and_writes_nothing(model, tmp_path, args, content, words):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    result = run("compress", path, "--model", model, "--out", tmp_path / "out", *args)
    assert result.exit_code == 1
    assert words in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("args", [("--bits", "3"), ("--level", "word"), ("--budget", "x"), ("--ratio", "half"), ()])
def test_compress_refuses_what_is_no_option(tmp_path, args):
    result = run("compress", tmp_path, *(("--model", "m", "--out", tmp_path / "out") if args else ()), *args)
    assert result.exit_code == 2 and (args[0] if args else "--model") in result.stderr


def test_a_folder_with_something_in_it_is_overwritten_only_when_told(model, text, tmp_path):
    (tmp_path / "mine").write_text("keep me")
    args = ("compress", text, "--model", model, "--ratio", "0.4", "--out", tmp_path)
    result = run(*args)
    assert result.exit_code == 1 and "is not empty" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    for _ in range(2):
        assert run(*args, "--overwrite").exit_code == 0
    assert (tmp_path / "mine").read_text() == "keep me"
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    loaded(model, tmp_path)


def test_ask_answers_many_at_once_as_each_alone(model, compressed):
    cache = loaded(model, compressed)
    expected = [greedy(cache, q, 10) for q in QUESTIONS]
    assert len(set(expected)) == 3  # or a random model that always says the same would pass
    args = ("--model", model, "--max-new-tokens", "10")
    result = run("ask", compressed, *QUESTIONS, *args)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "".join(f"> {q}\n{a}\n\n" for q, a in zip(QUESTIONS, expected, strict=True))
    piped = run("ask", compressed, *args, stdin="\n".join(["", *QUESTIONS, ""]))
    assert piped.stdout == result.stdout
    assert run("ask", compressed, QUESTIONS[1], *args).stdout == expected[1] + "\n"


def test_ask_as_a_conversation(model, compressed):
    cache = loaded(model, compressed)
    alone = greedy(cache, QUESTIONS[1], 10)
    expected = []
    for q in QUESTIONS:
        expected.append(greedy(cache, q, 10))
        cache.keep(cache.output)
    assert expected[1] != alone
    result = run("ask", compressed, *QUESTIONS, "--model", model, "--max-new-tokens", "10", "--conversation")
    assert result.stdout == "".join(f"> {q}\n{a}\n\n" for q, a in zip(QUESTIONS, expected, strict=True))


def test_ask_a_model_with_sliding_windows(text, tmp_path):
    folder = saved(tmp_path / "model", "gemma3_text", **HYBRIDS["gemma3_text"])
    assert run("compress", text, "--model", folder, "--out", tmp_path / "c").exit_code == 0
    cache = loaded(folder, tmp_path / "c")
    result = run("ask", tmp_path / "c", *QUESTIONS, "--model", folder, "--max-new-tokens", "6")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "".join(f"> {q}\n{greedy(cache, q, 6)}\n\n" for q in QUESTIONS)


def test_ask_at_a_prompt(model, compressed):
    """In a terminal of its own: two questions, then the end of the input."""
    cache = loaded(model, compressed)
    expected = [greedy(cache, q, 10) for q in QUESTIONS[:2]]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "dataopt", "kvzip", "ask", compressed, "--model", model, "--max-new-tokens", "10"],
        stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"TERM": "dumb"},
    )  # fmt: skip
    os.close(theirs)
    os.write(ours, "".join(q + "\n" for q in QUESTIONS[:2]).encode() + b"\n")
    timer = threading.Timer(120, process.kill)
    timer.start()
    shown, errors = process.communicate()
    timer.cancel()
    os.close(ours)
    assert process.returncode == 0 and not errors
    assert "An empty line ends." in shown and shown.count("> ") >= 3
    for answer in expected:
        assert answer in shown


def test_ask_a_repository_with_the_model_that_it_names(hub, model, text):
    """Model and cache on a Hub: nothing but the name of the cache is given."""
    code = f"""
from huggingface_hub import HfApi
from typer.testing import CliRunner
from dataopt.cli import app
HfApi().create_repo("me/tiny")
HfApi().upload_folder(repo_id="me/tiny", folder_path={str(model)!r})
run = lambda *args: CliRunner().invoke(app, ["kvzip", *args])
made = run("compress", {str(text)!r}, "--model", "me/tiny", "--ratio", "0.4", "--out", "OUT")
assert made.exit_code == 0, made.stderr
HfApi().create_repo("me/note", private=True)
HfApi().upload_folder(repo_id="me/note", folder_path="OUT")
asked = [run("ask", where, {QUESTIONS[0]!r}, "--max-new-tokens", "10") for where in ("OUT", "me/note")]
assert asked[0].exit_code == 0 and asked[0].stdout == asked[1].stdout, asked[1].stderr
print(asked[1].stdout, end="")
missing = run("ask", "me/none", "Who?")
assert missing.exit_code == 1 and len(missing.stderr.strip().splitlines()) == 1, missing.stderr
"""
    folder = Path(text).parent / "OUT"
    answer = run_client(hub, code.replace('"OUT"', repr(str(folder))), HF_HUB_DISABLE_PROGRESS_BARS="1")
    assert answer == greedy(loaded(model, folder), QUESTIONS[0], 10) + "\n"


@pytest.mark.parametrize("questions", [("",), (QUESTIONS[0], " ")])
def test_ask_refuses_an_empty_question(model, compressed, questions):
    result = run("ask", compressed, *questions, "--model", model)
    assert result.exit_code == 1 and "empty" in result.stderr


def test_ask_refuses_in_one_line(model, compressed, tmp_path):
    other = saved(tmp_path / "other", seed=1)
    (tmp_path / "empty").mkdir()
    for args, stdin, words in (
        ((compressed, "--model", model), "\n\n", "no question"),
        ((compressed, "Who?"), None, "--model"),
        ((compressed, "Who?", "--model", other), None, "another model: its weights differ"),
        ((tmp_path / "none", "Who?", "--model", model), None, "is no folder"),
        ((tmp_path / "empty", "Who?", "--model", model), None, "kvzip.json is missing"),
        ((compressed, "Who?", "--model", model, "--cache-revision", "x"), None, "is for the Hub"),
    ):
        result = run("ask", *args, stdin=stdin)
        assert result.exit_code == 1 and not result.stdout, args
        assert words in result.stderr and len(result.stderr.strip().splitlines()) == 1, result.stderr


def test_an_adapter_with_tokens_of_its_own_is_no_model(model, text, tmp_path):
    from dataopt.integrations.hf import CCMConfig, CCMModel
    from transformers import AutoModelForCausalLM

    CCMModel(AutoModelForCausalLM.from_pretrained(model), CCMConfig()).save_pretrained(tmp_path / "adapter")
    result = run("compress", text, "--model", tmp_path / "adapter", "--out", tmp_path / "out")
    assert result.exit_code == 1 and "is an adapter with tokens of its own, as CCM trains" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_head_is_refused(model, text, tmp_path):
    from transformers import AutoModel, AutoTokenizer

    AutoModel.from_pretrained(model).save_pretrained(tmp_path / "trunk")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "trunk")
    result = run("compress", text, "--model", tmp_path / "trunk", "--out", tmp_path / "out")
    assert result.exit_code == 1 and "has no language-model head; give a model that writes text" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_process_without_the_extra_or_matplotlib(model, text, tmp_path):
    without = dataopt_command("kvzip", "ask", "x", "Who?", without="transformers")
    assert without.returncode == 1 and len(without.stderr.strip().splitlines()) == 1
    assert 'pip install "dataopt[hf]"' in without.stderr
    out = tmp_path / "out"
    plain = dataopt_command("kvzip", "compress", text, "--model", model, "--out", out, without="matplotlib")
    assert plain.returncode == 0 and not plain.stderr
    assert 'pip install "dataopt[plots]"' in plain.stdout
    assert (out / "kvzip.json").exists() and not (out / "kept.png").exists()


def test_sweep(model, text, tmp_path):
    pairs = [("Where is the key?", "in a tin"), ("Who bought the boat?", "a painter")]
    questions = tmp_path / "q.tsv"
    questions.write_text("".join(f"{q}\t{a}\n" for q, a in pairs))
    out = tmp_path / "out"
    args = ("--ratios", ".3,1,0.5", "--questions", questions, "--out", out, "--chunk", "100", "--budget", "layer")
    result = run("sweep", text, "--model", model, *args)
    assert result.exit_code == 0, result.stderr
    report = json.loads((out / "sweep.json").read_text())
    assert [row["ratio"] for row in report["rows"]] == [1, 0.5, 0.3]
    assert all(line in result.stdout for line in report["table"])
    assert Image.open(out / "sweep.png").format == "PNG" and len(list(out.iterdir())) == 2
    # each row is that of a cache that was compressed to this ratio from the start
    loaded_model, tokenizer = Source(str(model)).load()
    for row in report["rows"]:
        cache = KVzipCache(loaded_model, tokenizer, TEXT, ratio=row["ratio"], chunk=100, budget="layer")
        assert row["nbytes"] == cache.nbytes and row["step_seconds"] > 0
        assert row["reconstruction"] == pytest.approx(kvzip_sweep.reconstruction(cache), abs=1e-4)
    # and at 1 the answers' loss is that of the plain model on the plain text
    total, count = 0.0, 0
    for q, a in pairs:
        start = [*cache._states[0].ids, *cache.inputs(q)["input_ids"][0].tolist()]
        own = encode(tokenizer, a)
        with torch.no_grad():
            logits = loaded_model(torch.tensor([[*start, *own]])).logits[0, len(start) - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(own), reduction="sum"))
        count += len(own)
    assert report["rows"][0]["answers"] == pytest.approx(total / count, abs=1e-4)
    assert report["rows"][0]["right"] in (0, 0.5, 1)
    again = run("sweep", text, "--model", model, *args)
    assert again.exit_code == 1 and "is not empty" in again.stderr


def test_reconstruction_at_one_is_that_of_the_plain_model(model):
    loaded_model, tokenizer = Source(str(model)).load()
    cache = KVzipCache(loaded_model, tokenizer, TEXT, ratio=1.0)
    state = cache._states[0]
    ids = state.ids[state.prefix :]
    start = round(0.5 * (len(ids) - 20))  # the middle one of a single piece
    last, part = ids[start - 8 : start], ids[start : start + 20]
    ask = encode(tokenizer, "\n\nRepeat the part of the previous context exactly, starting with ")
    prompt = [*state.ids, *ask, *last, *encode(tokenizer, "<|im_end|>\n<|im_start|>assistant\n")]
    with torch.no_grad():
        logits = loaded_model(torch.tensor([[*prompt, *part]])).logits[0, len(prompt) - 1 : -1]
    expected = float(torch.nn.functional.cross_entropy(logits, torch.tensor(part)))
    assert kvzip_sweep.reconstruction(cache, pieces=1, size=20) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("ratios", ["", "a", "1,,.5", "0,.5", "1.5", "nan"])
def test_sweep_refuses_ratios(ratios):
    with pytest.raises(ValueError, match="ratios="):
        kvzip_sweep.read_ratios(ratios)


@pytest.mark.parametrize(
    ("text", "words"), [("", "empty"), ("\n\n", "empty"), ("a\tb\nc", "line 2"), ("\tb", "line 1")]
)
def test_sweep_refuses_questions(text, words):
    with pytest.raises(ValueError, match=words):
        kvzip_sweep.read_questions(text)


def test_ratios_and_questions_as_they_are_typed():
    assert kvzip_sweep.read_ratios(" .1, 1,.5,0.5") == [1, 0.5, 0.1]
    assert kvzip_sweep.read_questions("Who?\tAda\r\n\n When? \t at nine \n") == [("Who?", "Ada"), ("When?", "at nine")]


def picture_of(figure) -> Image.Image:
    return Image.open(io.BytesIO(plots.to_png(figure)))


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (30, 3), (80, 8)])
def test_the_picture_of_what_was_kept(shape):
    lengths = np.random.default_rng(0).integers(0, 200, shape)
    figure = plots.show_kept(lengths, 200)
    heat = figure.axes[0].images[0]
    assert np.allclose(heat.get_array(), lengths.T / 200) and heat.get_clim() == (0, 1)
    assert f"{lengths.mean() / 200:.1%}" in figure.axes[0].get_title(loc="left")
    width, height = picture_of(figure).size
    title = figure.axes[0]._left_title.get_window_extent()
    assert title.x1 * 110 / figure.dpi <= width and height < width


def test_the_picture_of_a_sweep():
    figure = plots.show_sweep([0.1, 1, 0.5], [1e6, 10e6, 5e6], {"a": [3, 1, 2], "b": [6, 4, 5]})
    quality, size = figure.axes
    assert [list(line.get_ydata()) for line in quality.lines] == [[3, 2, 1], [6, 5, 4]]
    assert list(size.lines[0].get_xdata()) == [0.1, 0.5, 1] and list(size.lines[0].get_ydata()) == [1, 5, 10]


def test_the_pictures_of_attention():
    figure = plots.show_histograms(np.array([[0.05, 0.95], [0.95, 0.65]]), np.array([0.0, 1.0]), bins=10)
    drawn = [p.get_data().values.tolist() for p in figure.axes[0].patches]
    assert drawn[0] == [1, 0, 0, 0, 0, 0, 1, 0, 0, 2] and drawn[2] == [1, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    assert figure.axes[0].get_yscale() == "log"
    x, y = np.array([0.9, 0.9, 0.1]), np.array([0.1, 0.1, 0.2])
    figure = plots.show_joint([(("repeat", x), ("ask", y)), (("ask", y), ("repeat", x))], bins=2)
    first, second, _ = figure.axes
    shares = first.collections[0].get_array()
    assert np.allclose(shares.filled(0), [[1 / 3, 2 / 3], [0, 0]]) and shares.mask.sum() == 2
    assert first.get_xlabel() == "repeat" and first.get_ylabel() == "ask"
    assert first.collections[0].norm is second.collections[0].norm
    assert picture_of(figure).format == "PNG"
