"""Each example runs, for a step."""

import importlib.util
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Parquet files of 32 x 32 pictures of four classes, laid out as CIFAR-10's."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c", "d"])})
    for split, n in (("train", 24), ("test", 8)):
        images = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(n)]
        data = datasets.Dataset.from_dict({"image": images, "label": [i % 4 for i in range(n)]}, features=features)
        data.to_parquet(folder / f"{split}.parquet")
    return folder


def test_continual_learning_on_the_digits(tmp_path, capsys):
    quick = ["--steps", "1", "--training-steps", "30", "--seeds", "1", "--methods", "condensed", "random"]
    load("continual_learning").main([*quick, "--out", str(tmp_path)])
    curves = json.loads((tmp_path / "continual.json").read_text())["curves"]
    assert list(curves) == ["ConvNet-2"] and list(curves["ConvNet-2"]) == ["condensed", "random"]
    for seen, accuracies in curves["ConvNet-2"].values():
        assert seen == [2, 4, 6, 8, 10] and all(0 <= a <= 100 for a in accuracies)
        assert accuracies[0] > accuracies[-1]  # two classes are easier than ten
    assert Image.open(tmp_path / "continual.png").format == "PNG"
    assert "10 classes" in capsys.readouterr().out


def test_continual_learning_on_pictures_of_a_folder(pictures, tmp_path):
    quick = ["--steps", "1", "--training-steps", "1", "--seeds", "1", "--methods", "init", "--width", "4"]
    # oneDNN of torch 2.14.1 writes past its memory in this backward pass of ResNet-10, on AMD processors
    with torch.backends.mkldnn.flags(enabled=False):
        load("continual_learning").main([*quick, "--data", str(pictures), "--factor", "2", "--out", str(tmp_path)])
    curves = json.loads((tmp_path / "continual.json").read_text())["curves"]
    assert list(curves) == ["ConvNet-3", "ResNet-10"]
    assert all(points["init"][0] == [2, 4] for points in curves.values())


@pytest.mark.parametrize("action", ["drop", "relabel"])
def test_rounds_of_cleaning_find_more(action, capsys):
    found = load("refine_labels").main(action=action)
    assert len(found) > 1 and found[1] > found[0]
    assert capsys.readouterr().out.count("changed labels among") == len(found)
