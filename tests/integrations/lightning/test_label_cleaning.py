"""Label cleaning inside the Lightning Trainer, and the data set whose labels and weights change."""

import logging
import shutil
import typing

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from dataopt.integrations import lightning as ours
from dataopt.integrations.lightning import CleanableDataset, LabelCleaningCallback, read_snapshots
from dataopt.integrations.snapshots import undisturbed
from datasets import ClassLabel, Features, Value
from datasets import Dataset as HFDataset
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from ..tiny import Perceptron, trainer

ROWS = 400


@pytest.fixture(scope="module")
def digits() -> tuple[TensorDataset, torch.Tensor]:
    """Images and labels of which every 12th is wrong; and which ones."""
    x, y = (torch.from_numpy(a)[:ROWS] for a in load_digits(return_X_y=True))
    wrong = torch.arange(ROWS) % 12 == 5
    y = torch.where(wrong, (y + 1 + torch.arange(ROWS) % 9) % 10, y)
    return TensorDataset(x.float() / 16, y), wrong


def loader(data, **more) -> DataLoader:
    return DataLoader(data, 32, shuffle=True, **more)


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def fit(root, data, *callbacks, epochs: int = 3, module=None, workers: dict | None = None, **more):
    module = Perceptron() if module is None else module
    torch.manual_seed(0)
    np.random.seed(0)
    ckpt = more.pop("ckpt_path", None)
    trainer(root, *callbacks, epochs=epochs, **more).fit(module, loader(data, **(workers or {})), ckpt_path=ckpt)
    return module


def test_flipped_digits_are_found_in_the_order_of_the_data(tmp_path, digits, caplog):
    data, wrong = digits
    out = tmp_path / "c"
    cleaning = LabelCleaningCallback(out, epochs=[5, 10], batch_size=33)
    with caplog.at_level(logging.INFO, "dataopt"):
        module = fit(tmp_path, data, cleaning, epochs=10)
    assert same_weights(module, fit(tmp_path, data, epochs=10))

    table = pd.read_parquet(out / "epoch-0010" / "scores.parquet")
    assert table["index"].tolist() == list(range(ROWS))
    assert table.given_label.tolist() == data.tensors[1].tolist()
    assert average_precision_score(wrong, -table.label_score) > 0.9
    assert wrong[torch.from_numpy(table.index[table.is_label_issue].to_numpy())].double().mean() > 0.6
    assert f"epoch 10: {int(table.is_label_issue.sum())} of 400 labels doubted" in caplog.text

    first, last = read_snapshots(out)
    module.eval()
    with torch.no_grad():
        features = module.body(data.tensors[0])
    assert (first.epoch, last.epoch) == (5, 10)
    torch.testing.assert_close(last.features, features)
    torch.testing.assert_close(last.probs, module.head(features).softmax(1).detach())


class Shifted(Dataset):
    """The digits with random noise from two random states, as dicts."""

    def __init__(self, data: TensorDataset):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> dict:
        x, y = self.data[i]
        return {"x": x + torch.randn(64) * 0.1 + float(np.random.rand()), "target": y}


class Named(Perceptron):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch["x"], batch["target"]), batch_idx)


def test_training_is_the_same_and_dataset_is_what_is_looked_at(tmp_path, digits):
    data, _ = digits
    clean = [{"x": x, "target": y} for x, y in data]
    cleaning = LabelCleaningCallback(tmp_path / "c", dataset=clean, input_key="x")
    own = LabelCleaningCallback(tmp_path / "own")
    plain = fit(tmp_path, Shifted(data), module=Named(), epochs=2)
    module = fit(tmp_path, Shifted(data), cleaning, module=Named(), epochs=2)
    assert same_weights(plain, module)
    assert same_weights(plain, fit(tmp_path, Shifted(data), own, module=Named(), epochs=2, precision="32-true"))
    module.eval()
    last = list(read_snapshots(tmp_path / "c"))[-1]
    torch.testing.assert_close(last.features, module.body(data.tensors[0]).detach())


def test_frozen_parts_stay_as_they_are(tmp_path, digits):
    class Frozen(Perceptron):
        """The body neither learns nor drops, as in fine-tuning a head."""

        def __init__(self):
            super().__init__()
            self.body.requires_grad_(False)
            self.modes = set()

        def on_fit_start(self):
            self.body.eval()

        def training_step(self, batch, batch_idx):
            self.modes.add((self.training, self.body.training, self.body[2].training, self.head.training))
            return super().training_step(batch, batch_idx)

    module = fit(tmp_path, digits[0], LabelCleaningCallback(tmp_path / "c"), module=Frozen(), epochs=2)
    assert module.modes == {(True, False, False, True)}
    assert [p.requires_grad for p in module.parameters()] == [False, False, True, True]

    module.train()
    with pytest.raises(ZeroDivisionError), undisturbed(module):
        assert not module.head.training and not torch.is_grad_enabled()
        1 / 0  # noqa: B018
    assert module.head.training and torch.is_grad_enabled()


def test_precision_of_the_trainer_holds_in_the_pass(tmp_path, digits):
    dtypes = []

    class Watched(Perceptron):
        def forward(self, x):
            out = super().forward(x)
            dtypes.append((self.training, out.dtype))
            return out

    fit(tmp_path, digits[0], LabelCleaningCallback(tmp_path / "c"), module=Watched(), epochs=1, precision="bf16-mixed")
    assert set(dtypes) == {(True, torch.bfloat16), (False, torch.bfloat16)}


@pytest.mark.parametrize("persistent", [False, True])
def test_running_loader_workers_see_a_relabel(tmp_path, digits, persistent):
    data, wrong = CleanableDataset(digits[0]), digits[1]
    cleaning = LabelCleaningCallback(
        tmp_path / "c", action="relabel", confidence=0.4, epochs=[6], start=1, num_workers=0
    )
    module = fit(
        tmp_path, data, cleaning, epochs=7, workers={"num_workers": 1, "persistent_workers": persistent}
    )  # fmt: skip
    changed = data.labels != data.given
    assert changed[wrong].double().mean() > 0.5 and changed[~wrong].double().mean() < 0.05
    truth = torch.from_numpy(load_digits(return_X_y=True)[1][:ROWS])
    assert (data.labels == truth)[changed & wrong].double().mean() > 0.9
    y, weight, index = (torch.cat(x).view(7, ROWS) for x in zip(*module.seen, strict=True))
    assert torch.equal(y[5], data.given[index[5]])
    assert torch.equal(y[6], data.labels[index[6]])
    assert (weight == 1).all()


def test_reweighting_scales_the_gradient(tmp_path, digits):
    data, module = CleanableDataset(digits[0]), Perceptron(dropout=0)
    data.change(weights=torch.rand(ROWS) * (torch.arange(ROWS) % 2))
    batch = torch.utils.data.default_collate([data[i] for i in range(50)])
    module.training_step(batch, 0).backward()
    got = module.head.weight.grad.clone()
    module.zero_grad()
    losses = torch.nn.functional.cross_entropy(module(batch[0]), batch[1], reduction="none")
    (losses * data.weights[:50]).mean().backward()
    torch.testing.assert_close(got, module.head.weight.grad)
    assert got.abs().sum() > 0.1


@pytest.mark.parametrize("with_validation", [False, True])
def test_resumed_training_goes_on_bitwise(tmp_path, digits, with_validation):
    """With validation the checkpoint is written before the epoch's look; and workers read ahead before the resume."""

    def training(checkpoint=None):
        data, module = CleanableDataset(digits[0]), Perceptron()
        cleaning = LabelCleaningCallback(tmp_path / "c", action="reweight", start=2, epochs=2, num_workers=0)
        saving = ModelCheckpoint(tmp_path / "saved", filename="{epoch}", save_top_k=-1)
        val = DataLoader(digits[0], 200)
        module.validation_step = lambda batch, batch_idx: None
        torch.manual_seed(1)
        # not shuffled: Lightning does not restore the order of a shuffling loader; dropout off for the same reason
        module.body[2].p = 0.0
        trainer(tmp_path, cleaning, saving, epochs=8, enable_checkpointing=True).fit(
            module,
            DataLoader(data, 32, num_workers=1, persistent_workers=True),
            val if with_validation else None,
            ckpt_path=checkpoint,
        )
        return module, data

    module, data = training()
    assert 0 < int((data.weights < 1).sum()) < 100
    checkpoint = tmp_path / "saved" / "epoch=5.ckpt"
    again, data_again = training(checkpoint)
    assert same_weights(module, again)
    assert torch.equal(data.weights, data_again.weights)
    first = torch.cat([w for _, w, _ in again.seen])[:ROWS]
    kept = torch.cat([w for _, w, _ in module.seen]).view(8, ROWS)
    assert torch.equal(first, kept[6]) and not torch.equal(kept[6], kept[5])

    if not with_validation:
        return
    shutil.rmtree(tmp_path / "c" / "epoch-0006")  # killed before the look
    again, _ = training(checkpoint)
    assert same_weights(module, again)
    with pytest.raises(ValueError, match=r"holds the snapshots of another training; give another folder"):
        training()
    shutil.rmtree(tmp_path / "c")
    again, _ = training(checkpoint)  # at the end of an epoch the look can be made again
    assert same_weights(module, again)


def test_resume_in_mid_epoch_needs_the_folder(tmp_path, digits):
    def training(steps, checkpoint=None):
        cleaning = LabelCleaningCallback(tmp_path / "c", action="drop", start=1)
        saving = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=steps, filename="mid")
        fit(
            tmp_path,
            CleanableDataset(digits[0]),
            cleaning,
            saving,
            epochs=2,
            enable_checkpointing=True,
            ckpt_path=checkpoint,
        )

    training(18)  # 13 steps are an epoch
    shutil.rmtree(tmp_path / "c")
    with pytest.raises(ValueError, match=r"resumed after epoch 1, and '.*epoch-0001' is missing; give the out_dir"):
        training(18, tmp_path / "saved" / "mid.ckpt")


def test_refusals(tmp_path, digits):
    data, out = digits[0], tmp_path / "c"
    with pytest.raises(
        TypeError, match=r"action='relabel' changes the training data, which is a TensorDataset; wrap it"
    ):
        fit(tmp_path, data, LabelCleaningCallback(out, action="relabel"))
    with pytest.raises(TypeError, match="which is a Subset; wrap it"):
        fit(tmp_path, Subset(CleanableDataset(data), range(40)), LabelCleaningCallback(out, action="drop"))
    with pytest.raises(TypeError, match=r"one DataLoader to train with, and there is a list"):
        trainer(tmp_path, LabelCleaningCallback(out)).fit(Perceptron(), [loader(data), loader(data)])

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(data)

    with pytest.raises(TypeError, match=r"the training data is a Stream, whose rows have no numbers; give a map-style"):
        trainer(tmp_path, LabelCleaningCallback(out)).fit(Perceptron(), DataLoader(Stream(), 32))

    class Headless(Perceptron):
        forward = LightningModule.forward

    with pytest.raises(ValueError, match=r"Headless has no forward\(\); define it to map inputs to logits"):
        fit(tmp_path, data, LabelCleaningCallback(out), module=Headless())
    with pytest.raises(ValueError, match=r"start=None is half of the training, whose number of epochs is not known"):
        fit(tmp_path, CleanableDataset(data), LabelCleaningCallback(out, action="drop"), epochs=-1)
    soft = TensorDataset(data.tensors[0], torch.nn.functional.one_hot(data.tensors[1], 10).float())
    with pytest.raises(
        TypeError, match=r"labels of a batch are torch\.float32 of shape \(32, 10\); give class ids of shape"
    ):
        fit(tmp_path, soft, LabelCleaningCallback(out), epochs=1)
    assert not out.exists()
    with pytest.raises(ValueError, match="holds no snapshots"):
        next(read_snapshots(out))


def test_a_damaged_snapshot_is_refused(tmp_path, digits):
    fit(tmp_path, digits[0], LabelCleaningCallback(tmp_path / "c"), epochs=1)
    path = tmp_path / "c" / "epoch-0001" / "snapshot.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"snapshot\.safetensors is missing or damaged"):
        list(read_snapshots(tmp_path / "c"))


def test_arguments_are_plain_values(tmp_path):
    settings = yaml.safe_load(
        "{out_dir: cleaning, epochs: [2, 4], action: drop, start: 2, confidence: 0.5, half: true}"
    )
    cleaning = LabelCleaningCallback(**settings)
    assert (cleaning.action, cleaning.start, [e for e in range(6) if cleaning.due(e)]) == ("drop", 2, [2, 4])
    hints = typing.get_type_hints(LabelCleaningCallback.__init__)
    assert hints["epochs"] == int | list[int] | str and hints["action"] == str | None


def test_rows_of_a_cleanable_data_set():
    features = Features({"x": Value("float32"), "label": ClassLabel(names=["a", "b"])})
    table = HFDataset.from_dict({"x": [0.0, 1.0, 2.0], "label": [0, 1, 1]}, features=features)
    data = CleanableDataset(table)
    data.change(labels=torch.tensor([1, 1, 0]), weights=torch.tensor([1.0, 0.25, 1.0]))
    assert data[1] == {"x": 1.0, "label": 1, "sample_weight": 0.25, "index": 1}
    assert data[-1] == {"x": 2.0, "label": 0, "sample_weight": 1.0, "index": 2}
    batch = next(iter(DataLoader(data, 3)))
    assert batch["label"].tolist() == [1, 1, 0] and batch["index"].tolist() == [0, 1, 2]
    data.change(labels=torch.tensor([0, 0, 0]))
    data.refresh(batch)
    assert batch["label"].tolist() == [0, 0, 0] and batch["sample_weight"].tolist() == [1, 0.25, 1]
    shown = table.with_transform(lambda rows: {"pixels": rows["x"], "labels": rows["label"]})
    assert CleanableDataset(shown)[2] == {"pixels": 2.0, "labels": 1, "sample_weight": 1.0, "index": 2}
    with pytest.raises(IndexError):
        data[3]


@pytest.mark.parametrize(
    "rows, more, error, message",
    [
        ([{"x": 1}], {}, ValueError, r"no label under 'labels' or .* among \['x'\]; name it with label_key="),
        ([(1,)], {}, ValueError, r"a row or batch is a tuple of 1, without a label at 1"),
        ([(1, 0.5)], {}, TypeError, r"a label is 0\.5 \(float\); give integer class ids"),
        ([(1, 0), (1, 1)], {"labels": [0]}, ValueError, r"labels has the shape \(1,\) for 2 rows"),
        (iter([]), {}, TypeError, r"dataset is a list_iterator, whose rows have no numbers"),
        (HFDataset.from_dict({"label": ["a", "b"]}), {}, TypeError, r"column 'label' holds no integers; make"),
    ],
)  # fmt: skip
def test_bad_rows(rows, more, error, message):
    with pytest.raises(error, match=message):
        CleanableDataset(rows, **more)


def test_bad_changes_and_rows_that_disagree():
    data = CleanableDataset([(1, 0), (2, 1)], labels=[0, 0])
    assert data[0] == (1, 0, 1.0, 0)
    with pytest.raises(
        ValueError, match=r"row 1 holds the label 1 and labels the 0; give labels= as the rows hold them"
    ):
        data[1]
    with pytest.raises(ValueError, match=r"weights holds negative or non-finite values"):
        data.change(weights=torch.tensor([1.0, -1.0]))
    with pytest.raises(ValueError, match=r"labels has the shape \(3,\) for 2 rows"):
        data.change(labels=torch.zeros(3))
    with pytest.raises(ValueError, match=r"the rows hold 'index' already; remove or rename it"):
        CleanableDataset([{"label": 0, "index": 3}])[0]


def test_names_of_the_package():
    assert all(getattr(ours, name) for name in ours.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        ours.Nothing  # noqa: B018
