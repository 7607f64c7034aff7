"""Condensed data sets in folders and on the Hub: what is read back, what a plain reader sees, what is refused."""

import dataclasses
import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from dataopt.core.condense import Condensed, ConvNet, RealData, evaluate, initial_images
from dataopt.integrations.hf import condensed as module
from dataopt.integrations.hf import decode_condensed, is_condensed, load_condensed, read_condensed, save_condensed
from dataopt.integrations.hf import hub as hub_files
from dataopt.integrations.hf.condensed_images import as_png
from datasets import Array3D, ClassLabel, Dataset, Image, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow
from sklearn.datasets import load_digits

from tests.hub import fixtures
from tests.hub.fixtures import run_client

from ..condensed_data import NAMES, SCORES, arrays, condensed, pixels, same, table

ROOT = Path(__file__).parents[3]
hub = fixtures.hub


@pytest.mark.parametrize(
    ("factor", "channels", "size", "axes"),
    [(1, 3, (8, 8), "space"), (2, 3, (9, 11), "space"), (3, 1, (28, 28), "space"), (2, 1, (8, 20), "time")],
)
def test_both_configs_are_read_back(tmp_path, factor, channels, size, axes):
    c = condensed(factor, channels, size, axes)
    assert save_condensed(c, tmp_path / "d") == tmp_path / "d"
    assert same(read_condensed(tmp_path / "d", config="exact"), c)
    assert same(read_condensed(tmp_path / "d"), as_png(c))
    assert 0 < (as_png(c).images - c.images).abs().max() <= 0.5 / 255 + 1e-6

    exact, default = load_condensed(tmp_path / "d", config="exact"), load_condensed(tmp_path / "d")
    images, labels = c.decode()
    assert torch.equal(torch.stack(list(exact["image"])), images) and images.dtype == torch.float32
    assert torch.equal(arrays(default), (as_png(c).decode()[0] * 255).round().byte())
    for dataset in (exact, default):
        assert torch.equal(torch.as_tensor(dataset["label"][:]), labels)
        assert dataset.features["label"] == ClassLabel(names=list(NAMES))
    assert len(default) == 8 * (factor if axes == "time" else factor**2)
    stored = load_condensed(tmp_path / "d", decode=False)
    assert torch.equal(arrays(stored), (c.images * 255).round().byte()) and stored["label"][:] == c.labels.tolist()
    assert isinstance(stored.features["image"], Image)


def test_plain_load_dataset_shows_tiles_and_the_cards_code_decodes_them(tmp_path, monkeypatch):
    c = condensed()
    save_condensed(c, tmp_path / "d", licence="mit", source="me/source", scores=SCORES)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    stored = load_dataset("./d", split="train", cache_dir=str(tmp_path / "cache"))
    assert torch.equal(arrays(stored), (c.images * 255).round().byte())
    exact = load_dataset("./d", "exact", split="train", cache_dir=str(tmp_path / "cache"))
    assert torch.equal(torch.stack(list(exact.with_format("torch")["image"])), c.images)
    card = (tmp_path / "d/README.md").read_text()
    ours, plain = (compile(code, "card", "exec") for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL))
    found = []
    for code in (ours, plain):
        space = {"load_condensed": load_condensed}
        exec(code, space)
        found.append(space["dataset"])
    assert torch.equal(arrays(found[0]), arrays(found[1])) and found[0]["label"][:] == found[1]["label"][:]
    assert len(found[1]) == 32


def test_the_card(tmp_path):
    save_condensed(condensed(), tmp_path / "set", licence="cc-by-4.0", source="uoft-cs/cifar10", scores=SCORES)
    text = (tmp_path / "set/README.md").read_text()
    _, front, body = text.split("---\n", 2)
    about = yaml.safe_load(front)
    assert about["license"] == "cc-by-4.0" and about["source_datasets"] == ["uoft-cs/cifar10"]
    assert [entry["config_name"] for entry in about["configs"]] == ["default", "exact"]
    assert about["configs"][0]["default"] is True
    sections = re.findall("^## (.*)", body, re.MULTILINE)
    assert sections == ["Use", "Configs", "Scores", "What made it", "Source"]
    first = body.strip().splitlines()[0]
    assert "Plain `load_dataset` shows the 8 stored images" in first and "load_condensed('set')" in first
    assert "32 images to train on" in first
    assert "| condensed | ConvNet | 8 | 32 | 300 | 2 | 81.0 ± 1.4 |" in body
    assert "| random | ConvNet | 8 | 32 | 300 | 2 | 51.0 ± 1.4 |" in body
    assert '| source | {"images": 400, "sha256": "5ca1ab1e' in body and "| steps | 30 |" in body
    assert "Licence of the source: cc-by-4.0" in body
    save_condensed(condensed(1), tmp_path / "set")
    bare = (tmp_path / "set/README.md").read_text()
    assert "which are those to train on (factor 1)" in bare and "Not evaluated" in bare
    assert "licence of the source was not stated" in bare and "license:" not in bare


def test_what_condensed_save_wrote_is_read_too(tmp_path):
    c = condensed()
    c.save(tmp_path / "saved")
    save_condensed(c, tmp_path / "published")
    for config, wanted in ((None, c), ("exact", c), ("default", as_png(c))):
        assert same(read_condensed(tmp_path / "saved", config=config), wanted)
    for config in ("default", "exact"):
        a, b = (load_condensed(tmp_path / name, config=config).with_format("numpy") for name in ("saved", "published"))
        assert np.array_equal(a["image"], b["image"]) and a.features == b.features
    assert is_condensed(str(tmp_path / "saved")) and is_condensed(str(tmp_path / "published"))


def test_channels_that_png_cannot_hold(tmp_path):
    c = condensed(channels=2)
    with pytest.raises(ValueError, match=r"png=True and the images have 2 channels, where PNG holds 1 .* png=False"):
        save_condensed(c, tmp_path / "d")
    assert not (tmp_path / "d").exists()
    save_condensed(c, tmp_path / "d", png=False)
    assert {p.name.partition("-")[0] for p in (tmp_path / "d").iterdir()} == {"README.md", "condensed.json", "exact"}
    assert same(read_condensed(tmp_path / "d"), c)
    plain = load_dataset(str(tmp_path / "d"), split="train", cache_dir=str(tmp_path / "cache"))  # its first config
    assert plain.features["image"] == Array3D((2, 16, 16), "float32") and len(plain) == 8
    decoded = plain.map(decode_condensed, batched=True, fn_kwargs={"factor": 2}).with_format("numpy")
    assert np.array_equal(np.stack(decoded["image"]), c.decode()[0].numpy())
    with pytest.raises(ValueError, match=r"config='default' is not among those of .*; choose one of exact"):
        load_condensed(tmp_path / "d", config="default")
    c.save(tmp_path / "saved")
    with pytest.raises(ValueError, match="config='default' is of PNG images, which have no 2 channels"):
        load_condensed(tmp_path / "saved", config="default")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scores": table(("condensed", 0.8))}, "scores has no row of random images"),
        ({"licence": " "}, "licence=' ' must be one line"),
        ({"source": "a\nb"}, "source='a\\\\nb' must be one line"),
    ],
)
def test_bad_arguments_write_nothing(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        save_condensed(condensed(), tmp_path / "d", **settings)
    twice = dataclasses.replace(condensed(), label_names=("a", "b", "b", "c"))
    with pytest.raises(ValueError, match="label_names has 'b' twice"):
        save_condensed(twice, tmp_path / "d")
    for value in (float("nan"), object()):
        with pytest.raises(ValueError, match=r"made holds what JSON cannot \("):
            save_condensed(dataclasses.replace(condensed(), made={"loss": value}), tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_labels_without_names_and_with_gaps(tmp_path):
    c = dataclasses.replace(condensed(), labels=torch.arange(4, 8).repeat_interleave(2), label_names=None)
    save_condensed(c, tmp_path / "d")
    assert same(read_condensed(tmp_path / "d", config="exact"), c)
    assert load_condensed(tmp_path / "d").features["label"].num_classes == 8


def test_another_record_in_the_folder_is_kept(tmp_path):
    condensed().save(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"condensed\.json is there and of no published data set; give another folder"):
        save_condensed(condensed(), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    (tmp_path / "project").mkdir()
    (tmp_path / "project/README.md").write_text("Words of mine.")
    with pytest.raises(ValueError, match=r"README\.md is there and of no published data set"):
        save_condensed(condensed(), tmp_path / "project")
    assert (tmp_path / "project/README.md").read_text() == "Words of mine."


def test_other_parquet_files_in_the_folder_stay(tmp_path):
    theirs = [
        tmp_path / name for name in ("train-00000-of-00001.parquet", "exact-mine.parquet", "condensed-1.safetensors")
    ]
    for path in theirs:
        path.write_bytes(b"of mine")
    save_condensed(condensed(2), tmp_path)
    save_condensed(condensed(3), tmp_path)
    assert all(path.read_bytes() == b"of mine" for path in theirs)
    assert len(list(tmp_path.glob("*.parquet"))) == 4


def test_what_was_published_is_not_saved_over(tmp_path):
    save_condensed(condensed(2), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="of a dataopt condensed data set; give another folder"):
        condensed(3).save(tmp_path)
    with pytest.raises(ValueError, match="which load_condensed and read_condensed read"):
        Condensed.load(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_kill_leaves_the_old_data_set_or_the_new(tmp_path, monkeypatch):
    old, new = condensed(1), condensed(2)
    save_condensed(old, tmp_path)
    real, left = module.write_whole, 0

    def dying(path, content):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError("No space left on device")
        real(path, content)

    monkeypatch.setattr(module, "write_whole", dying)
    monkeypatch.setattr(hub_files, "write_whole", dying)
    for written in range(4):  # the two data files, the record, the README
        left = written
        with pytest.raises(OSError, match="No space left"):
            save_condensed(new, tmp_path)
        assert same(read_condensed(tmp_path, config="exact"), new if written == 3 else old)
        plain = load_dataset(str(tmp_path), "exact", split="train", cache_dir=str(tmp_path / f"cache{written}"))
        assert torch.equal(torch.stack(list(plain.with_format("torch")["image"])), old.images)
    left = 4
    save_condensed(new, tmp_path)
    assert same(read_condensed(tmp_path, config="exact"), new)
    assert len([p for p in tmp_path.iterdir() if p.is_file()]) == 4  # older and failed ones are gone


def resealed(folder: Path, **changes: object) -> None:
    """Change the record and its checksum."""
    record = {**json.loads((folder / "condensed.json").read_text()), **changes}
    del record["checksum"]
    record["checksum"] = hub_files._checksum(record)
    (folder / "condensed.json").write_text(json.dumps(record))


def test_damaged_and_tampered_files_are_refused_by_what_differs(tmp_path):
    def fresh() -> tuple[Path, Path, dict]:
        save_condensed(condensed(), tmp_path / "d")
        (data,) = (tmp_path / "d").glob("train-*")
        return tmp_path / "d", data, json.loads((tmp_path / "d/condensed.json").read_text())

    def refused(message: str, **where: object) -> None:
        for read in (load_condensed, read_condensed):
            with pytest.raises(ValueError, match=message):
                read(tmp_path / "d", **where)

    folder, data, record = fresh()
    content = data.read_bytes()
    data.write_bytes(content[:-100])
    refused(rf"{data.name} has {len(content) - 100} bytes where condensed\.json says {len(content)}; save or download")
    assert same(read_condensed(folder, config="exact"), condensed())  # the other config is whole
    data.write_bytes(content[:200] + bytes([content[200] ^ 1]) + content[201:])
    digest = record["files"]["default"]["sha256"][:16]
    refused(rf"{data.name} has the checksum [0-9a-f]{{16}} where condensed\.json says {digest}")
    data.unlink()
    refused(rf"lacks {data.name}, which condensed\.json names")
    (tmp_path / "outside.parquet").write_bytes(content)
    data.symlink_to(tmp_path / "outside.parquet")
    refused("is a link to .*outside.parquet, outside its folder")
    data.unlink()

    fresh()
    text = (folder / "condensed.json").read_text()
    (folder / "condensed.json").write_text(text.replace('"factor": 2', '"factor": 4'))
    refused("was changed after it was saved, or is damaged")
    (folder / "condensed.json").write_text(text[:300])
    refused(r"condensed\.json is damaged \(JSONDecodeError\)")
    assert is_condensed(str(folder))  # lest its tiles be taken for images
    files = record["files"]
    for changes, message in (
        ({"factor": 17}, "factor=17 is larger than the 16 x 16 images"),
        ({"factor": "2"}, "factor='2' must be a whole number"),
        ({"mode": "bound"}, "mode='bound' must be one of 'single', 'multi'"),
        ({"label_names": ["a", "b", "c", "d"]}, "not of .*'a', 'b', 'c', 'd'"),
        ({"images": 9}, "has 8 rows of"),
        ({"shape": [3, 16, 15]}, r"has images of \(3, 16, 16\), not \(3, 16, 15\)"),
        ({"mean": [0.5]}, r"mean=\(0.5,\) must have one number a channel"),
        ({"made": None}, "TypeError"),
        ({"files": {}}, "StopIteration"),
        ({"files": {"default": {**files["default"], "file": "../outside.parquet"}}}, "the file '../outside.parquet'"),
        ({"files": {"default": files["exact"]}}, "the file 'exact-"),
        ({"format_version": 2}, "has the newer format 2, and this dataopt reads 1"),
    ):
        (folder / "condensed.json").write_text(text)
        resealed(folder, **changes)
        refused(message)

    (folder / "condensed.json").write_text(text)
    broken = content[:8] + bytes(len(content) - 8)
    path = next(folder.glob("train-*"))
    path.write_bytes(broken)
    sha = module.hashlib.sha256(broken).hexdigest()
    resealed(folder, files={"default": {**files["default"], "bytes": len(broken), "sha256": sha}})
    refused("cannot be read as a parquet file")


def test_folders_that_are_no_condensed_data_set(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b\n")
    for read in (load_condensed, read_condensed):
        with pytest.raises(FileNotFoundError, match=r"holds no condensed data set: it has no condensed\.json; give"):
            read(tmp_path)
    assert not is_condensed(str(tmp_path)) and not is_condensed("../x")
    for other in ('{"kind": "milk"}', "[1]"):
        (tmp_path / "condensed.json").write_text(other)
        assert not is_condensed(str(tmp_path))
    with pytest.raises(ValueError, match="is of another kind"):
        load_condensed(tmp_path)
    with pytest.raises(ValueError, match="is no folder; give one that was saved to, or a Hub repository id"):
        load_condensed(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="config='png' must be one of None, 'default', 'exact'"):
        load_condensed(tmp_path, config="png")


def test_unreadable_records_count_and_are_refused_when_loaded(tmp_path):
    condensed().save(tmp_path)
    record = tmp_path / "condensed.json"
    content = record.read_bytes()

    def cut() -> None:
        record.write_bytes(content[:-100])

    def emptied() -> None:
        record.write_bytes(b"")

    def elsewhere() -> None:
        record.unlink()
        record.symlink_to(tmp_path / "nowhere")

    for change, message in ((cut, "is damaged"), (emptied, "is damaged"), (elsewhere, "is no file")):
        change()
        assert is_condensed(str(tmp_path))
        with pytest.raises(ValueError, match=rf"condensed\.json {message}"):
            load_condensed(tmp_path)


def test_decoding_by_map_repeats_other_columns_and_refuses_other_images():
    c = condensed()
    images = [Pillow.fromarray(row) for row in (c.images * 255).round().byte().permute(0, 2, 3, 1).numpy()]
    dataset = Dataset.from_dict({"picture": images, "label": c.labels.tolist(), "name": [f"row{i}" for i in range(8)]})
    decoded = dataset.map(
        decode_condensed, batched=True, batch_size=3, fn_kwargs={"factor": 2, "image_column": "picture"}
    )
    assert decoded["name"][:] == [f"row{i}" for i in range(8) for _ in range(4)]
    assert torch.equal(arrays(decoded.rename_column("picture", "image")), (as_png(c).decode()[0] * 255).round().byte())
    multi = dataset.map(
        decode_condensed, batched=True, fn_kwargs={"factor": 2, "mode": "multi", "image_column": "picture"}
    )
    assert len(multi) == 8 * 5

    def refused(error, message, batch, **settings):
        with pytest.raises(error, match=message):
            decode_condensed(batch, **{"factor": 2, **settings})

    refused(ValueError, "mode='bound' depends on", {"image": images}, mode="bound")
    refused(ValueError, "factor=17 is larger", {"image": images}, factor=17)
    refused(ValueError, "images of mode 'RGBA'", {"image": [images[0].convert("RGBA")]})
    refused(ValueError, "condensed ones have one size", {"image": [images[0], images[0].resize((8, 8))]})
    refused(TypeError, r"holds ndarray \(uint8, 3 axes\), neither", {"image": [np.asarray(images[0])]})


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3), st.sampled_from([1, 3]), st.integers(3, 9), st.integers(3, 9),
    st.sampled_from(["space", "time"]), st.sampled_from(["single", "multi"]), st.integers(1, 5),
)  # fmt: skip
def test_any_batches_decode_as_the_whole(factor, channels, height, width, axes, mode, batch):
    x = torch.rand(5, channels, height, width, generator=torch.Generator().manual_seed(factor * height))
    c = Condensed(x, torch.arange(5), factor, axes, mode)
    parts = [
        decode_condensed({"image": list(x[i : i + batch].numpy()), "label": list(range(i, min(i + batch, 5)))},
                         factor, axes, mode)
        for i in range(0, 5, batch)
    ]  # fmt: skip
    images, labels = c.decode()
    assert np.array_equal(np.concatenate([part["image"] for part in parts]), images.numpy())
    assert [label for part in parts for label in part["label"]] == labels.tolist()


def test_eight_bits_cost_less_than_a_point():
    digits = load_digits()
    x, y = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None], torch.tensor(digits.target)
    train, test = (x[:1200], y[:1200]), (x[1200:], y[1200:])
    form = condensed(1).formation
    data = RealData(*train)
    stored = initial_images(data, 3, "centres", form, torch.Generator().manual_seed(0))
    c = Condensed(stored, torch.arange(10).repeat_interleave(3), mean=data.mean, std=data.std)

    def accuracy(c: Condensed) -> float:
        network = {"net": lambda: ConvNet(1, 10, 8, depth=2, width=32)}
        return evaluate(c, train, test, network, seeds=(0, 1), steps=60, baselines=())["condensed"].mean

    exact = accuracy(c)
    assert exact > 0.65
    assert abs(exact - accuracy(as_png(c))) <= 0.01


def test_the_example_trains_and_tests(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_condensed(condensed(), "set")
    real = [Pillow.fromarray(row) for row in (pixels(16, seed=1) * 255).byte().permute(0, 2, 3, 1).numpy()]
    (tmp_path / "real").mkdir()
    Dataset.from_dict({"img": real, "fine": [0, 1, 2, 3] * 4}).to_parquet("real/test.parquet")
    main = runpy.run_path(str(ROOT / "examples/condensed_trainer.py"))["main"]
    data = ["set", "--test", "real", "--image-column", "img", "--label-column", "fine"]
    results = main([*data, "--steps", "1", "--out", str(tmp_path / "out")])
    assert 0 <= results["eval_accuracy"] <= 1 and results["train_loss"] > 0
    assert "32 images, 1 steps: accuracy" in capsys.readouterr().out


# The Hub


CLIENT = """
import json, sys
import torch
from huggingface_hub import HfApi
from datasets import load_dataset
from dataopt.integrations.hf import load_condensed, push_condensed, read_condensed
from dataopt.integrations.hf import is_condensed
from tests.integrations.condensed_data import SCORES, arrays, condensed, same
api = HfApi()
def kind(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "fine"
def files(repo):
    return sorted(api.list_repo_files(repo, repo_type="dataset"))
"""


def test_hub(hub, tmp_path):
    hub.lfs = True  # where parquet files are on the Hub
    hub.fail(r"POST .*/commit/", "cut")  # the client may try again by itself
    hub.fail(r"POST .*/commit/", 403)
    code = """
first, second, grey = condensed(2), condensed(3), condensed(2, 1, (8, 20), "time")
failed = []
while len(failed) < 5 and kind(push_condensed, first, "me/set", private=True) != "fine":
    failed.append(files("me/set"))
url = push_condensed(first, "me/set", scores=SCORES, licence="mit", source="me/source", commit_message="again")
old = api.repo_info("me/set", repo_type="dataset").sha
push_condensed(second, "me/set")
push_condensed(condensed(2, 2), "set2", png=False)  # a bare name is the user's own
push_condensed(grey, "me/grey")
never = kind(push_condensed, condensed(2, 2), "me/never"), api.repo_exists("me/never", repo_type="dataset")
data = {"repo_id": "me/broken", "repo_type": "dataset"}
api.create_repo(**data)
api.upload_file(path_or_fileobj=b'{"kind": "dataopt con', path_in_repo="condensed.json", **data)
api.create_repo("me/plain", repo_type="dataset")
api.upload_file(path_or_fileobj=b"x,label\\n1,2\\n", path_in_repo="rows.csv", repo_id="me/plain", repo_type="dataset")

def find_class(event, args):
    if event == "pickle.find_class":
        raise RuntimeError(f"something is unpickled: {args}")
sys.addaudithook(find_class)
loaded, before = load_condensed("me/set"), load_condensed("me/set", revision=old)
got = {
    "failed": failed, "url": url, "old": old, "files": files("me/set"),
    "new": bool(torch.equal(arrays(loaded), (second.decode()[0] * 255).round().byte())) or arrays(loaded).shape,
    "rows": [len(loaded), len(before)],
    "exact": [same(read_condensed("me/set", config="exact"), second),
              same(read_condensed("me/set", config="exact", revision=old), first)],
    "two": same(read_condensed("me/set2"), condensed(2, 2)),
    "grey": same(read_condensed("me/grey", config="exact"), grey),
    "is": [is_condensed(name) for name in ("me/set", "me/plain", "me/nothing", "me/broken")],
    "broken": [kind(load_condensed, "me/broken"), kind(push_condensed, first, "me/broken")],
    "never": never,
    "stranger": kind(load_condensed, "me/set", token=False, cache_dir=HOME + "/stranger"),
    "no revision": kind(load_condensed, "me/set", revision="nothing"),
    "none": kind(load_condensed, "me/plain"),
    "plain": kind(push_condensed, first, "me/plain"),
    "bare": kind(push_condensed, first, "plain"),
    "plain files": files("me/plain"),
    "not mine": kind(push_condensed, first, "other/set"),
    "public": kind(push_condensed, first, "me/grey", private=True),
    "not loaded": kind(load_condensed, "me/set", local_files_only=True, cache_dir=HOME + "/empty"),
}
api.whoami()
got["offline"] = len(load_condensed("me/set", local_files_only=True))
print(json.dumps(got))
"""
    home = str(tmp_path / "home")
    printed = run_client(hub, f"HOME = {home!r}\n" + CLIENT + code, HF_HOME=home, PYTHONPATH=str(ROOT))
    got = json.loads(printed.splitlines()[-1])
    assert got["failed"] in ([[".gitattributes"]], [[".gitattributes"]] * 2)
    assert got["url"] == f"{hub.url}/datasets/me/set/commit/{got['old']}"
    names = [re.sub("-[0-9a-f]{16}", "", name) for name in got["files"]]
    assert names == [".gitattributes", "README.md", "condensed.json", "exact.parquet", "train.parquet"]  # of one push
    assert got["rows"] == [8 * 9, 8 * 4] and got["exact"] == [True, True] and got["two"] and got["grey"]
    assert got["is"] == [True, False, False, True]
    assert "condensed.json is damaged" in got["broken"][0] and "is no condensed data set" in got["broken"][1]
    assert got["never"][0].startswith("ValueError: png=True and the images have 2 channels") and not got["never"][1]
    assert got["offline"] == 72 and hub.requests[-1] == "GET /api/whoami-v2"  # from there on only the cache was asked
    assert got["stranger"].startswith("RepositoryNotFoundError")
    assert got["no revision"].startswith("RevisionNotFoundError")
    assert got["none"].startswith("FileNotFoundError: 'me/plain' holds no condensed data set")
    assert got["plain"].startswith("ValueError: me/plain holds rows.csv and is no condensed data set")
    assert got["bare"] == got["plain"]
    assert got["plain files"] == [".gitattributes", "rows.csv"]
    assert "403" in got["not mine"]
    assert got["public"].startswith("ValueError: me/grey is public and private=True")
    assert got["not loaded"].startswith("LocalEntryNotFoundError")
    assert hub.repo("me/set", "dataset").private
    titles = [commit.title for _, commit in hub.repo("me/set", "dataset").history()]
    assert titles[:2] == ["Condensed data set", "again"]
    old = hub.files("me/set", "dataset", got["old"])["README.md"].decode()
    assert "load_condensed('me/set')" in old and "hfds/me/set" in old and "| random |" in old
