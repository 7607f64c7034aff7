"""Label cleaning inside the transformers Trainer, on text and images."""

import gc
import logging
import random
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from dataopt.core.relation import average_scores, find_issues, relation_map
from dataopt.integrations.hf import CleanableDataset, LabelCleaningCallback, read_snapshots, weighted_loss
from datasets import Dataset as HFDataset
from datasets import IterableDataset
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import Trainer, ViTConfig, ViTForImageClassification

from ..tiny import FLIPPED, Sentences, arguments, tiny_bert


@pytest.fixture(autouse=True, scope="module")
def quick_collections():
    """The Trainer collects garbage at each start, among all that was ever imported."""
    gc.freeze()
    yield
    gc.unfreeze()


def hf_dataset() -> HFDataset:
    rows = Sentences()
    return HFDataset.from_dict({"text": ["a word"] * len(rows), "input_ids": rows.ids.tolist(), "labels": rows.labels})


def run(tmp_path: Path, dataset, *callbacks, model=None, loss=None, **more):
    model = tiny_bert() if model is None else model
    trainer = Trainer(
        model,
        arguments(tmp_path / "trainer", **more),
        train_dataset=dataset,
        callbacks=list(callbacks),
        compute_loss_func=loss,
    )
    trainer.train()
    return model


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_table_and_snapshot_of_a_text_model_are_in_the_order_of_the_data(tmp_path, caplog):
    data, out = hf_dataset(), tmp_path / "cleaning"
    cleaning = LabelCleaningCallback(out, batch_size=7)
    with caplog.at_level(logging.INFO, "dataopt"):
        model = run(tmp_path, data, cleaning)
    snapshots = list(read_snapshots(out))
    assert [s.epoch for s in snapshots] == [1, 2]
    ids = torch.tensor(data["input_ids"])
    with torch.no_grad():
        model.eval()
        expected = model.bert(ids).pooler_output
        probs = model(ids).logits.softmax(1)
    torch.testing.assert_close(snapshots[1].features, expected)
    torch.testing.assert_close(snapshots[1].probs, probs)
    assert snapshots[1].labels.tolist() == data["labels"][:]
    assert not torch.allclose(snapshots[0].features, snapshots[1].features)

    table = pd.read_parquet(out / "epoch-0002" / "scores.parquet")
    assert table["index"].tolist() == list(range(len(data)))
    issues = find_issues(snapshots[1].features, snapshots[1].probs, snapshots[1].labels)
    pd.testing.assert_frame_equal(table.drop(columns="index"), issues.to_pandas())
    lines = [r.message for r in caplog.records if "Label cleaning, epoch 2" in r.message]
    assert len(lines) == 1
    assert f"{int(table.is_label_issue.sum())} of 45 labels doubted" in lines[0]
    # what the snapshots are for
    scores = [s.graph().label_noise().noisiness for s in read_snapshots(out)]
    assert average_scores(scores).shape == (45,)
    assert relation_map((s.graph() for s in read_snapshots(out)), 3).mean.shape == (44,)


class Augmented(Dataset):
    """Random shifts and noise from all three random states; ``train=False`` shows the images as they are."""

    def __init__(self, train: bool = True):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.rand(30, 1, 8, 8, generator=generator)
        self.labels = torch.randint(3, (30,), generator=generator)
        self.train = train

    def __len__(self) -> int:
        return 30

    def __getitem__(self, i: int) -> dict:
        x = self.images[i]
        if self.train:
            x = x.roll(random.randrange(8), 2) * np.random.rand() + torch.rand(()) * 0.1
        return {"pixel_values": x.float(), "labels": int(self.labels[i])}


def tiny_vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8,
            patch_size=4, num_channels=1, num_labels=3, hidden_dropout_prob=0.1,
        )
    )  # fmt: skip


def test_image_model_sees_the_rows_of_dataset_and_trains_as_without_the_callback(tmp_path):
    plain = run(tmp_path, Augmented(), model=tiny_vit())
    model = tiny_vit()
    cleaning = LabelCleaningCallback(tmp_path / "a", dataset=Augmented(train=False), batch_size=11)
    own = LabelCleaningCallback(tmp_path / "b")
    run(tmp_path, Augmented(), cleaning, model=model)
    assert same_weights(plain, model)
    assert same_weights(plain, run(tmp_path, Augmented(), own, model=tiny_vit()))  # its own, augmented rows

    last = list(read_snapshots(tmp_path / "a"))[-1]
    model.eval()
    with torch.no_grad():
        expected = model.vit(Augmented().images).last_hidden_state[:, 0]
    torch.testing.assert_close(last.features, expected)
    assert not torch.allclose(list(read_snapshots(tmp_path / "b"))[-1].features, expected, atol=1e-3)


def test_schedule_and_half_precision(tmp_path):
    data = hf_dataset()
    listed = LabelCleaningCallback(tmp_path / "listed", epochs=[1, 3], half=True)
    run(tmp_path, data, listed, num_train_epochs=3)
    assert sorted(p.name for p in (tmp_path / "listed").iterdir()) == ["epoch-0001", "epoch-0003"]
    first = next(read_snapshots(tmp_path / "listed"))
    assert first.features.dtype == first.probs.dtype == torch.float16
    last = LabelCleaningCallback(tmp_path / "last", epochs="last")
    model = run(tmp_path, data, last, num_train_epochs=5, max_steps=9)  # six steps are an epoch
    (snapshot,) = read_snapshots(tmp_path / "last")
    model.eval()
    assert snapshot.epoch == 2
    with torch.no_grad():
        torch.testing.assert_close(snapshot.probs, model(torch.tensor(data["input_ids"])).logits.softmax(1))


def test_dataset_with_more_columns_is_read_as_the_trainer_reads_its_own(tmp_path):
    run(tmp_path, hf_dataset(), LabelCleaningCallback(tmp_path / "c", dataset=hf_dataset()), num_train_epochs=1)
    assert len(next(read_snapshots(tmp_path / "c")).features) == 45


@pytest.mark.parametrize("accumulate", [1, 3])
def test_weights_enter_the_gradient_as_they_say(tmp_path, accumulate):
    data = CleanableDataset(Sentences(20))
    weights = torch.rand(20, generator=torch.Generator().manual_seed(5)) * (torch.arange(20) % 3 > 0)
    labels = data.given.clone()
    labels[7] = 1 - labels[7]
    data.change(labels, weights)
    cleaning = LabelCleaningCallback(tmp_path / "c", action="reweight", epochs=[9], start=9)
    start = tiny_bert(dropout=0.0)
    # one step over all rows: batches of 8, 8 and 4, or one of 20
    model = run(
        tmp_path, data, cleaning, model=tiny_bert(dropout=0.0), loss=cleaning.loss, num_train_epochs=1,
        per_device_train_batch_size=20 if accumulate == 1 else 8, gradient_accumulation_steps=accumulate,
        remove_unused_columns=False, optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0,
    )  # fmt: skip
    losses = torch.nn.functional.cross_entropy(start(data.dataset.ids).logits, labels, reduction="none")
    (losses * weights).sum().div(20).backward()
    moved = 0.0
    for before, after in zip(start.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(after, before - before.grad, rtol=1e-4, atol=1e-6)
        moved += float(before.grad.abs().sum())
    assert moved > 0.1


def test_weighted_loss_is_cross_entropy_with_weights():
    logits, labels = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    plain = torch.nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)
    weights = torch.tensor([1.0, 0.0, 0.5, 2.0])
    loss = weighted_loss({"logits": logits}, labels, weights, label_smoothing=0.1)
    torch.testing.assert_close(loss, (plain * weights).mean().float())
    torch.testing.assert_close(weighted_loss(logits, labels, num_items=8, label_smoothing=0.1), plain.sum().float() / 8)
    with pytest.raises(ValueError, match=r"weights has the shape \(4, 1\) for 4 rows"):
        weighted_loss(logits, labels, weights[:, None])


class Recorder:
    """A hook on the model that keeps what each training batch held."""

    def __init__(self, model):
        self.batches = []
        model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs):
        if module.training:
            self.batches.append({k: kwargs[k].clone() for k in ("index", "sample_weight")})


@pytest.mark.parametrize("persistent", [False, True])
def test_running_loader_workers_see_what_was_dropped(tmp_path, persistent):
    data, model = CleanableDataset(Sentences()), tiny_bert(dropout=0.0)
    record = Recorder(model)
    cleaning = LabelCleaningCallback(tmp_path / "c", action="drop", start=8, num_workers=0)
    run(
        tmp_path, data, cleaning, model=model, loss=cleaning.loss, num_train_epochs=9, remove_unused_columns=False,
        dataloader_num_workers=1, dataloader_persistent_workers=persistent,
    )  # fmt: skip
    dropped = load_file(tmp_path / "c" / "epoch-0008" / "data.safetensors")["weights"]
    assert set(FLIPPED) <= set((dropped == 0).nonzero().squeeze(1).tolist())
    assert set(dropped.tolist()) == {0.0, 1.0}
    seen = [torch.cat([b[k] for b in record.batches]).view(9, -1) for k in ("index", "sample_weight")]
    assert (seen[1][:8] == 1).all()
    assert torch.equal(seen[1][8], dropped[seen[0][8]])
    assert not (tmp_path / "c" / "epoch-0007" / "data.safetensors").exists()


def settings(action: str) -> dict:
    return {"action": action, "start": 5, "epochs": 1, "confidence": 0.5}


@pytest.mark.parametrize("action", ["reweight", "relabel"])
def test_resumed_training_goes_on_bitwise(tmp_path, action):
    def training(checkpoint=None):
        data = CleanableDataset(Sentences())
        cleaning = LabelCleaningCallback(tmp_path / "c", **settings(action))
        model = tiny_bert()
        trainer = Trainer(
            model,
            arguments(
                tmp_path / "t", num_train_epochs=8, save_strategy="steps", save_steps=36, remove_unused_columns=False
            ),
            train_dataset=data,
            callbacks=[cleaning],
            compute_loss_func=cleaning.loss,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=checkpoint)
        return model, data

    model, data = training()
    changed = data.weights < 1 if action == "reweight" else data.labels != data.given
    assert 0 < int(changed.sum()) < 15
    checkpoint = tmp_path / "t" / "checkpoint-36"  # epoch 6
    again, data_again = training(checkpoint)
    assert same_weights(model, again)
    assert torch.equal(data.labels, data_again.labels) and torch.equal(data.weights, data_again.weights)

    if action == "reweight":
        return
    # killed after the checkpoint and before the look
    shutil.rmtree(tmp_path / "c" / "epoch-0006")
    again, _ = training(checkpoint)
    assert same_weights(model, again)

    (tmp_path / "c" / "epoch-0006" / "data.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"data\.safetensors is missing or damaged"):
        training(checkpoint)
    shutil.rmtree(tmp_path / "c" / "epoch-0006")
    with pytest.raises(ValueError, match=r"out_dir=.* holds the snapshots of another training; give another folder"):
        training()


def test_too_many_doubts_change_nothing(tmp_path, caplog):
    data = CleanableDataset(Sentences())
    cleaning = LabelCleaningCallback(tmp_path / "c", action="drop", start=1)
    run(
        tmp_path,
        data,
        cleaning,
        loss=cleaning.loss,
        remove_unused_columns=False,
        num_train_epochs=1,
        learning_rate=1e-6,
    )
    assert int(cleaning.issues.is_label_issue.sum()) == 11  # of 45, the most there can be
    assert (data.weights == 1).all()
    assert "labels and weights stay" in caplog.text


def test_refusals_at_the_begin_of_training(tmp_path):
    out = tmp_path / "c"
    with pytest.raises(
        TypeError, match=r"action='drop' changes the training data, which is a Dataset; wrap it in Clean"
    ):
        run(tmp_path, hf_dataset(), LabelCleaningCallback(out, action="drop"))
    with pytest.raises(ValueError, match=r"remove_unused_columns=True takes away the weights that action='drop' needs"):
        run(tmp_path, CleanableDataset(hf_dataset()), LabelCleaningCallback(out, action="drop"))
    with pytest.raises(ValueError, match=r"the Trainer's loss did not; give it compute_loss_func=callback\.loss"):
        run(
            tmp_path, CleanableDataset(Sentences()), LabelCleaningCallback(out, action="drop"),
            remove_unused_columns=False,
        )  # fmt: skip
    cleaning = LabelCleaningCallback(out, action="reweight")
    trainer = Trainer(
        tiny_bert(),
        arguments(tmp_path, remove_unused_columns=False),
        train_dataset=CleanableDataset(Sentences()),
        callbacks=[cleaning],
        compute_loss_func=cleaning.loss,
        data_collator=lambda rows: {
            k: torch.stack([torch.as_tensor(r[k]) for r in rows]) for k in ("input_ids", "labels")
        },
    )
    with pytest.raises(ValueError, match=r"the batches hold no 'sample_weight', which action='reweight' needs"):
        trainer.train()
    with pytest.raises(ValueError, match=r"dataset has 44 rows and the training data 45"):
        run(tmp_path, hf_dataset(), LabelCleaningCallback(out, dataset=Sentences(44)))
    other = Sentences()
    other.labels[9] = 1 - other.labels[9]
    with pytest.raises(ValueError, match=r"dataset has the label 0 in row 9 and the training data 1"):
        run(tmp_path, CleanableDataset(Sentences()), LabelCleaningCallback(out, dataset=other))
    stream = IterableDataset.from_generator(lambda: iter([Sentences()[0]] * 8))
    with pytest.raises(TypeError, match=r"whose rows have no numbers"):
        run(tmp_path, stream, LabelCleaningCallback(out), max_steps=1)
    assert not out.exists()


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"action": "delete"}, r"action='delete' must be one of None, 'drop', 'relabel', 'reweight'"),
        ({"epochs": 0}, r"epochs=0 must be a positive number, a list of them, or 'last'"),
        ({"epochs": []}, r"epochs=\[\] must be"),
        ({"epochs": "last", "action": "drop"}, r"comes after the training"),
        ({"start": 0}, r"start=0 must be at least 1"),
        ({"confidence": 1.0}, r"confidence=1\.0 must lie in \[0, 1\)"),
        ({"batch_size": 0}, r"batch_size=0 must be at least 1"),
    ],
)
def test_bad_arguments(tmp_path, bad, message):
    with pytest.raises(ValueError, match=message):
        LabelCleaningCallback(tmp_path, **bad)
