"""Evaluation: the rows, the steps, and scores that follow the data."""

import dataclasses
import json

import pytest
import torch
from dataopt.core.condense import Augment, Condensed, Condenser, ConvNet, Score, Scores, evaluate, herd
from dataopt.core.condense.evaluate import training_augment
from torch import nn

from .problem import made, tiny_net

TRAIN, TEST = made(each=20), made(each=10, seed=0)


@pytest.fixture(scope="module")
def condensed() -> Condensed:
    return Condenser(tiny_net, 1, 2, steps=2, early_steps=1).fit(*TRAIN, progress=False)


def other_net():
    return ConvNet(3, 3, 8, depth=1, width=6)


def test_table_has_every_set_and_network(condensed):
    fns = {"two": tiny_net, "one": other_net}
    scores = evaluate(condensed, TRAIN, TEST, fns, seeds=(0, 1), steps=30, progress=False)
    found = [(r.data, r.network) for r in scores.rows]
    assert found == [(d, n) for d in ("condensed", "random", "herding", "init") for n in ("two", "one")]
    assert {r.stored for r in scores.rows} == {3} and {r.steps for r in scores.rows} == {30}
    assert scores["condensed"].shown == scores["init"].shown == 12 and scores["random"].shown == 3
    assert scores["herding", "one"] is scores.rows[5] and scores.test_images == 30
    again = evaluate(condensed, TRAIN, TEST, fns, seeds=(0, 1), steps=30, baselines=("random",), progress=False)
    assert again.rows == scores.rows[:4]
    frame = scores.to_pandas()
    assert list(frame["mean"]) == [r.mean for r in scores.rows] and len(str(scores).splitlines()) == 9
    with pytest.raises(KeyError, match="best"):
        scores["best"]


def test_scores_follow_the_labels(condensed):
    scores = evaluate(condensed, TRAIN, TEST, other_net, seeds=(0,), steps=60, baselines=(), progress=False)
    assert scores["condensed"].mean > 0.9  # patterns far apart
    turned = Condensed(condensed.images, (condensed.labels + 1) % 3, 2, mean=condensed.mean, std=condensed.std)
    scores = evaluate(turned, TRAIN, TEST, other_net, seeds=(0,), steps=60, baselines=(), progress=False)
    assert scores["condensed"].mean < 0.1


def test_init_is_what_the_condensation_started_from():
    condenser = Condenser(tiny_net, 1, 2, steps=2, early_steps=1, init="mix", seed=5)
    c = condenser.fit(*TRAIN, progress=False)
    start = Condensed(condenser.initial, c.labels, 2, mean=c.mean, std=c.std, made=c.made)
    scores = evaluate(start, TRAIN, TEST, tiny_net, seeds=(0, 1), steps=40, baselines=("init",), progress=False)
    assert scores["condensed"].accuracies == scores["init"].accuracies


def test_same_compute_gives_every_set_the_same_steps():
    c = Condensed(torch.rand(60, 3, 8, 8), torch.arange(3).repeat_interleave(20), 2)
    settings = {"seeds": (0,), "baselines": ("random",), "progress": False}
    scores = evaluate(c, TRAIN, TEST, tiny_net, epochs=3, **settings)
    assert (scores["condensed"].steps, scores["random"].steps) == (3 * 4, 3 * 1)  # 240 and 60 images in batches of 64
    scores = evaluate(c, TRAIN, TEST, tiny_net, epochs=3, same_compute=True, **settings)
    assert (scores["condensed"].steps, scores["random"].steps) == (3, 3)


def test_soft_labels_are_rows_of_their_own(condensed):
    torch.manual_seed(0)
    scores = evaluate(
        condensed, TRAIN, TEST, tiny_net, seeds=(0,), steps=3, baselines=(), teacher=tiny_net(), progress=False
    )
    names = ["condensed", "condensed + soft labels", "random + soft labels"]
    assert [r.data for r in scores.rows] == names


def test_mean_and_spread():
    row = Score("condensed", "net", 1, 4, 300, (0.5, 0.7, 0.9))
    assert row.mean == pytest.approx(0.7) and row.std == pytest.approx(0.2)
    assert Score("condensed", "net", 1, 4, 300, (0.5,)).std == 0
    assert "70.0 ± 20.0" in str(Scores((row,), 10))


def test_herding_keeps_the_mean():
    f = torch.rand(200, 5, generator=torch.Generator().manual_seed(0))
    chosen = herd(f, 20)
    assert len(set(chosen.tolist())) == 20
    gap = (f[chosen].mean(0) - f.mean(0)).norm()
    random = [(f[torch.randperm(200)[:20]].mean(0) - f.mean(0)).norm() for _ in range(20)]
    assert gap < 0.5 * min(random)
    first = (f - f.mean(0)).norm(dim=1).argmin()
    assert int(chosen[0]) == int(first) and len(herd(f, 200).unique()) == 200


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": ()}, "seeds is empty"),
        ({"steps": 0}, "steps=0 and epochs=None must be at least 1"),
        ({"epochs": 0}, "epochs=0 must be at least 1"),
        ({"baselines": ("best",)}, "baselines='best' must be one of 'random', 'herding', 'init'"),
        ({"model_fn": {}}, "model_fn names no network"),
        ({"train": (TRAIN[0].flip(2), TRAIN[1])}, "train has the checksum .* the condensed set was made from"),
        ({"train": made(classes=2)}, r"train has 2 classes of \(3, 8, 8\), the condensed set 3 of"),
        ({"test": (TEST[0], TEST[1][:3])}, "labels has the shape"),
        ({"test": (TEST[0], TEST[1] + 1)}, "class ids up to 3, train images of .* class ids up to 2"),
        ({"test": (TEST[0][:, :, :4], TEST[1])}, r"test has images of \(3, 4, 8\)"),
        ({"model_fn": {"small": tiny_net, "narrow": lambda: tiny_net(classes=2)}}, r"gives \(2, 2\) for 2 images"),
    ],
)
def test_bad_arguments(condensed, settings, message):
    values = {"condensed": condensed, "train": TRAIN, "test": TEST, "model_fn": tiny_net, "progress": False}
    with pytest.raises(ValueError, match=message):
        evaluate(**values | settings)


def test_a_set_that_does_not_say_where_it_comes_from_has_no_init_row():
    c = Condensed(torch.rand(3, 3, 8, 8), torch.arange(3))
    with pytest.raises(ValueError, match="the condensed set does not say what it started from"):
        evaluate(c, TRAIN, TEST, tiny_net, seeds=(0,), steps=2, progress=False)


def test_a_test_set_may_lack_classes(condensed):
    keep = TEST[1] == 2
    test = (TEST[0][keep], TEST[1][keep])
    scores = evaluate(condensed, TRAIN, test, tiny_net, seeds=(0,), steps=5, baselines=("random",), progress=False)
    assert scores.test_images == 10


def test_dropout_draws_from_the_seed_alone(condensed):
    def model_fn():
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, 3))

    state = torch.get_rng_state()
    settings = {"seeds": (0, 1), "steps": 4, "baselines": (), "progress": False}
    scores = [evaluate(condensed, TRAIN, TEST, model_fn, **settings)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    scores.append(evaluate(condensed, TRAIN, TEST, model_fn, **settings))
    assert scores[0] == scores[1] and len(set(scores[0]["condensed"].accuracies)) == 2


def test_networks_train_with_the_whole_augmentation_but_cutout():
    made = dataclasses.asdict(Augment(flip=True, scale=1.2, rotate=15, crop=(0, 0.1)))
    c = Condensed(torch.rand(3, 3, 8, 8), torch.arange(3), made={"augment": json.loads(json.dumps(made))})
    assert training_augment(c) == Augment(flip=True, scale=1.2, rotate=15, crop=(0, 0.1), cutout=0)


def test_start_by_herding_needs_its_network():
    c = Condenser(tiny_net, 1, 1, init="herding", steps=1, early_steps=0).fit(*TRAIN, progress=False)
    with pytest.raises(ValueError, match="herding chose with ConvNet of"):
        evaluate(c, TRAIN, TEST, lambda: tiny_net(width=8), seeds=(0,), steps=2, baselines=("init",), progress=False)


def test_the_teacher_stays_in_training_mode(condensed):
    teacher = tiny_net().train()
    evaluate(condensed, TRAIN, TEST, tiny_net, seeds=(0,), steps=2, baselines=(), teacher=teacher, progress=False)
    assert teacher.training
