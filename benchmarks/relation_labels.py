"""Wrong labels: the relation graph beside every other score, on synthetic and on human label noise.

Average precision (AP), area under the ROC curve (AUROC) and the true negative rate at 95 % recall (TNR95), mean over
three seeds. Up to 6,000 rows are scored a run, where a curve does not say otherwise. The thesis' Tables 5.4, 5.5 and
5.7 and Figures 5.5, 5.6 and 5.9 with small models.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import relation_data as data
import torch
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
from dataopt import plots
from dataopt.core.artifacts import write_whole
from dataopt.core.relation import LabelNoise, RelationGraph, average_scores, baselines, find_issues
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

PACKAGES = ("dataopt", "torch", "numpy", "scikit-learn", "cleanlab")
TEMPERATURES = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
PARTS = (0.01, 0.03, 0.1, 0.3, 1.0)  # of all rows, Figure 5.5b
CHECKPOINTS = 4  # of the temporal ensemble
THESIS, WHITE, COMBINED = "relation t=4 (thesis)", "relation, whitened, t=2", "relation, whitened, t=2 + loss"
CURVES = ("loss", THESIS, COMBINED)
CURVE_GROUPS: tuple[data.Group, ...] = (("sst2", "top2", 0.08), ("cifar10", "top2", 0.08), ("cifar10", "aggre", None))
EPOCH_GROUPS: tuple[data.Group, ...] = (("fsdd", "top2", 0.08), ("cifar10", "top2", 0.08), ("cifar10", "aggre", None))


class Subject:
    """A sample to be scored; graphs are made once."""

    def __init__(self, sample: data.Sample):
        self.features, self.probs, self.labels = sample.features, sample.probs, sample.labels
        self.wrong = sample.wrong

    @functools.cache  # noqa: B019 (as short-lived as the subject)
    def graph(self, temperature: float = 4, whiten: bool = False, **options: Any) -> RelationGraph:
        return RelationGraph(
            self.features, self.probs, self.labels, temperature=temperature, whiten=whiten, progress=False, **options
        )

    def found(self, max_iter: int = 1, mode: str = "thesis", **graph: Any) -> LabelNoise:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # at t=1 the guard returns the plain sums
            return self.graph(**graph).label_noise(max_iter=max_iter, mode=mode)

    def relation(self, **options: Any) -> np.ndarray:
        return self.found(**options).noisiness.numpy()

    def loss(self) -> np.ndarray:
        return baselines.loss(self.probs, self.labels).numpy()

    def margin(self) -> np.ndarray:
        return baselines.margin(self.probs, self.labels).numpy()


def together(*scores: np.ndarray) -> np.ndarray:
    """Mean rank."""
    return np.mean([rankdata(s) for s in scores], axis=0)


def _self_confidence(s: Subject) -> np.ndarray:
    given = s.labels.numpy(), s.probs.numpy().astype(np.float64)
    return -get_label_quality_scores(*given, method="self_confidence", adjust_pred_probs=True)


def _product_only(s: Subject) -> np.ndarray:
    ones = torch.ones(len(s.labels), 1)
    return RelationGraph(ones, s.probs, s.labels, progress=False).label_noise().noisiness.numpy()


Scorer = Callable[[Subject], np.ndarray]
SCORES: dict[str, Scorer] = {
    "loss": Subject.loss,
    "margin": Subject.margin,
    "entropy": lambda s: baselines.entropy(s.probs).numpy(),
    "least confidence": lambda s: baselines.least_confidence(s.probs).numpy(),
    "CWE": lambda s: baselines.cwe(s.probs, s.labels).numpy(),
    "TracIn": lambda s: baselines.tracin(s.features, s.probs, s.labels).numpy(),
    "kNN-50 disagreement": lambda s: baselines.knn_disagreement(s.features, s.labels, 50).numpy(),
    "cleanlab self-confidence, adjusted": _self_confidence,
    "relation t=1": lambda s: s.relation(temperature=1),
    "relation t=2": lambda s: s.relation(temperature=2),
    THESIS: lambda s: s.relation(temperature=4),
    "relation t=6": lambda s: s.relation(temperature=6),
    "relation t=8": lambda s: s.relation(temperature=8),
    "relation t=4, no correction": lambda s: s.relation(temperature=4, max_iter=0),
    "relation t=4, released code": lambda s: s.relation(temperature=4, mode="released"),
    "relation, no compatibility (cos)": lambda s: s.relation(compatibility=False),
    "relation, RBF * c": lambda s: s.relation(kernel="rbf"),
    "relation, RBF": lambda s: s.relation(kernel="rbf", compatibility=False),
    "relation, c alone (cosine 1)": _product_only,
    WHITE: lambda s: s.relation(temperature=2, whiten=True),
    "relation, whitened, t=2, no correction": lambda s: s.relation(temperature=2, whiten=True, max_iter=0),
    COMBINED: lambda s: together(s.relation(temperature=2, whiten=True), s.loss()),
    "relation, whitened, t=2 + margin": lambda s: together(s.relation(temperature=2, whiten=True), s.margin()),
    "loss + margin": lambda s: together(s.loss(), s.margin()),
}
PRODUCT = "relation, c alone (cosine 1)"
KERNELS = (THESIS, "relation, RBF * c", "relation, no compatibility (cos)", "relation, RBF", PRODUCT)
ENSEMBLE = ("entropy", "least confidence", "CWE", "loss", "TracIn", "margin", THESIS, WHITE, COMBINED)


def judge(score: np.ndarray, wrong: np.ndarray) -> list[float]:
    """AP, AUROC and TNR95."""
    false, true, _ = roc_curve(wrong, score, drop_intermediate=False)
    return [
        float(average_precision_score(wrong, score)),
        float(roc_auc_score(wrong, score)),
        float(1 - false[np.argmax(true >= 0.95)]),
    ]


def _flags(flag: np.ndarray, wrong: np.ndarray) -> list[float]:
    """Precision, recall and share of all rows."""
    hits = float((flag & wrong).sum())
    return [hits / max(int(flag.sum()), 1), hits / int(wrong.sum()), float(flag.mean())]


def scores(task: data.Task, folder: Path, scratch: Path) -> common.Cell:
    """Every score of one sample, and what the methods flag."""
    sample = data.load(task, folder, scratch).scored()
    s = Subject(sample)
    out: common.Cell = {"scores": {}, "seconds": {}}
    for name, scorer in SCORES.items():
        start = time.perf_counter()
        out["scores"][name] = judge(scorer(s), s.wrong)
        out["seconds"][name] = round(time.perf_counter() - start, 3)  # graphs are shared: the first user pays
    probs, labels = s.probs.numpy().astype(np.float64), s.labels.numpy()
    flags = {
        THESIS: s.found(temperature=4).noisy.numpy(),
        WHITE: s.found(temperature=2, whiten=True).noisy.numpy(),
        "find_issues": find_issues(s.features, s.probs, s.labels, progress=False).is_label_issue.numpy(),
        "cleanlab find_label_issues": find_label_issues(labels, probs, n_jobs=1),
    }
    suggested = s.found(temperature=2, whiten=True).suggested.numpy()
    right = suggested == sample.truth.numpy()
    out["flags"] = {name: _flags(flag, s.wrong) for name, flag in flags.items()}
    out["suggested right"] = float(right[flags[WHITE] & s.wrong].mean()) if (flags[WHITE] & s.wrong).any() else None
    return out


def parts_of_the_data(task: data.Task, folder: Path, scratch: Path, shares: Sequence[float]) -> common.Cell:
    """Figure 5.5b: AP where only a share of the rows is known; the mean over draws, more of them for small shares."""
    sample = data.load(task, folder, scratch)
    n, generator = len(sample.labels), torch.Generator().manual_seed(task.seed)
    out: common.Cell = {}
    for share in shares:
        found: dict[str, list[list[float]]] = {name: [] for name in CURVES}
        for _ in range(min(round(1 / share), 20)):
            rows = torch.randperm(n, generator=generator)[: round(share * n)]
            drawn = data.Sample(*(t[rows] for t in (sample.features, sample.probs, sample.labels, sample.truth)))
            if not drawn.wrong.any():
                continue  # nothing to find in this draw
            s = Subject(drawn)
            for name in CURVES:
                found[name].append(judge(SCORES[name](s), s.wrong))
        out[f"{share:g}"] = {name: np.mean(values, axis=0).tolist() for name, values in found.items()}
    return out


def over_epochs(task: data.Task, folder: Path, scratch: Path) -> common.Cell:
    """Figure 5.6 and Table 5.5: AP after each epoch, and of the scores' mean over checkpoints."""
    sample = data.load(task, folder, scratch).scored()
    by_epoch: dict[str, list[np.ndarray]] = {name: [] for name in ENSEMBLE}
    for features, probs in sample.epochs:
        s = Subject(data.Sample(features, probs, sample.labels, sample.truth))
        for name in ENSEMBLE:
            by_epoch[name].append(SCORES[name](s))
    count = len(sample.epochs)
    chosen = {
        "one": [count - 1],
        "all of training": [round(count * (i + 1) / CHECKPOINTS) - 1 for i in range(CHECKPOINTS)],
        "second half": [round(count * (0.5 + (i + 1) / 2 / CHECKPOINTS)) - 1 for i in range(CHECKPOINTS)],
    }
    out: common.Cell = {"epochs": {name: [judge(s, sample.wrong)[0] for s in v] for name, v in by_epoch.items()}}
    for kind, checkpoints in chosen.items():
        out[kind] = {
            name: judge(average_scores([torch.from_numpy(v[i]) for i in checkpoints]).numpy(), sample.wrong)
            for name, v in by_epoch.items()
        }
    return out


def temperatures(task: data.Task, folder: Path, scratch: Path, values: Sequence[float]) -> common.Cell:
    """Figure 5.9: AP over the temperature."""
    s = Subject(data.load(task, folder, scratch).scored())
    out: common.Cell = {"loss": judge(s.loss(), s.wrong), "raw": {}, "whitened": {}}
    for kind in ("raw", "whitened"):
        for t in values:
            score = s.relation(temperature=t, whiten=kind == "whitened", max_iter=1)
            out[kind][f"{t:g}"] = judge(score, s.wrong)
    return out


def measure(kind: str, task: data.Task, folder: Path, scratch: Path) -> tuple[common.Cell, float]:
    """One cell, in a process of its own."""
    start = time.perf_counter()
    torch.set_num_threads(1)
    kinds: dict[str, Callable[[], common.Cell]] = {
        "scores": lambda: scores(task, folder, scratch),
        "parts": lambda: parts_of_the_data(task, folder, scratch, PARTS if task.data != "digits" else (0.3, 1.0)),
        "epochs": lambda: over_epochs(task, folder, scratch),
        "temperature": lambda: temperatures(task, folder, scratch, TEMPERATURES if task.data != "digits" else (2, 4)),
    }
    return kinds[kind](), time.perf_counter() - start


def cells_of(run: common.Run, kind: str, group: data.Group, seeds: Sequence[int]) -> list[common.Cell]:
    return [run.cells[f"{kind}: {task.name}"] for task in data.tasks((group,), seeds)]


def mean(values: Iterable[Any]) -> np.ndarray:
    return np.mean(list(values), axis=0)


def report(
    run: common.Run, groups: Sequence[data.Group], noise: dict[str, list[data.Group]], curves: Sequence[data.Group],
    epochs: Sequence[data.Group], seeds: Sequence[int],
) -> None:  # fmt: skip
    names = [data.Task(*group).group for group in groups]
    cells = {name: cells_of(run, "scores", group, seeds) for name, group in zip(names, groups, strict=True)}
    parts = ["AP / TNR95, mean over the seeds:", _main_table(names, cells, SCORES, (0, 2))]
    if len(seeds) > 1:
        parts += [
            "AP less that of the loss, paired by seed: mean (standard error of the mean):",
            _paired(names, cells, "loss", [n for n in SCORES if n != "loss"]),
            f"AP less that of {THESIS}, paired by seed:",
            _paired(names, cells, THESIS, [n for n in SCORES if n.startswith("relation") and n != THESIS]),
            "AP, standard deviation over the seeds:",
            common.table(
                ["score", *names],
                [[s, *(f"{np.std([c['scores'][s][0] for c in cells[n]], ddof=1):.3f}" for n in names)] for s in SCORES],
            ),
        ]
    parts += ["AUROC:", _main_table(names, cells, SCORES, (1,))]
    parts += ["Table 5.7, kernels at t=4, AP / TNR95:", _main_table(names, cells, ("loss", *KERNELS), (0, 2))]
    flags = list(cells[names[0]][0]["flags"])
    rows = []
    for flag in flags:
        found = [mean(c["flags"][flag] for c in cells[n]) for n in names]
        rows.append([flag, *(f"{p:.2f} / {r:.2f} ({100 * share:.1f} %)" for p, r, share in found)])
    right = [[c["suggested right"] for c in cells[n] if c["suggested right"] is not None] for n in names]
    rows.append([f"label suggested by {WHITE} is right", *(f"{np.mean(v):.2f}" if v else "" for v in right)])
    parts += [
        "What is flagged: precision / recall (share of all rows), and of the wrong labels that are flagged, how many "
        "get the right suggestion:",
        common.table(["flag", *names], rows),
    ]
    parts += _noise(run, noise, seeds) + _parts(run, curves, seeds)
    parts += _epochs(run, epochs, seeds) + _temperature(run, curves, seeds)
    run.report(*parts)


def _main_table(
    names: Sequence[str], cells: dict[str, list[common.Cell]], shown: Iterable[str], which: Sequence[int]
) -> str:
    rows = []
    for score in shown:
        found = [mean(c["scores"][score] for c in cells[name]) for name in names]
        rows.append([score, *(" / ".join(f"{v[i]:.3f}" if i < 2 else f"{v[i]:.2f}" for i in which) for v in found)])
    return common.table(["score", *names], rows)


def _paired(names: Sequence[str], cells: dict[str, list[common.Cell]], base: str, shown: Iterable[str]) -> str:
    rows = []
    for score in shown:
        row = [score]
        for name in names:
            d = [c["scores"][score][0] - c["scores"][base][0] for c in cells[name]]
            row.append(f"{np.mean(d):+.3f} ({np.std(d, ddof=1) / np.sqrt(len(d)):.3f})")
        rows.append(row)
    return common.table(["score", *names], rows)


def picture(
    run: common.Run, name: str, panels: dict[str, dict[str, plots.Curve]], x: str, shares: Sequence[float] = ()
) -> str:
    """Store curves as NAME.png and return its name; ``shares`` are the ticks of a logarithmic x axis."""
    figure = plots.show_curves(panels, x)
    for ax in figure.axes if shares else ():
        ax.set_xscale("log")
        ax.set_xticks(shares, [f"{share:g}" for share in shares])
        ax.minorticks_off()
    path = run.args.out / f"{run.name}_{name}.png"
    write_whole(path, plots.to_png(figure))
    return path.name


def _noise(run: common.Run, groups: dict[str, list[data.Group]], seeds: Sequence[int]) -> list[str]:
    panels: dict[str, dict[str, plots.Curve]] = {}
    rows = []
    for name, of_set in groups.items():
        values = {g[2]: cells_of(run, "scores", g, seeds) for g in of_set}
        x = sorted(share for share in values if share is not None)
        panels[f"{name}, AP"] = {
            score: ([100 * s for s in x], [mean(c["scores"][score][0] for c in values[s]) for s in x])
            for score in CURVES
        }
        for share in x:
            row = [f"{name}, {100 * share:g} %"]
            for score in (*CURVES, "margin", WHITE):
                v = mean(c["scores"][score] for c in values[share])
                row.append(f"{v[0]:.3f} / {v[2]:.2f}")
            rows.append(row)
    file = picture(run, "figure_5_5a", panels, "wrong labels, %")
    header = ["wrong labels", *CURVES, "margin", WHITE]
    title = f"Figure 5.5a ({file}), AP / TNR95 over the share of wrong labels (top-2 flips):"
    return [title, common.table(header, rows)]


def _parts(run: common.Run, groups: Sequence[data.Group], seeds: Sequence[int]) -> list[str]:
    panels: dict[str, dict[str, plots.Curve]] = {}
    rows = []
    for group in groups:
        name, cells = data.Task(*group).group, cells_of(run, "parts", group, seeds)
        shares = [s for s in cells[0] if s not in ("cell_seconds", "date")]
        x = [100 * float(s) for s in shares]
        panels[f"{name}, AP"] = {score: (x, [mean(c[s][score][0] for c in cells) for s in shares]) for score in CURVES}
        for s in shares:
            row = [f"{name}, {100 * float(s):g} %"]
            for score in CURVES:
                v = mean(c[s][score] for c in cells)
                row.append(f"{v[0]:.3f} / {v[2]:.2f}")
            rows.append(row)
    file = picture(run, "figure_5_5b", panels, "rows known, %", x)
    title = f"Figure 5.5b ({file}), AP / TNR95 where only a share of all rows is known:"
    return [title, common.table(["rows", *CURVES], rows)]


def _epochs(run: common.Run, groups: Sequence[data.Group], seeds: Sequence[int]) -> list[str]:
    panels: dict[str, dict[str, plots.Curve]] = {}
    rows = []
    for group in groups:
        name, cells = data.Task(*group).group, cells_of(run, "epochs", group, seeds)
        panels[f"{name}, AP"] = {
            score: (
                list(range(1, len(cells[0]["epochs"][score]) + 1)),
                mean(c["epochs"][score] for c in cells).tolist(),
            )
            for score in CURVES
        }
        for kind in ("one", "all of training", "second half"):
            label = "last checkpoint" if kind == "one" else f"{CHECKPOINTS} checkpoints, {kind}"
            rows.append([f"{name}: {label}", *(f"{mean(c[kind][s][0] for c in cells):.3f}" for s in ENSEMBLE)])
    file = picture(run, "figure_5_6", panels, "epoch")
    return [
        f"Figure 5.6 is {file}. Table 5.5, AP of the mean score over checkpoints (each score over its largest):",
        common.table(["checkpoints", *ENSEMBLE], rows),
    ]


def _temperature(run: common.Run, groups: Sequence[data.Group], seeds: Sequence[int]) -> list[str]:
    panels: dict[str, dict[str, plots.Curve]] = {}
    rows = []
    for group in groups:
        name, cells = data.Task(*group).group, cells_of(run, "temperature", group, seeds)
        values = list(cells[0]["raw"])
        x = [float(t) for t in values]
        loss = float(mean(c["loss"][0] for c in cells))
        curves: dict[str, plots.Curve] = {"loss": (x, [loss] * len(x))}
        for kind in ("raw", "whitened"):
            curves[f"relation, {kind}"] = (x, [mean(c[kind][t][0] for c in cells) for t in values])
            rows.append(
                [f"{name}, {kind}", *(f"{mean(c[kind][t][0] for c in cells):.3f}" for t in values), f"{loss:.3f}"]
            )
        panels[f"{name}, AP"] = curves
    file = picture(run, "figure_5_9", panels, "temperature t")
    header = ["features", *(f"t={t}" for t in values), "loss"]
    return [f"Figure 5.9 ({file}), AP over the temperature, one correction:", common.table(header, rows)]


def main() -> None:
    arguments = common.parser(__doc__)
    common.add_data_option(arguments)
    args = arguments.parse_args()
    groups, curves, epochs, seeds = data.LABEL_GROUPS, CURVE_GROUPS, EPOCH_GROUPS, data.SEEDS
    noise = {d: [(d, "top2", share) for share in sorted((0.08, *shares))] for d, shares in data.SHARES.items()}
    if args.quick:
        groups, seeds = data.QUICK_LABELS, (0,)
        curves = epochs = groups
        noise = {"digits": list(groups)}
    plan = [("scores", g) for g in dict.fromkeys([*groups, *(g for of_set in noise.values() for g in of_set)])]
    plan += [("epochs", g) for g in epochs]
    plan += [(kind, g) for kind in ("parts", "temperature") for g in curves]
    jobs = {f"{kind}: {task.name}": (kind, task) for kind, g in plan for task in data.tasks((g,), seeds)}
    settings = {
        "samples": [data.Task(*g).settings for _, g in plan], "scores": list(SCORES), "rows": data.SCORED,
        "temperatures": TEMPERATURES, "parts": PARTS, "checkpoints": CHECKPOINTS,
    }  # fmt: skip
    title = "Wrong labels: relation graph and other scores"
    run = common.start(
        "relation_labels", title, args, 1, settings, workers=data.WORKERS, packages=PACKAGES, timed=False
    )
    missing = {key: jobs[key] for key in run.missing(list(jobs))}
    data.check(args.data, [task for _, task in missing.values() if not data.kept(task, run.scratch)])
    data.in_processes(run, measure, {key: (*job, args.data, run.scratch) for key, job in missing.items()})
    report(run, groups, noise, curves, epochs, seeds)


if __name__ == "__main__":
    main()
