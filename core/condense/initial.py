"""Images to start from, which are baselines as well: random, herding, noise, mixed tiles, class centres."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..arguments import check_tensors, check_whole
from .augment import Augment
from .formation import MultiFormation
from .matching import inputs_of, last_linear
from .real import CANDIDATES, RealData
from .training import fresh, train_on

INITS = ("centres", "mix", "random", "herding", "noise")
_HERDING_STEPS = 300  # on real data, of the network whose features herding looks at


def initial_images(
    data: RealData,
    images_per_class: int,
    init: str,
    formation: MultiFormation,
    generator: torch.Generator,
    model_fn: Callable[[], nn.Module] | None = None,
) -> Tensor:
    """Stored images before any optimisation.

    ``"random"`` and ``"herding"`` (Welling 2009: means of network features) are whole real images, ``"noise"`` is
    Gaussian around grey; ``"mix"`` tiles random real images and ``"centres"`` the means of the k-means clusters of each
    class, largest first, one for each tile.

    Args:
        data: where real images come from; those of a class come again where it has too few.
        formation: whose tiling is used by ``"mix"`` and ``"centres"``.
        generator: of the draws.
        model_fn: of the network that herding trains.

    Returns:
        (K * images_per_class, C, H, W) pixels in [0, 1], classes one after another.

    Raises:
        ValueError: another init, or a factor larger than the image.
    """
    classes, shape = range(data.classes), data.shape
    formation.check(data.size)
    if init == "noise":
        noise = torch.randn(data.classes * images_per_class, *shape, generator=generator, dtype=data.dtype)
        return (noise / 4 + 0.5).clamp(0, 1).to(data.device)
    if init == "random":
        return torch.cat([data.pixels(data.at_least(c, images_per_class, generator)) for c in classes])
    if init == "herding":
        if model_fn is None:
            raise ValueError("init='herding' looks at features of a network; give model_fn")
        return data.pixels(herding_rows(data, images_per_class, model_fn, generator))
    tiles = images_per_class * formation.tiles(formation.factor)
    if init == "mix":
        drawn = [data.pixels(data.at_least(c, tiles, generator)) for c in classes]
    elif init == "centres":
        drawn = [_centres(data, c, tiles, generator) for c in classes]
    else:
        raise ValueError(f"init={init!r} must be one of {', '.join(map(repr, INITS))}")
    return formation.assemble(torch.cat(drawn)).clamp(0, 1)


def herding_rows(
    data: RealData, images_per_class: int, model_fn: Callable[[], nn.Module], generator: torch.Generator
) -> Tensor:
    """(K * images_per_class,) rows whose features have the means of their classes, of 1000 candidates a class."""
    model = fresh(model_fn, generator).to(data.device, data.dtype)
    train_on(model, data, data.labels.to(data.device), _HERDING_STEPS, augment=Augment(cutout=0), decay=False,
             generator=generator)  # fmt: skip
    model.eval()
    chosen = []
    for c in range(data.classes):
        rows = data.draw(c, CANDIDATES, generator)
        with torch.no_grad(), inputs_of(last_linear(model)) as seen:
            for part in rows.split(256):
                model(data(part))
        order = herd(torch.cat(seen), min(images_per_class, len(rows))).cpu()
        chosen.append(rows[order.repeat(-(-images_per_class // len(order)))[:images_per_class]])
    return torch.cat(chosen)


def herd(features: Tensor, count: int) -> Tensor:
    """(count,) rows of (n, d) features, greedily so that the mean of those chosen stays close to the mean of all."""
    check_tensors(features=features)
    check_whole(count=count)
    if features.ndim != 2 or not features.numel() or not features.is_floating_point():
        raise ValueError(f"features is {features.dtype} of shape {tuple(features.shape)}; give floating (n, d)")
    if not bool(features.isfinite().all()):
        raise ValueError("features holds non-finite values; remove or recompute such rows")
    if not 0 <= count <= len(features):
        raise ValueError(f"count={count} must lie in [0, {len(features)}], the rows that there are to choose from")
    mean, total = features.mean(0), torch.zeros_like(features[0])
    left = torch.ones(len(features), dtype=torch.bool, device=features.device)
    chosen = []
    for k in range(1, count + 1):
        gaps = ((total + features) / k - mean).square().sum(1)
        chosen.append(int(torch.where(left, gaps, torch.inf).argmin()))
        total = total + features[chosen[-1]]
        left[chosen[-1]] = False
    return torch.tensor(chosen, device=features.device)


def _centres(data: RealData, c: int, count: int, generator: torch.Generator) -> Tensor:
    rows = data.draw(c, CANDIDATES, generator)
    cluster = data.clusters(rows, min(count, len(rows)), generator)
    sizes = cluster.bincount()
    found = [data.pixels(rows[cluster == k]).mean(0) for k in sizes.argsort(descending=True, stable=True) if sizes[k]]
    return torch.stack([found[i % len(found)] for i in range(count)])
