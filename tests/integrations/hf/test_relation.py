"""Scores as columns, the data set without what they found, and scores beside the data set, on the Hub too."""

import json
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from dataopt.core.relation import find_issues
from dataopt.integrations.hf import (
    add_relation_scores,
    clean_dataset,
    load_relation_scores,
    model_outputs,
    save_relation_scores,
)
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value, load_from_disk
from sklearn.datasets import load_digits
from torch import nn

from tests.hub import fixtures
from tests.hub.fixtures import run_client

from . import tiny

ROOT = Path(__file__).parents[3]
hub = fixtures.hub


class Pixels(nn.Module):
    """A linear classifier of 64 pixels, and how many rows it saw."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 10)
        self.fc.load_state_dict({"weight": weight, "bias": bias})
        self.num_classes, self.rows = 10, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.rows += len(x)
        return self.fc(x)


class AsVector:
    def __repr__(self) -> str:
        return "AsVector()"

    def __call__(self, pixels: list[float]) -> torch.Tensor:
        return torch.tensor(pixels) / 16


@pytest.fixture(scope="module")
def digits() -> tuple[Dataset, Pixels, np.ndarray]:
    """The digits with 8 % of the labels wrong, a model of the wrong labels, and which are wrong."""
    from sklearn.linear_model import LogisticRegression

    pixels, truth = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    wrong = np.zeros(len(truth), bool)
    wrong[rng.choice(len(truth), len(truth) * 8 // 100, replace=False)] = True
    labels = np.where(wrong, (truth + rng.integers(1, 10, len(truth))) % 10, truth)
    fit = LogisticRegression(C=0.05, max_iter=200).fit(pixels / 16, labels)
    features = Features(
        {"pixels": List(Value("float32")), "label": ClassLabel(names=list("0123456789")), "truth": Value("int64")}
    )
    dataset = Dataset.from_dict(
        {"pixels": list(pixels.astype("f")), "label": labels.tolist(), "truth": truth.tolist()}, features=features
    )
    return dataset, Pixels(torch.tensor(fit.coef_), torch.tensor(fit.intercept_)), wrong


OPTIONS = dict(transform=AsVector(), input_column="pixels", batch_size=512)


@pytest.fixture(scope="module")
def scored(digits) -> Dataset:
    dataset, model, _ = digits
    return add_relation_scores(dataset, model, **OPTIONS)


def test_columns_are_those_of_the_issues(digits, scored):
    dataset, model, _ = digits
    out = model_outputs(dataset, model, **OPTIONS)
    issues = find_issues(out.features, out.probs, out.labels)
    table = issues.to_pandas()
    assert scored.column_names == [*dataset.column_names, *table.columns, "conflicts"]
    for name in table:
        np.testing.assert_array_equal(np.array(scored[name][:]), table[name].to_numpy(), err_msg=name)
    assert scored.features["predicted_label"] == scored.features["given_label"] == dataset.features["label"]
    conflicts = scored["conflicts"][:]
    suspects = set(issues.suspects.tolist())
    assert all(not found for row, found in enumerate(conflicts) if row not in suspects)
    worst = int(issues.suspects[0])
    rows = issues.relations.conflicting[0]
    assert [c["row"] for c in conflicts[worst]] == rows[rows >= 0].tolist()
    values = [c["value"] for c in conflicts[worst]]
    assert values == sorted(values) and values[-1] < 0
    assert all(scored[c["row"]]["label"] != scored[worst]["label"] for c in conflicts[worst])


def test_flipped_digits_are_found_and_cleaned(digits, scored):
    dataset, _, wrong = digits
    flagged = np.array(scored["is_label_issue"][:])
    assert wrong[flagged].mean() > 0.85 and flagged[wrong].mean() > 0.4
    assert wrong[np.argsort(scored["label_score"][:])[: wrong.sum()]].mean() > 0.85
    dropped = clean_dataset(scored)
    assert len(dropped) == (~flagged).sum()
    relabelled = clean_dataset(dataset, scored, "relabel")
    assert relabelled.features == dataset.features and relabelled.column_names == dataset.column_names
    truth = np.array(dataset["truth"][:])
    assert relabelled["truth"][:] == dataset["truth"][:]
    before, after = (np.array(d["label"][:]) == truth for d in (dataset, relabelled))
    assert after.mean() > before.mean() + 0.03 and after[flagged & wrong].mean() > 0.9
    unflagged = np.flatnonzero(~flagged)
    assert np.array_equal(np.array(relabelled["label"][:])[unflagged], np.array(dataset["label"][:])[unflagged])


def test_computed_once_per_data_weights_and_settings(digits, tmp_path):
    dataset, model, _ = digits
    dataset.select(range(100)).save_to_disk(tmp_path / "d")

    def rows_seen(shift=0.0, **options) -> int:
        fresh = Pixels(model.fc.weight.data, model.fc.bias.data + shift * torch.arange(10))
        add_relation_scores(load_from_disk(tmp_path / "d"), fresh, **{**OPTIONS, **options})
        return fresh.rows

    assert rows_seen() == 100
    assert rows_seen() == 0
    assert rows_seen(shift=1.0) == 100
    assert rows_seen(top=3) == 100
    assert rows_seen(probs="out-of-fold") == 100
    assert rows_seen(shift=1.0) == rows_seen(top=3) == rows_seen() == 0
    with pytest.MonkeyPatch.context() as patch:  # classes of these names stand in another order
        patch.setattr(Pixels, "config", types.SimpleNamespace(id2label=dict(enumerate("1023456789"))), raising=False)
        assert rows_seen() == 100
    assert rows_seen(top=4, out_dir=tmp_path / "outputs") == 100
    assert rows_seen(top=5, out_dir=tmp_path / "outputs") == 0


def test_text_rows_stay_aligned_after_a_shuffle():
    dataset = tiny.texts(20).add_column("id", list(range(20))).shuffle(seed=1)
    options = dict(processor=tiny.tokenizer(), input_column="text", batch_size=20)
    model = tiny.text_model(num_labels=2)
    out = add_relation_scores(dataset, model, **options)
    straight = model_outputs(dataset.sort("id"), model, **options)
    given = -straight.probs[torch.arange(20), straight.labels].log()
    assert out["id"][:] != list(range(20))
    for row in out:
        assert row["loss"] == pytest.approx(float(given[row["id"]]), abs=1e-4)
        assert row["given_label"] == row["label"] == int("good" in row["text"])


@pytest.fixture
def small() -> tuple[Dataset, pd.DataFrame]:
    """Six rows; row 1 has a wrong label, 5 is an outlier, and 0, 1, 3 and 4 are near-duplicates of each other."""
    features = Features({"x": Value("string"), "label": ClassLabel(names=["a", "b"]), "y": Value("int64")})
    dataset = Dataset.from_dict({"x": list("uvwxyz"), "label": [0, 0, 0, 1, 1, 1], "y": range(6)}, features=features)
    table = pd.DataFrame(
        {
            "is_label_issue": [False, True, False, False, False, False],
            "label_score": [0.9, 0.0, 0.8, 0.2, 0.7, 0.6],
            "given_label": [0, 0, 0, 1, 1, 1],
            "predicted_label": [0, 1, 0, 1, 1, 1],
            "is_outlier_issue": [False] * 5 + [True],
            "outlier_score": [0.5] * 5 + [0.1],
            "is_near_duplicate_issue": [True, True, False, True, True, False],
            "near_duplicate_score": [0.0, 0.0, 0.5, 0.0, 0.0, 0.5],
            "nearest_neighbor": [3, 0, 1, 4, 3, 0],
        }
    )
    return dataset, table


def test_drop_and_relabel(small):
    dataset, table = small

    def left(*args, **options) -> list[tuple[str, int]]:
        out = clean_dataset(dataset, table, *args, **options)
        assert out.features == dataset.features
        return "".join(out["x"][:]), out["label"][:]

    assert left() == ("uwxyz", [0, 0, 1, 1, 1])
    assert left("relabel") == ("uvwxyz", [0, 1, 0, 1, 1, 1])
    assert left(issues=("outlier",)) == ("uvwxy", [0, 0, 0, 1, 1])
    assert left("relabel", issues=("label", "outlier")) == ("uvwxy", [0, 1, 0, 1, 1])
    assert left(issues=["near_duplicate"])[0] == "uwz"
    assert left(min_score=0.25)[0] == "uwyz"
    assert left(issues="outlier", min_score=0.5)[0] == "uvwxy"
    # a group of copies keeps its first row without another issue
    table.loc[[0, 1], "is_label_issue"] = [True, False]
    assert left(issues=("label", "near_duplicate"))[0] == "vwz"
    table["is_label_issue"] = [True, True, False, True, True, False]
    assert left(issues=("label", "near_duplicate"))[0] == "wz"


@pytest.mark.parametrize("action", ["drop", "relabel"])
def test_a_format_that_was_set_stays(small, action):
    dataset, table = small
    shouted = dataset.with_transform(lambda batch: {"x": [x.upper() for x in batch["x"]], "label": batch["label"]})
    assert "".join(row["x"] for row in clean_dataset(shouted, table, action)) in ("UWXYZ", "UVWXYZ")
    arrays = clean_dataset(dataset.with_format("numpy", columns=["label"], output_all_columns=True), table, action)
    assert isinstance(arrays[0]["label"], np.integer) and arrays[0]["x"] == "u"


def test_labels_as_names_and_as_numbers(small):
    dataset, table = small
    names = dataset.remove_columns("label").add_column("label", list("aaabbb"))
    assert clean_dataset(names, table, "relabel")["label"][:] == list("ababbb")
    numbers = dataset.cast_column("label", Value("int8"))
    out = clean_dataset(numbers, table, "relabel")
    assert out["label"][:] == [0, 1, 0, 1, 1, 1] and out.features["label"] == Value("int8")


def test_scores_in_every_form(small, tmp_path, digits, scored):
    dataset, table = small
    table.to_parquet(tmp_path / "scores.parquet")
    shuffled = table.assign(index=range(6)).sample(frac=1, random_state=1)
    assert shuffled["index"].tolist() != list(range(6))
    save_relation_scores(table, tmp_path / "beside")
    columns = dataset.remove_columns("label").add_column("label", dataset["label"][:])
    for name in table:
        columns = columns.add_column(name, table[name].tolist())
    for form in (table, tmp_path / "scores.parquet", str(tmp_path), shuffled, tmp_path / "beside", columns):
        assert clean_dataset(dataset, form)["x"][:] == list("uwxyz")
    data, model, _ = digits
    out = model_outputs(data, model, **OPTIONS)
    issues = find_issues(out.features, out.probs, out.labels)
    assert clean_dataset(data, issues)["truth"][:] == clean_dataset(data, scored)["truth"][:]


def test_scores_of_another_data_set_are_refused_by_row(small, tmp_path):
    dataset, table = small
    indexed = table.assign(index=range(6))
    for scores, message in [
        (table[:4], "scores have 4 rows and the data set 6: row 4 has no score"),
        (pd.concat([table, table[:1]]), "scores have 7 rows and the data set 6: score 6 has no row"),
        (table[::-1], "row 0 has the label 'a' and its score was made for 'b'"),
        (table.assign(given_label=[0, 0, 0, 1, 0, 1]), "row 4 has the label 'b' and its score was made for 'a'"),
        (indexed.assign(index=[0, 1, 2, 3, 3, 5]), "scores hold row 3 of the data set twice"),
        (indexed.assign(index=[0, 1, 2, 3, 4, 9]), r"scores lack a row of the data set, row 5 \(6 scores, 6 rows\)"),
        (pd.concat([indexed, indexed[:1].assign(index=8)]), "hold a row that the data set has not, row 8"),
        (table.drop(columns="is_label_issue"), r"scores lack the columns \['is_label_issue'\]"),
        (dataset, r"scores lack the columns \['given_label', 'is_label_issue', 'predicted_label'\]"),
        (tmp_path / "nothing.parquet", "nothing.parquet cannot be read as a parquet file"),
        (tmp_path, "holds no relation scores of default/train"),
        (table.assign(predicted_label=[0, 7, 0, 1, 1, 1]), "suggest the class 7 for row 1, outside the 2 classes"),
    ]:
        with pytest.raises(ValueError, match=message):
            clean_dataset(dataset, scores, "relabel")
    with pytest.raises(TypeError, match="scores is a dict; give an Issues"):
        clean_dataset(dataset, {})
    with pytest.raises(ValueError, match="action='keep' must be one of 'drop', 'relabel'"):
        clean_dataset(dataset, table, "keep")
    for issues in ((), ("label", "typo")):
        with pytest.raises(ValueError, match="must name one or more of label, outlier, near_duplicate"):
            clean_dataset(dataset, table, issues=issues)
    with pytest.raises(ValueError, match="label_column='y2' is not among"):
        clean_dataset(dataset, table, label_column="y2")
    with pytest.raises(TypeError, match="one split at a time"):
        clean_dataset(DatasetDict(train=dataset), table)


def test_columns_already_there_are_refused(digits, scored):
    _, model, _ = digits
    with pytest.raises(ValueError, match=r"columns \['is_label_issue', .* are already there; remove_columns"):
        add_relation_scores(scored, model, **OPTIONS)
    with pytest.raises(ValueError, match="prints its address"):
        add_relation_scores(digits[0], model, **{**OPTIONS, "transform": lambda pixels: torch.tensor(pixels)})


def test_saved_and_loaded(small, tmp_path):
    _, table = small
    folder = save_relation_scores(table, tmp_path, split="test", label_names=["a", "b"], model="me/model")
    loaded = load_relation_scores(tmp_path, split="test")
    pd.testing.assert_frame_equal(loaded, table)
    assert loaded.attrs["label_names"] == ["a", "b"] and loaded.attrs["model"] == "me/model"
    record = json.loads((folder / "record.json").read_text())
    assert record["counts"] == {"is_label_issue": 1, "is_outlier_issue": 1, "is_near_duplicate_issue": 4}
    with pytest.raises(ValueError, match="holds no relation scores of default/train"):
        load_relation_scores(tmp_path)
    table[:5].to_parquet(folder / "scores.parquet")
    with pytest.raises(ValueError, match=r"scores.parquet is not the file of its record"):
        load_relation_scores(tmp_path, split="test")
    for name in ("../x", "", "a/b"):
        with pytest.raises(ValueError, match="is no name of a split"):
            save_relation_scores(table, tmp_path, split=name)
    with pytest.raises(ValueError, match="scores lack the column given_label"):
        save_relation_scores(table.drop(columns="given_label"), tmp_path)


CLIENT = """
import io, json
import pandas as pd
from datasets import load_dataset
from huggingface_hub import HfApi
from dataopt.integrations.hf import load_relation_scores, push_relation_scores
api = HfApi()
api.create_repo("me/data", repo_type="dataset")
rows = b"x,label\\n" + b"".join(b"%d,%d\\n" % (i, i % 2) for i in range(6))
api.upload_file(path_or_fileobj=rows, path_in_repo="rows.csv", repo_id="me/data", repo_type="dataset")
readme = "---\\nlicense: mit\\n---\\n# My data\\n\\nWords of mine.\\n"
api.upload_file(path_or_fileobj=readme.encode(), path_in_repo="README.md", repo_id="me/data", repo_type="dataset")
before = api.repo_info("me/data", repo_type="dataset").sha
def kind(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "fine"
table = pd.DataFrame({"given_label": [0, 1] * 3, "is_label_issue": [False] * 5 + [True], "label_score": [.5] * 6})
got = {"url": push_relation_scores(table, "me/data", model="me/model", label_names=["even", "odd"])}
table["is_label_issue"] = [True] + [False] * 5
push_relation_scores(table, "me/data", commit_message="again")
push_relation_scores(table, "me/new", private=True, split="test")
data = load_dataset("me/data", split="train")
scores = load_relation_scores("me/data")
first = load_relation_scores("me/data", revision=got["url"].rpartition("/")[2])
got |= {"rows": data["x"][:], "flags": scores.is_label_issue.tolist(), "first": first.is_label_issue.tolist(),
        "attrs": first.attrs,
        "stale": kind(push_relation_scores, table[:3], "me/data", parent_commit=before),
        "not mine": kind(push_relation_scores, table, "other/data"),
        "public": kind(push_relation_scores, table, "me/data", private=True),
        "none": kind(load_relation_scores, "me/new"),
        "private": api.repo_info("me/new", repo_type="dataset").private}
print(json.dumps(got))
"""


def test_hub(hub):
    hub.lfs = True  # where parquet files are on the Hub
    got = json.loads(run_client(hub, CLIENT, PYTHONPATH=str(ROOT)).splitlines()[-1])
    assert got["url"].startswith(f"{hub.url}/datasets/me/data/commit/")
    assert got["rows"] == [0, 1, 2, 3, 4, 5]  # load_dataset takes no notice of the scores
    assert got["flags"] == [True] + [False] * 5 and got["first"] == [False] * 5 + [True]
    assert got["attrs"]["label_names"] == ["even", "odd"] and got["attrs"]["model"] == "me/model"
    assert "412" in got["stale"] and "403" in got["not mine"]
    assert got["public"].startswith("ValueError: me/data is public and private=True")
    assert got["none"].startswith("ValueError: 'me/new' holds no relation scores of default/train")
    assert got["private"] is True
    files = hub.files("me/data", "dataset")
    scores = ["__dataopt__/default/train/record.json", "__dataopt__/default/train/scores.parquet"]
    assert sorted(files) == [".gitattributes", "README.md", *scores, "rows.csv"]
    readme = files["README.md"].decode()
    assert readme.startswith("---\nlicense: mit\n---\n# My data\n\nWords of mine.\n\n")
    assert readme.count("## Relation scores") == 1 and "1 label issues" in readme
    assert hub.repo("me/data", "dataset").history()[0][1].title == "again"
    assert (
        "load_relation_scores('me/new', config='default', split='test')"
        in hub.files("me/new", "dataset")["README.md"].decode()
    )
