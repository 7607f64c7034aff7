"""The condensing part of ``dataopt demo``: one image of each digit, and what networks learn from them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from .condense_commands import draw, report, verdict
from .core.artifacts import write_whole
from .core.condense import Condenser, ConvNet, evaluate

TESTING = 500
STEPS, EVALUATION_STEPS, SEEDS = 140, 200, 3


def load() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """scikit-learn's digits, (n, 1, 8, 8) float32 in [0, 1] and (n,) int64: 1,297 to condense and 500 for testing."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(digits.target).long()
    parts = train_test_split(range(len(labels)), test_size=TESTING, stratify=digits.target, random_state=0)
    train, test = (torch.tensor(rows) for rows in parts)
    return (images[train], labels[train]), (images[test], labels[test])


def network() -> nn.Module:
    return ConvNet(channels=1, classes=10, size=8, depth=2, width=32)


def main(out: Path = Path("demo"), steps: int = STEPS, evaluation_steps: int = EVALUATION_STEPS) -> None:
    """Condense, compare, print the table; write the data, ``condensed.png``, ``changed.png`` and ``condense.json``.

    All go into ``out / "condense"``.

    Raises:
        ValueError: ``out`` is a file.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out} is a file; give a folder")
    train, test = load()
    print(f"scikit-learn's digits: {len(train[0]):,} images are condensed to 10, one of each digit.")
    # a factor above 1 would cut 8 x 8 pixels into tiles that cannot show a digit
    condenser = Condenser(network, images_per_class=1, factor=1, steps=steps, repeats=2)
    condensed = condenser.fit(*train)
    seconds = condensed.made["seconds"]
    print(f"{steps} steps took {seconds:.1f} s, threads: {torch.get_num_threads()}. Networks trained on 10 images:\n")
    scores = evaluate(condensed, train, test, network, seeds=range(SEEDS), steps=evaluation_steps)
    print(scores)
    print(
        f"\n{scores.test_images} test images, after {evaluation_steps} steps, mean and spread over {SEEDS} seeds.\n"
        f"{verdict(scores)}\ninit is what condensing starts from: here the mean image of each class."
    )
    folder = out / "condense"
    condensed.save(folder)
    drawn = draw(condensed, condenser.initial, folder)
    content = report(scores, SEEDS, f"{TESTING} images") | {"steps": steps, "seconds": seconds}
    write_whole(folder / "condense.json", json.dumps(content, indent=1) + "\n")
    print(f"\nWrote {', '.join(str(folder / name) for name in [*drawn, 'condense.json'])} and the condensed digits.")
