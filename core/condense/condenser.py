"""Condensing a training set: settings, presets, checkpoints and the loop (thesis chapter 6, Algorithm 5)."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from ..arguments import check_choice, check_label_names, check_numbers, check_strings, check_whole
from .augment import Augment, without_cutout
from .checkpoint import Checkpoints
from .condensed import Condensed
from .formation import AXES, MODES, MultiFormation
from .initial import INITS, initial_images
from .matching import LAYERS, METRICS, matched_layers
from .real import RealData
from .rounds import Run
from .training import accuracy, any_network, check_network, fresh, network_record, own_random, rows_of, train_on

PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"init": "centres", "optimiser": "adam", "lr": 0.01, "repeats": 4, "inner": 10, "network_steps": "free",
             "network_lr": 0.03, "early_steps": 300, "networks": 2},
    "released": {"init": "mix", "optimiser": "sgd", "repeats": 1, "inner": 100, "network_steps": 8, "network_lr": 0.01,
                 "early_steps": 0, "networks": 0},
}  # fmt: skip
# a fresh network for every step, never trained
_FEATURES = {"repeats": 1, "inner": 1, "network_steps": 0, "early_steps": 0, "networks": 0}
_CHOICES = {
    "axes": AXES, "formation": MODES, "metric": METRICS, "layers": LAYERS, "objective": ("gradients", "features"),
    "match": ("real", "synthetic"), "init": INITS, "optimiser": ("adam", "sgd"), "sampler": ("random", "kmeans"),
}  # fmt: skip
_OPEN = ("repeats", "inner", "network_steps", "early_steps", "networks")  # None takes the preset's
_LOOSE = ("steps", "checkpoint_every", "device", "compile")  # what a resumed run may change


@dataclass
class Condenser:
    """Information-intensive dataset condensation: a few images a class that train networks like the whole set.

    ``preset="released"`` is the authors' algorithm, its steps for one class after another taken as one exact step
    for all; lr is for runs of hundreds of thousands of steps. ``preset="fast"`` keeps the objective and starts from
    class centres, steps with Adam, takes several steps for each look at real images, old ones among them, under two
    networks that 300 steps have trained (Figure 6.5), and trains them on with the gradients it has.
    ``objective="features"`` takes cheaper steps; gradients are the thesis' choice for long runs.

    Arguments that are None are the preset's.

    Args:
        model_fn: returns a new network with fresh weights, normalised (B, C, H, W) to logits. ConvNet computes all
            classes' synthetic gradients at once; any other network takes a loop. Synthetic images follow its dtype.
        images_per_class: stored images of each class.
        factor: of :class:`MultiFormation`; ``"auto"`` tries ``factors`` on a held-out fifth of the training set.
        preset: ``"fast"`` or ``"released"``.
        steps: the budget: steps of the images of all classes.
        axes: ``"space"``, or ``"time"`` for spectrograms.
        formation: ``"single"``, ``"multi"`` or ``"bound"`` while condensing; bound is decoded as single.
        bound: results of a class at most, for ``formation="bound"``.
        init: ``"centres"``, ``"mix"``, ``"random"``, ``"herding"`` or ``"noise"``; see :func:`initial_images`.
        objective: ``"gradients"``, or ``"features"`` (distribution matching) under fresh networks.
        metric: ``"mse"`` (sum of squares), ``"l1"`` or ``"cosine"``.
        match: networks are trained on ``"real"`` images, or ``"synthetic"`` ones (Table 6.5; with cosine it is DSA).
        layers: gradients matched: ``"conv"`` or ``"all"``.
        optimiser: of the images, ``"adam"`` (betas 0.5, 0.9) or ``"sgd"`` (momentum 0.5).
        lr: of the images, in pixels in [0, 1]; for released .005, scaled as there by images and area.
        real_batch: real images of a class in one look. synthetic_batch: formed images of a class in one step at most.
        repeats: steps for each look: the first on it, the others on stored ones.
        bank_bytes: memory for stored looks (at most 64); at least one is kept.
        inner: looks before the network is renewed.
        network_steps: steps of the network after each look, on mixed batches with augmentation and CutMix, or
            ``"free"``: one step with the mean of the classes' gradients.
        network_lr: of those steps. cutmix: its probability.
        early_steps: on mixed batches, of every new network before it is matched.
        networks: so many new ones; later renewals go back to one of them as early_steps left it. 0: ever new ones, as
            is None without early_steps, with pretrained, for features, and on synthetic images.
        pretrained: state dicts that new networks are drawn from, in place of fresh weights.
        augment: siamese :class:`Augment`, None for none, or ``"auto"``: colour, crop and cutout; for time, a shift.
        sampler: ``"kmeans"`` takes one real image of each of ``real_batch`` pixel clusters (after DREAM).
        mean, std: per channel, of the normalisation, both or neither; None takes those of the images.
        factors, factor_steps: for ``factor="auto"``: the candidates, and steps before they are compared (0: the init).
        seed: of every draw.
        device: of the computation; None is where the images are.
        compile: torch.compile the first-order parts; pays in runs of minutes.
        checkpoint_every: steps between two checkpoints.

    Attributes:
        losses: (steps,) float64 after ``fit``: matching loss of each step, summed over classes.
        initial: (n, C, H, W) float32 after ``fit``: the stored images before the first step.

    Raises:
        ValueError: a setting outside its range.

    References:
        Kim et al., "Dataset Condensation via Efficient Synthetic-Data Parameterization", ICML 2022; thesis chapter 6.
        Zhao and Bilen, "Dataset Condensation with Differentiable Siamese Augmentation", ICML 2021. Zhao and Bilen,
        "Dataset Condensation with Distribution Matching", WACV 2023.
    """

    model_fn: Callable[[], nn.Module]
    images_per_class: int = 10
    factor: int | str = 2
    preset: str = "fast"
    _: dataclasses.KW_ONLY
    steps: int = 500
    axes: str = "space"
    formation: str = "single"
    bound: int = 128
    init: str | None = None
    objective: str = "gradients"
    metric: str = "mse"
    match: str = "real"
    layers: str = "conv"
    optimiser: str | None = None
    lr: float | None = None
    real_batch: int = 64
    synthetic_batch: int = 128
    repeats: int | None = None
    bank_bytes: int = 256 << 20
    inner: int | None = None
    network_steps: int | str | None = None
    network_lr: float | None = None
    cutmix: float = 0.5
    early_steps: int | None = None
    networks: int | None = None
    pretrained: Sequence[Mapping[str, Tensor]] | None = None
    augment: Augment | str | None = "auto"
    sampler: str = "random"
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    factors: tuple[int, ...] = (1, 2, 3)
    factor_steps: int = 0
    seed: int = 0
    device: torch.device | str | None = None
    compile: bool = False
    checkpoint_every: int = 100
    losses: Tensor | None = field(default=None, init=False, repr=False)
    initial: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        check_strings(preset=self.preset)
        check_choice(PRESETS, preset=self.preset)
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value is not None or name not in ("init", "optimiser"):
                check_choice(choices, **{name: value})
        if self.factor != "auto":
            MultiFormation(self.factor, self.axes)  # type: ignore[arg-type]
        if isinstance(self.steps, int) and self.steps < 1:
            raise ValueError(f"steps={self.steps} is a budget too short for one step; give at least 1")
        counts = ("steps", "images_per_class", "bound", "real_batch", "synthetic_batch", "repeats", "inner")
        least = dict.fromkeys((*counts, "checkpoint_every"), 1)
        least |= dict.fromkeys(("network_steps", "early_steps", "networks", "factor_steps", "bank_bytes"), 0)
        for name, low in least.items():
            value = getattr(self, name)
            if (value is None and name in _OPEN) or (isinstance(value, str) and name == "network_steps"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"{name}={value} must be a whole number of at least {low}")
        for name in ("lr", "network_lr"):
            value = getattr(self, name)
            if value is not None:
                check_numbers(**{name: value})
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value} must be above 0")
            setattr(self, name, None if value is None else float(value))
        if not isinstance(self.factors, list | tuple) or not self.factors:
            raise ValueError(f"factors={self.factors!r:.80} must be a tuple of whole numbers")
        for factor in self.factors:
            check_whole(factors=factor)
        self.factors = tuple(int(factor) for factor in self.factors)
        check_numbers(cutmix=self.cutmix)
        check_whole(seed=self.seed)
        if not 0 <= self.cutmix <= 1:
            raise ValueError(f"cutmix={self.cutmix} must lie in [0, 1]")
        self.cutmix, self.seed = float(self.cutmix), int(self.seed)  # as JSON can hold them
        free = self.network_steps == "free"
        if free and (self.match == "synthetic" or self.objective == "features"):
            raise ValueError(
                "network_steps='free' uses gradients of real images, which match='synthetic' and objective='features' "
                "do not have; give a number of steps"
            )
        if not free and isinstance(self.network_steps, str):
            raise ValueError(f"network_steps={self.network_steps!r} must be a number of steps or 'free'")
        known = isinstance(self.augment, Augment | None)
        if not known and not (isinstance(self.augment, str) and self.augment == "auto"):
            raise ValueError(f"augment={self.augment!r} must be an Augment, None or 'auto'")

    def fit(
        self,
        images: Any,
        labels: Any,
        *,
        label_names: Sequence[str] | None = None,
        resume: str | Path | None = None,
        progress: bool | None = None,
    ) -> Condensed:
        """Condense a training set.

        With ``torch.distributed`` initialised its processes share the classes; each must be given the same arguments,
        and gets the result of one process.

        Args:
            images: (N, C, H, W), floating in [0, 1] or uint8.
            labels: (N,) class ids 0 to K - 1, each present; classes may differ in size and be small.
            label_names: of the classes, kept in the result.
            resume: folder of checkpoints, saved every ``checkpoint_every`` steps and at the end, from which the run
                goes on bitwise; it may then have more ``steps``.
            progress: a bar with the matching loss; None shows one on a terminal.

        Raises:
            TypeError, ValueError: bad data; a network without convolution, or with too few outputs; a factor larger
                than the image; checkpoints of other settings or data, or damaged ones.
            OSError: a checkpoint could not be written; the one before it stays.
        """
        settings = self._resolved()
        dtype = _dtype(self.model_fn)
        data = RealData(images, labels, mean=self.mean, std=self.std, device=self.device, dtype=dtype)
        if settings.lr is None:
            settings.lr = _released_rate(self.images_per_class, data.size)
        check_label_names(label_names)
        if label_names is not None and len(label_names) != data.classes:
            empty = label_names[data.classes :]
            what = f": {empty[0]!r} has no image; leave it out" if empty else "; give one a class"
            raise ValueError(f"label_names has {len(label_names)} names for the {data.classes} classes of labels{what}")
        rank, world = _processes(data.classes)
        with own_random(self.seed, data.device):
            settings._check_network(data)
            generator = torch.Generator().manual_seed(self.seed)
            store = Checkpoints(Path(resume), settings._fingerprint(data), rank, world) if resume is not None else None
            found = store.newest() if store else None
            if found:
                if int(found[1]["steps"]) > self.steps:
                    raise ValueError(
                        f"steps={self.steps} is less than the {found[1]['steps']} that resume={str(resume)!r} holds; "
                        "give as many or more, or another folder"
                    )
                settings.factor = int(found[1]["factor"])
                initial = found[0]["initial"].to(data.device)
            else:
                if settings.factor == "auto":
                    settings.factor = self.choose_factor(images, labels)
                initial = settings._initial(data, generator)
            assert isinstance(settings.factor, int)
            hidden = True if rank else None if progress is None else not progress
            form = MultiFormation(settings.factor, self.axes, self.formation, self.bound)
            run = Run(settings, data, form, initial, generator, hidden)
            if found:
                run.restore(*found)
            self._go(run, store)
            stored = run.result()
        losses = torch.tensor(run.losses, dtype=torch.float64)
        if world > 1:
            total = losses.to(data.device)
            dist.all_reduce(total)
            losses = total.cpu()
        self.losses, self.initial = losses, run.initial.detach().float().cpu()
        made = settings._made(data) | {
            "seconds": round(run.seconds, 1),
            "loss": float(losses[-10:].mean()),
        }
        y = torch.arange(data.classes).repeat_interleave(self.images_per_class)
        mode = "single" if self.formation == "bound" else self.formation
        names = None if label_names is None else tuple(label_names)
        return Condensed(stored, y, settings.factor, self.axes, mode, data.mean, data.std, made, names)

    def choose_factor(self, images: Any, labels: Any) -> int:
        """The one of ``factors`` whose images train the best network, judged on a fifth of the training set held out.

        Two networks a factor, 150 steps each, on the initial images, or on those after ``factor_steps`` steps. At one
        image a class the init ranked the factors rightly on Fashion-MNIST, digits and spoken digits; on CIFAR-10 it
        could not tell, and a few hundred ``factor_steps`` are needed.

        Raises:
            ValueError: none of the factors fits into the image.
        """
        data = RealData(images, labels, mean=self.mean, std=self.std, device=self.device, dtype=_dtype(self.model_fn))
        generator = torch.Generator().manual_seed(self.seed)
        kept, held = data.split(0.2, generator)
        held = held[torch.randperm(len(held), generator=generator)[:2000]]
        part, y = data.subset(kept), data.labels[held].to(data.device)
        most = data.size[1] if self.axes == "time" else min(data.size)
        scores: dict[int, float] = {}
        for factor in (f for f in self.factors if f <= most):
            trial = dataclasses.replace(self, factor=factor, steps=max(self.factor_steps, 1))
            if self.factor_steps:
                stored = trial.fit(part.images, part.labels, progress=False).images.to(data.device, data.dtype)
            else:
                stored = trial._resolved()._initial(part, torch.Generator().manual_seed(self.seed))
            form = MultiFormation(factor, self.axes)
            x = data.normalise(form(stored))
            own = form.labels(torch.arange(data.classes, device=x.device).repeat_interleave(self.images_per_class))
            right = []
            for seed in range(2):
                g = torch.Generator().manual_seed(seed)
                net = fresh(self.model_fn, g).to(data.device)
                train_on(net, rows_of(x), own, 150, augment=without_cutout(self._augment()), generator=g)
                right.append(accuracy(net, lambda rows: data(held[rows]), y))
            scores[factor] = sum(right)
        if not scores:
            raise ValueError(
                f"factors={self.factors} are all larger than the {data.size[0]} x {data.size[1]} images; give smaller "
                "ones"
            )
        return max(scores, key=lambda f: scores[f])  # of equal ones the first

    def _go(self, run: Run, store: Checkpoints | None) -> None:
        saved = run.steps
        with tqdm(total=self.steps, initial=run.steps, desc="condensing", unit="step", disable=run.hidden) as bar:
            while run.steps < self.steps:
                loss = run.step()
                bar.set_postfix({"matching loss a class": f"{loss / len(run.mine):.4g}"}, refresh=False)
                bar.update()
                last = run.steps == self.steps
                if not math.isfinite(loss):
                    raise ValueError(
                        f"the matching loss is {loss} at step {run.steps}; give a lower lr than {run.settings.lr} or "
                        f"network_lr than {run.settings.network_lr}"
                    )
                if store and run.steps > saved and (last or run.steps % self.checkpoint_every == 0):
                    store.save(run)
                    saved = run.steps

    def _resolved(self) -> Condenser:
        """A copy with the preset's values in place of None."""
        values = dict(PRESETS[self.preset])
        if self.objective == "features":
            values |= _FEATURES
        elif self.match == "synthetic" and values["network_steps"] == "free":
            values |= {"network_steps": 1, "early_steps": 0, "networks": 0}
        if self.pretrained:
            values |= {"early_steps": 0, "networks": 0}
        if self.early_steps == 0:
            values["networks"] = 0
        if self.optimiser is not None and self.optimiser != values["optimiser"]:
            values["lr"] = 0.01 if self.optimiser == "adam" else None
        changed = {name: value for name, value in values.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **changed, augment=self._augment())

    def _augment(self) -> Augment | None:
        if not isinstance(self.augment, str):
            return self.augment
        return Augment(colour=False, crop=(0, 0.125), cutout=0) if self.axes == "time" else Augment()

    def _initial(self, data: RealData, generator: torch.Generator) -> Tensor:
        assert isinstance(self.factor, int) and self.init is not None
        form = MultiFormation(self.factor, self.axes)
        return initial_images(data, self.images_per_class, self.init, form, generator, self.model_fn)

    def _check_network(self, data: RealData) -> None:
        if self.factor != "auto":
            MultiFormation(self.factor, self.axes).check(data.size)  # type: ignore[arg-type]
        net = any_network(self.model_fn).to(data.device)
        if self.objective == "gradients":
            matched_layers(net, self.layers)
        factor = 1 if self.factor == "auto" else self.factor
        form = MultiFormation(factor, self.axes, self.formation, self.bound)  # type: ignore[arg-type]
        count = min(sum(form.counts(self.images_per_class)), self.synthetic_batch)
        logits = check_network(net, data(torch.zeros(1, dtype=torch.long).expand(count)), data.classes)
        if self.objective == "gradients":
            params = {name: p for name, p in net.named_parameters() if p.requires_grad}
            found = torch.autograd.grad(logits.sum(), list(params.values()), allow_unused=True)
            unused = next((name for name, g in zip(params, found, strict=True) if g is None), None)
            if unused is not None:
                raise ValueError(
                    f"the logits of model_fn's network do not depend on its {unused}; give a network without, or set "
                    "requires_grad=False there"
                )

    def _made(self, data: RealData) -> dict[str, Any]:
        """Settings, source and versions, as JSON can hold them."""
        skipped = ("model_fn", "pretrained", "losses", "initial", "device", "mean", "std")
        made = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in skipped}
        made["augment"] = None if self.augment is None else dataclasses.asdict(self.augment)  # type: ignore[arg-type]
        made["factors"] = list(self.factors)
        made["pretrained"] = len(self.pretrained or ())
        made |= network_record(self.model_fn)
        made["source"] = {"images": len(data.labels), "shape": list(data.shape), "sha256": data.sha256,
                          "classes": [len(rows) for rows in data.rows]}  # fmt: skip
        made["versions"] = {"torch": torch.__version__}
        with suppress(importlib.metadata.PackageNotFoundError):
            made["versions"]["dataopt"] = importlib.metadata.version("dataopt")
        return json.loads(json.dumps(made))  # as it is read back: lists for tuples

    def _fingerprint(self, data: RealData) -> dict[str, Any]:
        made = self._made(data)
        shapes = [(name, list(p.shape)) for name, p in any_network(self.model_fn).named_parameters()]
        return {name: value for name, value in made.items() if name not in (*_LOOSE, "versions")} | {
            "mean": list(data.mean),
            "std": list(data.std),
            "layers of the network": hashlib.sha256(json.dumps(shapes).encode()).hexdigest(),
            "pretrained weights": [_digest(weights) for weights in self.pretrained or ()],
        }


def _processes(classes: int) -> tuple[int, int]:
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    if dist.get_world_size() > classes:
        raise ValueError(f"{dist.get_world_size()} processes share {classes} classes; start at most one for each class")
    return dist.get_rank(), dist.get_world_size()


def _dtype(model_fn: Callable[[], nn.Module]) -> torch.dtype:
    return next((p.dtype for p in any_network(model_fn).parameters()), torch.float32)


def _released_rate(images_per_class: int, size: tuple[int, int]) -> float:
    """.005 at 10 images of 32 x 32 a class; from 64 pixels on the released code counts from 224."""
    side = max(size)
    return 0.005 * images_per_class / 10 * (side / (32 if side <= 64 else 224)) ** 2


def _digest(weights: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, t in sorted(weights.items()):
        found.update(name.encode() + t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
