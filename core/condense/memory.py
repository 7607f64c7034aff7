"""Exemplars of the classes seen so far, for class-incremental learning (thesis section 6.5.3)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_choice
from ..relation.checks import as_tensor
from .condensed import Condensed
from .condenser import Condenser
from .formation import MultiFormation
from .initial import initial_images
from .real import RealData
from .training import network_record

METHODS = ("condensed", "init", "herding", "random")


@dataclass
class ExemplarMemory:
    """A data set that arrives a few classes at a time, kept as ``images_per_class`` stored images of each class.

    Every :meth:`add` makes the exemplars of the new classes from their images alone; those of older classes stay as
    they are. All methods store as many pixels: ``"condensed"`` what the condenser makes, ``"init"`` what it starts
    from, ``"herding"`` and ``"random"`` whole real images.

    Args:
        condenser: how exemplars are made, and how many. Its ``model_fn`` may have outputs for all classes to come. Mean
            and std that it does not give are those of the first classes, for good; ``factor="auto"`` is chosen with
            them, too.
        method: ``"condensed"``, ``"init"``, ``"herding"`` or ``"random"``.
        stored: what an earlier memory has stored, to go on from; None before the first class. A :class:`Condensed`, so
            that ``memory.stored.save(folder)`` keeps it and ``stored=Condensed.load(folder)`` goes on.

    Raises:
        TypeError: a ``condenser`` that is no :class:`Condenser`, or ``stored`` that is no :class:`Condensed`.
        ValueError: another method, or stored images of another formation.

    References:
        Prabhu et al., "GDumb", ECCV 2020: the networks train on the memory alone. Zhao and Bilen, "Dataset Condensation
        with Distribution Matching", WACV 2023: the setting.

    Examples:
        >>> import torch
        >>> from dataopt.core.condense import Condenser, ConvNet, ExemplarMemory
        >>> recipe = Condenser(lambda: ConvNet(1, 4, 8, depth=2, width=4), images_per_class=1, factor=2, steps=1)
        >>> memory = ExemplarMemory(recipe)
        >>> images, labels = torch.rand(40, 1, 8, 8), torch.arange(40) % 2
        >>> new = memory.add(images, labels + 2)
        >>> new = memory.add(images, labels)
        >>> memory.classes, len(memory.stored.images), memory.decode()[1].bincount().tolist()
        ((2, 3, 0, 1), 4, [4, 4, 4, 4])
    """

    condenser: Condenser
    method: str = "condensed"
    stored: Condensed | None = None

    def __post_init__(self) -> None:
        check_choice(METHODS, method=self.method)
        if not isinstance(self.condenser, Condenser) or not isinstance(self.stored, Condensed | None):
            raise TypeError(
                f"condenser is a {type(self.condenser).__name__} and stored a {type(self.stored).__name__}; give a "
                "Condenser, and a Condensed or None"
            )
        whole, c = self.method in ("herding", "random"), self.condenser
        mode = "single" if c.formation == "bound" else c.formation
        if self.stored is None or (self.stored.factor == 1 and (whole or c.factor in (1, "auto"))):
            return
        found = (self.stored.factor, self.stored.axes, self.stored.mode)
        wanted = (1 if whole else found[0] if c.factor == "auto" else c.factor, c.axes, mode)
        if found != wanted:
            raise ValueError(
                f"stored is decoded with (factor, axes, mode) {found} and method={self.method!r} makes {wanted}; give "
                "the method and the condenser that it was made with"
            )

    @property
    def classes(self) -> tuple[int, ...]:
        """Class ids in the order in which they came."""
        return () if self.stored is None else tuple(dict.fromkeys(self.stored.labels.tolist()))

    def add(
        self, images: Any, labels: Any, *, resume: str | Path | None = None, progress: bool | None = None
    ) -> Condensed:
        """Make and store the exemplars of new classes; what was stored before stays bit for bit.

        Args:
            images: (N, C, H, W) of the new classes, floating in [0, 1] or uint8.
            labels: (N,) class ids, any that are not in the memory yet.
            resume: folder of checkpoints of this step; see :meth:`Condenser.fit`.
            progress: a bar; None shows one on a terminal.

        Returns:
            The exemplars of the new classes alone.

        Raises:
            TypeError, ValueError: bad data; a class that is in the memory already; images of another shape. The memory
                is then as it was.
        """
        given = as_tensor(labels, "labels")
        if given.is_floating_point() or given.dtype == torch.bool:
            raise TypeError(f"labels holds {given.dtype}; give integer class ids")
        if not given.numel():
            raise ValueError("labels is empty; give the images of one class at least")
        if int(given.min()) < 0:
            raise ValueError(f"labels holds {int(given.min())}; give class ids from 0")
        ids, renumbered = torch.unique(given.long().cpu(), return_inverse=True)
        known = sorted(set(ids.tolist()) & set(self.classes))
        if known:
            raise ValueError(f"labels has class {known[0]}, which is in the memory already; add each class once")
        recipe = self.condenser
        if self.stored is not None:
            shape = tuple(self.stored.images.shape[1:])
            found = tuple(as_tensor(images, "images").shape)
            if found[1:] != shape:
                raise ValueError(f"images has the shape {found} where the memory holds images of {shape}; resize them")
            recipe = dataclasses.replace(
                recipe, mean=self.stored.mean, std=self.stored.std, factor=self.stored.factor,
                seed=recipe.seed + len(self.classes),  # other draws for every step
            )  # fmt: skip
        if self.method == "condensed":
            made = recipe.fit(images, renumbered, resume=resume, progress=progress)
        else:
            made = _chosen(recipe, self.method, images, renumbered)
        made = dataclasses.replace(made, labels=ids[made.labels])
        self.stored = made if self.stored is None else _joined(self.stored, made)
        return made

    def decode(self, normalised: bool = False) -> tuple[Tensor, Tensor]:
        """Images and labels of all classes so far, to train on; see :meth:`Condensed.decode`.

        Raises:
            ValueError: nothing was added yet.
        """
        if self.stored is None:
            raise ValueError("the memory is empty; add the images of some classes first")
        return self.stored.decode(normalised)


def _chosen(recipe: Condenser, method: str, images: Any, labels: Tensor) -> Condensed:
    """Images without any optimisation, as :func:`evaluate`'s baselines choose them."""
    settings = recipe._resolved()
    factor: Any = 1 if method in ("herding", "random") else recipe.factor
    if factor == "auto":
        factor = recipe.choose_factor(images, labels)
    init = settings.init if method == "init" else method
    assert init is not None and not isinstance(settings.augment, str)
    data = RealData(images, labels, mean=recipe.mean, std=recipe.std, device=recipe.device)
    generator = torch.Generator().manual_seed(recipe.seed)
    form = MultiFormation(factor, recipe.axes)
    stored = initial_images(data, recipe.images_per_class, init, form, generator, recipe.model_fn)
    made = {
        "init": init,
        "seed": recipe.seed,
        "images_per_class": recipe.images_per_class,
        "steps": 0,
        **network_record(recipe.model_fn),
        "augment": None if settings.augment is None else dataclasses.asdict(settings.augment),
        "source": {"images": len(data.labels), "shape": list(data.shape), "sha256": data.sha256},
    }
    y = torch.arange(data.classes).repeat_interleave(recipe.images_per_class)
    mode = recipe.formation if method == "init" and recipe.formation != "bound" else "single"
    return Condensed(stored.float().cpu(), y, factor, recipe.axes, mode, data.mean, data.std, made)


def _joined(old: Condensed, new: Condensed) -> Condensed:
    """The images of both; ``made`` keeps what made each."""
    names = old.label_names
    parts = [*old.made.get("parts", [old.made]), new.made]
    return dataclasses.replace(
        old,
        images=torch.cat([old.images, new.images]),
        labels=torch.cat([old.labels, new.labels]),
        made={"parts": parts, "augment": old.made.get("augment", {})},
        label_names=names if names is not None and len(names) > int(new.labels.max()) else None,
    )
