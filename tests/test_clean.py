"""``dataopt clean``: pictures, saved data and files, through small models, to the folder that review reads."""

import dataclasses
import hashlib
import html
import io
import json
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from dataopt import clean, clean_report
from dataopt.cli import app
from dataopt.core.relation import RelationGraph, find_issues
from dataopt.integrations.hf import hub as records
from dataopt.integrations.hf.features import model_outputs
from dataopt.items import items_table
from dataopt.review.export import export
from dataopt.review.folder import read_folder
from dataopt.sources import find_labels, find_source
from PIL import Image
from typer.testing import CliRunner

from .hub.fixtures import hub, run_client
from .integrations.hf import tiny

__all__ = ["hub"]  # a fixture


def run(*args):
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, ["clean", *map(str, args)])


@pytest.fixture(scope="module")
def text_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text-model")
    tiny.text_model(num_labels=2).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reviews(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("reviews") / "reviews.csv"
    data = tiny.texts(120)
    pd.DataFrame({"text": data["text"], "label": data["label"]}).to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def cleaned(reviews, text_model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("clean") / "out"
    result = run(reviews, "--model", text_model, "--out", out, "--probs", "out-of-fold", "--top", 4)
    assert result.exit_code == 0, result.output
    assert "120 rows, 2 classes" in result.output and "label issues" in result.output
    return out


def test_the_folder_holds_what_find_issues_says(cleaned, reviews, text_model):
    data = datasets.load_dataset("csv", data_files=str(reviews), split="train")
    outputs = model_outputs(
        data, tiny.text_model(num_labels=2).base_model, processor=tiny.tokenizer(), probs="out-of-fold"
    )
    expected = find_issues(outputs.features, outputs.probs, outputs.labels, top=4)
    scores = pd.read_parquet(cleaned / "scores.parquet")
    assert scores["index"].tolist() == list(range(120)) and scores["given_label"].tolist() == data["label"][:]
    for name in ("is_label_issue", "predicted_label", "is_outlier_issue", "nearest_neighbor"):
        assert scores[name].tolist() == getattr(expected, name).tolist()
    assert np.allclose(scores["label_score"], expected.label_score)
    record = records.read_record(cleaned / "record.json", "dataopt-clean", 1)
    assert record["rows"] == 120 and record["modality"] == "text" and record["input_column"] == "text"
    given = np.array(data["label"][:], "<i8")
    assert record["labels_hash"] == hashlib.sha256(given.tobytes()).hexdigest()
    kept = datasets.load_dataset("parquet", data_files=str(cleaned / "cleaned/train.parquet"), split="train")
    assert kept["text"][:] == [data["text"][i] for i in range(120) if not expected.is_label_issue[i]]
    assert record["counts"]["cleaned_rows"] == len(kept) < 120


def test_neighbours_are_signed_sorted_and_shown(cleaned):
    scores = pd.read_parquet(cleaned / "scores.parquet")
    relations = pd.read_parquet(cleaned / "relations.parquet")
    items = pd.read_parquet(cleaned / "items.parquet").set_index("index")
    label = scores["given_label"].to_numpy()
    assert len(relations) and set(relations["row"]) <= set(
        scores["index"][scores.is_label_issue | scores.is_outlier_issue]
    )
    same = label[relations["row"]] == label[relations["neighbour"]]
    assert ((relations["value"] > 0) == same).all() and (relations["row"] != relations["neighbour"]).all()
    for _, group in relations.groupby("row"):
        assert group["value"].abs().is_monotonic_decreasing and group["rank"].is_monotonic_increasing
        assert (group["value"] > 0).sum() <= 4 and (group["value"] < 0).sum() <= 4
    assert set(relations["neighbour"]) | set(relations["row"]) <= set(items.index)
    assert (items["label"] == label[items.index]).all() and relations["similarity"].abs().max() <= 1 + 1e-6


def test_the_map_is_that_of_the_relations(cleaned):
    relations, drawn = (
        pd.read_parquet(cleaned / f"{n}.parquet").set_index(["row", "neighbour"]) for n in ("relations", "map")
    )
    both = relations.join(drawn, how="inner")
    assert len(both) == len(relations)  # the strongest are in it
    assert np.allclose(both["value"], both["last"], atol=1e-6) and (drawn["std"] == 0).all()
    assert np.allclose(drawn["mean"], drawn["last"])


def test_review_reads_and_exports_the_folder(cleaned, tmp_path):
    folder = read_folder(cleaned)
    assert len(folder.suspects) and folder.items.text(int(folder.suspects[0]))
    done = export(folder.record, {}, len(folder.suspects), tmp_path)
    assert done.rows == 120 and (tmp_path / "train.parquet").exists()


def test_the_worst_of_each_kind_are_shown_where_there_are_many(reviews, text_model, tmp_path, monkeypatch):
    monkeypatch.setattr(clean, "_SHOWN", 2)

    def with_outliers(*args, **options):
        """Those of the data, and rows 5 to 7 as outliers."""
        issues = find_issues(*args, **options)
        wrong, far = issues.is_label_issue.clone(), issues.is_outlier_issue.clone()
        wrong[5:8], far[5:8] = False, True
        suspects = torch.cat([wrong.nonzero().squeeze(1), torch.arange(5, 8)])
        relations = RelationGraph(*args[:3]).relations(suspects, 4)
        flags = {"is_label_issue": wrong, "is_outlier_issue": far}
        return dataclasses.replace(issues, **flags, suspects=suspects, relations=relations)

    monkeypatch.setattr(clean, "find_issues", with_outliers)
    out = tmp_path / "out"
    result = run(reviews, "--model", text_model, "--out", out, "--probs", "out-of-fold")
    assert result.exit_code == 0, result.output
    assert "Note: only the worst 2 of a kind have pictures and neighbours" in result.output
    assert set(pd.read_parquet(out / "relations.parquet")["row"]) >= {5, 6}
    folder = read_folder(out)
    assert {5, 6} <= set(folder.suspects.tolist())


def test_pictures_of_a_folder_and_several_checkpoints(tmp_path):
    rng = np.random.default_rng(0)
    for row in range(90):
        path = tmp_path / "data" / "abc"[row % 3] / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 90, (20, 20, 3), dtype=np.uint8)
        pixels[..., (row + row % 7 // 6) % 3] += 150  # the colour tells the class, of six in seven
        Image.fromarray(pixels).save(path)
    for name, seed in (("early", 1), ("late", 2)):
        model, processor = tiny.image_model()
        torch.manual_seed(seed)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    out = tmp_path / "out"
    models = ["--model", tmp_path / "early", "--model", tmp_path / "late", "--probs", "out-of-fold"]
    result = run(
        tmp_path / "data", *models, "--out", out, "--action", "relabel", "--issue", "label", "--issue", "outlier"
    )
    assert result.exit_code == 0, result.output
    drawn, scores = pd.read_parquet(out / "map.parquet"), pd.read_parquet(out / "scores.parquet")
    assert 0 < scores.is_label_issue.sum() < 45 and (drawn["std"] > 0).any()
    kept = datasets.load_dataset("parquet", data_files=str(out / "cleaned/train.parquet"), split="train")
    stays = scores[~scores.is_outlier_issue]
    assert kept["label"][:] == stays["predicted_label"].where(stays["is_label_issue"], stays["given_label"]).tolist()
    assert kept.features["label"].names == ["a", "b", "c"] and kept[0]["image"].size == (20, 20)
    page = (out / "report.html").read_text()
    assert "data:image/png;base64," in page and "<script" not in page and "http" not in page.replace("http-equiv", "")
    again = run(tmp_path / "data", *models, "--out", out, "--action", "relabel")
    assert again.exit_code == 1 and "is not empty; give another folder, or --resume" in again.output
    other = run(tmp_path / "data", *models[2:], "--out", out, "--resume")
    assert other.exit_code == 1 and "other values of models" in other.output
    (out / "record.json").unlink()
    on = run(tmp_path / "data", *models, "--out", out, "--action", "relabel", "--resume")
    assert on.exit_code == 0, on.output
    assert (out / "record.json").exists()
    assert pd.read_parquet(out / "scores.parquet").equals(scores)


def test_text_of_the_data_is_no_markup(cleaned, tmp_path):
    record = json.loads((cleaned / "record.json").read_text())
    tables = [pd.read_parquet(cleaned / f"{n}.parquet") for n in ("scores", "relations", "items")]
    attack = "<script>alert(1)</script>"
    tables[2]["text"] = attack
    record["label_names"] = [attack, "</title><img src=x>"]
    page = clean_report.render(record, tmp_path, *tables)
    assert attack not in page and html.escape(attack) in page and "<img src=x>" not in page


def test_items_are_small_and_playable():
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (700, 1400, 3), dtype=np.uint8))
    clear = Image.new("RGBA", (300, 10), (1, 2, 3, 0))
    data = datasets.Dataset.from_dict({"image": [wide, clear]}, features=datasets.Features({"image": datasets.Image()}))
    table = items_table(data, ["image"], "image", torch.tensor([0, 1]), np.array([0, 1]))
    assert table["media_type"].tolist() == ["image/jpeg", "image/png"] and table["label"].tolist() == [0, 1]
    shown = [Image.open(io.BytesIO(m)) for m in table["media"]]
    assert shown[0].size == (512, 256) and shown[1].mode == "RGBA"
    tone = tiny.tones(8000, 1)[0]
    file = tiny.wav(tone, 8000)
    data = datasets.Dataset.from_dict({"sound": [{"array": tone.tolist(), "sampling_rate": 8000}]})
    as_array = items_table(data, ["sound"], "audio", torch.tensor([0]), np.array([0]))
    data = datasets.Dataset.from_dict({"sound": [file]})
    as_file = items_table(data, ["sound"], "audio", torch.tensor([0]), np.array([0]))
    assert as_file["media"][0] == file and as_array["media"][0][:4] == b"RIFF"
    assert as_array["media_type"][0] == as_file["media_type"][0] == "audio/wav"
    minute = tiny.wav(np.resize(tone, 60 * 8000), 8000)
    data = datasets.Dataset.from_dict({"sound": [minute]})
    cut = items_table(data, ["sound"], "audio", torch.tensor([0]), np.array([0]))["media"][0]
    assert len(minute) > 2**19 and len(cut) == 44 + 2 * 10 * 8000  # its first ten seconds
    long = datasets.Dataset.from_dict({"a": ["x" * 9000], "b": ["second"]})
    text = items_table(long, ["b", "a"], "text", torch.tensor([0]), np.array([0]))["text"][0]
    assert text.startswith("second\n\nxxx") and len(text) == 4004


def test_a_data_set_on_the_hub_is_named_by_its_commit(hub):
    hub.lfs = True
    code = (
        "from dataopt.sources import find_source, load_source\n"
        "from datasets import Dataset\n"
        "data = Dataset.from_dict({'text': ['a', 'b'], 'label': [0, 1]})\n"
        "data.push_to_hub('me/words')\n"
        "source = find_source('me/words', None, None, None)\n"
        "data.select([0]).push_to_hub('me/words')\n"
        "print(source['kind'], source['split'], len(source['revision']), load_source(source)['text'][:])"
    )
    assert run_client(hub, code).splitlines()[-1] == "hub train 40 ['a', 'b']"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{tmp}/nothing here"], "is no file, no folder and no name of a data set on the Hub"),
        (["{csv}", "--revision", "main"], "is for the Hub"),
        (["{csv}", "--label-column", "stars"], "label_column='stars' is not among the columns"),
        (["{csv}", "--input-column", "body"], "input_column='body' is not among the columns"),
        (["{csv}", "--head", "nose"], "head='nose' is no layer"),
        (["{csv}", "--device", "teapot"], "teapot"),
        (["{csv}", "--partitions", "500"], "partitions=500 must be a whole number between 1 and 60"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, reviews, text_model, tmp_path):
    names = {"tmp": tmp_path, "csv": reviews}
    result = run(*[a.format(**names) for a in arguments], "--model", text_model, "--out", tmp_path / "out")
    assert result.exit_code == 1 and message in result.output and "Traceback" not in result.output
    assert not (tmp_path / "out" / "record.json").exists()
    assert not (tmp_path / "out").exists() or message.startswith("partitions")  # which is known to be wrong later


def test_an_encoder_is_not_taken_for_a_classifier(reviews, tmp_path):
    model = tiny.text_model()
    for part in (model, tiny.tokenizer()):
        part.save_pretrained(tmp_path / "whole")
    for part in (model.base_model, tiny.tokenizer()):
        part.save_pretrained(tmp_path / "encoder")
    result = run(reviews, "--model", tmp_path / "encoder", "--out", tmp_path / "out")
    assert result.exit_code == 1 and "has no trained classifier (" in result.output and not (tmp_path / "out").exists()
    for name, probs in (("encoder", "out-of-fold"), ("whole", "model")):
        result = run(reviews, "--model", tmp_path / name, "--out", tmp_path / name / "out", "--probs", probs)
        assert result.exit_code == 0, result.output


def test_splits_and_labels_that_are_not_clear(tmp_path):
    two = datasets.Dataset.from_dict({"a": [1], "b": [2]})
    datasets.DatasetDict({"one": two, "two": two}).save_to_disk(tmp_path / "both")
    with pytest.raises(ValueError, match="has the splits one, two; give one of them with --split"):
        find_source(str(tmp_path / "both"), None, None, None)
    assert find_source(str(tmp_path / "both"), "two", None, None)["split"] == "two"
    with pytest.raises(ValueError, match="not clear among a, b; give --label-column"):
        find_labels(two)


def test_a_model_of_other_classes_is_refused(reviews, tmp_path):
    tiny.text_model(num_labels=5).save_pretrained(tmp_path / "five")
    tiny.tokenizer().save_pretrained(tmp_path / "five")
    data = datasets.Dataset.from_csv(str(reviews)).cast_column("label", datasets.ClassLabel(names=["n", "p"]))
    data.save_to_disk(tmp_path / "data")
    result = run(tmp_path / "data", "--model", tmp_path / "five", "--out", tmp_path / "out")
    assert result.exit_code == 1 and "knows 5 classes and the labels are 2" in result.output
