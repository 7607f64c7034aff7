"""Both presets of the condenser against the plain loop of Algorithm 5: class updates a second, and time to an accuracy.

The plain loop takes one class after another: 64 real images and the class' formed images through one siamese
augmentation, both gradients, the sum of squared differences over the convolutions, a step of SGD on the stored images;
after all classes 8 batches of augmentation and CutMix for the network. It is written once, here, and first shown to
have the losses of preset "released" in float64 under one network. (At a renewal the pixels are clamped to [0, 1]; in
the plain loop the last classes have not coasted to the end then, so that later losses differ a little.)

Rates are those of whole rounds between two renewals. Accuracy is that of three test networks after 300 steps, for three
condensation seeds at one stored image a class and factor 2; the plain loop gets the best of several step sizes, chosen
on the test images of seed 0. Seconds are the processor's, of one thread: a busy neighbour lengthens both sides.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import common
import condense_data as source
import torch
import torch.nn.functional as F
from cifar10 import spread
from dataopt.core.condense import Augment, Condenser, MultiFormation, RealData, initial_images
from dataopt.core.condense.training import BATCH, fresh, sgd, training_step
from mixup import Job, run_cells
from torch import Tensor, nn

WORKERS = 2
SEEDS: tuple[int, ...] = (0, 1, 2)
TEST_SEEDS: tuple[int, ...] = (0, 1, 2)
DATA, QUICK = ("Fashion-MNIST", "CIFAR-10"), ("digits",)
FACTOR, REAL, BATCHES = 2, 64, 8
INNER = 10  # rounds before the network is renewed
ROUNDS = {"Fashion-MNIST": 200, "CIFAR-10": 160, "digits": 20}  # of the plain loop
STEPS = {"Fashion-MNIST": 140, "CIFAR-10": 80, "digits": 10}  # of "fast", to end within a third of its time
RATES = (0.01, 0.02, 0.05, 0.1)  # of the plain loop's steps
TEST_STEPS = 300
RATE_RENEWALS = 4  # stretches between two renewals over which a rate is measured
REPEATS = 2
FASTER, SHARE = 1.3, 1 / 3
COMPILED = "released, compiled"
LOOPS = ("plain", "released", COMPILED)
PACKAGES = ("dataopt", "torch", "torchvision", "numpy", "scikit-learn")
ModelFn = Callable[[], nn.Module]


def plain(
    model_fn: ModelFn,
    data: RealData,
    initial: Tensor,
    formation: MultiFormation,
    rounds: int,
    lr: float,
    generator: torch.Generator,
    inner: int = INNER,
) -> tuple[Tensor, list[float]]:
    """Algorithm 5 as released, eagerly: the stored images, and every round's matching loss, summed over classes."""
    augment = Augment()
    stored = initial.clone().requires_grad_()
    optimiser = torch.optim.SGD([stored], lr, momentum=0.5)
    losses = []
    for i in range(rounds):
        if i % inner == 0:
            with torch.no_grad():
                stored.clamp_(0, 1)
            net = fresh(model_fn, generator)
            net_optimiser = sgd(net)
            convolutions = [p for p in net.parameters() if p.ndim > 2]
        draws = [augment.draw(1, data.size, generator) for _ in range(data.classes)]
        total = 0.0
        for c, draw in enumerate(draws):
            real = data(data.draw(c, REAL, generator))
            formed = data.normalise(formation(stored.unflatten(0, (data.classes, -1))[c]))
            both = augment(torch.cat([real, formed]), draw)
            target = torch.autograd.grad(_loss(net, both[: len(real)].detach(), c), convolutions)
            found = torch.autograd.grad(_loss(net, both[len(real) :], c), convolutions, create_graph=True)
            gap = torch.stack([(f - t).square().sum() for f, t in zip(found, target, strict=True)]).sum()
            optimiser.zero_grad(set_to_none=False)  # the momentum of the other classes goes on, as released
            gap.backward(inputs=[stored])
            optimiser.step()
            total += float(gap.detach())
        losses.append(total)
        for rows in _batches(len(data.labels), generator):
            training_step(
                net, net_optimiser, data(rows), data.labels[rows], Augment(cutout=0), 0.5, generator, data.classes
            )
    return stored.detach().clamp(0, 1), losses


def _loss(net: nn.Module, x: Tensor, c: int) -> Tensor:
    return F.cross_entropy(net(x), torch.full((len(x),), c))


def _batches(n: int, generator: torch.Generator) -> Iterator[Tensor]:
    size = min(BATCH, n)
    rounds = -(-BATCHES * size // n)
    rows = torch.cat([torch.randperm(n, generator=generator) for _ in range(rounds)])
    yield from rows[: BATCHES * size].split(size)


@dataclass
class Stamped:
    """A model_fn that notes the time of every call: a renewal of the network comes every ``INNER`` rounds."""

    model_fn: ModelFn
    times: list[float] = field(default_factory=list)

    def __call__(self) -> nn.Module:
        self.times.append(time.process_time())
        return self.model_fn()

    def stretches(self, renewals: int) -> list[float]:
        """Seconds between the last renewals, one stretch more than asked for: the first warms up, or compiles."""
        times = self.times[-renewals - 2 :]
        found = [after - before for before, after in pairwise(times)]
        assert max(found[1:]) < 5 * min(found[1:]), f"not the times of renewals: {found}"
        return found

    def per_round(self, renewals: int) -> float:
        return statistics.mean(self.stretches(renewals)[1:]) / INNER


@dataclass(frozen=True)
class Setup:
    """What all cells depend on."""

    folder: Path
    quick: bool = False

    def data(self, name: str) -> source.Data:
        return source.load(name, self.folder, 200 if self.quick else None)

    def rounds(self, count: int) -> int:
        return min(count, 4) if self.quick else count

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of the test networks."""
        return TEST_SEEDS[:1] if self.quick else TEST_SEEDS


def start_of(condenser: Condenser, data: RealData) -> tuple[Tensor, torch.Generator]:
    """Initial images of preset "released", and the generator where its first round finds it."""
    assert isinstance(condenser.factor, int)
    generator = torch.Generator().manual_seed(condenser.seed)
    form = MultiFormation(condenser.factor)
    images = initial_images(data, condenser.images_per_class, "mix", form, generator)
    fresh(condenser.model_fn, generator)  # the network before its first renewal
    return images, generator


def released(
    model_fn: ModelFn, lr: float, steps: int, seed: int = 0, compiled: bool = False, inner: int = INNER
) -> Condenser:
    return Condenser(
        model_fn, 1, FACTOR, "released", steps=steps, lr=lr, inner=inner, network_steps=BATCHES, real_batch=REAL,
        seed=seed, compile=compiled,
    )  # fmt: skip


# Cells


def equal(setup: Setup) -> common.Cell:
    """Largest relative difference of the losses, and of pixels, on the digits in float64; with renewals as well."""
    data, rounds, lr = setup.data("digits"), INNER + (3 if setup.quick else 15), 0.002
    real = RealData(*data.train, dtype=torch.float64)
    out: common.Cell = {"rounds": rounds}
    for key, inner in (("one network", rounds + 1), ("renewals", INNER)):
        condenser = released(lambda: data.network().double(), lr, rounds, inner=inner)
        made = condenser.fit(*data.train, progress=False)
        images, generator = start_of(condenser, real)
        stored, losses = plain(condenser.model_fn, real, images, MultiFormation(FACTOR), rounds, lr, generator, inner)
        assert condenser.losses is not None
        found = torch.tensor(losses, dtype=torch.float64)
        difference = float(((found - condenser.losses).abs() / found).max())
        out[key] = [difference, float((stored.float() - made.images).abs().max())]
    return out


def rate(name: str, setup: Setup) -> common.Cell:
    """Class updates a second of the plain loop and of preset "released", eager and compiled, by turns."""
    torch.compiler.config.force_disable_caches = True  # compiling takes what it takes the first time
    d = setup.data(name)
    renewals = 2 if setup.quick else RATE_RENEWALS
    rounds = (renewals + 1) * INNER + 1
    out: common.Cell = {name: [] for name in (*LOOPS, "compiling", "loss")}
    for repeat in range(1 if setup.quick else REPEATS):
        stamped = Stamped(d.network)
        images, generator = start_of(released(d.network, 0.01, rounds), d.real)
        _, losses = plain(stamped, d.real, images, MultiFormation(FACTOR), rounds, 0.01, generator)
        out["plain"].append(source.CLASSES / stamped.per_round(renewals))
        for key, compiled in (("released", False), (COMPILED, True))[: 1 if setup.quick else 2]:
            stamped = Stamped(d.network)
            condenser = released(stamped, 0.01, rounds, compiled=compiled)
            condenser.fit(*d.train, progress=False)
            stamped.times.pop()  # of the network that describes the result
            out[key].append(source.CLASSES / stamped.per_round(renewals))
            assert condenser.losses is not None
            if compiled and repeat == 0:
                out["compiling"].append(stamped.stretches(renewals)[0] - INNER * stamped.per_round(renewals))
            elif not compiled:
                found = torch.tensor(losses[:INNER], dtype=torch.float64)
                out["loss"].append(float(((found - condenser.losses[:INNER]).abs() / found).max()))
    return out


def plain_accuracy(name: str, lr: float, seed: int, setup: Setup) -> common.Cell:
    d, start = setup.data(name), time.process_time()
    images, generator = start_of(released(d.network, lr, 1, seed), d.real)
    rounds = setup.rounds(ROUNDS[name])
    stored, losses = plain(d.network, d.real, images, MultiFormation(FACTOR), rounds, lr, generator)
    seconds = time.process_time() - start
    return {"seconds": seconds, "rounds": rounds, "loss": losses[-1]} | _accuracy(stored, d, setup)


def fast_accuracy(name: str, seed: int, setup: Setup) -> common.Cell:
    d, start = setup.data(name), time.process_time()
    condenser = Condenser(d.network, 1, FACTOR, steps=setup.rounds(STEPS[name]), seed=seed)
    made = condenser.fit(*d.train, progress=False)
    seconds = time.process_time() - start
    assert condenser.initial is not None
    return {"seconds": seconds, "start": _accuracy(condenser.initial, d, setup)["accuracies"]} | _accuracy(
        made.images, d, setup
    )


def _accuracy(images: Tensor, d: source.Data, setup: Setup) -> common.Cell:
    steps = setup.rounds(TEST_STEPS)
    found = source.scores(source.stored(images, d, FACTOR), d, {"ConvNet": d.network}, setup.seeds, steps)
    return {"accuracies": found["ConvNet"]}


# The run


def plain_name(name: str, lr: float, seed: int) -> str:
    return f"{name}, plain, {ROUNDS[name]} rounds, rate {lr:g}, seed {seed}"


def fast_name(name: str, seed: int) -> str:
    return f"{name}, fast, {STEPS[name]} steps, seed {seed}"


def best(run: common.Run, name: str) -> float:
    """The plain loop's step size with the highest accuracy at seed 0."""
    return max(RATES, key=lambda lr: statistics.mean(run.cells[plain_name(name, lr, 0)]["accuracies"]))


def rates_report(run: common.Run) -> list[str]:
    cell = run.cells["equal"]
    (loss, pixel), (later, _) = cell["one network"], cell["renewals"]
    out = [
        f"Plain loop and preset released, {cell['rounds']} rounds on the digits in float64: under one network losses "
        f"differ by {loss:.1e} at most (after its last update a class coasts less in the plain loop: pixels differ by "
        f"{pixel:.1e}); with the clamp at every renewal, after {INNER} rounds, losses differ by {later:.1e}.",
    ]
    lines, targets = [], []
    for name in (*DATA, *QUICK):
        cell = run.cells.get(f"{name}, class updates a second")
        if not cell:
            continue
        rates = {key: statistics.median(cell[key]) for key in LOOPS if cell[key]}
        for key, value in rates.items():
            ratio, compiling, pays = value / rates["plain"], "", ""
            if key == COMPILED:
                saved = source.CLASSES / rates["released"] - source.CLASSES / value  # seconds a round
                compiling = f"{cell['compiling'][0]:.0f}"
                pays = f"{cell['compiling'][0] / saved:.0f}" if saved > 0 else "never"
            lines.append([name, key, f"{value:.1f}", f"{ratio:.2f}", compiling, pays])
            if key != "plain":
                what = f"{key} on {name}, class updates a second over the plain loop's"
                targets.append(common.verdict(what, ratio, least=FASTER))
        out.append(f"On {name} in float32 the losses of the first {INNER} rounds differ by {max(cell['loss']):.1e}.")
    header = ["data", "loop", "class updates a second", "times plain", "compiling s", "pays after rounds"]
    return [*out, common.table(header, lines), *targets] if lines else out


def accuracy_report(run: common.Run) -> list[str]:
    lines, targets = [], []
    for name in (*DATA, *QUICK):
        rows = {f"plain, rate {lr:g}": [run.cells.get(plain_name(name, lr, s)) for s in SEEDS] for lr in RATES}
        rows["fast"] = [run.cells.get(fast_name(name, s)) for s in SEEDS]
        means = {}
        for row, found in rows.items():
            cells = [cell for cell in found if cell]
            if not cells:
                continue
            accuracies = [a for cell in cells for a in cell["accuracies"]]
            seconds = [cell["seconds"] for cell in cells]
            means[row] = (statistics.mean(accuracies), statistics.mean(seconds), len(cells))
            lines.append([name, row, len(cells), spread(seconds), spread(accuracies)])
        if not means:
            continue
        compared = max((row for row in means if row != "fast"), key=lambda row: means[row][2], default=None)
        if compared and "fast" in means and min(means[compared][2], means["fast"][2]) == len(SEEDS):
            (a, t, _), (b, u, _) = means[compared], means["fast"]
            targets += [
                common.verdict(f"fast on {name}, its seconds over the plain loop's,", u / t, most=round(SHARE, 3)),
                common.verdict(f"fast on {name}, points above the plain loop ({compared}) then,", b - a, least=0),
            ]
        else:
            targets.append(f"{name}: not all seeds have run, so no verdict on the time to an accuracy.")
    header = ["data", "loop", "seeds", "seconds", "accuracy %"]
    return [f"One stored image a class, factor {FACTOR}:", common.table(header, lines), *targets] if lines else []


def main() -> None:
    arguments = common.parser(__doc__)
    common.add_data_option(arguments)
    args = arguments.parse_args()
    settings = {
        "factor": FACTOR, "real": REAL, "batches": BATCHES, "inner": INNER, "test_steps": TEST_STEPS,
        "renewals": RATE_RENEWALS, "repeats": REPEATS,
    }  # fmt: skip
    packages = PACKAGES
    run = common.start("condense_speed", "Condensing against the plain loop", args, 1, settings, WORKERS, packages)
    setup = Setup(args.data, args.quick)
    names = QUICK if args.quick else DATA
    source.check(args.data, set(names))
    run.cell("equal", lambda: equal(setup))
    for name in names:
        run.cell(f"{name}, class updates a second", lambda name=name: rate(name, setup))  # alone on the machine
    jobs: dict[str, Job] = {}
    for name in names:
        jobs |= {plain_name(name, lr, 0): (plain_accuracy, (name, lr, 0, setup)) for lr in RATES}
        jobs |= {fast_name(name, s): (fast_accuracy, (name, s, setup)) for s in SEEDS}
    run_cells(run, {key: job for key, job in jobs.items() if key not in run.cells}, float("inf"), WORKERS)
    jobs = {}
    for name in names:
        lr = best(run, name)
        jobs |= {plain_name(name, lr, s): (plain_accuracy, (name, lr, s, setup)) for s in SEEDS}
    run_cells(run, {key: job for key, job in jobs.items() if key not in run.cells}, float("inf"), WORKERS)
    run.report(
        f"Factor {FACTOR}, {REAL} real images, {BATCHES} batches for the network after each round, networks renewed "
        f"every {INNER} rounds. Seconds are the processor's.",
        *rates_report(run),
        *accuracy_report(run),
    )


if __name__ == "__main__":
    main()
