"""One image of each digit, published and downloaded, and what networks learn from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from ..condense_commands import draw, report, verdict
from ..core.condense import Condenser, ConvNet, evaluate
from .digits import Digits
from .labels import Cleaning
from .publish import there_and_back
from .step import Step

STEPS, EVALUATION_STEPS = 140, 200


def network() -> nn.Module:
    return ConvNet(channels=1, classes=10, size=8, depth=2, width=32)


def condense(
    digits: Digits, cleaning: Cleaning, seeds: Sequence[int], out: Path,
    steps: int = STEPS, evaluation_steps: int = EVALUATION_STEPS,
) -> Step:  # fmt: skip
    """The step; the condensed digits and their pictures are written into ``out / "condense"``."""
    train = (digits.x[cleaning.result.rows], cleaning.result.labels)
    # a factor above 1 would cut 8 x 8 pixels into tiles that cannot show a digit, and after 300 steps a network has
    # little left to learn from digits
    condenser = Condenser(network, images_per_class=1, factor=1, steps=steps, repeats=2, early_steps=0)
    condensed = condenser.fit(*train)
    folder = out / "condense"
    condensed.save(folder)
    draw(condensed, condenser.initial, folder)
    file, nbytes = there_and_back(folder)
    pulled = load_file(file)
    file.unlink()
    same = torch.equal(pulled["images"], condensed.images) and torch.equal(pulled["labels"], condensed.labels)
    downloaded = replace(condensed, images=pulled["images"], labels=pulled["labels"])
    scores = evaluate(downloaded, train, (digits.test_x, digits.test_y), network, seeds=seeds, steps=evaluation_steps)
    names = {
        "random": "10 random digits", "herding": "10 typical digits (herding)", "init": "the mean of each class",
        "condensed": "10 condensed digits, downloaded",
    }  # fmt: skip
    seconds = condensed.made["seconds"]
    figures = report(scores, len(seeds), f"{len(digits.test_y)} images")
    return Step(
        "Condense to one image of each digit",
        f"The {len(train[1])} digits that are left are condensed to 10, pushed to a Hub on this machine, downloaded, "
        "and trained on. What do networks learn from them, and from 10 images that were chosen in other ways?",
        ["trained on", "test accuracy, %"],
        [
            [names[row.data], f"{100 * row.mean:.1f}" + (f" ± {100 * row.std:.1f}" if len(seeds) > 1 else "")]
            for row in scores.rows
        ],
        f"{verdict(scores)} Condensing took {seconds:.1f} s; the repository has {nbytes:,} bytes, and what came back "
        f"is {'bit for bit what was pushed' if same else 'NOT what was pushed'}.",
        ["dataopt condense DATASET --images-per-class 1 --out condense --push ID", "dataopt condense eval condense"],
        {"condensed.png": (_CAPTION, (folder / "changed.png").read_bytes())},
        {name: figures[name] for name in ("test_images", "seeds", "rows")}
        | {"steps": steps, "seconds": seconds, "bytes": nbytes, "came_back_equal": same},
    )


_CAPTION = "Before: the mean of each class. After: the condensed digit."
