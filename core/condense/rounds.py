"""One condensation run: its state, and the rounds of Algorithm 5.

A round looks once at real images of every class under the network as it is, then takes one or more steps on the stored
images of all classes together, then trains the network. The released code steps after every class instead; as the
network stands still within its loop over the classes, and the classes share nothing but a momentum buffer, its C steps
with rate r and momentum m are one step for all classes with rate r (1 - m^C) / (1 - m) and momentum m^C.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from .augment import Augment, without_cutout
from .formation import MultiFormation
from .matching import GROUPED, Features, Gradients, Objective
from .real import RealData, Strata
from .training import BATCH, fresh, sgd, training_step

if TYPE_CHECKING:
    from .condenser import Condenser

_KEPT = 64  # looks at real images in the bank, where memory allows
MOMENTUM = 0.5  # of the released code's steps on the images


@dataclass(frozen=True)
class Look:
    """Real images seen by one network: what synthetic ones are to match.

    Attributes:
        params: the network's parameters then.
        draws: the siamese augmentation, one for all classes or one for each.
        targets: for each layer the classes' signatures, stacked.
    """

    params: dict[str, Tensor]
    draws: list[dict[str, Tensor]]
    targets: list[Tensor]

    def bytes(self, classes: int) -> int:
        """Memory of it in a process that has all classes, so that several processes keep as many as one."""
        return sum(p.nbytes for p in self.params.values()) + sum(t[0].nbytes * classes for t in self.targets)


class Run:
    """State of a run that :meth:`step` moves on by one step of all images.

    Args:
        settings: the condenser with every setting resolved.
        data: the training set.
        formation: of the optimisation.
        initial: (K * images_per_class, C, H, W) in [0, 1].
        generator: of every draw.
        hidden: of the bar of early_steps, as tqdm's ``disable``.
    """

    def __init__(
        self,
        settings: Condenser,
        data: RealData,
        formation: MultiFormation,
        initial: Tensor,
        generator: torch.Generator,
        hidden: bool | None = None,
    ):
        self.settings, self.data, self.formation, self.generator = settings, data, formation, generator
        self.hidden = hidden
        started = dist.is_available() and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if started else (0, 1)
        self.mine = range(self.rank, data.classes, self.world)
        self.net = fresh(settings.model_fn, generator).to(data.device)
        self.forward = torch.compile(self.net) if settings.compile else self.net
        self.objective: Objective = (
            Features(self.net) if settings.objective == "features" else Gradients(self.net, settings.layers)
        )
        self.augment: Augment | None = settings.augment  # type: ignore[assignment]
        seeded = torch.Generator().manual_seed(settings.seed)  # the same clusters for a run that goes on
        self.sampler = Strata(data, settings.real_batch, seeded) if settings.sampler == "kmeans" else data
        self.initial = initial
        self.stored = initial.clone().requires_grad_()
        self.optimiser = self._image_optimiser()
        assert settings.network_lr is not None
        self.net_optimiser = sgd(self.net, settings.network_lr)
        self.pool: list[dict[str, Tensor]] = []  # networks as early_steps left them
        self.bank: list[Look] = []
        self.free: list[Tensor] = []  # gradients for the network's step at the end of the round
        self.steps, self.rounds, self.within = 0, 0, 0  # within: steps since the round began
        self.losses: list[float] = []
        self.began = time.monotonic()
        dropping = next((name for name, m in self.net.named_modules() if _drops(m)), None)
        if self.world > 1 and dropping is not None:
            raise ValueError(
                f"model_fn's network has the dropout {dropping!r}, which draws differently in {self.world} processes; "
                "start one process, or build the network without"
            )

    @property
    def seconds(self) -> float:
        """Since the run began, sessions before a resume included."""
        return time.monotonic() - self.began

    def _image_optimiser(self) -> torch.optim.Optimizer:
        s = self.settings
        assert s.lr is not None
        if s.optimiser == "adam":
            return torch.optim.Adam([self.stored], lr=s.lr, betas=(0.5, 0.9))
        classes = self.data.classes
        lr = s.lr * (1 - MOMENTUM**classes) / (1 - MOMENTUM)
        return torch.optim.SGD([self.stored], lr=lr, momentum=MOMENTUM**classes)

    def step(self) -> float:
        """One step of the images of all classes; the matching loss of this process' classes, summed."""
        s = self.settings
        assert s.inner is not None and s.repeats is not None
        if self.within == 0:
            if self.rounds % s.inner == 0:
                self._renew()
            self._look()
        at = len(self.bank) - 1 if self.within == 0 else self._integer(len(self.bank))
        loss = self._image_step(self.bank[at])
        self.losses.append(loss)
        self.steps, self.within = self.steps + 1, self.within + 1
        if self.within == s.repeats:
            self._train_network()
            self.rounds, self.within = self.rounds + 1, 0
            if s.preset == "released" and self.rounds % s.inner == 0:
                self._clamp()
        return loss

    def result(self) -> Tensor:
        """(K * images_per_class, C, H, W) float32 in [0, 1], those of every process."""
        self._share()
        return self.stored.detach().clamp(0, 1).float().cpu()

    # Parts of a round

    def _renew(self) -> None:
        """Another network: fresh or loaded and then trained for early_steps, or one that was so trained before."""
        s = self.settings
        assert s.network_lr is not None and s.early_steps is not None and s.networks is not None
        back = 0 < s.networks == len(self.pool)
        start = self.pool if back else s.pretrained
        self.net.load_state_dict(
            start[self._integer(len(start))] if start else fresh(s.model_fn, self.generator).state_dict()
        )
        self.net.train()
        self.net_optimiser = sgd(self.net, s.network_lr)
        if not back:
            self._train_on_batches(s.early_steps, "training a network")
            if s.networks:
                self.pool.append({name: t.clone() for name, t in self.net.state_dict().items()})

    def _look(self) -> None:
        """Signatures of a batch of real images of each class, into the bank."""
        s, size = self.settings, self.data.size
        draws: list[dict[str, Tensor]] = []
        if self.augment is not None:
            draws = [
                self.augment.draw(1, size, self.generator)
                for _ in range(self.data.classes if s.preset == "released" else 1)
            ]
        signatures: list[list[Tensor]] = []
        gradients: dict[int, list[Tensor]] = {}
        total: list[Tensor] = []
        for c in range(self.data.classes):
            rows = self.sampler.draw(c, s.real_batch, self.generator)  # on every process, so that all draws agree
            if c in self.mine:
                x = self._augmented(self.data(rows), draws, c)
                signature, found = self.objective.real(self.forward, self.net, x, c)
                signatures.append(signature)
                gradients[c] = found or []
            if s.network_steps == "free" and self.world == 1:
                total = _added(total, gradients.pop(c))
        if s.network_steps == "free" and self.world > 1:
            for c in range(self.data.classes):  # in the order of one process: sums are the same to the last bit
                parts = gradients.get(c) or [torch.empty_like(p) for p in self._trained()]
                for part in parts:
                    dist.broadcast(part, c % self.world)
                total = _added(total, parts)
        self.free = total
        params = {name: p.detach().clone() for name, p in self.net.named_parameters()}
        look = Look(params, draws, [torch.stack(layer) for layer in zip(*signatures, strict=True)])
        self.bank.append(look)
        kept = _KEPT if s.repeats and s.repeats > 1 else 1
        del self.bank[: -max(1, min(kept, s.bank_bytes // max(look.bytes(self.data.classes), 1)))]

    def _image_step(self, look: Look) -> float:
        s = self.settings
        count = sum(self.formation.counts(s.images_per_class))  # of a class
        shown = None
        if count > s.synthetic_batch:
            shown = torch.randperm(count, generator=self.generator)[: s.synthetic_batch]
        at_once = len(self.mine) if min(count, s.synthetic_batch) <= GROUPED else 1  # many need memory, not company
        self.optimiser.zero_grad()
        total = 0.0
        for start in range(0, len(self.mine), at_once):
            classes = self.mine[start : start + at_once]
            formed = self._formed(classes)
            formed = formed if shown is None else formed[:, shown]
            parts = [
                self._augmented(self.data.normalise(x), look.draws, c) for x, c in zip(formed, classes, strict=True)
            ]
            x = torch.stack(parts)
            targets = [t[start : start + at_once] for t in look.targets]
            losses, slopes = self.objective.match(self.net, look.params, x.detach(), classes, targets, s.metric)
            x.backward(slopes)  # decoding and augmentation are affine: one product with their transpose
            total += float(losses.double().sum())
        self.optimiser.step()
        if s.preset != "released":
            self._clamp()
        return total

    def _formed(self, classes: Sequence[int]) -> Tensor:
        """(G, n', C, H, W) images of some classes."""
        own = self.stored.unflatten(0, (self.data.classes, -1))[list(classes)]
        if self.formation.mode == "bound":  # which is for each class
            return torch.stack([self.formation(images) for images in own])
        return self.formation(own.flatten(0, 1)).unflatten(0, (len(own), -1))

    def _augmented(self, x: Tensor, draws: list[dict[str, Tensor]], c: int) -> Tensor:
        return x if self.augment is None else self.augment(x, draws[c % len(draws)])

    def _train_network(self) -> None:
        s = self.settings
        if s.network_steps == "free":
            for p, g in zip(self._trained(), self.free, strict=True):
                p.grad = g / self.data.classes
            self.net_optimiser.step()
            self.free = []
        else:
            assert isinstance(s.network_steps, int)
            self._train_on_batches(s.network_steps)

    def _train_on_batches(self, count: int, shown: str | None = None) -> None:
        """Steps on mixed batches with augmentation and CutMix, of real or, for the ablation, synthetic images."""
        if not count:
            return
        s, g, device = self.settings, self.generator, self.data.device
        labels, images = self.data.labels, None
        if s.match == "synthetic":
            self._share()
            with torch.no_grad():
                formed = self._formed(range(self.data.classes))
                images = self.data.normalise(formed.flatten(0, 1))
            labels = torch.arange(len(formed)).repeat_interleave(formed.shape[1])
        augment = without_cutout(self.augment)
        hidden = self.hidden if shown else True
        for rows in tqdm(_rows(len(labels), count, g), shown, leave=False, unit="step", disable=hidden):
            x = self.data(rows) if images is None else images[rows.to(device)]
            training_step(self.forward, self.net_optimiser, x, labels[rows].to(device), augment, s.cutmix, g,
                          self.data.classes)  # fmt: skip

    def _clamp(self) -> None:
        with torch.no_grad():
            self.stored.clamp_(0, 1)

    def _share(self) -> None:
        """The images of all classes to every process."""
        if self.world > 1:
            with torch.no_grad():
                for c, part in enumerate(self.stored.unflatten(0, (self.data.classes, -1))):
                    whole = part.contiguous()
                    dist.broadcast(whole, c % self.world)
                    part.copy_(whole)

    def _trained(self) -> list[Tensor]:
        return [p for p in self.net.parameters() if p.requires_grad]

    def _integer(self, below: int) -> int:
        return int(torch.randint(below, (), generator=self.generator))

    # State, for a checkpoint

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and numbers from which :meth:`restore` goes on bitwise."""
        tensors = {
            "initial": self.initial,
            "stored": self.stored.detach(),
            "generator": self.generator.get_state(),
            "torch_random": torch.get_rng_state(),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
        }
        if self.data.device.type == "cuda":
            tensors["cuda_random"] = torch.cuda.get_rng_state(self.data.device)
        tensors |= {f"net.{name}": t for name, t in self.net.state_dict().items()}
        tensors |= _moments(self.optimiser, "images") | _moments(self.net_optimiser, "network")
        tensors |= {f"free.{i:04d}": t for i, t in enumerate(self.free)}
        for k, weights in enumerate(self.pool):
            tensors |= {f"pool.{k}.{name}": t for name, t in weights.items()}
        for k, look in enumerate(self.bank):
            tensors |= {f"bank.{k}.params.{name}": t for name, t in look.params.items()}
            tensors |= {f"bank.{k}.targets.{i:04d}": t for i, t in enumerate(look.targets)}
            tensors |= {
                f"bank.{k}.draws.{j}.{name}": t for j, draw in enumerate(look.draws) for name, t in draw.items()
            }
        tensors = {name: t.clone() for name, t in tensors.items()}  # shared weights are one tensor with two names
        bank = [len(look.draws) for look in self.bank]
        numbers = {"steps": self.steps, "rounds": self.rounds, "within": self.within, "seconds": self.seconds}
        return tensors, numbers | {"bank": bank, "pool": len(self.pool)}

    def restore(self, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        device = self.data.device
        with torch.no_grad():
            self.stored.copy_(tensors["stored"])
        self.initial = tensors["initial"].to(device)
        self.generator.set_state(tensors["generator"])
        torch.set_rng_state(tensors["torch_random"])
        if device.type == "cuda" and "cuda_random" in tensors:  # else saved on another device, and not bitwise
            torch.cuda.set_rng_state(tensors["cuda_random"], device)
        self.losses = tensors["losses"].tolist()
        self.net.load_state_dict(_under(tensors, "net."))
        self.net.train()
        _restore_moments(self.optimiser, tensors, "images")
        _restore_moments(self.net_optimiser, tensors, "network")
        self.free = [t.to(device) for _, t in sorted(_under(tensors, "free.").items())]
        pool = [_under(tensors, f"pool.{k}.") for k in range(record["pool"])]
        self.pool = [{name: t.to(device) for name, t in weights.items()} for weights in pool]
        self.bank = []
        for k, draws in enumerate(record["bank"]):
            part = _under(tensors, f"bank.{k}.")
            self.bank.append(
                Look(
                    {name: t.to(device) for name, t in _under(part, "params.").items()},
                    [_under(part, f"draws.{j}.") for j in range(draws)],
                    [t.to(device) for _, t in sorted(_under(part, "targets.").items())],
                )
            )
        self.steps, self.rounds, self.within = (int(record[name]) for name in ("steps", "rounds", "within"))
        self.began = time.monotonic() - float(record["seconds"])


def _drops(m: torch.nn.Module) -> bool:
    """Whether a module draws at random in training: dropout, or stochastic depth."""
    dropout = isinstance(m, torch.nn.modules.dropout._DropoutNd) and m.p > 0
    return dropout or bool(getattr(m, "drop_prob", 0))


def _rows(n: int, count: int, generator: torch.Generator) -> list[Tensor]:
    """``count`` batches of row numbers below n; all rows come before one comes again."""
    size = min(BATCH, n)
    rounds = -(-count * size // n)
    return list(torch.cat([torch.randperm(n, generator=generator) for _ in range(rounds)])[: count * size].split(size))


def _added(total: list[Tensor], parts: list[Tensor]) -> list[Tensor]:
    return [a + b for a, b in zip(total, parts, strict=True)] if total else parts


def _moments(optimiser: torch.optim.Optimizer, name: str) -> dict[str, Tensor]:
    state = optimiser.state_dict()["state"]
    return {f"{name}.{i}.{key}": t for i, values in state.items() for key, t in values.items() if t is not None}


def _restore_moments(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor], name: str) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, t in _under(tensors, f"{name}.").items():
        i, _, field = key.partition(".")
        state.setdefault(int(i), {})[field] = t
    optimiser.load_state_dict(optimiser.state_dict() | {"state": state})


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
