"""Formation, augmentation, the condenser, what it makes and its evaluation, on arguments that make no sense."""

import torch
from dataopt.core.condense import (
    Augment,
    Condensed,
    Condenser,
    ExemplarMemory,
    MultiFormation,
    RealData,
    distance,
    evaluate,
    herd,
)
from hypothesis import given
from hypothesis import strategies as st

from ..core.condense.problem import made, tiny_net
from .budget import tries
from .spoiled import answer, finite, spoil, vary

X, Y = made(2, 5, (1, 8, 8))
STORED = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def net():
    return tiny_net(1, 2, 2)


@tries(100)
@given(st.data())
def test_formation(data):
    settings = {"factor": 2, "axes": "space", "mode": "single", "bound": 8}
    form = answer(MultiFormation, spoil(data, settings))
    if form is None:
        return
    arguments = spoil(data, {"s": STORED})
    found = answer(form, arguments, ["s", "factor"])
    if found is not None:
        assert found.shape == (sum(form.counts(len(arguments["s"]))), *arguments["s"].shape[1:])
        assert finite(found) or not finite(arguments["s"])
    back = answer(form.assemble, spoil(data, {"images": form(STORED)}), ["images", "factor"])
    assert back is None or back.ndim == 4


@tries(100)
@given(st.data())
def test_condensed(data):
    call = {"images": STORED, "labels": torch.tensor([0, 1]), "factor": 2, "axes": "space", "mode": "single",
            "mean": (0.5,), "std": (0.5,), "made": {"seed": 1}, "label_names": ("a", "b")}  # fmt: skip
    c = answer(Condensed, spoil(data, call))
    if c is not None:
        assert repr(c)
        if c.mean is not None and c.std is not None:
            images, labels = c.decode(normalised=True)
            assert finite(images) and len(images) == len(labels)


@tries(60)
@given(st.data())
def test_real_data(data):
    call = {"images": X, "labels": Y, "mean": (0.5,), "std": (0.5,)}
    real = answer(RealData, spoil(data, call))
    if real is not None:
        assert finite(real(torch.tensor([0]))) and len(real.rows) == real.classes


@tries(60)
@given(st.data())
def test_augment(data):
    call = {"colour": True, "crop": 0.1, "cutout": 0.2, "flip": True, "scale": 1.2, "rotate": 10.0}
    augment = answer(Augment, spoil(data, call))
    if augment is not None:
        x = answer(augment, spoil(data, {"x": STORED, "generator": None}))
        assert x is None or x.ndim == 4


@tries(40)
@given(st.data())
def test_distance_and_herding(data):
    call = {"synthetic": [torch.rand(3, 4)], "real": [torch.rand(3, 4)], "metric": "mse"}
    found = answer(distance, spoil(data, call))
    assert found is None or finite(found)
    rows = answer(herd, spoil(data, {"features": torch.rand(6, 3), "count": 2}))
    assert rows is None or (len(rows.unique()) == len(rows) and bool((rows < 6).all()))


@tries(80)
@given(st.data())
def test_condenser_settings(data):
    call = {"model_fn": net, "images_per_class": 1, "factor": 2, "preset": "fast", "steps": 1, "axes": "space",
            "formation": "single", "bound": 8, "init": "random", "objective": "gradients", "metric": "mse",
            "match": "real", "layers": "conv", "optimiser": "adam", "lr": 0.01, "real_batch": 4, "synthetic_batch": 8,
            "repeats": 1, "inner": 2, "network_steps": 1, "network_lr": 0.01, "cutmix": 0.5, "early_steps": 0,
            "networks": 1, "augment": None, "sampler": "random", "mean": (0.5,), "std": (0.5,), "factors": (1, 2),
            "factor_steps": 0, "seed": 0, "compile": False, "checkpoint_every": 10}  # fmt: skip
    settings = spoil(data, call, ("compile", "model_fn", "steps", "early_steps"))
    condenser = answer(Condenser, settings)
    if condenser is not None:
        c = answer(condenser.fit, {"images": X, "labels": Y, "progress": False}, [*call, "images", "labels"])
        assert c is None or (finite(c.images) and c.decode()[0].shape[1:] == X.shape[1:])


@tries(40)
@given(st.data())
def test_fit(data):
    call = {"images": X, "labels": Y, "label_names": ("a", "b")}
    condenser = Condenser(net, 1, 2, steps=1, init="random", augment=None, real_batch=4, early_steps=0)
    c = answer(condenser.fit, spoil(data, call) | {"progress": False}, [*call, "factor"])
    assert c is None or (finite(c.images) and c.labels.tolist() == list(range(c.classes)))


@tries(40)
@given(st.data())
def test_evaluate(data):
    c = Condensed(STORED, torch.tensor([0, 1]), 2, mean=(0.5,), std=(0.5,))
    call = {"condensed": c, "train": (X, Y), "test": (X, Y), "model_fn": net, "seeds": (0,), "steps": 1, "epochs": None,
            "baselines": ()}  # fmt: skip
    scores = answer(evaluate, spoil(data, call), [*call, "images", "labels"])
    if scores is not None:
        assert all(0 <= row.mean <= 1 for row in scores.rows)


@tries(40)
@given(st.data())
def test_exemplar_memory(data):
    """New classes are stored beside the old, which stay bit for bit, also where the new ones are refused."""
    recipe = Condenser(net, 1, 2, steps=1, init="random", augment=None, real_batch=4, early_steps=0)
    call = {"condenser": recipe, "method": "init", "stored": None}
    old = Condensed(STORED, torch.tensor([5, 7]), 2, mean=(0.5,), std=(0.5,))
    settings = vary(data, call, {"method": ["random", "condensed"], "stored": [old, old]})
    memory = answer(ExemplarMemory, settings)
    if memory is None:
        return
    before, classes = memory.stored, memory.classes
    given_ = vary(data, {"images": X, "labels": Y}, {"images": [X.double(), X[..., :4], (X * 255).to(torch.uint8)],
                                                     "labels": [Y + 9, Y.int(), Y * 7 + 5]})  # fmt: skip
    new = answer(
        lambda images, labels: memory.add(images, labels, progress=False), given_, [*given_, "condenser", "factor"]
    )
    if new is None:
        assert memory.stored is before
        return
    seen = sorted(set(torch.as_tensor(given_["labels"]).tolist()))
    assert new.labels.tolist() == seen and memory.classes == (*classes, *seen) and finite(new.images)
    assert torch.equal(memory.stored.images[: len(classes)], before.images) if before else True
    images, labels = memory.decode()
    assert len(images) == len(labels) and set(labels.tolist()) == set(memory.classes)
