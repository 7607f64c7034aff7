"""How well networks train on a condensed set, beside what the same storage gives otherwise (thesis section 6.5.1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..arguments import check_choice, check_whole
from .augment import Augment, without_cutout
from .condensed import Condensed
from .formation import MultiFormation
from .initial import initial_images
from .real import RealData
from .training import BATCH, accuracy, any_network, check_network, fresh, network_record, rows_of, train_on

if TYPE_CHECKING:
    import pandas as pd

BASELINES = ("random", "herding", "init")
_SOFT = " + soft labels"
ModelFn = Callable[[], nn.Module]


@dataclass(frozen=True)
class Score:
    """Test accuracy of networks trained on one data set.

    Attributes:
        data: ``"condensed"`` or a baseline. network: name of the test network.
        stored: images stored. shown: images trained on. steps: of training, the last of which is scored.
        accuracies: one for each seed, in [0, 1].
    """

    data: str
    network: str
    stored: int
    shown: int
    steps: int
    accuracies: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.accuracies) / len(self.accuracies)

    @property
    def std(self) -> float:
        """Sample standard deviation over the seeds; 0 for one seed."""
        return float(torch.tensor(self.accuracies).std()) if len(self.accuracies) > 1 else 0.0


@dataclass(frozen=True)
class Scores:
    """A table of scores; ``str`` prints it, in per cent.

    Attributes:
        rows: (data, network) in the order of evaluation.
        test_images: that were classified for each.
    """

    rows: tuple[Score, ...]
    test_images: int

    def __getitem__(self, key: str | tuple[str, str]) -> Score:
        """The row of a data set, or of a data set and a network; of the first network where none is named."""
        data, network = (key, None) if isinstance(key, str) else key
        for row in self.rows:
            if row.data == data and network in (None, row.network):
                return row
        raise KeyError(f"key={key!r} is not among the rows; there are {sorted({row.data for row in self.rows})}")

    def to_pandas(self) -> pd.DataFrame:
        """One row for each score, accuracies in [0, 1]."""
        import pandas as pd

        names = ("data", "network", "stored", "shown", "steps", "mean", "std")
        return pd.DataFrame([{name: getattr(row, name) for name in names} for row in self.rows])

    def __str__(self) -> str:
        wide = max(len(row.data) for row in self.rows)
        broad = max(len("network"), *(len(row.network) for row in self.rows))
        lines = [f"{'data':{wide}}  {'network':{broad}}  stored  shown  steps  accuracy %"]
        for r in self.rows:
            score = f"{100 * r.mean:5.1f} ± {100 * r.std:.1f}"
            lines.append(f"{r.data:{wide}}  {r.network:{broad}}  {r.stored:6}  {r.shown:5}  {r.steps:5}  {score}")
        return "\n".join(lines)


def evaluate(
    condensed: Condensed,
    train: tuple[Any, Any],
    test: tuple[Any, Any],
    model_fn: ModelFn | Mapping[str, ModelFn],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    steps: int = 300,
    epochs: int | None = None,
    same_compute: bool = False,
    baselines: Sequence[str] = BASELINES,
    teacher: nn.Module | None = None,
    augment: Augment | str | None = "auto",
    cutmix: float = 0.5,
    lr: float = 0.01,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Scores:
    """Train fresh networks on the decoded set and on baselines of the same storage; test accuracy after the last step.

    SGD with momentum .9, weight decay 5e-4 and batches of 64, the rate divided by 5 after 2/3 and 5/6 of the steps,
    augmentation for each image and CutMix. Labels are hard; rows with soft labels come only beside them, as with those
    almost any images do well.

    Args:
        condensed: to be scored.
        train: (images, labels) that it was condensed from; baselines are taken from here.
        test: (images, labels), pixels as those of ``train``.
        model_fn: of a new network, or several by name, as test networks.
        seeds: one network each; ``"random"`` and ``"herding"`` choose anew for each.
        steps: of training. epochs: given instead: passes over each set, 1000 in the thesis for 32 x 32.
        same_compute: with ``epochs``: all sets get the steps of as many images as are stored (Table 6.2).
        baselines: ``"random"``, ``"herding"``, and ``"init"``, what the condensation started from.
        teacher: a network trained on real data; adds rows with its softmax as labels, for condensed and random.
        augment: for each image; ``"auto"`` is that of the condensation without cutout.
        cutmix: its probability. lr: of the networks.
        device: None is where the images of ``train`` are.
        progress: a bar; None shows one on a terminal.

    Raises:
        ValueError: ``train`` is not what the set was condensed from; test images or classes, or a network, that do not
            fit; a set that does not say what it started from; another argument outside its range.
    """
    _check(seeds, steps, epochs, baselines)
    if not isinstance(condensed, Condensed):
        raise TypeError(f"condensed is a {type(condensed).__name__}; give a Condensed")
    for name, pair in (("train", train), ("test", test)):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise TypeError(f"{name} is a {type(pair).__name__}; give the pair (images, labels)")
    functions = list(model_fn.values()) if isinstance(model_fn, Mapping) else [model_fn]
    if not all(map(callable, functions)):
        raise TypeError(f"model_fn={model_fn!r:.80} must be a function that makes a network, or several by name")
    if not isinstance(model_fn, Mapping):
        model_fn = {type(any_network(model_fn)).__name__: model_fn}
    fns = dict(model_fn)
    if not fns:
        raise ValueError("model_fn names no network; give one at least")
    data = RealData(*train, mean=condensed.mean, std=condensed.std, device=device)
    if data.shape != tuple(condensed.images.shape[1:]) or data.classes != condensed.classes:
        raise ValueError(
            f"train has {data.classes} classes of {data.shape}, the condensed set {condensed.classes} of "
            f"{tuple(condensed.images.shape[1:])}; give the images that it was condensed from"
        )
    source = condensed.made.get("source", {}).get("sha256")
    if "init" in baselines and source is not None and source != data.sha256:
        raise ValueError(
            f"train has the checksum {data.sha256[:16]}, the condensed set was made from {source[:16]}; give the same "
            "images and labels, or baselines=('random', 'herding')"
        )
    try:
        held = RealData(*test, mean=data.mean, std=data.std, device=data.device, complete=False)
    except (TypeError, ValueError) as e:
        raise type(e)(f"test: {e}") from e
    if held.shape != data.shape or held.classes > data.classes:
        raise ValueError(
            f"test has images of {held.shape} and class ids up to {held.classes - 1}, train images of {data.shape} and "
            f"class ids up to {data.classes - 1}; give the same images and classes as there"
        )
    for fn in fns.values():
        net = any_network(fn).to(data.device, torch.float32).eval()
        with torch.no_grad():
            check_network(net, data(torch.zeros(2, dtype=torch.long)), data.classes)
    if "init" in baselines:
        _check_start(condensed.made, next(iter(fns.values())))
    chosen = training_augment(condensed) if isinstance(augment, str) else augment
    names = ["condensed", *baselines]
    if teacher is not None:
        names += [name + _SOFT for name in ("condensed", "random")]
    rows = []
    total = len(names) * len(fns) * len(seeds)
    disable = None if progress is None else not progress
    with tqdm(total=total, desc="evaluating", unit="network", disable=disable) as bar:
        for name in names:
            right: dict[str, list[float]] = {network: [] for network in fns}
            for seed in seeds:
                g = torch.Generator().manual_seed(seed)
                x, y = _images(name.removesuffix(_SOFT), condensed, data, g, next(iter(fns.values())))
                x = data.normalise(x)
                count = _steps(len(x), len(condensed.images), steps, epochs, same_compute)
                target = _soft(teacher, x) if teacher is not None and name.endswith(_SOFT) else y
                for network, fn in fns.items():
                    g = torch.Generator().manual_seed(seed)
                    net = fresh(fn, g).to(data.device, torch.float32)
                    train_on(net, rows_of(x), target, count, augment=chosen, cutmix=cutmix, lr=lr, generator=g)
                    right[network].append(accuracy(net, held, held.labels.to(data.device)))
                    bar.update()
            stored = len(condensed.images)
            rows += [Score(name, network, stored, len(x), count, tuple(found)) for network, found in right.items()]
    return Scores(tuple(rows), len(held.labels))


def _check(seeds: Sequence[int], steps: int, epochs: int | None, baselines: Sequence[str]) -> None:
    for name, several in (("seeds", seeds), ("baselines", baselines)):
        if not isinstance(several, Sequence) or isinstance(several, str | bytes):
            raise TypeError(f"{name}={several!r:.80} is a {type(several).__name__}; give a list")
    for seed in seeds:
        check_whole(seeds=seed)
    check_whole(steps=steps, epochs=1 if epochs is None else epochs)
    if not len(seeds):
        raise ValueError("seeds is empty; give one seed for each network to train")
    if steps < 1 or (epochs is not None and epochs < 1):
        raise ValueError(f"steps={steps} and epochs={epochs} must be at least 1")
    for name in baselines:
        check_choice(BASELINES, baselines=name)


def _check_start(made: dict[str, Any], model_fn: ModelFn) -> None:
    """Raise ValueError unless the images that the set started from can be made again."""
    if "init" not in made or "seed" not in made:
        raise ValueError("the condensed set does not say what it started from; give baselines=('random', 'herding')")
    if made["init"] == "herding" and any(made.get(k) != v for k, v in network_record(model_fn).items()):
        raise ValueError(
            f"the condensed set started from what herding chose with {made.get('network')} of {made.get('parameters')} "
            "parameters; give that as the first model_fn, or baselines=('random', 'herding')"
        )


def _images(
    name: str, condensed: Condensed, data: RealData, generator: torch.Generator, model_fn: ModelFn
) -> tuple[Tensor, Tensor]:
    """Pixels and class ids to train on, on the device of ``data``."""
    device = data.device
    if name == "condensed":
        x, y = condensed.decode()
        return x.to(device), y.to(device)
    per_class = int(condensed.labels.bincount().max())
    form = MultiFormation(1)
    if name == "init":
        generator = torch.Generator().manual_seed(int(condensed.made["seed"]))
        name, form = str(condensed.made["init"]), condensed.formation
        stored = initial_images(data, per_class, name, MultiFormation(form.factor, form.axes), generator, model_fn)
    else:
        stored = initial_images(data, per_class, name, form, generator, model_fn)
    y = torch.arange(data.classes, device=device).repeat_interleave(per_class)
    return form(stored), form.labels(y)


def _steps(shown: int, stored: int, steps: int, epochs: int | None, same_compute: bool) -> int:
    if epochs is None:
        return steps
    return epochs * -(-(stored if same_compute else shown) // BATCH)


def training_augment(condensed: Condensed) -> Augment | None:
    """What networks on a condensed set train with: the augmentation that it was made with, without cutout."""
    made: dict[str, Any] | None = condensed.made.get("augment", {})
    if made is None:
        return None
    settings: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in made.items()}
    return without_cutout(Augment(**settings))


@torch.no_grad()
def _soft(teacher: nn.Module, x: Tensor) -> Tensor:
    training = teacher.training
    teacher.eval()
    try:
        return torch.cat([teacher(part).softmax(1) for part in x.split(256)])
    finally:
        teacher.train(training)
