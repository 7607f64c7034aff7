"""Outliers: the relation graph beside every other score.

Contaminated training sets (the thesis' Table 5.6): outliers with random labels among the training rows, scored by the
network that was trained on them. New data against a clean training set: test images of CIFAR-10 against Fashion-MNIST,
with all of the training rows or few of them (Figure 5.7).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import relation_data as data
import torch
from dataopt import plots
from dataopt.core.relation import Outliers, RelationGraph, baselines, find_issues
from relation_labels import judge, mean, picture
from torch import Tensor

PACKAGES = ("dataopt", "torch", "numpy", "scikit-learn")
SUBSETS = (0.004, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
NEIGHBOURS = 200  # of the kNN score of new data, for all training rows; in proportion for fewer
UNARY = ("MSP", "max logit", "energy")
RELATION = "relation t=1 (thesis)"

Scorer = Callable[["Subject"], Tensor]


class Subject:
    """Rows to be scored, with the model's last layer, and what they are compared with: themselves, or other rows."""

    def __init__(self, sample: data.Sample, new: tuple[Tensor, Tensor] | None = None):
        self.sample = sample
        self.features, self.probs = new or (sample.features, sample.probs)
        self.logits = sample.logits(self.features)
        self.within = new is None

    @functools.cache  # noqa: B019 (as short-lived as the subject)
    def graph(self, **options: Any) -> RelationGraph:
        sample = self.sample
        return RelationGraph(sample.features, sample.probs, sample.labels, progress=False, **options)

    def relation(self, temperature: float = 1, subset: float | None = None, seed: int = 0, **options: Any) -> Tensor:
        new = () if self.within else (self.features, self.probs)
        generator = torch.Generator().manual_seed(seed)
        return self.graph(**options).outlier_scores(
            *new, subset=subset, temperature=temperature, generator=generator
        )  # fmt: skip

    def knn(self, k: int) -> Tensor:
        return baselines.knn_distance(self.features, None if self.within else self.sample.features, k)


def _iterative(s: Subject) -> Tensor:
    return baselines.iterative_sampling(s.features, generator=torch.Generator().manual_seed(0))


SCORES: dict[str, Scorer] = {
    RELATION: lambda s: s.relation(),
    "relation t=1, 5 % of the rows": lambda s: s.relation(subset=0.05),
    "relation t=2": lambda s: s.relation(2),
    "relation t=4": lambda s: s.relation(4),
    "relation t=1, no compatibility": lambda s: s.relation(compatibility=False),
    "relation t=1, no cut": lambda s: s.relation(edge_cut=0.0),
    "relation t=1, RBF * c": lambda s: s.relation(kernel="rbf"),
    "relation t=1, whitened": lambda s: s.relation(whiten=True),
    "MSP": lambda s: baselines.msp(s.probs),
    "entropy": lambda s: baselines.entropy(s.probs),
    "max logit": lambda s: baselines.max_logit(s.logits),
    "energy": lambda s: baselines.energy(s.logits),
    "ReAct": lambda s: baselines.react(s.features, s.sample.weight, s.sample.bias, s.sample.features),
    "KL-Matching": lambda s: baselines.kl_matching(s.probs, s.sample.probs),
    "Mahalanobis": lambda s: baselines.mahalanobis(s.features, s.sample.features, s.sample.labels),
    "kNN-10": lambda s: s.knn(10),
    "kNN-50": lambda s: s.knn(50),
    "kNN-200": lambda s: s.knn(200),
}
WITHIN: dict[str, Scorer] = {  # scores that exist only for the training rows
    "iterative sampling": _iterative,
    "local outlier factor, 20": lambda s: baselines.local_outlier_factor(s.features, 20),
    "loss of the given label": lambda s: baselines.loss(s.probs, s.sample.labels),
}


def contaminated(task: data.Task, folder: Path, scratch: Path, subsets: Sequence[float]) -> common.Cell:
    """Table 5.6: outliers in the training set."""
    sample = data.load(task, folder, scratch).scored()
    s = Subject(sample)
    out: common.Cell = {"scores": {}, "seconds": {}}
    for name, scorer in (SCORES | WITHIN).items():
        start = time.perf_counter()
        out["scores"][name] = judge(scorer(s).numpy(), sample.outlier)
        out["seconds"][name] = round(time.perf_counter() - start, 3)
    out["subsets"] = {f"{share:g}": _drawn(s, sample.outlier, share) for share in subsets}
    found = find_issues(sample.features, sample.probs, sample.labels, progress=False).is_outlier_issue.numpy()
    hits = float((found & sample.outlier).sum())
    out["flag"] = [hits / max(int(found.sum()), 1), hits / int(sample.outlier.sum()), float(found.mean())]
    return out


def _drawn(s: Subject, outlier: np.ndarray, share: float) -> list[float]:
    """The mean over five draws of S."""
    seeds = range(5 if share < 1 else 1)
    return mean(judge(s.relation(subset=share, seed=seed).numpy(), outlier) for seed in seeds).tolist()


def new_data(task: data.Task, folder: Path, scratch: Path, subsets: Sequence[float]) -> common.Cell:
    """Figure 5.7: test images against images of another data set, with S of several sizes."""
    sample = data.load(task, folder, scratch)
    features, probs = (torch.cat(pair) for pair in zip(sample.new["test"], sample.new["fashion"], strict=True))
    outlier = np.arange(len(features)) >= len(sample.new["test"][0])
    s = Subject(sample, (features, probs))
    out: common.Cell = {"scores": {name: judge(scorer(s).numpy(), outlier) for name, scorer in SCORES.items()}}
    out["subsets"], out["kNN subsets"] = {}, {}
    n = len(sample.features)
    for share in subsets:
        relation, nearest = [], []
        for seed in range(5 if share < 1 else 1):
            rows = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: round(share * n)]
            reference = sample.features[rows], sample.probs[rows]
            relation.append(judge(Outliers().fit(*reference).score(features, probs).numpy(), outlier))
            k = max(1, round(share * NEIGHBOURS))
            nearest.append(judge(baselines.knn_distance(features, reference[0], k).numpy(), outlier))
        out["subsets"][f"{share:g}"], out["kNN subsets"][f"{share:g}"] = mean(relation).tolist(), mean(nearest).tolist()
    return out


def measure(task: data.Task, folder: Path, scratch: Path, subsets: Sequence[float]) -> tuple[common.Cell, float]:
    """One cell, in a process of its own."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    kind = new_data if task.noise == "clean" else contaminated
    return kind(task, folder, scratch, subsets), time.perf_counter() - start


def report(run: common.Run, groups: Sequence[data.Group], clean: Sequence[data.Group], seeds: Sequence[int]) -> None:
    cells = {data.Task(*g).group: [run.cells[t.name] for t in data.tasks((g,), seeds)] for g in (*groups, *clean)}
    names = list(cells)
    rows = []
    for score in SCORES | WITHIN:
        row = [score]
        for name in names:
            found = [c["scores"].get(score) for c in cells[name]]
            row.append("" if None in found else " / ".join(f"{v:.3f}" for v in mean(found)))
        rows.append(row)
    shown = {name: name if "clean" not in name else "CIFAR-10 test against Fashion-MNIST" for name in names}
    header = ["score", *shown.values()]
    parts = [
        "AP / AUROC / TNR95, mean over the seeds. The last column compares new data with a clean training set. ReAct, "
        "KL-Matching and Mahalanobis want a clean reference; elsewhere they get the contaminated rows themselves.",
        common.table(header, rows),
    ]
    if len(seeds) > 1:
        spread = [
            [score, *("" if score in WITHIN and "clean" in n else _spread(cells[n], score) for n in names)]
            for score in (SCORES | WITHIN)
        ]
        parts += ["AP and AUROC, standard deviation over the seeds:", common.table(header, spread)]
    shares = list(cells[names[0]][0]["subsets"])
    rows = [
        [
            f"{100 * float(s):g} %",
            *(" / ".join(f"{v:.3f}" for v in mean(c["subsets"][s] for c in cells[n])) for n in names),
        ]
        for s in shares
    ]
    parts += [f"{RELATION} over |S|, AP / AUROC / TNR95:", common.table(["|S|", *shown.values()], rows)]
    flags = [[n, *(f"{v:.3f}" for v in mean(c["flag"] for c in cells[n]))] for n in names if "flag" in cells[n][0]]
    parts += [
        "What find_issues flags as an outlier:",
        common.table(["training set", "precision", "recall", "share of all rows"], flags),
    ]
    parts += _figure(run, [cells[data.Task(*g).group] for g in clean])
    run.report(*parts)


def _spread(cells: list[common.Cell], score: str) -> str:
    ap, auroc, _ = np.std([c["scores"][score] for c in cells], axis=0, ddof=1)
    return f"{ap:.3f} / {auroc:.3f}"


def _figure(run: common.Run, clean: list[list[common.Cell]]) -> list[str]:
    if not clean:
        return []
    cells = clean[0]
    best = max(UNARY, key=lambda name: mean(c["scores"][name][0] for c in cells))
    x = [100 * float(s) for s in cells[0]["subsets"]]
    panels: dict[str, dict[str, plots.Curve]] = {}
    for i, metric in enumerate(("AP", "AUROC", "TNR95")):
        panels[metric] = {
            f"best unary ({best})": (x, [mean(c["scores"][best][i] for c in cells)] * len(x)),
            "kNN": (x, [mean(c["kNN subsets"][s][i] for c in cells) for s in cells[0]["subsets"]]),
            "relation": (x, [mean(c["subsets"][s][i] for c in cells) for s in cells[0]["subsets"]]),
        }
    file = picture(run, "figure_5_7", panels, "|S|, % of the training rows", x)
    rows = []
    for s in cells[0]["subsets"]:
        row = [" / ".join(f"{v:.3f}" for v in mean(c[kind][s] for c in cells)) for kind in ("subsets", "kNN subsets")]
        rows.append([f"{100 * float(s):g} %", *row])
    return [
        f"Figure 5.7 ({file}), new data, AP / AUROC / TNR95; k of kNN is {NEIGHBOURS} |S| / n:",
        common.table(["|S|", "relation", "kNN"], rows),
    ]


def main() -> None:
    arguments = common.parser(__doc__)
    common.add_data_option(arguments)
    args = arguments.parse_args()
    groups, clean, seeds, subsets = data.OUTLIER_GROUPS, (data.CLEAN,), data.SEEDS, SUBSETS
    if args.quick:
        groups, clean, seeds, subsets = data.QUICK_OUTLIERS, (), (0,), (0.05, 1.0)
    wanted = data.tasks((*groups, *clean), seeds)
    settings = {
        "samples": [task.settings for task in wanted], "scores": [*SCORES, *WITHIN], "subsets": SUBSETS,
        "neighbours": NEIGHBOURS, "rows": data.SCORED,
    }  # fmt: skip
    title = "Outliers: relation graph and other scores"
    run = common.start(
        "relation_outliers", title, args, 1, settings, workers=data.WORKERS, packages=PACKAGES, timed=False
    )
    missing = [task for task in wanted if task.name not in run.cells]
    data.check(args.data, [task for task in missing if not data.kept(task, run.scratch)])
    data.in_processes(run, measure, {task.name: (task, args.data, run.scratch, subsets) for task in missing})
    report(run, groups, clean, seeds)


if __name__ == "__main__":
    main()
