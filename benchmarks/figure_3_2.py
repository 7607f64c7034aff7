"""Figure 3.2 of the thesis: what three kinds of mixed images keep, and how a plain network reads them.

A network trained without mixing sees CIFAR-10 test images mixed by input mixup, CutMix and Puzzle
Mix, for shares of the first input from 0.1 to 0.9; only pairs of different classes count. CutMix's
squares lie inside the image, so that the share holds. For Puzzle Mix, which takes its four grids in
turn, the share is a prior only, so the picture is drawn over the share that really came out.

Measured on each mix: the saliency that it keeps, the sum of h(s(x0), s(x1)), each input's saliency
summing to one; the total variation, as the mean absolute difference of neighbouring pixels in
[0, 1], down plus right; the cross entropy with the mixed label; whether the top-1 prediction is one
of the two classes; whether the top-2 predictions are the two classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import cifar
import common
import torch
import torch.nn.functional as F
from dataopt import plots
from dataopt.core.mixup import Mixed, PuzzleMix, input_gradient, saliency
from torch import Tensor, nn

SHARES = tuple(round(0.1 * k, 1) for k in range(1, 10))
IMAGES = 10_000
BATCH = 250
TRUE_SHARE = "true share"
METHODS = ("input mixup", "CutMix", "Puzzle Mix")
MEASURES = ("saliency kept", "total variation", "loss", "top-1 in {y0, y1} %", "top-2 = {y0, y1} %")

Mix = Callable[[Tensor, Tensor, Tensor, Tensor, float, int], Mixed]  # x, y, s, partner, share, number of the batch


def mixes(generator: torch.Generator) -> dict[str, Mix]:
    puzzle = PuzzleMix(cifar.CLASSES, mean=cifar.MEAN, std=cifar.STD)
    return {
        "input mixup": lambda x, y, s, partner, share, k: with_mask(x, y, partner, torch.full_like(s, share)),
        "CutMix": lambda x, y, s, partner, share, k: with_mask(x, y, partner, squares(s, share, generator)),
        "Puzzle Mix": lambda x, y, s, partner, share, k: puzzle(
            x, y, s, partner=partner, lam=share, grid=puzzle.grids[k % len(puzzle.grids)]
        ),
    }


def squares(like: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Masks (B, H, W) that hide a random square, of the rounded area, which lies inside the image."""
    batch, height, width = like.shape
    sides = [round(n * math.sqrt(1 - share)) for n in (height, width)]
    mask = torch.ones_like(like)
    for k in range(batch):
        top, left = (
            int(torch.randint(0, n - m + 1, (), generator=generator))
            for n, m in zip((height, width), sides, strict=True)
        )
        mask[k, top : top + sides[0], left : left + sides[1]] = 0
    return mask


def with_mask(x: Tensor, y: Tensor, partner: Tensor, mask: Tensor) -> Mixed:
    """The mix under a given mask, without transport."""
    labels = F.one_hot(y, cifar.CLASSES).float()
    ratio = mask.mean((1, 2)).unsqueeze(1)
    inputs = torch.lerp(x[partner], x, mask.unsqueeze(1))
    return Mixed(inputs, torch.lerp(labels[partner], labels, ratio), mask, partner)


def measure(model: nn.Module, x: Tensor, y: Tensor, s: Tensor, share: float) -> common.Cell:
    """Every measure of every method at one share, as means over the pairs."""
    generator = torch.Generator().manual_seed(round(1000 * share))
    out: common.Cell = {}
    batches = [slice(k, k + BATCH) for k in range(0, len(x), BATCH)]
    partners = [torch.randperm(len(y[rows]), generator=generator) for rows in batches]
    for method, mix in mixes(generator).items():
        values = [
            observe(model, y[rows], s[rows], mix(x[rows], y[rows], s[rows], partner, share, k))
            for k, (rows, partner) in enumerate(zip(batches, partners, strict=True))
        ]
        means = torch.cat(values).mean(0).tolist()
        out[method] = dict(zip((TRUE_SHARE, *MEASURES), means, strict=True))
    return out


@torch.inference_mode()
def observe(model: nn.Module, y: Tensor, s: Tensor, m: Mixed) -> Tensor:
    """(pairs, 6): the true share and the measures, for the pairs of different classes."""
    logits = model(m.inputs)
    other = y[m.partner]
    top = logits.topk(2).indices
    is_first, is_second = (top == labels.unsqueeze(1) for labels in (y, other))
    std = torch.tensor(cifar.STD).view(-1, 1, 1)
    pixels = m.inputs * std  # differences do not need the mean
    variation = sum(pixels.diff(dim=d).abs().mean((1, 2, 3)) for d in (2, 3))
    columns = [
        m.mask.mean((1, 2)),
        m.apply(s).sum((1, 2)),
        variation,
        F.cross_entropy(logits, m.targets, reduction="none"),
        100.0 * (is_first | is_second)[:, 0],
        100.0 * (is_first.any(1) & is_second.any(1)),
    ]
    return torch.stack(columns, 1)[y != other]  # type: ignore[arg-type]


def report(run: common.Run, shares: tuple[float, ...]) -> None:
    rows = []
    for share in shares:
        for method in METHODS:
            v = run.cells[str(share)][method]
            digits = (3, 3, 4, 3, 1, 1)
            rows.append([share, method, *(f"{value:.{d}f}" for value, d in zip(v.values(), digits, strict=True))])

    def along(method: str, name: str) -> list[float]:
        return [run.cells[str(share)][method][name] for share in shares]

    panels = {name: {m: (along(m, TRUE_SHARE), along(m, name)) for m in METHODS} for name in MEASURES}
    figure = plots.show_curves(panels, "share of the first input")
    common.write_whole(run.args.out / f"{run.name}.png", plots.to_png(figure))
    network = run.settings["network"]
    run.report(
        f"Means over the pairs of different classes among {run.settings['images']} test images of CIFAR-10 (JPEG); the "
        f"network was trained plainly for {network['epochs']} epochs on {network['training']} images:",
        f"![{run.title}]({run.name}.png)",
        common.table(["share", "method", TRUE_SHARE, *MEASURES], rows),
    )


def main() -> None:
    arguments = common.parser(__doc__)
    common.add_data_option(arguments)
    args = arguments.parse_args()
    scale, shares, images = (cifar.QUICK, (0.5,), 50) if args.quick else (cifar.Scale(), SHARES, IMAGES)
    settings = {"images": images, "batch": BATCH, "network": scale.settings}
    run = common.start("figure_3_2", "What a mix keeps (thesis Figure 3.2)", args, 2, settings)
    missing = run.missing([str(share) for share in shares])
    if missing:
        data = cifar.load(args.data, scale)
        model = cifar.plainly_trained(data, scale, run.scratch)
        x, y = cifar.normalise(data.test_x[:images]), data.test_y[:images]
        s = torch.cat(
            [saliency(input_gradient(model, a, b)) for a, b in zip(x.split(BATCH), y.split(BATCH), strict=True)]
        )
        for key in missing:
            run.cell(key, partial(measure, model, x, y, s, float(key)))
    report(run, shares)


if __name__ == "__main__":
    main()
