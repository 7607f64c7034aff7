"""Condensed data sets beside what the same storage gives otherwise: the thesis' tables and figures of chapter 6, small.

Digits, Fashion-MNIST and CIFAR-10 (JPEG) at 1 and 10 stored images a class, spoken digits (FSDD spectrograms, cut along
time) at 1: random and herded images, the images that condensation starts from, DSA, DM, IDC-I (factor 1) and IDC, also
with networks that nothing trained before they are matched. Then factors 1 to 4 (Table 6.7), other test networks (Table
6.1), as many training steps for all (Table 6.2), what the parts bring (Table 6.5), shrinking afterwards (Table 6.6),
gradient norms (Figure 6.4), and networks of one age (Figure 6.5).

A row is the mean over condensation seeds (two where the report says so) and three test networks each, after the last of
a fixed number of steps with hard labels. DSA and DM are ours over the same parts: random real images to start from,
Adam, and for DSA networks trained on the synthetic images, cosine distance and a new siamese draw at every step.
Networks are narrow and runs take seconds to minutes; the thesis condenses for hours on a GPU (condense_gpu.py).

Two processes of one thread; the main rows come first. No cell is begun that might not end within --minutes, and the
report says which have run: call the script again for the others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import condense_data as source
import numpy as np
import torch
import torch.nn.functional as F
from cifar10 import spread
from condense_data import CLASSES
from dataopt import plots
from dataopt.core.artifacts import write_whole
from dataopt.core.condense import Condensed, Condenser, MultiFormation, evaluate
from dataopt.core.condense.training import fresh, train_on
from mixup import Job, picture, run_cells
from safetensors.torch import load_file, save
from torch import Tensor, nn

WORKERS = 2
MINUTES = 60
TEST_SEEDS: tuple[int, ...] = (0, 1, 2)
PACKAGES = ("dataopt", "torch", "torchvision", "numpy", "scikit-learn")
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
FLOORS = (  # data, factors, least accuracy, least gain over the init
    ("digits", (1,), 88.0, None),
    ("Fashion-MNIST", (2,), 74.0, 7.0),
    ("CIFAR-10", (2, 3), 34.0, None),
)


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


# Cells


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


# The plan: every cell by its name, in the order in which they run


IMAGES, SPEECH = ("digits", "Fashion-MNIST", "CIFAR-10"), "spoken digits"
FACTORS = {  # of the main rows, at images a class; two condensation seeds each
    ("digits", 1): (1,), ("Fashion-MNIST", 1): (2, 1), ("CIFAR-10", 1): (3, 2, 1), ("digits", 10): (1,),
    ("Fashion-MNIST", 10): (1,), ("CIFAR-10", 10): (2, 1), (SPEECH, 1): (2, 1),
}  # fmt: skip
GROUPS = tuple(FACTORS)


def idc_rows(data: str, per_class: int) -> list[Row]:
    return [Row(data, per_class, "IDC", f, seed) for f in FACTORS[data, per_class] for seed in (0, 1)]


def fresh_rows() -> list[Row]:
    """Every row of IDC with networks that nothing has trained yet."""
    rows = [row for group in GROUPS for row in idc_rows(*group)] + factor_rows()
    return [dataclasses.replace(row, method="fresh networks") for row in rows]


def rival_rows(data: str, per_class: int) -> list[Row]:
    """DSA and DM; two condensation seeds at one image a class."""
    seeds = (0, 1) if per_class == 1 and data != SPEECH else (0,)
    return [Row(data, per_class, rival, 1, seed) for seed in seeds for rival in ("DSA", "DM")]


def factor_rows() -> list[Row]:
    """What Table 6.7 needs beside the main rows."""
    out = [Row("digits", 1, "IDC", f) for f in (2, 3, 4)] + [Row("digits", 10, "IDC", 2)]
    out += [Row("Fashion-MNIST", 1, "IDC", f) for f in (3, 4)] + [Row("Fashion-MNIST", 10, "IDC", 2)]
    return [*out, Row("CIFAR-10", 1, "IDC", 4)]


def setting_rows() -> list[Row]:
    return [Row("Fashion-MNIST", 1, m, 2) for m in SETTINGS] + [Row("CIFAR-10", 1, "feature matching from centres", 2)]


def part_rows() -> list[Row]:
    return [Row("Fashion-MNIST", 1, m, 1, seed) for seed in (0, 1) for m in PARTS]


TRANSFER, SHRINK, FIXED, GRADIENTS = "transfer", "shrunk afterwards", "fixed compute", "gradient norms"
TRANSFERRED: dict[str, Row | str] = {
    "random": "random", "herding": "herding", "DSA": Row("CIFAR-10", 1, "DSA"), "DM": Row("CIFAR-10", 1, "DM"),
}  # fmt: skip
TILED = {"IDC-I": 1, "IDC, factor 2": 2, "IDC, factor 3": 3}
TRANSFERRED |= {name: Row("CIFAR-10", 1, "IDC", f) for name, f in TILED.items()}
TRANSFERRED |= {f"{name}, fresh networks": Row("CIFAR-10", 1, "fresh networks", f) for name, f in TILED.items()}
COMPUTE = tuple(Row("CIFAR-10", 10, "fresh networks", f) for f in (1, 2))
SHRUNK = tuple(Row(data, 4, "fresh networks") for data in ("Fashion-MNIST", "CIFAR-10"))
NORMS = Row("CIFAR-10", 10, "DSA")


def planned(setup: Setup) -> dict[str, Job]:
    def rows(wanted: Iterable[Row]) -> dict[str, Job]:
        return {row.name: (scored, (row, setup)) for row in wanted}

    if setup.quick:
        few = [Row("digits", 1), Row("digits", 1, "DSA"), Row("digits", 10, "IDC", 2), Row("digits", 1, "DM")]
        return rows(few) | {real_name("digits", 1, h): (real_images, ("digits", 1, h, setup)) for h in source.REAL}
    out: dict[str, Job] = {}
    for groups in ([(d, 1) for d in IMAGES], [(d, 10) for d in IMAGES], [(SPEECH, 1)]):
        for data, n in groups:
            out |= {real_name(data, n, how): (real_images, (data, n, how, setup)) for how in source.REAL}
            out |= rows(idc_rows(data, n))
        for group in groups:
            out |= rows(rival_rows(*group))
    out |= rows([*part_rows()[: len(PARTS)], *setting_rows(), *factor_rows()])
    out |= {name_of(TRANSFER, what): (transfer, (what, 1, setup)) for what in TRANSFERRED.values()}
    out |= {name_of(SHRINK, row): (shrunk, (row, setup)) for row in SHRUNK}
    out |= {name_of(FIXED, row): (fixed_compute, (row, setup)) for row in COMPUTE}
    out[name_of(GRADIENTS, NORMS)] = norms, (NORMS, setup)
    out |= {f"networks of every age, seed {seed}": (pretrain, (seed, setup)) for seed in (0, 1)}
    out |= {f"condensed with epoch {age}": (of_age, (age, setup)) for age in EPOCHS}
    return out | rows(part_rows()) | rows(fresh_rows())


def name_of(kind: str, what: Row | str) -> str:
    """Of a cell that looks at a condensed set, whose budget is then in the name, or at real images."""
    return f"{kind}: {what.name if isinstance(what, Row) else what}"


def real_name(data: str, per_class: int, how: str) -> str:
    return f"{data}, {per_class} per class: {how}"


# The report


def cells_of(run: common.Run, row: Row) -> list[common.Cell]:
    """Those of every condensation seed that has run."""
    return [cell for key, cell in run.cells.items() if key.startswith(f"{row.group}, seed")]


def accuracies(cells: Sequence[common.Cell], of: str = "accuracies") -> list[float]:
    return [a for cell in cells for a in cell.get(of, [])]


def line_of(run: common.Run, row: Row, name: str) -> list[object] | None:
    cells = cells_of(run, row)
    if not cells:
        return None
    found, start = accuracies(cells), accuracies(cells, "start")
    minutes = statistics.mean(c["processor_seconds"] for c in cells) / 60
    gain = f"{statistics.mean(found) - statistics.mean(start):+.1f}" if start else ""
    return [
        name, cells[0]["init"], len(cells), cells[0]["steps"], f"{minutes:.1f}", cells[0]["shown"],
        cells[0]["evaluation_steps"], spread(found), spread(start) if start else "", gain,
    ]  # fmt: skip


HEADER = ["", "starts from", "seeds", "steps", "minutes", "shown", "test steps", "accuracy %", "start alone %", "gain"]


def main_table(run: common.Run, data: str, per_class: int) -> list[str]:
    lines: list[list[object]] = []
    for how in source.REAL:
        cell = run.cells.get(real_name(data, per_class, how))
        if cell:
            shown, steps = cell["shown"], cell["evaluation_steps"]
            lines.append([how, "", "", "", "", shown, steps, spread(cell["accuracies"]), "", ""])
    wanted = [(Row(data, per_class, rival), rival) for rival in ("DSA", "DM")]
    for f in BUDGETS[data, per_class]:
        name = f"IDC, factor {f}" if f > 1 else "IDC-I (factor 1)"
        wanted += [(Row(data, per_class, "IDC", f), name)]
        wanted += [(Row(data, per_class, "fresh networks", f), f"{name}, fresh networks")]
    found = [line_of(run, row, name) for row, name in wanted]
    lines += [line for line in found if line]
    return [f"{data}, {per_class} stored per class:", common.table(HEADER, lines)] if lines else []


def verdicts(run: common.Run) -> list[str]:
    """The floors, each beside random, herding and the start; the best factor where there are several."""
    out = []
    for data, factors, least, gain in FLOORS:
        rows = [(Row(data, 1, "IDC", f), cells_of(run, Row(data, 1, "IDC", f))) for f in factors]
        rows = [(row, cells) for row, cells in rows if len(cells) >= 2]
        if not rows:
            out.append(f"{data}, 1 per class: not measured with two condensation seeds yet, so no verdict.")
            continue
        row, cells = max(rows, key=lambda pair: statistics.mean(accuracies(pair[1])))
        found, start = statistics.mean(accuracies(cells)), statistics.mean(accuracies(cells, "start"))
        beside = {
            how: statistics.mean(run.cells[key]["accuracies"])
            for how in source.REAL
            if (key := real_name(data, 1, how)) in run.cells
        }
        shown = ", ".join(f"{name} {value:.1f}" for name, value in (beside | {"its start": start}).items())
        what = f"{data}, 1 per class, factor {row.factor}, % after {cells[0]['evaluation_steps']} steps"
        out.append(f"{common.verdict(what, found, least=least)} Beside it: {shown}.")
        if gain is not None:
            out.append(common.verdict(f"its points above the start ({start:.1f} %)", found - start, least=gain))
    return out


def explained(run: common.Run) -> list[str]:
    """Where the start alone explains the gain."""
    none = []
    for data, per_class in GROUPS:
        for factor in BUDGETS[data, per_class]:
            cells = cells_of(run, Row(data, per_class, "IDC", factor))
            found, start = accuracies(cells), accuracies(cells, "start")
            if found and start and statistics.mean(found) - statistics.mean(start) < 1:
                none.append(f"{data} {per_class} per class factor {factor}")
    if not none:
        return []
    return [f"The start alone explains the accuracy (condensing adds less than a point to it): {'; '.join(none)}."]


def factors_table(run: common.Run) -> list[str]:
    lines = []
    for (data, per_class), method in itertools.product(GROUPS, ("IDC", "fresh networks")):
        row = [f"{data}, {per_class} per class, {method}", "", "", "", ""]
        for factor in BUDGETS[data, per_class]:
            cells = cells_of(run, Row(data, per_class, method, factor))
            start = accuracies(cells, "start")
            row[factor] = f"{spread(accuracies(cells))} ({statistics.mean(start):.1f})" if start else ""
        if sum(map(bool, row)) > 2:
            lines.append(row)
    if not lines:
        return []
    title = "Factors (Table 6.7), accuracy % and in brackets the start alone; steps as in the tables above:"
    return [title, common.table(["", "1", "2", "3", "4"], lines)]


def parts_table(run: common.Run) -> list[str]:
    out = []
    lines = [line for m in PARTS if (line := line_of(run, Row("Fashion-MNIST", 1, m, 1), m))]
    if lines:
        out += [
            f"What the parts bring (Table 6.5): Fashion-MNIST, 1 per class, factor 1, {PART_STEPS} steps each under "
            "networks trained for 4 batches between two steps, on synthetic (Syn) or real images; Reg is CutMix:",
            common.table(HEADER, lines),
        ]
    wanted = [(Row("Fashion-MNIST", 1, m, 2), m) for m in ("fresh networks", *SETTINGS)]
    lines = [line for row, name in wanted if (line := line_of(run, row, name))]
    if len(lines) > 1:
        title = "Other settings, each with fresh networks: Fashion-MNIST, 1 per class, factor 2:"
        out += [title, common.table(HEADER, lines)]
    wanted = [(Row("CIFAR-10", 1, m, 2), m) for m in ("fresh networks", *SETTINGS)]
    lines = [line for row, name in wanted if (line := line_of(run, row, name))]
    if len(lines) > 1:
        out += ["The same on CIFAR-10:", common.table(HEADER, lines)]
    return out


def transfer_table(run: common.Run) -> list[str]:
    keys = {name: name_of(TRANSFER, what) for name, what in TRANSFERRED.items()}
    cells = {name: run.cells[key] for name, key in keys.items() if key in run.cells}
    if not cells:
        return []
    networks, lines = list(source.transfer_networks()), []
    for name, cell in cells.items():
        what = TRANSFERRED[name]
        key = what.name if isinstance(what, Row) else real_name("CIFAR-10", 1, what)
        own = spread(run.cells[key]["accuracies"]) if key in run.cells else ""
        lines.append([name, own, *(spread(cell["accuracies"][n]) for n in networks)])
    title = "Other test networks (Table 6.1): CIFAR-10, 1 per class, condensation seed 0, accuracy %:"
    return [title, common.table(["", "ConvNet-3", *networks], lines)]


def compute_table(run: common.Run) -> list[str]:
    lines = []
    for row in COMPUTE:
        cell = run.cells.get(name_of(FIXED, row))
        for name in ("own", "same"):
            if cell and name in cell:
                what = "epochs of its own" if name == "own" and row.factor > 1 else "steps of factor 1"
                lines.append([f"factor {row.factor}", what, cell[name]["steps"], spread(cell[name]["accuracies"])])
    if not lines:
        return []
    title = (
        f"Fixed training steps (Table 6.2): CIFAR-10, 10 per class, condensed with fresh networks, {LONG} epochs, "
        "condensation seed 0:"
    )
    return [title, common.table(["", "trained for", "steps", "accuracy %"], lines)]


def shrunk_table(run: common.Run) -> list[str]:
    lines = []
    for row in SHRUNK:
        cell = run.cells.get(name_of(SHRINK, row))
        if cell:
            found = accuracies(cells_of(run, Row(row.data, 1, "fresh networks", 2)))
            idc = spread(found) if found else ""
            lines.append([row.data, idc, spread(cell["shrunk"]), spread(cell["whole"]), cell["evaluation_steps"]])
    if not lines:
        return []
    header = ["", "IDC, 1 stored", "IDC-I of 4, shrunk to 1", "IDC-I, 4 stored", "test steps"]
    return ["Shrinking afterwards (Table 6.6), with fresh networks, accuracy %:", common.table(header, lines)]


def norms_figure(run: common.Run) -> list[str]:
    cell = run.cells.get(name_of(GRADIENTS, NORMS))
    if not cell:
        return []
    panels = {
        trained: {name: (cell["x"], cell[f"{trained}, norm on {name}"]) for name in ("synthetic", "real")}
        for trained in ("trained on synthetic", "trained on real")
    }
    ends = [
        [trained, name, *(f"{curve[i]:.1f}" for i in (0, len(curve) // 4, -1))]
        for trained, curves in panels.items()
        for name, (_, curve) in curves.items()
    ]
    x = cell["x"]
    header = ["network", "L1 norm on", *(f"step {x[i]}" for i in (0, len(x) // 4, -1))]
    return [
        "Gradient norms (Figure 6.4): CIFAR-10, a set condensed by DSA, 10 per class:",
        picture(run, "figure_6_4", plots.show_curves(panels, "training steps of the network")),
        common.table(header, ends),
    ]


def age_figure(run: common.Run) -> list[str]:
    left = {age: run.cells[key]["accuracies"] for age in EPOCHS if (key := f"condensed with epoch {age}") in run.cells}
    keys = [f"networks of every age, seed {seed}" for seed in (0, 1)]
    if len(left) < len(EPOCHS) or not all(key in run.cells for key in keys):
        return []
    right = {what: np.mean([run.cells[key][what] for key in keys], 0).tolist() for what in ("norm", "cosine")}
    panels = {
        "accuracy %": {"condensed": (EPOCHS, [statistics.mean(v) for v in left.values()])},
        "L1 norm of a class": {"gradient": (EPOCHS, right["norm"])},
        "cosine in a class": {"gradient": (EPOCHS, right["cosine"])},
    }
    lines = [
        [age, spread(v), f"{n:.1f}", f"{c:.3f}"]
        for (age, v), n, c in zip(left.items(), right["norm"], right["cosine"], strict=True)
    ]
    return [
        f"Networks of one age (Figure 6.5): CIFAR-10, 1 per class, factor 2, {AGE_STEPS} steps under two networks that "
        f"stay as they are; an epoch is {EPOCH} batches of 64:",
        picture(run, "figure_6_5", plots.show_curves(panels, "epoch")),
        common.table(["epoch", "accuracy %", "L1 norm", "cosine"], lines),
    ]


def report(run: common.Run, plan: Sequence[str]) -> None:
    ran = run.ran(plan)
    if not run.cells:
        print(ran)
        return
    parts = [
        f"{ran} Accuracy on all test images after the last step, mean +- standard deviation over condensation seeds "
        f"and {len(TEST_SEEDS)} test networks each. Minutes are the processor's, of one condensation in one "
        "thread; shown are the images that a test network trains on.",
        *verdicts(run),
        *explained(run),
    ]
    for group in GROUPS:
        parts += main_table(run, *group)
    for part in (
        factors_table, parts_table, transfer_table, compute_table, shrunk_table, norms_figure, age_figure,
    ):  # fmt: skip
        parts += part(run)
    run.report(*parts)


def main() -> None:
    arguments = common.parser(__doc__)
    common.add_data_option(arguments)
    arguments.add_argument(
        "--minutes", type=float, default=MINUTES, help=f"no cell is begun that may not end within them ({MINUTES})"
    )
    args = arguments.parse_args()
    settings = {
        "methods": METHODS, "rates": RATES, "evaluation": EVALUATION, "ages": [EPOCH, EPOCHS, AGE_STEPS],
        "norms": [NORM_STEPS, NORM_EVERY], "long": LONG,
    }  # fmt: skip
    run = common.start("condense", "Condensed data sets", args, 1, settings, WORKERS, PACKAGES, timed=False)
    setup = Setup(args.data, run.scratch, args.quick)
    if args.fresh:
        shutil.rmtree(kept_in(setup), ignore_errors=True)
    plan = planned(setup)
    missing = run.missing(list(plan))
    if missing and not args.quick:
        source.check(args.data, {name for name, _ in GROUPS})
    run_cells(run, {key: plan[key] for key in missing}, args.minutes, WORKERS)
    report(run, list(plan))


if __name__ == "__main__":
    main()
