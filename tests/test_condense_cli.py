"""``dataopt condense``: folders, files and saved data to a few pictures, and what they are worth."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from dataopt import plots
from dataopt.cli import app
from dataopt.condense_commands import Network, verdict
from dataopt.core.condense import Condensed, Condenser, ConvNet, Score, Scores, evaluate, initial
from dataopt.images import read_images
from dataopt.integrations.hf import read_condensed, save_condensed
from PIL import Image
from sklearn.datasets import load_digits
from typer.testing import CliRunner

from .hub.fixtures import hub, run_client

__all__ = ["hub"]  # a fixture

NAMES = ["nought", "one", "two"]
SMALL = ("--images-per-class", 1, "--width", 4, "--early-steps", 2, "--seed", 3, "--device", "cpu")


@pytest.fixture(autouse=True)
def short_herding(monkeypatch):
    """Herding looks at features of a network after 300 steps, which nothing here depends on."""
    monkeypatch.setattr(initial, "_HERDING_STEPS", 5)


def run(*args):
    return CliRunner(env={"COLUMNS": "300", "TERM": "dumb"}).invoke(app, ["condense", *map(str, args)])


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """90 digits below three, (90, 1, 8, 8) uint8, in the order of an image folder; and their labels."""
    images, labels = load_digits(n_class=3, return_X_y=True)
    rows = np.concatenate([np.flatnonzero(labels == c)[:30] for c in range(3)])
    pixels = np.round(images[rows] * 255 / 16).astype(np.uint8).reshape(-1, 1, 8, 8)
    return torch.from_numpy(pixels), torch.from_numpy(labels[rows])


@pytest.fixture(scope="module")
def folder(digits, tmp_path_factory) -> Path:
    """Pictures of train (20 a class) and test (10), a folder for each class."""
    root = tmp_path_factory.mktemp("digits")
    for i, (x, y) in enumerate(zip(*digits, strict=True)):
        path = root / ("train" if i % 30 < 20 else "test") / NAMES[y] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x[0].numpy()).save(path)
    return root


@pytest.fixture(scope="module")
def parts(digits):
    kept = torch.arange(90) % 30 < 20
    return (digits[0][kept], digits[1][kept]), (digits[0][~kept], digits[1][~kept])


@pytest.fixture(scope="module")
def condensed(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("condensed") / "out"
    result = run(folder, *SMALL, "--steps", 4, "--out", out)
    assert result.exit_code == 0, result.output
    assert "60 images of 8 x 8 grey pixels in 3 classes became 3 (5.00%), cut by 2 to 12" in result.output
    assert f"dataopt condense eval {out}" in result.output
    return out


def test_the_folder_holds_what_the_condenser_makes(condensed, parts):
    network = Network("convnet", width=4).build((1, 8, 8), 3)
    expected = Condenser(network, 1, 2, steps=4, early_steps=2, seed=3).fit(*parts[0])
    found = Condensed.load(condensed)
    assert torch.equal(found.images, expected.images) and found.label_names == tuple(NAMES)
    assert (found.factor, found.made["steps"]) == (2, 4)
    assert found.made["source"] == expected.made["source"]
    for name in ("condensed.png", "changed.png"):
        assert Image.open(condensed / name).format == "PNG"
    record = json.loads((condensed / "record.json").read_text())
    assert record["source"]["split"] == "train" and record["network"] == {"name": "convnet", "depth": None, "width": 4}


def test_eval_prints_and_writes_what_evaluate_says(condensed, parts, tmp_path):
    result = run("eval", condensed, "--seeds", 2, "--steps", 3, "--device", "cpu")
    assert result.exit_code == 0, result.output
    network = Network("convnet", width=4).build((1, 8, 8), 3)
    settings = {"model_fn": {"convnet": network}, "seeds": (0, 1), "steps": 3}
    expected = evaluate(Condensed.load(condensed), *parts, **settings)
    eight_bits = save_condensed(Condensed.load(condensed), tmp_path / "published")
    (png,) = evaluate(read_condensed(eight_bits), *parts, **settings, baselines=()).rows
    expected = replace(expected, rows=(*expected.rows, replace(png, data="condensed, 8 bits")))
    written = json.loads((condensed / "scores.json").read_text())
    assert [(r["data"], tuple(r["accuracies"])) for r in written["rows"]] == [
        (r.data, r.accuracies) for r in expected.rows
    ]
    assert [r["stored"] for r in written["rows"]] == [3] * 5 and written["test_images"] == 30
    assert str(expected) in result.output and verdict(expected) in result.output
    assert written["test"]["split"] == "test" and written["seeds"] == [0, 1]
    networks = ("--network", "convnet", "--network", "timm:test_resnet")
    several = run("eval", condensed, "--seeds", 1, "--steps", 1, *networks)
    assert several.exit_code == 0, several.output
    rows = json.loads((condensed / "scores.json").read_text())["rows"]
    assert {r["network"] for r in rows} == {"convnet", "timm:test_resnet"} and len(rows) == 10


def test_a_stopped_run_goes_on_and_more_steps_are_the_long_run(folder, condensed, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert run(folder, *SMALL, "--steps", 2, "--out", out).exit_code == 0
    again = run(folder, *SMALL, "--steps", 4, "--out", out)
    assert again.exit_code == 1 and "is not empty; give another folder, or --resume" in again.output
    other = run(folder, *SMALL, "--seed", 4, "--steps", 4, "--out", out, "--resume")
    assert other.exit_code == 1 and "begun with other values of seed" in other.output
    (out / "record.json").unlink()
    early = run("eval", out)
    assert early.exit_code == 1 and "run dataopt condense to its end with --resume" in early.output
    (out / "scores.json").write_text("of two steps")
    save, beside = Condensed.save, []

    def watched(self: Condensed, target: Path) -> None:
        beside.extend(path.name for path in target.iterdir())
        save(self, target)

    monkeypatch.setattr(Condensed, "save", watched)
    longer = run(folder, *SMALL, "--steps", 4, "--out", out, "--resume")
    assert longer.exit_code == 0, longer.output
    about = {"scores.json", "condensed.png", "changed.png"}
    assert "condensed.json" in beside and not about & {*beside}  # a kill leaves nothing beside data that it is not of
    assert about & {path.name for path in out.iterdir()} == about - {"scores.json"}
    assert torch.equal(Condensed.load(out).images, Condensed.load(condensed).images)
    assert sorted(p.name[:9] for p in out.glob("condensed*")) == ["condensed"] * 3  # older tensors are gone


def test_a_published_folder_is_not_gone_on_in(folder, condensed, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(condensed / "work", out / "work")  # stopped before its end
    save_condensed(Condensed.load(condensed), out)
    before = {path: path.read_bytes() for path in out.rglob("*.*")}
    result = run(folder, *SMALL, "--steps", 4, "--out", out, "--resume")
    assert result.exit_code == 1 and len(result.output.strip().splitlines()) == 1
    assert f"--out {out} holds a published data set" in result.output
    assert {path: path.read_bytes() for path in out.rglob("*.*")} == before


def test_held_out_pictures_are_not_condensed_and_are_tested_on(folder, tmp_path):
    out = tmp_path / "out"
    result = run(folder / "train", *SMALL, "--steps", 1, "--hold-out", 0.25, "--out", out)
    assert result.exit_code == 0, result.output
    assert Condensed.load(out).made["source"]["classes"] == [15, 15, 15]
    scored = run("eval", out, "--seeds", 1, "--steps", 1)
    assert scored.exit_code == 0 and "15 test images" in scored.output
    elsewhere = run("eval", out, "--seeds", 1, "--steps", 1, "--test", folder / "test")
    assert elsewhere.exit_code == 0 and "30 test images" in elsewhere.output


def test_files_with_texts_as_labels_in_another_order(digits, folder, tmp_path):
    """Test labels are matched by name, not by their own numbers."""
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.Value("string")})
    for name, rows in (("train", range(60)), ("test", range(30, 90))):
        images = [Image.fromarray(digits[0][i, 0].numpy()) for i in rows]
        kinds = [NAMES[int(digits[1][i])] for i in rows]
        data = datasets.Dataset.from_dict({"picture": images, "kind": kinds}, features=features)
        data.to_parquet(tmp_path / f"{name}.parquet")
    out = tmp_path / "out"
    columns = ("--input-column", "picture", "--label-column", "kind")
    result = run(tmp_path / "train.parquet", *SMALL, *columns, "--factor", 1, "--steps", 1, "--out", out)
    assert result.exit_code == 0, result.output
    assert Condensed.load(out).label_names == ("nought", "one")
    refused = run("eval", out, "--test", tmp_path / "test.parquet")
    assert refused.exit_code == 1 and "column kind has the class 'two', which was not condensed" in refused.output
    alone = run("eval", out)
    assert alone.exit_code == 1 and "no split test beside what was condensed to test on" in alone.output
    same = run("eval", out, "--test", tmp_path / "train.parquet")
    assert same.exit_code == 1 and "train.parquet is what was condensed" in same.output


def test_large_pictures_of_many_sizes_want_one(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(8):
        path = tmp_path / "data" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    out = tmp_path / "out"
    result = run(tmp_path / "data", *SMALL, "--steps", 1, "--out", out)
    assert result.exit_code == 1 and "different sizes (30 x 20, in row 1 30 x" in result.output
    assert "give --size" in result.output and not out.exists()
    sized = run(tmp_path / "data", *SMALL, "--steps", 1, "--size", 16, "--out", out)
    assert sized.exit_code == 0, sized.output
    assert Condensed.load(out).images.shape == (2, 3, 16, 16)


def test_grey_stays_grey_unless_a_picture_has_colour():
    grey, colour = Image.fromarray(np.full((4, 6), 7, np.uint8)), Image.new("RGBA", (6, 4), (1, 2, 3, 0))

    def read(*images, **options):
        data = datasets.Dataset.from_dict({"x": list(images)}, features=datasets.Features({"x": datasets.Image()}))
        return read_images(data, "x", options.pop("size", None), **options)

    assert read(grey).shape == (1, 1, 4, 6) and (read(grey) == 7).all()
    both = read(grey, colour)
    assert both.dtype == torch.uint8 and both[:, :, 0, 0].tolist() == [[7, 7, 7], [1, 2, 3]]
    assert read(grey, grey=False).shape == (1, 3, 4, 6) and read(colour, grey=True).shape == (1, 1, 4, 6)
    wide = Image.fromarray(np.tile(np.repeat([255, 7, 255], [4, 12, 4]).astype(np.uint8), (4, 1)))
    assert read(wide, size=2)[0, 0].tolist() == [[7, 7], [7, 7]]  # the middle of it
    deep = Image.fromarray(np.full((4, 6), 700, np.uint16))
    with pytest.raises(ValueError, match="image of mode I;16 in row 1; convert such images to 8 bits"):
        read(grey, deep)
    with pytest.raises(ValueError, match="no image in row 1"):
        read(grey, None)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_tables_of_paths_or_bytes(folder, tmp_path, suffix):
    """Files that know nothing of pictures: texts are paths, and a parquet file without its schema has bytes."""
    paths = sorted((folder / "test").rglob("*.png"))
    rows = pd.DataFrame({"path": map(str, paths), "kind": [path.parent.name for path in paths]})
    table, column = tmp_path / f"rows{suffix}", "path"
    if suffix == ".jsonl":
        rows.to_json(table, orient="records", lines=True)
    elif suffix == ".parquet":
        column = "picture"
        rows[column] = [{"bytes": path.read_bytes(), "path": None} for path in paths]
        rows.drop(columns="path").to_parquet(table)
    else:
        rows.to_csv(table, index=False, sep="\t" if suffix == ".tsv" else ",")
    columns = ("--input-column", column, "--label-column", "kind")
    made = []
    for data, more in ((table, columns), (folder, ("--split", "test"))):
        out = tmp_path / f"out{len(made)}"
        result = run(data, *SMALL, *more, "--steps", 1, "--out", out)
        assert result.exit_code == 0, result.output
        made.append(Condensed.load(out))
    assert torch.equal(made[0].images, made[1].images) and made[0].label_names == made[1].label_names == tuple(NAMES)
    assert run("eval", tmp_path / "out0", "--test", folder, "--seeds", 1, "--steps", 1).exit_code == 0


def test_what_is_held_out_leaves_an_image_of_each_class(folder, tmp_path):
    data = tmp_path / "data"
    for name in NAMES:
        (data / name).mkdir(parents=True)
        for path in sorted((folder / "train" / name).iterdir())[:2]:
            shutil.copy(path, data / name)
    out = tmp_path / "out"
    assert run(data, *SMALL, "--steps", 1, "--hold-out", 0.9, "--out", out).exit_code == 0
    assert (
        json.loads(run("eval", out, "--seeds", 1, "--steps", 1) and (out / "scores.json").read_text())["test_images"]
        == 3
    )
    next((data / "one").iterdir()).unlink()
    result = run(data, *SMALL, "--steps", 1, "--hold-out", 0.2, "--out", tmp_path / "again")
    assert result.exit_code == 1 and "the class 'one' has one image, which --hold-out cannot both" in result.output


def test_another_network_than_the_one_that_herded_has_no_row_of_the_start(folder, tmp_path):
    out = tmp_path / "out"
    assert run(folder, *SMALL, "--factor", 1, "--init", "herding", "--steps", 1, "--out", out).exit_code == 0
    for network, rows in (("timm:test_resnet", 4), ("convnet", 5)):
        result = run("eval", out, "--network", network, "--seeds", 1, "--steps", 1)
        assert result.exit_code == 0, result.output
        assert len(json.loads((out / "scores.json").read_text())["rows"]) == rows
        assert ("No row of the start" in result.output) == (rows == 4)


def test_the_split_to_test_on_is_the_one_called_test(folder, condensed, tmp_path):
    for split, source in (("train", "train"), ("validation", "test")):
        shutil.copytree(folder / source, tmp_path / "data" / split)
    result = run("eval", condensed, "--test", tmp_path / "data")
    assert result.exit_code == 1 and "the splits train, validation; give one of them with --test-split" in result.output


def test_a_broken_picture_is_named(folder, tmp_path):
    shutil.copytree(folder / "test", tmp_path / "data")
    (tmp_path / "data" / "one" / "zzz.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    result = run(tmp_path / "data", *SMALL, "--steps", 1, "--out", tmp_path / "out")
    assert result.exit_code == 1 and "the image in row 20 cannot be read" in result.output
    assert not (tmp_path / "out").exists()


def test_results_and_scores_go_to_the_hub(hub, folder, tmp_path):
    out = str(tmp_path / "out")
    small = [str(a) for a in SMALL] + ["--steps", "1"]
    code = f"""
        from contextlib import suppress
        from dataopt.cli import main
        from dataopt.core.condense import Condensed, initial
        from dataopt.integrations.hf import read_condensed
        from huggingface_hub import HfApi, hf_hub_download

        initial._HERDING_STEPS = 2
        def run(*args):
            with suppress(SystemExit):
                main(["condense", *args])
        run({str(folder)!r}, *{small!r}, "--out", {out!r}, "--push", "me/few", "--private", "--licence", "mit")
        run("eval", {out!r}, "--seeds", "1", "--steps", "1", "--push", "me/few", "--licence", "mit")
        found = read_condensed("me/few", config="exact")
        print((found.images == Condensed.load({out!r}).images).all().item(), found.label_names)
        print(HfApi().repo_info("me/few", repo_type="dataset").private)
        card = open(hf_hub_download("me/few", "README.md", repo_type="dataset")).read()
        print("license: mit" in card, "herding" in card and "condensed, 8 bits" in card)
    """
    hub.lfs = True
    lines = run_client(hub, code).splitlines()
    assert sum(line.startswith("Uploaded to http") for line in lines) == 2
    assert lines[-3:] == [f"True {tuple(NAMES)}", "True", "True True"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--factor", "9"], "factor=9 is larger than the 8 x 8 images"),
        (["--factor", "two"], "--factor two must be a whole number of at least 1, or auto"),
        (["--network", "vgg"], "--network vgg must be convnet, resnet10, resnetap10 or timm:NAME"),
        (["--network", "resnet10"], "too small for ResNet-10"),
        (["--network", "timm:test_resnet", "--depth", "2"], "--depth 2 is for convnet"),
        (["--network", "timm:test_resnet"], "--width 4 is for networks of ours"),
        (["--depth", "4"], "too small for depth=4"),
        (["--lr", "0"], "lr=0.0 must be above 0"),
        (["--split", "validation"], "has the splits train, test; give one of them with --split"),
        (["--input-column", "label"], "--input-column label holds ClassLabel"),
        (["--input-column", "nose"], "--input-column nose is not among the columns image, label"),
        (["--label-column", "nose"], "label_column='nose' is not among the columns"),
        (["--device", "teapot"], "device='teapot' cannot be used"),
        (["--push", "a/b/c"], "a/b/c"),
        (["--private"], "--private and --licence are for --push"),
    ],
)
def test_bad_arguments_are_one_line_and_leave_nothing(folder, tmp_path, arguments, message):
    result = run(folder, *SMALL, "--steps", 1, *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 1 and message in result.output and "Traceback" not in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_eval_refuses_what_it_cannot_test(condensed, folder, tmp_path):
    for args, message in (
        ([tmp_path], "holds no record.json; give the --out of dataopt condense"),
        ([condensed, "--test-split", "train"], "has no split train beside train to test on"),
        ([condensed, "--same-compute"], "--same-compute counts steps of --epochs; give both"),
        ([condensed, "--network", "vgg"], "--network vgg must be convnet"),
        ([condensed, "--test", tmp_path / "no where"], "is no file, no folder and no name of a data set"),
    ):
        result = run("eval", *args)
        assert result.exit_code == 1 and message in result.output and "Traceback" not in result.output
    copy = tmp_path / "copy"
    shutil.copytree(condensed, copy)
    tensors = next(copy.glob("condensed-*.safetensors"))
    tensors.write_bytes(tensors.read_bytes()[:-1])
    result = run("eval", copy)
    assert result.exit_code == 1 and "bytes where condensed.json says" in result.output


def test_the_size_decides_the_depth():
    depths = {8: 2, 16: 2, 28: 3, 32: 3, 64: 4, 224: 5}
    for size, depth in depths.items():
        net = Network("convnet", width=2).build((3, size, size), 7)()
        assert isinstance(net, ConvNet) and len(net.convs) == depth
        assert net(torch.zeros(2, 3, size, size)).shape == (2, 7)
    assert Network("convnet").build((1, 28, 28), 10)().padding == [3, 1, 1]


def test_the_verdict_says_what_the_seeds_cannot_tell():
    def row(data, *accuracies):
        return Score(data, "net", 10, 10, 300, accuracies)

    scores = Scores((row("condensed", 0.9, 0.92), row("random", 0.7, 0.7), row("init", 0.9, 0.91)), 500)
    assert verdict(scores) == "Condensed, in points: +21.0 over random, +0.5 over init (within the spread)."


def test_the_sheet_shows_every_picture_in_its_place():
    rng = np.random.default_rng(0)
    stored, decoded = rng.random((2, 3, 1, 8, 8)), rng.random((2, 5, 1, 8, 8))
    figure = plots.show_condensed(["cat", "dog"], list(stored), list(decoded))
    left, right = figure.axes
    assert [t.get_text() for t in left.get_yticklabels()] == ["cat", "dog"]
    for ax, images in ((left, stored), (right, decoded)):
        sheet = np.asarray(ax.images[0].get_array())
        for r in range(2):
            for c in range(images.shape[1]):
                found = sheet[r * 9 : r * 9 + 8, c * 9 : c * 9 + 8]
                assert np.allclose(found, images[r, c, 0][..., None])
    assert (np.asarray(left.images[0].get_array())[8::9] == 1).all()  # white between them


def test_changes_are_coloured_by_their_sign():
    before = np.full((1, 2, 3, 8, 8), 0.5)
    after = before.copy()
    after[0, 0, :, :4] += 0.2
    after[0, 0, :, 4:] -= 0.1
    figure = plots.show_changes(["only"], list(before), list(after))
    assert [ax.get_title("left") for ax in figure.axes] == ["before", "after", "change, up to 0.20"]
    sheet = np.asarray(figure.axes[2].images[0].get_array())
    more, less, same = sheet[0, 0], sheet[7, 0], sheet[0, 12]
    assert more[2] > more[0] + 0.3 and less[0] > less[2] + 0.1 and np.allclose(same, 1, atol=0.02)
    assert Image.open(io.BytesIO(plots.to_png(figure))).format == "PNG"
    unchanged = plots.show_changes(["only"], list(before), list(before))
    assert unchanged.axes[2].get_title("left") == "no change"
