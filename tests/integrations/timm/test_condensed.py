"""``dataopt train`` on condensed data sets: recognised, decoded before timm's transforms, validated elsewhere."""

from __future__ import annotations

import csv
import io
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from dataopt.integrations.hf import load_condensed, save_condensed
from dataopt.integrations.hf.condensed_images import as_png
from dataopt.integrations.timm.condensed import CondensedReader, mentioned
from PIL import Image

from tests.hub import fixtures
from tests.hub.fixtures import run_client

from ..condensed_data import NAMES, condensed, pixels
from .conftest import needs_script, same, weights

ROOT = Path(__file__).parents[3]
hub = fixtures.hub


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Eight stored images, 32 to train on."""
    return save_condensed(condensed(), tmp_path_factory.mktemp("condensed") / "set")


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """validation/ with real images, in folders whose order is that of the condensed classes."""
    return _folder(tmp_path_factory.mktemp("real"), [f"{i}-{name}" for i, name in enumerate(NAMES)])


def _folder(root: Path, names: list[str]) -> Path:
    for row, x in enumerate((pixels(16, seed=1) * 255).byte().permute(0, 2, 3, 1).numpy()):
        folder = root / "validation" / names[row % 4]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x).save(folder / f"{row}.png")
    return root


@pytest.fixture
def inputs():
    """(input, in training) of every call of timm's model while the test ran."""
    seen: list[torch.Tensor] = []

    def watch(module, args, result):
        if type(module).__name__ == "ResNet":
            seen.append((args[0].detach().clone(), module.training))

    handle = torch.nn.modules.module.register_module_forward_hook(watch)
    yield seen
    handle.remove()


def refused(run, capsys, *flags) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(*flags)
    assert stopped.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("dataopt train: error: ")
    return line


def decoded_pixels(c) -> torch.Tensor:
    """What timm must be given: of PNG images, and in PNG images."""
    return (as_png(c).decode()[0] * 255).round() / 255


def check_training_inputs(inputs) -> None:
    """All 32 decoded images were seen, in any order."""
    seen = torch.cat([x for x, training in inputs if training])
    wanted = (decoded_pixels(condensed()) - 0.5) / 0.5
    assert seen.shape == wanted.shape
    gaps = torch.cdist(seen.flatten(1), wanted.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    assert gaps.min(1).values.max() < 1e-5 and gaps.argmin(1).unique().numel() == 32


PLAIN = (
    "--no-aug",
    "--img-size",
    16,
    "--crop-pct",
    1.0,
    "--mean",
    0.5,
    0.5,
    0.5,
    "--std",
    0.5,
    0.5,
    0.5,
    "--data-dir",
    "",
)


@pytest.mark.parametrize("given", ["hfds in DIR", "hfds in --dataset", "DIR", "--data-dir"])
def test_our_loop_trains_on_the_decoded_images(train, source, inputs, given):
    data = {
        "hfds in DIR": (f"hfds/{source}",),
        "hfds in --dataset": ("--dataset", f"HFDS/{source}"),
        "DIR": (source,),
        "--data-dir": ("--data-dir", source),
    }[given]
    train(*PLAIN, *data, "--val-split", "", "--smoothing", 0.0)
    check_training_inputs(inputs)


def test_it_learns_the_classes_of_real_images(train, source, real):
    folder = train(f"hfds/{source}", *PLAIN, "--val-data-dir", real, "--epochs", 10, "--opt", "adamw", "--lr", 0.01)
    with (folder / "summary.csv").open() as f:
        best = max(float(row["eval_top1"]) for row in csv.DictReader(f))
    assert best >= 75  # a quarter by chance
    args = yaml.safe_load((folder / "args.yaml").read_text())
    assert args["dataset"] == f"hfds/{source}" and args["val_data_dir"] == str(real)


def test_with_mixup_too(train, source, steps):
    train(f"hfds/{source}", *PLAIN, "--val-split", "", "--mixup", "puzzle", "--puzzle-grids", 4)
    assert len(steps) == 4 and all(s["mixed"] is not None for s in steps)


def test_validation_needs_data_of_its_own(train, source, capsys):
    line = refused(train, capsys, f"hfds/{source}", *PLAIN)
    assert "is condensed and has training images only, no split 'validation'" in line and "--val-dataset" in line
    assert "--train-split train[:10]: " in refused(
        train, capsys, f"hfds/{source}", *PLAIN, "--train-split", "train[:10]"
    )
    assert "--class-map does not go with" in refused(train, capsys, f"hfds/{source}", *PLAIN, "--class-map", "x.txt")
    line = refused(train, capsys, f"hfids/{source}", *PLAIN)
    assert f"a stream of it would show stored tiles; give hfds/{source}" in line


def test_classes_in_another_order_stop_the_run(train, source, tmp_path, capsys):
    other = _folder(tmp_path / "other", list(NAMES))  # timm sorts the folders' names
    line = refused(train, capsys, f"hfds/{source}", *PLAIN, "--val-data-dir", other)
    assert "class 'arrow' is 1 in the condensed data and 0 in the validation data" in line


def test_damaged_and_unreadable_sets_are_one_line(train, tmp_path, capsys):
    folder = save_condensed(condensed(), tmp_path / "cut")
    data = next(folder.glob("train-*"))
    data.write_bytes(data.read_bytes()[:-1])
    assert f"{data.name} has" in refused(train, capsys, folder, *PLAIN)
    record = folder / "condensed.json"
    record.write_bytes(record.read_bytes()[:-2])
    for given in (folder, f"hfds/{folder}"):
        assert "condensed.json is damaged" in refused(train, capsys, given, *PLAIN)
    two = save_condensed(condensed(channels=2), tmp_path / "two", png=False)
    assert "holds no PNG images but arrays of (2, 16, 16)" in refused(train, capsys, f"hfds/{two}", *PLAIN)


def test_the_reader(source):
    reader = CondensedReader(str(source))
    for copy in (reader, pickle.loads(pickle.dumps(reader))):  # as workers get it
        assert len(copy) == 32 and copy.class_to_idx == {name: i for i, name in enumerate(NAMES)}
        x = np.asarray(Image.open(io.BytesIO(copy[5][0].getvalue())))
        assert np.array_equal(x, np.asarray(load_condensed(source)[5]["image"])) and copy[5][1] == 0
        assert copy.filenames()[:2] == ["0.png", "1.png"]


# --- scripts ---


def test_a_script_like_timms_trains_on_the_decoded_images(like_timm, source, real, inputs):
    folder = like_timm(f"hfds/{source}", "--val-data-dir", real, "--epochs", 1)
    assert sum(len(x) for x, training in inputs if training) == 32
    assert sum(len(x) for x, training in inputs if not training) == 16
    args = yaml.safe_load((folder / "args.yaml").read_text())
    assert args["data"] == f"hfds/{source}" and args["val_data_dir"] == str(real)
    inputs.clear()
    like_timm("-c", folder / "args.yaml", "--output", str(folder.parent / "again"), out="again")
    assert sum(len(x) for x, training in inputs if training) == 32
    assert same(torch.load(folder / "model.pt"), torch.load(folder.parent / "again" / "model.pt"))


def test_a_script_refuses_as_the_loop_does(like_timm, source, capsys):
    assert "has training images only" in refused(like_timm, capsys, f"hfds/{source}")


def test_a_script_is_left_alone_where_nothing_may_be_condensed(real, tmp_path):
    assert not mentioned(["--dataset", "torch/cifar10", "--data-dir", str(real), "--model", "resnet18", "--lr=.1"])
    assert mentioned(["--dataset=hfds/me/x"]) and mentioned(["HFDS/me/x"]) and mentioned(["--val-dataset", "hfds/y"])
    config = tmp_path / "run.yaml"
    config.write_text("dataset: hfds/me/x\n")
    assert mentioned(["-c", str(config)])
    config.write_text(f"data_dir: {real}\n")
    assert not mentioned(["-c", str(config)])


@needs_script
@pytest.mark.parametrize("workers", [0, 1])
def test_timms_script_trains_on_the_decoded_images(train_script, source, real, inputs, workers):
    folder = train_script(f"hfds/{source}", *PLAIN, "--val-data-dir", real, "--workers", workers, "--no-prefetcher")
    check_training_inputs(inputs)
    assert sum(len(x) for x, training in inputs if not training) == 16
    assert not same(weights(folder), weights(train_script(
        f"hfds/{source}", *PLAIN, "--val-split", "", "--lr", 0.0, experiment="still"
    )))  # fmt: skip


@needs_script
def test_timms_script_mixes_and_refuses(train_script, source, steps, capsys):
    train_script(source, *PLAIN[:-2], "--data-dir", source, "--val-split", "", "--mixup", "puzzle", "--puzzle-grids", 4)
    assert len(steps) == 4 and all(s["mixed"] is not None for s in steps)
    assert "has training images only" in refused(train_script, capsys, f"hfds/{source}", *PLAIN)


# --- the Hub ---


def test_repositories_are_recognised(hub, tmp_path):
    code = """
import json
from contextlib import redirect_stderr
from io import StringIO
import torch
from datasets import config, load_dataset
from huggingface_hub import HfApi, constants
from dataopt.integrations.hf import push_condensed
from dataopt.integrations.timm.train import main
from tests.integrations.condensed_data import condensed
push_condensed(condensed(), "me/set")
from datasets import Dataset
from PIL import Image
plain = Dataset.from_dict({"image": [Image.new("RGB", (16, 16))] * 8, "label": [0] * 8})
plain.to_parquet("plain.parquet")
api = HfApi()
for name in ("me/plain", "me/other"):
    data = {"repo_id": name, "repo_type": "dataset"}
    api.create_repo(**data)
    api.upload_file(**data, path_in_repo="train.parquet", path_or_fileobj="plain.parquet")
seen = []
watch = lambda module, args, out: seen.append(len(args[0])) if type(module).__name__ == "ResNet" else None
torch.nn.modules.module.register_module_forward_hook(watch)
flags = "--model test_resnet --num-classes 4 --img-size 16 --batch-size 8 --epochs 1 --warmup-epochs 0 --device cpu"
def run(name, number):
    main(["hfds/" + name, *flags.split(), "--workers", "0", "--val-split", "", "--experiment", str(number)])
run("me/set", 1)
run("me/plain", 2)
load_dataset("me/other")
constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True
run("me/set", 3)
run("me/plain", 4)
try:
    with redirect_stderr(StringIO()) as printed:
        run("me/other", 5)
except SystemExit as stopped:
    print(json.dumps([seen, stopped.code, printed.getvalue()]))
"""
    code = f"import os; os.chdir({str(tmp_path)!r})\n" + code
    printed = run_client(hub, code, PYTHONPATH=str(ROOT), TIMM_TRAIN_SCRIPT=None)
    seen, status, refusal = json.loads(printed.splitlines()[-1])
    assert seen == ([8] * 4 + [8]) * 2  # without the Hub as with it
    assert status == 2 and refusal.splitlines()[-1].startswith(
        "dataopt train: error: the Hub cannot be asked whether me/other is condensed, and its cache does not know; run"
    )
    assert any(re.search("GET /datasets/me/plain/resolve/.*train.parquet", line) for line in hub.requests)
