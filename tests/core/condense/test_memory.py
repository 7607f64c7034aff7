"""The memory of class-incremental learning against the condenser and the baselines that it is made of."""

import pytest
import torch
from dataopt.core.condense import (
    Condensed,
    Condenser,
    ConvNet,
    ExemplarMemory,
    MultiFormation,
    RealData,
    evaluate,
    initial,
    initial_images,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

METHODS = ("condensed", "init", "herding", "random")


@pytest.fixture(autouse=True)
def short_herding(monkeypatch):
    """Herding looks at features of a network after 300 steps, which nothing here depends on."""
    monkeypatch.setattr(initial, "_HERDING_STEPS", 5)


def network() -> ConvNet:
    return ConvNet(1, 6, 8, depth=2, width=4)


def recipe(**changes) -> Condenser:
    return Condenser(
        network,
        **{"images_per_class": 2, "factor": 2, "steps": 2, "early_steps": 1, "real_batch": 8, "seed": 5} | changes,
    )


@pytest.fixture(scope="module")
def arriving() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Two steps of two classes of 12 images each."""
    generator = torch.Generator().manual_seed(0)
    ids = (torch.tensor([4, 1]), torch.tensor([0, 3]))
    return [
        (torch.rand(24, 1, 8, 8, generator=generator), pair[torch.randperm(24, generator=generator) % 2])
        for pair in ids
    ]


def test_each_step_is_the_condenser_on_its_classes_alone(arriving):
    memory = ExemplarMemory(recipe())
    for images, labels in arriving:
        memory.add(images, labels)
    assert memory.classes == (1, 4, 0, 3)
    assert memory.stored.labels.tolist() == [1, 1, 4, 4, 0, 0, 3, 3]
    (images, labels), (later, later_labels) = arriving
    first = recipe().fit(images, (labels == 4).long())
    assert torch.equal(memory.stored.images[:4], first.images)
    assert memory.stored.mean == first.mean and memory.stored.std == first.std
    # two classes were there before; pixels are normalised as they were then
    second = recipe(seed=7, mean=first.mean, std=first.std).fit(later, (later_labels == 3).long())
    assert torch.equal(memory.stored.images[4:], second.images)
    assert [part["source"]["sha256"] for part in memory.stored.made["parts"]] == [
        RealData(images, (labels == 4).long()).sha256,
        RealData(later, (later_labels == 3).long()).sha256,
    ]


@pytest.mark.parametrize("method", ["init", "herding", "random"])
def test_other_methods_store_as_much_and_are_the_baselines(arriving, method):
    memory = ExemplarMemory(recipe(), method)
    for images, labels in arriving:
        memory.add(images, labels)
    assert memory.stored.images.shape == (8, 1, 8, 8)
    assert memory.stored.factor == (2 if method == "init" else 1)
    images, labels = arriving[0]
    data = RealData(images, (labels == 4).long())
    init, form = ("centres", MultiFormation(2)) if method == "init" else (method, MultiFormation(1))
    chosen = initial_images(data, 2, init, form, torch.Generator().manual_seed(5), network)
    assert torch.equal(memory.stored.images[:4], chosen)
    first = ExemplarMemory(recipe(), method).add(images, (labels == 4).long())
    double = evaluate(first, (data.images, data.labels), (data.images, data.labels), lambda: network().double(),
                      seeds=(0,), steps=1, progress=False)  # fmt: skip
    assert [row.data for row in double.rows] == ["condensed", "random", "herding", "init"]
    if method != "init":  # real images, each of its own class
        pool = {tuple(x.flatten().tolist()): int(y) for part in arriving for x, y in zip(*part, strict=True)}
        found = [pool[tuple(x.flatten().tolist())] for x in memory.stored.images]
        assert found == memory.stored.labels.tolist()


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_memory_goes_on_as_if_it_had_not_been_saved(arriving, method, tmp_path):
    whole = ExemplarMemory(recipe(), method)
    for images, labels in arriving:
        whole.add(images, labels)
    part = ExemplarMemory(recipe(), method)
    part.add(*arriving[0])
    part.stored.save(tmp_path)
    again = ExemplarMemory(recipe(), method, Condensed.load(tmp_path))
    again.add(*arriving[1])
    assert torch.equal(again.stored.images, whole.stored.images)
    assert again.stored.labels.tolist() == whole.stored.labels.tolist()
    assert [p["seed"] for p in again.stored.made["parts"]] == [5, 7]
    images, labels = whole.decode()
    tiles = 1 if method in ("herding", "random") else 4
    assert len(images) == 8 * tiles and labels.bincount().tolist() == [2 * tiles, 2 * tiles, 0, 2 * tiles, 2 * tiles]


@given(st.permutations(range(6)), st.integers(1, 3))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_classes_come_in_any_order_and_number(order, per_step):
    """Each class is drawn in a shade of its own, which says where an exemplar came from."""
    memory = ExemplarMemory(recipe(images_per_class=1, factor=1), "random")
    for start in range(0, 6, per_step):
        ids = torch.tensor(order[start : start + per_step]).repeat(3)
        memory.add((ids / 10)[:, None, None, None].expand(-1, 1, 8, 8), ids)
    assert memory.classes == tuple(c for i in range(0, 6, per_step) for c in sorted(order[i : i + per_step]))
    images, labels = memory.decode()
    assert torch.equal(images[:, 0, 0, 0], labels / 10)


def test_a_step_goes_on_from_its_checkpoint(arriving, tmp_path):
    memory = ExemplarMemory(recipe(checkpoint_every=1))
    memory.add(*arriving[0], resume=tmp_path)
    again = ExemplarMemory(recipe(checkpoint_every=1))
    again.add(*arriving[0], resume=tmp_path)
    assert list(tmp_path.glob("checkpoint-*.json"))
    assert torch.equal(again.stored.images, memory.stored.images)


def test_what_cannot_be_added_leaves_the_memory_as_it_was(arriving):
    with pytest.raises(ValueError, match="method='best' must be one of 'condensed', 'init', 'herding', 'random'"):
        ExemplarMemory(recipe(), "best")
    memory = ExemplarMemory(recipe(), "init")
    with pytest.raises(ValueError, match="the memory is empty; add the images"):
        memory.decode()
    (images, labels), (later, later_labels) = arriving
    memory.add(images, labels)
    before = memory.stored
    with pytest.raises(ValueError, match="class 1, which is in the memory already; add each class once"):
        memory.add(images, labels.clamp(max=1))
    with pytest.raises(ValueError, match=r"images has the shape \(24, 1, 8, 6\) where the memory holds images of"):
        memory.add(later[..., :6], later_labels)
    with pytest.raises(ValueError, match="labels holds -1; give class ids from 0"):
        memory.add(later, later_labels - 1)
    with pytest.raises(TypeError, match=r"labels holds torch.float32; give integer class ids"):
        memory.add(later, later_labels.float())
    with pytest.raises(ValueError, match="labels is empty"):
        memory.add(later[:0], later_labels[:0])
    with pytest.raises(ValueError, match=r"labels has the shape \(23,\) where \(24,\) was expected"):
        memory.add(later, later_labels[1:])
    assert memory.stored is before
    with pytest.raises(ValueError, match=r"stored is decoded with .* \(2, 'space', 'single'\) and method='herding'"):
        ExemplarMemory(recipe(), "herding", before)
    with pytest.raises(ValueError, match=r"method='condensed' makes \(3, 'space', 'single'\)"):
        ExemplarMemory(recipe(factor=3), stored=before)
    assert ExemplarMemory(recipe(factor="auto"), stored=before).classes == (1, 4)
