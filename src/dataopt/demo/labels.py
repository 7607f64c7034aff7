"""Wrong labels among the digits: found, taken out, and looked for again by a network that has learned without them."""

from __future__ import annotations

import contextlib
import io
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

from .. import plots
from ..clean import write_folder
from ..core.relation import Refinement, refine
from ..integrations.hf.features import model_outputs
from ..out_folder import WORK
from .digits import CLASSES, FLIPPED, Digits, flip
from .step import Step, spread

_EPOCHS, _BATCH, _HIDDEN = 30, 64, 128
_ROUNDS = 5
_SHOWN = 12


@dataclass(frozen=True)
class Cleaning:
    """One seed: what was changed, and the rounds that looked for it.

    Attributes:
        given: (n,) labels, some of them changed. wrong: (n,) bool, which.
        result: the rounds.
        accuracy: per cent of the test images, of networks trained on the labels as given and on what each round keeps.
    """

    given: Tensor
    wrong: Tensor
    result: Refinement
    accuracy: list[float] = field(default_factory=list)


class Pixels:
    """A picture to the (64,) values in [0, 1] that the network takes."""

    def __call__(self, image: Image.Image) -> Tensor:
        return 1 - torch.from_numpy(np.array(image.convert("L"))).flatten() / 255

    def __repr__(self) -> str:
        return "Pixels()"


def train(x: Tensor, y: Tensor, seed: int) -> nn.Sequential:
    """A network with one hidden layer, trained on (n, 64) pixels and the labels as they are."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, CLASSES))
    model.num_classes = CLASSES  # type: ignore[assignment]
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.05)
    for _ in range(_EPOCHS):
        for rows in torch.randperm(len(y), generator=generator).split(_BATCH):
            loss = F.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def clean(digits: Digits, seed: int) -> Cleaning:
    """Change labels, find them in rounds."""
    x, test = digits.x.flatten(1), digits.test_x.flatten(1)
    given, tested = flip(digits.y, seed), []

    @torch.no_grad()
    def look(model: nn.Sequential) -> tuple[Tensor, Tensor]:
        tested.append(100 * float((model(test).argmax(1) == digits.test_y).float().mean()))
        hidden = model[:2](x)
        return hidden, model[2](hidden).softmax(1)

    def fit(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return look(train(x[rows], labels, seed))

    result = refine(fit, given, max_rounds=_ROUNDS, progress=False)
    if not result.stable:  # nobody has been trained yet on what the last round keeps
        fit(result.rows, result.labels)
    return Cleaning(given, given != digits.y, result, tested)


def find(digits: Digits, cleanings: list[Cleaning], out: Path) -> Step:
    """The step of ``dataopt clean``; the first seed's folder is written into ``out / "clean"``."""
    _write(digits, cleanings[0].given, out / "clean")
    first = [c.result.rounds[0].issues for c in cleanings]
    wrong = [c.wrong for c in cleanings]
    called = [i.is_label_issue for i in first]
    found = [100 * float((f & w).sum() / w.sum()) for f, w in zip(called, wrong, strict=True)]
    right = [100 * float((f & w).sum() / f.sum()) for f, w in zip(called, wrong, strict=True)]
    scores = {
        "both": [-i.label_score for i in first],
        "relation": [i.relation_noisiness for i in first],
        "loss": [i.loss for i in first],
    }
    precision = {
        name: [average_precision_score(w, s) for s, w in zip(values, wrong, strict=True)]
        for name, values in scores.items()
    }
    issues = first[0]
    rows = issues.suspects[issues.is_label_issue[issues.suspects]][:_SHOWN]
    titles = [f"{issues.given_label[i]} → {issues.predicted_label[i]}" for i in rows.tolist()]
    picture = plots.to_png(plots.show_labels(digits.x[rows].numpy(), titles, wrong[0][rows].numpy()))
    n = len(digits.y)
    return Step(
        "Find the wrong labels",
        f"{int(wrong[0].sum())} of the labels of {n} digits ({FLIPPED:.0%}) were changed at random, and a network with "
        "one hidden layer was trained on them. Which ones does the relation graph of its features name?",
        ["", "value"],
        [
            ["changed labels that are found, %", spread(found)],
            ["found labels that are changed, %", spread(right)],
            *([f"average precision, by {name}", spread(values, 2)] for name, values in precision.items()),
            ["average precision, by chance", f"{float(wrong[0].float().mean()):.2f}"],
        ],
        f"In the first seed {int((called[0] & wrong[0]).sum())} of {int(wrong[0].sum())} were found, with "
        f"{int((called[0] & ~wrong[0]).sum())} false alarms; {out / 'clean' / 'report.html'} shows why.",
        ["dataopt clean DATASET --model MODEL --out clean", "dataopt review clean"],
        {"labels.png": ("The worst twelve: given label → suggested label. Green frames were really changed.", picture)},
        {"found": found, "right": right, "average_precision": precision},
    )


def again(cleanings: list[Cleaning]) -> Step:
    """The step of ``refine``: does a network that has learned from cleaner labels find more?"""
    longest = max(len(c.result.rounds) for c in cleanings)

    def of_round(values: list[float], number: int) -> float:
        """A seed whose rounds have ended stays where it is."""
        return values[min(number, len(values) - 1)]

    found = [[100 * float((r.issues.is_label_issue & c.wrong).sum() / c.wrong.sum()) for r in c.result.rounds]
             for c in cleanings]  # fmt: skip
    alarms = [[float((r.issues.is_label_issue & ~c.wrong).sum()) for r in c.result.rounds] for c in cleanings]
    rows = [["before", "", "", spread([c.accuracy[0] for c in cleanings])]]
    for k in range(longest):
        rows.append(
            [
                str(k + 1),
                spread([of_round(f, k) for f in found]),
                spread([of_round(a, k) for a in alarms]),
                spread([of_round(c.accuracy, k + 1) for c in cleanings]),
            ]
        )
    more = [of_round(f, 1) - f[0] for f in found]
    steps = list(range(1, longest + 1))
    curves = {
        "wrong labels found, %": {
            f"seed {i}": (steps, [of_round(f, k) for k in range(longest)]) for i, f in enumerate(found)
        },
        "test accuracy, %": {
            f"seed {i}": (steps, [of_round(c.accuracy, k + 1) for k in range(longest)]) for i, c in enumerate(cleanings)
        },
    }
    stable = sum(c.result.stable for c in cleanings)
    return Step(
        "Clean, train, look again",
        "The network of the first round learned wrong labels too. Each round takes out what the one before found, "
        "trains anew on the rest, and judges all labels again. Does it find more?",
        ["round", "changed labels found, %", "false alarms", "test accuracy after it, %"],
        rows,
        f"The second round finds {spread(more)} points more of the changed labels. {stable} of {len(cleanings)} seeds "
        f"came to a round that changes nothing, {_ROUNDS} rounds at most.",
        ['python -c "from dataopt.core.relation import refine; help(refine)"'],
        {"rounds.png": ("Each seed over the rounds.", plots.to_png(plots.show_curves(curves, "round")))},
        {"found": found, "false_alarms": alarms, "accuracy": [c.accuracy for c in cleanings]},
    )


def _write(digits: Digits, given: Tensor, folder: Path) -> None:
    """What ``dataopt clean`` writes, from pictures and a network as a user has them."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(CLASSES)})
    # ink on paper
    pictures = [Image.fromarray(((1 - x[0]) * 255).round().byte().numpy()) for x in digits.x]
    data = datasets.Dataset.from_dict({"image": pictures, "label": given.tolist()}, features=features)
    saved = folder / "digits"
    shutil.rmtree(folder / WORK, ignore_errors=True)  # of an earlier demo, whose network may have been another
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):  # bars of a moment
        data.save_to_disk(saved)
        data = datasets.load_from_disk(saved)
        outputs = model_outputs(data, train(digits.x.flatten(1), given, 0), transform=Pixels())
        settings = {"probs": "model", "action": "drop", "issues": ["label"], "partitions": None, "top": 8}
        source = {"kind": "disk", "name": str(saved.resolve())}
        write_folder(folder, source, data, "label", [outputs], ["a network with one hidden layer"], settings)
