"""Saving, loading and sharing: the same cache or one sentence, never anything between."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from dataopt.core.kvzip import Quantised
from dataopt.integrations.hf import KVzipCache, decoder
from dataopt.integrations.hf import hub as hub_files
from dataopt.integrations.hf.kvzip import artifact
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.hub import fixtures
from tests.hub.fixtures import run_client

from .conftest import CONTEXT, HYBRIDS, byte_tokenizer, generate, tiny

hub = fixtures.hub
ROOT = Path(__file__).parents[4]
QUESTION = "Who sold the boat?"
HYBRID = {"kind": "gemma3_text", **HYBRIDS["gemma3_text"]}
VARIANTS = {
    "plain": {},
    "whole": {"ratio": 1.0},
    "8 bits": {"bits": 8},
    "4 bits": {"bits": 4, "keep_scores": True},
    "scores": {"keep_scores": True, "budget": "layer"},
    "head": {"level": "head", "ratio": 0.5, "recent": 16},
    "instruction": {"instruction": "Read this.", "max_tokens": 40, "budget": "uniform"},
    "hybrid": {"model": HYBRID},
    "hybrid 8 bits": {"model": HYBRID, "bits": 8},
    "bfloat16": {"dtype": torch.bfloat16},
}


def tensors_of(context) -> list[torch.Tensor]:
    out = [] if context.head_scores is None else [context.head_scores]
    for p in context.layers:
        for pairs in (p.keys, p.values, getattr(p, "scores", None)):
            out += [pairs.codes, pairs.scale, pairs.minimum] if isinstance(pairs, Quantised) else [pairs]
    return [t for t in out if t is not None]


def same(a, b) -> bool:
    plain = [
        dataclasses.replace(
            c, head_scores=None, layers=tuple(getattr(p, "lengths", None) or (p.window, p.seen) for p in c.layers)
        )
        for c in (a, b)
    ]
    pairs = zip(tensors_of(a), tensors_of(b), strict=True)
    return plain[0] == plain[1] and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip(name, tokenizer, tmp_path):
    options = dict(VARIANTS[name])
    shape, dtype = options.pop("model", {}), options.pop("dtype", torch.float32)
    model = tiny(**shape).to(dtype)
    cache = KVzipCache(model, tokenizer, CONTEXT, **{"ratio": 0.4, **options})
    expected, expected_logits = generate(model, cache.inputs(QUESTION), cache)
    cache.save_pretrained(tmp_path / "new" / "folder")

    other = tiny(**shape).to(dtype)
    loaded = KVzipCache.from_pretrained(tmp_path / "new" / "folder", other, tokenizer)
    assert same(loaded._states[0], cache._states[0])
    for _ in range(2):
        answer, logits = generate(other, loaded.inputs(QUESTION), loaded)
        assert torch.equal(answer, expected) and torch.equal(logits, expected_logits)
    assert loaded.nbytes == cache.nbytes
    if name != "instruction":  # a budget in tokens makes room only where scores were kept
        loaded.extend(" Dora has a red bicycle.")
    if options.get("keep_scores"):
        loaded.prune(0.2)
    loaded.save_pretrained(tmp_path / "again")
    assert same(KVzipCache.from_pretrained(str(tmp_path / "again"), model, tokenizer)._states[0], loaded._states[0])


def test_what_a_folder_holds(tokenizer, tmp_path):
    cache = KVzipCache(tiny(), tokenizer, CONTEXT)
    cache.save_pretrained(tmp_path)
    (tensors,) = tmp_path.glob("kvzip-*.safetensors")
    assert {p.name for p in tmp_path.iterdir()} == {"kvzip.json", "head_scores.json", "README.md", tensors.name}
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) <= 1.01 * cache.nbytes + 20_000
    everything = "".join(p.read_text() for p in tmp_path.iterdir() if p != tensors)
    assert str(ROOT) not in everything and str(tmp_path) not in everything

    card = (tmp_path / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata == {"library_name": "dataopt", "tags": ["dataopt", "kvzip", "kv-cache"]}
    assert re.findall("^## (.*)", card, re.MULTILINE) == ["Use", "Before you share it", "What made it"]
    assert "files contain the document" in card and "weaken refusals" in card and "KVzipCache.from_pretrained" in card
    for name in ("head_scores.json", "README.md"):
        assert "Ada" not in (tmp_path / name).read_text()

    cache.model.config._name_or_path = "someone/a-model"
    cache.save_pretrained(tmp_path)
    assert yaml.safe_load((tmp_path / "README.md").read_text().split("---")[1])["base_model"] == "someone/a-model"
    assert len(list(tmp_path.glob("kvzip-*.safetensors"))) == 1


def python(code: str, *arguments: object) -> str:
    head = "import sys\nfrom tests.integrations.hf.kvzip.conftest import *\nfrom dataopt.integrations.hf import *\n"
    command = [sys.executable, "-c", head + textwrap.dedent(code), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_a_new_process_answers_the_same_and_a_kill_leaves_the_old_save(tokenizer, tmp_path):
    model = tiny()
    cache = KVzipCache(model, tokenizer, CONTEXT, ratio=0.4)
    cache.save_pretrained(tmp_path / "save")
    code = """
    import json, os, pathlib
    model, tokenizer, folder = tiny(), byte_tokenizer(), pathlib.Path(sys.argv[1])
    old = KVzipCache.from_pretrained(folder, model, tokenizer)
    answer = generate(model, old.inputs(sys.argv[2]), old)[0].tolist()
    new = KVzipCache(model, tokenizer, CONTEXT, ratio=0.2)

    def killed(at):
        "Save over a copy of the folder in a process that dies at the at-th step that touches the disk."
        child = os.fork()
        if child:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        left = [at]
        def dying(call):
            def step(*args, **kwargs):
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)
                return call(*args, **kwargs)
            return step
        for name in ("mkdir", "open", "fsync", "chmod", "replace", "unlink"):
            setattr(os, name, dying(getattr(os, name)))
        new.save_pretrained(folder)
        os._exit(0)

    states, at = [], 0
    while killed(at):
        states.append(KVzipCache.from_pretrained(folder, model, tokenizer).options.ratio)
        if states[-1] != 0.4:
            old.save_pretrained(folder)
        at += 1
    print(json.dumps([answer, states, KVzipCache.from_pretrained(folder, model, tokenizer).options.ratio]))
    """
    answer, states, finished = json.loads(python(code, tmp_path / "save", QUESTION))
    assert answer == generate(model, cache.inputs(QUESTION), cache)[0].tolist()
    assert len(states) > 10 and finished == 0.2
    assert states == sorted(states, reverse=True) and set(states) == {0.4, 0.2}
    assert states.count(0.2) == 1  # killed when only the old tensors were left to be removed


# Head scores


def test_head_scores_are_reused_without_a_scoring_pass(tokenizer, tmp_path):
    model = tiny()
    cache = KVzipCache(model, tokenizer, CONTEXT)
    cache.save_pretrained(tmp_path / "cache")
    cache.save_head_scores(tmp_path / "scores")
    assert [p.name for p in (tmp_path / "scores").iterdir()] == ["head_scores.json"]
    tokens = []
    model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: tokens.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    text = CONTEXT.replace("Ada", "Eve")
    options = {"level": "head", "ratio": 0.5, "recent": 16}
    expected = KVzipCache(model, tokenizer, text, **options, head_scores=cache.head_scores())
    for source in ("scores", "scores/head_scores.json", "cache"):
        tokens.clear()
        got = KVzipCache(model, tokenizer, text, **options, head_scores=tmp_path / source)
        assert tokens == [got.seen_tokens]
        assert same(got._states[0], expected._states[0])
    # They depend on the model, not on the tokenizer or the document.
    assert torch.equal(artifact.load_head_scores(tmp_path / "scores", tiny()), cache.head_scores())
    with pytest.raises(ValueError, match=r"head_scores\.json was made with another model: its weights differ"):
        KVzipCache(tiny(seed=1), tokenizer, text, **options, head_scores=tmp_path / "scores")


@pytest.mark.parametrize("scores", [None, 1, [], [1.0], [[]], [[1.0], [1.0, 2.0]], [["a"]], [[True]], [[1e999]], {}])
def test_hostile_head_scores(scores, tokenizer, tmp_path):
    model = tiny()
    file = tmp_path / "head_scores.json"
    KVzipCache(model, tokenizer, CONTEXT).save_head_scores(tmp_path)
    record = hub_files.read_record(file, artifact.HEADS_KIND, 1)
    record["scores"] = scores
    record["checksum"] = hub_files._checksum(record)
    file.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"head_scores\.json: scores .*save or download it again"):
        artifact.load_head_scores(tmp_path, model)


# Refusals


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def saved(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "good"
    KVzipCache(model, tokenizer, CONTEXT, keep_scores=True).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def refused(folder, model, tokenizer, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as e:
        KVzipCache.from_pretrained(folder, model, tokenizer)
    assert str(folder) in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 700


def tensors_file(folder: Path) -> Path:
    return next(folder.glob("kvzip-*.safetensors"))


OTHERS = {
    "config": (lambda: tiny(rms_norm_eps=1e-3), byte_tokenizer, r"config\.rms_norm_eps"),
    "rope": (lambda: tiny(rope_parameters={"rope_type": "default", "rope_theta": 5e5}), byte_tokenizer, "rope_theta"),
    "weights": (lambda: tiny(seed=1), byte_tokenizer, "weights differ"),
    "dtype": (lambda: tiny().bfloat16(), byte_tokenizer, "dtype was float32 and is bfloat16"),
    "architecture": (lambda: tiny("qwen2"), byte_tokenizer, "another model"),
    "template": (tiny, lambda: byte_tokenizer(None), "chat_template differs"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_model_or_tokenizer_is_refused_by_name(case, saved):
    make_model, make_tokenizer, sentence = OTHERS[case]
    refused(saved, make_model(), make_tokenizer(), sentence)


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


def elsewhere(path: Path) -> None:
    other = path.parent.parent / "elsewhere"
    path.rename(other)
    path.symlink_to(other)


FILES = {
    "no record": (lambda f: (f / "kvzip.json").unlink(), r"kvzip\.json is missing"),
    "no tensors": (lambda f: tensors_file(f).unlink(), r"safetensors is missing"),
    "empty record": (lambda f: cut(f / "kvzip.json", 0), "damaged"),
    "half a record": (lambda f: cut(f / "kvzip.json", 500), "damaged"),
    "empty tensors": (lambda f: cut(tensors_file(f), 0), "cut off"),
    "half the tensors": (lambda f: cut(tensors_file(f), 9000), "cut off"),
    "one byte less": (lambda f: cut(tensors_file(f), tensors_file(f).stat().st_size - 1), "cut off"),
    "deep": (lambda f: (f / "kvzip.json").write_text("[" * 100_000), "damaged"),
    "long": (lambda f: (f / "kvzip.json").write_text("1" * 10_000), "damaged"),
    "bytes": (lambda f: (f / "kvzip.json").write_bytes(bytes(range(256))), "damaged"),
    "list": (lambda f: (f / "kvzip.json").write_text("[]"), "another kind"),
    "head scores": (lambda f: shutil.copy(f / "head_scores.json", f / "kvzip.json"), "another kind"),
    "record elsewhere": (lambda f: elsewhere(f / "kvzip.json"), "outside its folder"),
    "tensors elsewhere": (lambda f: elsewhere(tensors_file(f)), "outside its folder"),
    "a folder": (lambda f: (tensors_file(f).unlink(), (f / "kvzip.json").unlink(), (f / "kvzip.json").mkdir()), "file"),
    "foreign": (lambda f: save_file({"x": torch.zeros(3)}, tensors_file(f)), "from another save"),
}


@pytest.mark.parametrize("case", FILES)
def test_damaged_folders(case, folder, model, tokenizer):
    damage, sentence = FILES[case]
    damage(folder)
    refused(folder, model, tokenizer, sentence)


def test_files_of_two_saves_do_not_mix(folder, model, tokenizer, tmp_path):
    KVzipCache(model, tokenizer, CONTEXT.replace("Ada", "Eve"), keep_scores=True).save_pretrained(tmp_path / "two")
    shutil.copy(tensors_file(tmp_path / "two"), tensors_file(folder))
    refused(folder, model, tokenizer, "from another save")
    shutil.copy(tmp_path / "two" / "kvzip.json", folder)
    refused(folder, model, tokenizer, "missing")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_flipped_byte_passes(saved, model, tokenizer, tmp_path_factory, data):
    folder = Path(shutil.copytree(saved, tmp_path_factory.mktemp("flip") / "copy"))
    file = data.draw(st.sampled_from([folder / "kvzip.json", tensors_file(folder)]))
    content = bytearray(file.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content)
    try:
        loaded = KVzipCache.from_pretrained(folder, model, tokenizer)
    except ValueError as e:
        assert str(folder) in str(e)
    else:  # white space of the record
        assert file.name == "kvzip.json"
        assert same(loaded._states[0], KVzipCache.from_pretrained(saved, model, tokenizer)._states[0])
    shutil.rmtree(folder)


def rewrite(folder: Path, change) -> None:
    """Edit the record and make its checksum right again, as a hostile writer would."""
    path = folder / "kvzip.json"
    record = hub_files.read_record(path, artifact.KIND, artifact.VERSION)
    change(record)
    record.pop("checksum", None)
    path.write_text(json.dumps({**record, "checksum": hub_files._checksum(record)}))


def put(*keys):
    *way, value = keys

    def change(record):
        for key in way[:-1]:
            record = record[key]
        record[way[-1]] = value

    return change


RECORDS = {
    "newer": (put("format_version", 2), "newer format 2, and this dataopt reads 1; update dataopt"),
    "older": (put("format_version", 0), "format_version 0"),
    "version": (put("format_version", "1"), "format_version '1'"),
    "true": (put("format_version", True), "format_version True"),
    "kind": (put("kind", ["x"]), "another kind"),
    "no tensors": (put("tensors", None), "file of tensors"),
    "up": (put("tensors", "file", "../kvzip-0.safetensors"), "file of tensors"),
    "absolute": (put("tensors", "file", "/etc/passwd"), "file of tensors"),
    "number": (put("tensors", "file", 3), "file of tensors"),
    "line": (put("tensors", "file", "kvzip-0.safetensors\n"), "file of tensors"),
    "hash": (put("tensors", "xxh3_128", 3), "from another save"),
    "seen": (put("seen", "x"), "seen='x' must be of type int"),
    "seen true": (put("seen", True), "seen=True"),
    "seen huge": (put("seen", 10**30), "seen=1000"),
    "seen more": (put("seen", 100_000), "token_ids"),
    "prefix": (put("prefix", -1), "prefix=-1"),
    "prefix much": (put("prefix", 200), "lengths must be"),
    "dtype": (put("dtype", "nn"), "dtype='nn'"),
    "dtype other": (put("dtype", "float16"), r"must be torch\.float16"),
    "dtype null": (put("dtype", None), "dtype=None"),
    "text": (put("text", None), "text=None"),
    "kwargs": (put("template_kwargs", []), r"template_kwargs=\[\]"),
    "kwargs two": (put("template_kwargs", {"conversation": 1}), "template_kwargs does not suit"),
    "fingerprint": (put("fingerprint", []), "no complete fingerprint"),
    "fingerprint less": (lambda r: r["fingerprint"].pop("weights"), "no complete fingerprint"),
    "layers": (put("layers", "abc"), "layers='abc'"),
    "layers less": (lambda r: r["layers"].pop(), "layers are not those of the model"),
    "layers strings": (put("layers", ["full"] * 4), "layers are not those of the model"),
    "sliding": (put("layers", 0, "attention", "sliding"), "layers are not those of the model"),
    "lengths": (put("layers", 0, "lengths", [1e9, 2]), "lengths must be"),
    "lengths none": (put("layers", 0, "lengths", []), "lengths must be"),
    "lengths sum": (lambda r: r["layers"][1]["lengths"].append(r["seen"]), "1.keys is"),
    "shape": (put("layers", 0, "shape", [32]), "shape"),
    "shape huge": (put("layers", 0, "shape", [10**9, 32]), "shape"),
    "scores": (put("layers", 0, "scores", "yes"), "scores='yes'"),
    "scores gone": (put("layers", 0, "scores", False), r"tensors too many, such as '0\.scores'"),
    "options": (put("options", None), "options=None"),
    "options less": (lambda r: r["options"].pop("ratio"), "options must be ratio"),
    "options more": (put("options", "x", 1), "options must be ratio"),
    "ratio": (put("options", "ratio", 2.0), "ratio=2.0 must be above 0"),
    "ratio text": (put("options", "ratio", "2"), "ratio='2' must be of type"),
    "ratio nan": (put("options", "ratio", float("nan")), "ratio=nan must be above 0"),
    "bits float": (put("options", "bits", 8.0), r"bits=8\.0 must be of type"),
    "bits": (put("options", "bits", 8), r"0\.keys\.codes"),
    "level": (put("options", "level", ["pair"]), "level="),
    "keep": (put("options", "keep_scores", 1), "keep_scores=1"),
}


@pytest.mark.parametrize("case", RECORDS)
def test_hostile_records(case, folder, model, tokenizer):
    change, sentence = RECORDS[case]
    rewrite(folder, change)
    refused(folder, model, tokenizer, sentence)


def set_first(name, value):
    def change(tensors):
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[0] = value

    return change


def replaced(name, by):
    return lambda tensors: tensors.update({name: by(tensors[name]).contiguous()})


TENSORS = {
    "gone": (lambda t: t.pop("2.values"), r"no tensor 2\.values"),
    "more": (lambda t: t.update(x=torch.zeros(1)), "tensors too many, such as 'x'"),
    "none": (lambda t: t.clear(), "no tensor token_ids"),
    "nan": (set_first("1.keys", torch.nan), r"1\.keys holds non-finite values"),
    "inf": (set_first("3.values", -torch.inf), r"3\.values holds non-finite values"),
    "nan score": (set_first("0.scores", torch.nan), r"0\.scores holds NaN"),
    "nan head score": (set_first("head_scores", torch.nan), "head_scores holds non-finite values"),
    "id": (set_first("token_ids", 5000), "token_ids are outside the vocabulary"),
    "negative id": (set_first("token_ids", -1), "token_ids are outside the vocabulary"),
    "half": (replaced("0.keys", torch.Tensor.half), r"0\.keys is torch\.float16"),
    "short": (replaced("0.keys", lambda t: t[1:]), r"0\.keys is torch\.float32 \(.*must be"),
    "narrow": (replaced("1.values", lambda t: t[:, 1:]), r"1\.values is"),
    "flat": (replaced("1.values", torch.Tensor.flatten), r"1\.values is"),
    "heads": (replaced("head_scores", lambda t: t[:1]), "head_scores is"),
    "long ids": (replaced("token_ids", torch.Tensor.long), "token_ids is torch.int64"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_hostile_tensors(case, folder, model, tokenizer):
    change, sentence = TENSORS[case]
    file = tensors_file(folder)
    tensors = {name: t.clone() for name, t in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)
    entry = {"file": file.name, "bytes": file.stat().st_size, "xxh3_128": hub_files.file_checksum(file)}
    rewrite(folder, put("tensors", entry))
    refused(folder, model, tokenizer, sentence)


def test_a_file_that_is_no_safetensors(folder, model, tokenizer):
    file = tensors_file(folder)
    file.write_bytes(b"\x80\x04pickle" * 100)
    entry = {"file": file.name, "bytes": file.stat().st_size, "xxh3_128": hub_files.file_checksum(file)}
    rewrite(folder, put("tensors", entry))
    refused(folder, model, tokenizer, "is no file of tensors")


def test_layers_say_where_they_are():
    spread = tiny()
    spread.model.layers[2].to("meta")
    where = {i: d.type for i, d in decoder.layer_devices(spread).items()}
    assert where == {-1: "cpu", 0: "cpu", 1: "cpu", 2: "meta", 3: "cpu"}


def test_a_folder_may_be_a_link(folder, model, tokenizer, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    KVzipCache.from_pretrained(tmp_path / "link", model, tokenizer)


@pytest.mark.parametrize("source", ["no/such/folder", "/nowhere", "./here", "", "a b", Path("me/model")])
def test_no_such_folder(source, model, tokenizer):
    with pytest.raises(ValueError, match="is no folder; give one that was saved to, or a Hub repository id"):
        KVzipCache.from_pretrained(source, model, tokenizer)


def test_saving_what_cannot_be_saved(model, tokenizer, tmp_path):
    cache = KVzipCache(model, tokenizer, CONTEXT)
    cache.save_pretrained(tmp_path / "save")
    before = {p.name: p.read_bytes() for p in (tmp_path / "save").iterdir()}
    with pytest.raises(ValueError, match="save_pretrained works on one context and this cache stacks 2"):
        KVzipCache.stack([cache, cache]).save_pretrained(tmp_path / "stack")
    assert not (tmp_path / "stack").exists()
    with pytest.raises(ValueError, match=r"kvzip\.json'? is a file; give a folder"):
        cache.save_pretrained(tmp_path / "save" / "kvzip.json")
    strange = KVzipCache(model, tokenizer, CONTEXT, template_kwargs={"tool": object()})
    with pytest.raises(ValueError, match=r"kvzip\.json cannot be written as JSON"):
        strange.save_pretrained(tmp_path / "save")
    assert {p.name for p in (tmp_path / "save").iterdir()} == before.keys()
    assert same(KVzipCache.from_pretrained(tmp_path / "save", model, tokenizer)._states[0], cache._states[0])
    with pytest.raises(ValueError, match="revision='v1' is for the Hub"):
        KVzipCache.from_pretrained(tmp_path / "save", model, tokenizer, revision="v1")


# The Hub


CLIENT = """
import json
from huggingface_hub import HfApi
from dataopt.integrations.hf import KVzipCache
from tests.integrations.hf.kvzip.conftest import CONTEXT, byte_tokenizer, generate, tiny
model, tokenizer, api = tiny(), byte_tokenizer(), HfApi()
def kind(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "fine"
def answer(cache):
    return generate(model, cache.inputs("Who sold the boat?"), cache)[0].tolist()
def load(**kwargs):
    return KVzipCache.from_pretrained("me/doc", model, tokenizer, **kwargs)
"""


@pytest.mark.parametrize("lfs", [False, True])
def test_hub(hub, lfs, tmp_path):
    hub.lfs = lfs
    hub.fail(r"POST .*/commit/", "cut")  # the client may try again by itself
    hub.fail(r"POST .*/commit/", 403)
    code = """
first = KVzipCache(model, tokenizer, CONTEXT, ratio=0.5)
second = KVzipCache(model, tokenizer, CONTEXT, ratio=0.2)
failed = []
while len(failed) < 5 and kind(first.push_to_hub, "me/doc") != "fine":
    failed.append(api.list_repo_files("me/doc"))
url = first.push_to_hub("me/doc")
old = api.model_info("me/doc").sha
first.save_pretrained(HOME + "/doc", push_to_hub=True, repo_id="me/doc", commit_message="again")
second.push_to_hub("me/doc", commit_message="smaller")
reused = KVzipCache(model, tokenizer, CONTEXT, ratio=0.5, level="head", head_scores="me/doc")
loaded = load()
got = {"failed": failed, "url": url, "old": old,
       "new": answer(loaded) == answer(second) and loaded.options.ratio,
       "revision": answer(load(revision=old)) == answer(first) and load(revision=old).options.ratio,
       "heads": bool((reused.head_scores() == second.head_scores()).all()),
       "stranger": kind(load, token=False, cache_dir=HOME + "/stranger"),
       "no revision": kind(load, revision="nothing"),
       "not mine": kind(first.push_to_hub, "other/doc"),
       "not loaded": kind(load, local_files_only=True, cache_dir=HOME + "/empty")}
api.update_repo_settings("me/doc", private=False)
got["public"] = kind(second.push_to_hub, "me/doc")
api.whoami()
got["offline"] = answer(load(local_files_only=True)) == answer(second)
print(json.dumps(got))
"""
    home = str(tmp_path / "home")
    got = json.loads(run_client(hub, f"HOME = {home!r}\n" + CLIENT + code, HF_HOME=home, PYTHONPATH=str(ROOT)))
    assert got["failed"] in ([[".gitattributes"]], [[".gitattributes"]] * 2)
    assert got["url"] == f"{hub.url}/me/doc/commit/{got['old']}"
    assert got["new"] == 0.2 and got["revision"] == 0.5 and got["heads"] and got["offline"]
    assert hub.requests[-1] == "GET /api/whoami-v2"  # from there on only the cache was asked
    assert got["stranger"].startswith("RepositoryNotFoundError")
    assert got["no revision"].startswith("RevisionNotFoundError")
    assert got["not mine"].startswith("HfHubHTTPError")
    assert got["not loaded"].startswith("LocalEntryNotFoundError")
    assert got["public"].startswith("ValueError: me/doc is public and private=True")
    files = hub.files("me/doc")
    names = {re.sub("kvzip-.*", "tensors", name) for name in files}
    assert names == {".gitattributes", "README.md", "head_scores.json", "kvzip.json", "tensors"}
    assert len(files) == len(names)  # the tensors of older saves are gone
    titles = [commit.title for _, commit in hub.repo("me/doc").history()]
    assert titles[:2] == ["smaller", "again"] and len(titles) == 5
    assert "from_pretrained('me/doc', model" in files["README.md"].decode()
