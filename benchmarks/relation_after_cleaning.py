"""Accuracy after cleaning: train on noisy labels, on what is left or relabelled, and on clean labels.

Rows are cleaned by what a method flags: dropped, or given the label that the method suggests. Then the same model is
trained again with the same seed. SST-2: logistic regression, tested on 10,000 other sentences; FSDD and CIFAR-10: the
networks of the samples, on their test sets. Test labels are the true ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import common
import numpy as np
import relation_data as data
import torch
from cleanlab.filter import find_label_issues
from dataopt.core.relation import RelationGraph, find_issues
from relation_models import RECIPES, accuracy, look
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

PACKAGES = ("dataopt", "torch", "numpy", "scikit-learn", "cleanlab")
GROUPS: tuple[data.Group, ...] = (
    ("sst2", "top2", 0.15), ("sst2", "uniform", 0.08), ("fsdd", "top2", 0.15), ("cifar10", "random1", None),
)  # fmt: skip
SHORT = ("noisy", "find_issues, drop", "find_issues, relabel", "clean")  # of CIFAR-10, whose trainings take longest

Cleaned = tuple[Tensor, Tensor]  # rows that stay (n,) bool, labels (n,)


def _find_issues(sample: data.Sample) -> tuple[Tensor, Tensor]:
    found = find_issues(sample.features, sample.probs, sample.labels, progress=False)
    return found.is_label_issue, found.predicted_label


def _relation(sample: data.Sample) -> tuple[Tensor, Tensor]:
    found = RelationGraph(sample.features, sample.probs, sample.labels, progress=False).label_noise()
    return found.noisy, found.suggested


def _cleanlab(sample: data.Sample) -> tuple[Tensor, Tensor]:
    flags = find_label_issues(sample.labels.numpy(), sample.probs.numpy().astype(np.float64), n_jobs=1)
    return torch.from_numpy(flags), sample.probs.argmax(1)


FLAGS: dict[str, Callable[[data.Sample], tuple[Tensor, Tensor]]] = {  # flagged rows (n,) and suggested labels (n,)
    "find_issues": _find_issues,
    "relation t=4": _relation,
    "cleanlab": _cleanlab,
}
METHODS = ("noisy", *(f"{name}, {action}" for name in FLAGS for action in ("drop", "relabel")), "clean")


def clean(method: str, sample: data.Sample) -> Cleaned:
    everything = torch.ones(len(sample.labels), dtype=torch.bool)
    if method in ("noisy", "clean"):
        return everything, sample.labels if method == "noisy" else sample.truth
    name, action = method.split(", ")
    flagged, suggested = FLAGS[name](sample)
    if action == "drop":
        return ~flagged, sample.labels
    return everything, torch.where(flagged, suggested, sample.labels)


def tested(task: data.Task, cleaned: Cleaned, folder: Path, scratch: Path) -> float:
    """Test accuracy in percent of the model trained on cleaned rows."""
    keep, labels = cleaned
    if task.data == "sst2":
        seeds = (task.seed, (task.seed + 1) % len(data.SEEDS))  # sentences of another seed are for testing
        own, other = (data.load(data.Task("sst2", "teacher", None, seed), folder, scratch) for seed in seeds)
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
        model.fit(own.features[keep].numpy(), labels[keep].numpy())
        return 100 * float(model.score(other.features.numpy(), other.truth.numpy()))
    rows = {
        "cifar10": lambda: data.cifar_rows(folder, task.seed),
        "fsdd": lambda: data.fsdd_rows(folder),
        "digits": data.digits_rows,
    }
    x, _, test_x, test = rows[task.data]()
    recipe = RECIPES[task.data]
    network, _ = recipe.train(x[keep], labels[keep], task.seed)
    return accuracy(look(network, test_x, recipe.prepare)[1], test)


def measure(task: data.Task, method: str, folder: Path, scratch: Path) -> tuple[common.Cell, float]:
    """One training, in a process of its own."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    sample = data.load(task, folder, scratch)
    keep, labels = clean(method, sample)
    wrong = float((labels != sample.truth)[keep].float().mean())
    if task.data == "cifar10" and method in ("noisy", "clean"):  # trained already
        trained = task if method == "noisy" else data.Task(*data.CLEAN, task.seed)
        found = data.load(trained, folder, scratch).facts["test_accuracy"]
    else:
        found = tested(task, (keep, labels), folder, scratch)
    return {"accuracy": found, "kept": float(keep.float().mean()), "wrong": wrong}, time.perf_counter() - start


def report(run: common.Run, plan: Sequence[tuple[data.Task, str]]) -> None:
    groups = list(dict.fromkeys(task.group for task, _ in plan))
    rows, left = [], []
    for method in METHODS:
        row, remains = [method], [method]
        for group in groups:
            cells = [run.cells[f"{t.name}: {m}"] for t, m in plan if t.group == group and m == method]
            noisy = [run.cells[f"{t.name}: noisy"] for t, m in plan if t.group == group and m == method]
            found = [c["accuracy"] for c in cells]
            gain = [c["accuracy"] - n["accuracy"] for c, n in zip(cells, noisy, strict=True)]
            if not cells:
                row.append("")
                remains.append("")
                continue
            spread = f" +- {np.std(gain, ddof=1):.2f}" if len(gain) > 1 else ""
            row.append(f"{np.mean(found):.2f} ({np.mean(gain):+.2f}{spread})")
            remains.append(" / ".join(f"{100 * np.mean([c[name] for c in cells]):.1f}" for name in ("kept", "wrong")))
        rows.append(row)
        left.append(remains)
    run.report(
        "Test accuracy in percent, mean over the seeds (less that of the noisy labels: mean +- standard deviation):",
        common.table(["trained on", *groups], rows),
        "Rows kept / wrong labels among them, in percent:",
        common.table(["trained on", *groups], left),
    )


def main() -> None:
    arguments = common.parser(__doc__)
    common.add_data_option(arguments)
    args = arguments.parse_args()
    groups, seeds = GROUPS, data.SEEDS
    if args.quick:
        groups, seeds = data.QUICK_LABELS, (0,)
    plan = [(t, m) for t in data.tasks(groups, seeds) for m in (SHORT if t.data == "cifar10" else METHODS)]
    settings = {"samples": [t.settings for t in data.tasks(groups, seeds)], "methods": METHODS}
    title = "Accuracy after cleaning"
    run = common.start(
        "relation_after_cleaning", title, args, 1, settings, workers=data.WORKERS, packages=PACKAGES, timed=False
    )
    missing = {f"{t.name}: {m}": (t, m) for t, m in plan if f"{t.name}: {m}" not in run.cells}
    data.check(args.data, [t for t, _ in missing.values()])
    ordered = sorted(missing.items(), key=lambda item: item[1][0].data != "cifar10")  # the longest first
    data.in_processes(run, measure, {key: (*job, args.data, run.scratch) for key, job in ordered})
    report(run, plan)


if __name__ == "__main__":
    main()
