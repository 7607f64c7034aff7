"""Cells of condense.py: condense a set and score it, or look at what happens meanwhile."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import condense_data as source
import numpy as np
import torch
import torch.nn.functional as F
from condense_data import CLASSES
from dataopt.core.artifacts import write_whole
from dataopt.core.condense import Condensed, Condenser, MultiFormation, evaluate
from dataopt.core.condense.training import fresh, train_on
from safetensors.torch import load_file, save
from torch import Tensor, nn

TEST_SEEDS: tuple[int, ...] = (0, 1, 2)
FRESH = {"early_steps": 0, "networks": 0}  # networks as model_fn makes them, another every ten looks
DSA = {"match": "synthetic", "metric": "cosine", "init": "random", "repeats": 1}
NETWORK = FRESH | {"repeats": 1, "network_steps": 4, "network_lr": 0.01}  # trained between looks, as Algorithm 5 has it
METHODS: dict[str, dict[str, Any]] = {  # what a Condenser is given beside data, factor, seed and steps
    "IDC": {},
    "fresh networks": FRESH,
    "DSA": DSA,
    "DM": {"objective": "features", "init": "random"},
    "feature matching from centres": {"objective": "features"},
    "mix init": FRESH | {"init": "mix"},
    "L1": FRESH | {"metric": "l1"},
    "k-means batches": FRESH | {"sampler": "kmeans"},
    "no bank": FRESH | {"repeats": 1},
    "Syn + Cos": NETWORK | {"match": "synthetic", "metric": "cosine", "cutmix": 0.0},
    "Syn + MSE": NETWORK | {"match": "synthetic", "cutmix": 0.0},
    "Real + Cos": NETWORK | {"metric": "cosine", "cutmix": 0.0},
    "Real + MSE": NETWORK | {"cutmix": 0.0},
    "Real + Reg + MSE": NETWORK,
}
PARTS = ("Syn + Cos", "Syn + MSE", "Real + Cos", "Real + MSE", "Real + Reg + MSE")  # Table 6.5
SETTINGS = ("mix init", "L1", "k-means batches", "no bank", "feature matching from centres")
RATES = {"spoken digits": 0.003}  # of the images
BUDGETS: dict[tuple[str, int], dict[int, int]] = {  # steps of IDC by factor, at images a class
    ("digits", 1): {1: 140, 2: 140, 3: 140, 4: 140},
    ("digits", 10): {1: 400, 2: 400},
    ("Fashion-MNIST", 1): {1: 400, 2: 600, 3: 300, 4: 200},
    ("Fashion-MNIST", 4): {1: 400},
    ("Fashion-MNIST", 10): {1: 1000, 2: 300},
    ("CIFAR-10", 1): {1: 300, 2: 600, 3: 300, 4: 150},
    ("CIFAR-10", 4): {1: 400},
    ("CIFAR-10", 10): {1: 600, 2: 250},
    ("spoken digits", 1): {1: 150, 2: 150},
}
OTHER_STEPS = {  # of DSA and DM, which look at real images in every step
    ("digits", 1): 140, ("digits", 10): 200, ("Fashion-MNIST", 1): 200, ("Fashion-MNIST", 10): 200,
    ("CIFAR-10", 1): 150, ("CIFAR-10", 10): 150, ("spoken digits", 1): 60,
}  # fmt: skip
EVALUATION = {1: 300, 4: 300, 10: 900}  # steps of a test network, by images a class
PART_STEPS = 150  # of Table 6.5
EPOCH, EPOCHS, AGE_STEPS = 157, (0, 1, 2, 4, 8, 16), 150  # Figure 6.5: batches of an epoch, ages, steps
NORM_STEPS, NORM_EVERY = 400, 20  # Figure 6.4
LONG = 300  # epochs of Table 6.2


@dataclass(frozen=True)
class Setup:
    """What all cells depend on."""

    folder: Path
    scratch: Path
    quick: bool = False

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of the test networks."""
        return TEST_SEEDS[:1] if self.quick else TEST_SEEDS

    def data(self, name: str) -> source.Data:
        return source.load(name, self.folder, 200 if self.quick else None)

    def steps(self, count: int) -> int:
        return min(count, 4) if self.quick else count


@dataclass(frozen=True)
class Row:
    """One condensed set."""

    data: str
    per_class: int
    method: str = "IDC"
    factor: int = 1
    seed: int = 0

    @property
    def group(self) -> str:
        """Name without the seed; with another budget it is another cell."""
        return f"{self.data}, {self.per_class} per class: {self.method}, factor {self.factor}, {self.steps} steps"

    @property
    def name(self) -> str:
        return f"{self.group}, seed {self.seed}"

    @property
    def steps(self) -> int:
        if self.method in PARTS:
            return PART_STEPS
        if self.method == "DSA" or METHODS[self.method].get("objective") == "features":
            return OTHER_STEPS[self.data, self.per_class]
        return BUDGETS[self.data, self.per_class][self.factor]

    @property
    def evaluation(self) -> int:
        return EVALUATION[self.per_class]

    @property
    def scores_start(self) -> bool:
        """Whether what it starts from is scored too: random images are a baseline anyway, others those of IDC."""
        return self.method in ("IDC", "fresh networks", "mix init") and (self.per_class == 1 or self.seed == 0)

    def condenser(self, setup: Setup) -> Condenser:
        data, options = setup.data(self.data), dict(METHODS[self.method])
        if self.method == "DSA":  # as released: fresh networks for one image a class, else trained ones
            options |= {"cutmix": 0.0, "inner": 1} if self.per_class == 1 else {"cutmix": 0.0, "network_steps": 5}
        if options.get("objective") != "features":
            options.setdefault("cutmix", data.cutmix)
        return Condenser(
            data.network, self.per_class, self.factor, steps=setup.steps(self.steps), axes=data.axes, seed=self.seed,
            lr=RATES.get(self.data), **options,
        )  # fmt: skip


def condense(row: Row, setup: Setup) -> tuple[Condensed, Condensed]:
    """The condensed set and what it started from; kept, since several cells look at the main ones."""
    recipe = json.dumps([row.name, METHODS[row.method], RATES, setup.quick])
    folder = kept_in(setup) / hashlib.sha256(recipe.encode()).hexdigest()[:16]
    if not (folder / "start" / "condensed.json").exists():
        data, condenser = setup.data(row.data), row.condenser(setup)
        start = time.process_time()
        made = condenser.fit(*data.train, progress=False)
        made.made["processor_seconds"] = round(time.process_time() - start, 1)
        made.save(folder)
        assert condenser.initial is not None
        source.stored(condenser.initial, data, row.factor).save(folder / "start")
    return Condensed.load(folder), Condensed.load(folder / "start")


def kept_in(setup: Setup) -> Path:
    return setup.scratch / "condense"


def scored(row: Row, setup: Setup) -> common.Cell:
    """Accuracy of a condensed set and of what it started from, and its cost."""
    made, start = condense(row, setup)
    data, steps = setup.data(row.data), setup.steps(row.evaluation)
    out = {name: made.made[name] for name in ("steps", "seconds", "processor_seconds", "loss", "init")}
    out |= {"evaluation_steps": steps, "shown": len(made.decode()[0])}
    own = {"ConvNet": data.network}
    out["accuracies"] = source.scores(made, data, own, setup.seeds, steps)["ConvNet"]
    if row.scores_start:
        out["start"] = source.scores(start, data, own, setup.seeds, steps)["ConvNet"]
    return out


def real_images(data: str, per_class: int, how: str, setup: Setup) -> common.Cell:
    """Random or herded images, chosen anew for each test seed."""
    d, steps = setup.data(data), setup.steps(EVALUATION[per_class])
    return {"evaluation_steps": steps, "shown": per_class * CLASSES} | {
        "accuracies": _each_seed(d, per_class, how, {"ConvNet": d.network}, setup, steps)["ConvNet"]
    }


def _each_seed(
    d: source.Data, per_class: int, how: str, networks: dict[str, source.ModelFn], setup: Setup, steps: int
) -> dict[str, list[float]]:
    found = [source.scores(source.chosen(d, per_class, how, s), d, networks, (s,), steps) for s in setup.seeds]
    return {name: [each[name][0] for each in found] for name in networks}


def transfer(what: Row | str, per_class: int, setup: Setup) -> common.Cell:
    """Table 6.1: networks that nothing was condensed with, trained on a condensed set or on real images of CIFAR-10."""
    d, steps, networks = setup.data("CIFAR-10"), setup.steps(EVALUATION[per_class]), source.transfer_networks()
    if isinstance(what, str):
        return {"accuracies": _each_seed(d, per_class, what, networks, setup, steps)}
    return {"accuracies": source.scores(condense(what, setup)[0], d, networks, setup.seeds, steps)}


def fixed_compute(row: Row, setup: Setup) -> common.Cell:
    """Table 6.2: epochs over the formed images, and as many steps as the stored ones would take."""
    made, data, out = condense(row, setup)[0], setup.data(row.data), {}
    for name, same in (("own", False), ("same", True)):
        found = evaluate(
            made, data.train, data.test, {"ConvNet": data.network}, seeds=setup.seeds, baselines=(),
            epochs=setup.steps(LONG), same_compute=same, augment=data.augment, cutmix=data.cutmix, progress=False,
        )["condensed"]  # fmt: skip
        out[name] = {"steps": found.steps, "accuracies": [100 * a for a in found.accuracies]}
        if row.factor == 1:
            break  # both are the same
    return out


def shrunk(row: Row, setup: Setup) -> common.Cell:
    """Table 6.6: four images a class without formation, and the same at half their sides in the storage of one."""
    made, _ = condense(row, setup)
    data, steps = setup.data(row.data), setup.steps(row.evaluation)
    after = source.stored(MultiFormation(2).assemble(made.images), data, 2)
    sets = {"whole": made, "shrunk": after}
    return {"seconds": made.made["seconds"], "evaluation_steps": steps} | {
        name: source.scores(c, data, {"ConvNet": data.network}, setup.seeds, steps)["ConvNet"]
        for name, c in sets.items()
    }


def norms(row: Row, setup: Setup) -> common.Cell:
    """Figure 6.4: gradient norms while a network trains on synthetic images with augmentation, or on real ones."""
    data = setup.data(row.data)
    x, y = condense(row, setup)[0].decode(normalised=True)
    rows = torch.randperm(len(data.real.labels), generator=torch.Generator().manual_seed(0))
    batches = {"synthetic": (x, y), "real": (data.real(rows[:256]), data.real.labels[rows[:256]])}
    total = setup.steps(NORM_STEPS)
    out: common.Cell = {"x": list(range(0, total + 1, NORM_EVERY))}
    trainings: dict[str, tuple[Callable[[Tensor], Tensor], Tensor, float]] = {
        "trained on synthetic": (x.__getitem__, y, 0.0),
        "trained on real": (data.real, data.real.labels, data.cutmix),
    }
    for trained, (images, labels, cutmix) in trainings.items():
        found: dict[str, list[list[float]]] = {name: [] for name in batches}
        for seed in setup.seeds:
            generator = torch.Generator().manual_seed(seed)
            net = fresh(data.network, generator)
            curves: dict[str, list[float]] = {name: [] for name in batches}
            for step in out["x"]:
                if step:
                    train_on(net, images, labels, NORM_EVERY, augment=data.augment, cutmix=cutmix, decay=False,
                             generator=generator)  # fmt: skip
                for name, batch in batches.items():
                    curves[name].append(float(sum(g.abs().sum() for g in gradients(net, *batch))))
            for name, curve in curves.items():
                found[name].append(curve)
        out |= {f"{trained}, norm on {name}": np.mean(curves, 0).tolist() for name, curves in found.items()}
    return out


def gradients(net: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Of the mean cross entropy, by every parameter."""
    return torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))


def pretrain(seed: int, setup: Setup) -> common.Cell:
    """A network of every age of Figure 6.5, and its gradients on images of one class."""
    data = setup.data("CIFAR-10")
    generator = torch.Generator().manual_seed(seed)
    net = fresh(data.network, generator)
    out: common.Cell = {"norm": [], "cosine": []}
    for before, age in zip((0, *EPOCHS), EPOCHS, strict=False):
        steps = setup.steps((age - before) * EPOCH)
        if steps:
            train_on(net, data.real, data.real.labels, steps, augment=data.augment, cutmix=data.cutmix, decay=False,
                     generator=generator)  # fmt: skip
        write_whole(_weights(seed, age, setup), save(net.state_dict()))
        norm, cosine = zip(*(_alike(net, data, c) for c in range(CLASSES)), strict=True)
        out["norm"].append(statistics.mean(norm))
        out["cosine"].append(statistics.mean(cosine))
    return out


def _alike(net: nn.Module, data: source.Data, c: int) -> tuple[float, float]:
    """L1 norm of the gradient on 64 images of a class, and the mean cosine between those of 16 single ones."""
    rows = data.real.draw(c, 64, torch.Generator().manual_seed(0))
    x, y = data.real(rows), data.real.labels[rows]
    norm = float(sum(g.abs().sum() for g in gradients(net, x, y)))
    single = [
        torch.cat([g.flatten() for g in gradients(net, a, b)])
        for a, b in zip(x[:16].split(1), y[:16].split(1), strict=True)
    ]
    unit = F.normalize(torch.stack(single), dim=1)
    return norm, float(((unit @ unit.T).sum() - 16) / (16 * 15))


def _weights(seed: int, age: int, setup: Setup) -> Path:
    return kept_in(setup) / f"network-{seed}-epoch-{age}{'-quick' if setup.quick else ''}.safetensors"


def of_age(age: int, setup: Setup) -> common.Cell:
    """Figure 6.5, left: condensing with two networks that stay as they are."""
    if not all(_weights(seed, age, setup).exists() for seed in (0, 1)):
        for seed in (0, 1):
            pretrain(seed, setup)
    data, networks = setup.data("CIFAR-10"), [load_file(_weights(seed, age, setup)) for seed in (0, 1)]
    condenser = Condenser(
        data.network, 1, 2, steps=setup.steps(AGE_STEPS), inner=1, network_steps=0, pretrained=networks
    )  # fmt: skip
    made = condenser.fit(*data.train, progress=False)
    steps = setup.steps(EVALUATION[1])
    return {"seconds": made.made["seconds"], "evaluation_steps": steps} | {
        "accuracies": source.scores(made, data, {"ConvNet": data.network}, setup.seeds, steps)["ConvNet"]
    }
