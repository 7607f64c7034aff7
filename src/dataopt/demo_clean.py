"""The label part of ``dataopt demo``: digits with wrong labels, found by what a network makes of them."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

from .clean import write_folder
from .core.relation import Issues
from .integrations.hf.features import model_outputs

FLIPPED = 0.08  # share of the labels
_EPOCHS, _BATCH, _HIDDEN = 30, 64, 128


class Pixels:
    """A picture to the (64,) values in [0, 1] that the network takes."""

    def __call__(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image.convert("L"))).flatten() / 255

    def __repr__(self) -> str:
        return "Pixels()"


def noisy_digits(seed: int = 0) -> tuple[datasets.Dataset, np.ndarray]:
    """scikit-learn's 1,797 digits, 8 % of the labels changed to another class, and which ones."""
    digits = load_digits()
    rng = np.random.default_rng(seed)
    labels = digits.target.copy()
    wrong = np.zeros(len(labels), bool)
    wrong[rng.choice(len(labels), round(FLIPPED * len(labels)), replace=False)] = True
    labels[wrong] = (labels[wrong] + rng.integers(1, 10, wrong.sum())) % 10
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(10)})
    # ink on paper
    pictures = [Image.fromarray((255 - x * 255 / 16).astype(np.uint8)) for x in digits.images]
    return datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features), wrong


def train(data: datasets.Dataset, seed: int = 0) -> nn.Module:
    """A network with one hidden layer, trained on the labels as they are."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, 10))
    model.num_classes = 10  # type: ignore[assignment]
    pixels = Pixels()
    x, y = torch.stack([pixels(image) for image in data["image"]]), torch.tensor(data["label"][:])
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.05)
    for _ in range(_EPOCHS):
        for rows in torch.randperm(len(y)).split(_BATCH):
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def main(out: Path) -> None:
    """Flip labels, find them, and write the folder of ``dataopt clean`` into ``out / "clean"``.

    Raises:
        ValueError: ``out`` is a file.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out} is a file; give a folder")
    data, wrong = noisy_digits()
    print(f"scikit-learn's digits, {len(data):,} images; {wrong.sum()} labels ({FLIPPED:.0%}) are changed at random.\n")
    saved = out / "clean" / "digits"
    with contextlib.redirect_stderr(io.StringIO()):  # two progress bars of a moment
        data.save_to_disk(saved)
        data = datasets.load_from_disk(saved)
    outputs = model_outputs(data, train(data), transform=Pixels())
    settings = {"probs": "model", "action": "drop", "issues": ["label"], "partitions": None, "top": 8}
    source = {"kind": "disk", "name": str(saved.resolve())}
    found = write_folder(out / "clean", source, data, "label", [outputs], ["a network with one hidden layer"], settings)
    print("\n" + verdict(found, wrong))


def verdict(found: Issues, wrong: np.ndarray) -> str:
    """How many of the changed labels were found; average precision of the orders."""
    called = found.is_label_issue.numpy()
    scores = {"both": -found.label_score, "relation": found.relation_noisiness, "loss": found.loss}
    precision = {name: average_precision_score(wrong, score.numpy()) for name, score in scores.items()}
    return (
        f"{(called & wrong).sum()} of the {wrong.sum()} changed labels are among the {called.sum()} that were found. "
        "Average precision: " + ", ".join(f"{name} {value:.2f}" for name, value in precision.items())
        + f"; by chance {wrong.mean():.2f}."
    )  # fmt: skip
