"""Rules that rank wrong labels by relation and other scores together: chosen on some sets, confirmed on others.

The whitened relation graph finds flipped labels that the loss does not, and the loss finds human errors that the graph
does not. Each rule is judged by what it is behind the better of the two in average precision (its regret); the rule
with the smallest worst regret on the choosing sets is then looked at on the others. "pretrained" are the images of
CIFAR-10 under features that were learned from other images: stronger ones than those of the small network.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import common
import numpy as np
import relation_data as data
import torch
from dataopt.core.relation import RelationGraph, baselines
from relation_labels import judge
from relation_models import accuracy
from scipy.stats import rankdata

PACKAGES = ("dataopt", "torch", "numpy", "scikit-learn")
CHOOSING: tuple[data.Group, ...] = (
    ("sst2", "top2", 0.08), ("cifar10", "top2", 0.08), ("cifar10", "aggre", None), ("pretrained", "top2", 0.08),
    ("pretrained", "aggre", None),
)  # fmt: skip
CONFIRMING: tuple[data.Group, ...] = (
    ("sst2", "uniform", 0.08), ("fsdd", "top2", 0.08), ("cifar10", "random1", None), ("cifar10", "worse", None),
    ("pretrained", "uniform", 0.08), ("pretrained", "random1", None), ("pretrained", "worse", None),
)  # fmt: skip
BASES = ("relation", "loss")
PRESENT = "mean rank of relation, loss"
RIGHT = "the predicted label is the true one, %"
TINY = 1e-12


class Scores:
    """The scores of one sample, high is bad, that the rules combine."""

    def __init__(self, sample: data.Sample):
        self.probs, labels = sample.probs.double(), sample.labels
        graph = RelationGraph(sample.features, sample.probs, labels, temperature=2, whiten=True, progress=False)
        found = graph.label_noise()
        self.relation = found.noisiness.numpy()
        self.loss = baselines.loss(sample.probs, labels).double().numpy()
        self.margin = baselines.margin(sample.probs, labels).double().numpy()
        self.own = labels[:, None]
        sums = graph.class_sums(torch.arange(len(labels)))
        # (n, C): the neighbours' labels as a prediction
        self.votes = (sums + TINY) / (sums + TINY).sum(1, keepdim=True)
        agreeing = sums.gather(1, self.own).squeeze(1)
        self.conflict = (sums.sum(1) - agreeing).numpy()

    def of(self, probs: torch.Tensor) -> np.ndarray:
        """-log p of the given label."""
        return -probs.gather(1, self.own).squeeze(1).clamp(min=TINY).log().numpy()

    @property
    def log_margin(self) -> np.ndarray:
        """log of the likeliest class over the given one."""
        return self.loss + self.probs.max(1).values.log().numpy()

    @property
    def votes_margin(self) -> np.ndarray:
        """The likeliest other class over the given one, by votes."""
        own = self.votes.gather(1, self.own)
        return (self.votes.scatter(1, self.own, 0).max(1, keepdim=True).values - own).squeeze(1).numpy()

    @property
    def product(self) -> np.ndarray:
        """Votes and model as two independent witnesses."""
        both = self.probs.clamp(min=TINY) * self.votes
        return self.of(both / both.sum(1, keepdim=True))

    @property
    def mixture(self) -> np.ndarray:
        return self.of((self.probs + self.votes) / 2)


def mean_rank(*scores: np.ndarray) -> np.ndarray:
    return np.mean([rankdata(s) for s in scores], axis=0)


def fisher(*scores: np.ndarray) -> np.ndarray:
    """Fisher's combination of the ranks as p-values: the head of either list counts most."""
    return np.sum([-np.log(1 - rankdata(s) / (len(s) + 1)) for s in scores], axis=0)


def highest_rank(*scores: np.ndarray) -> np.ndarray:
    return np.max([rankdata(s) for s in scores], axis=0)


def standardised(*scores: np.ndarray) -> np.ndarray:
    return np.sum([(s - s.mean()) / s.std() for s in scores], axis=0)


RULES: dict[str, Callable[[Scores], np.ndarray]] = {
    "relation": lambda s: s.relation,
    "loss": lambda s: s.loss,
    "margin": lambda s: s.margin,
    "log margin": lambda s: s.log_margin,
    "conflicting similarity": lambda s: s.conflict,
    "votes": lambda s: s.of(s.votes),
    "margin of votes": lambda s: s.votes_margin,
    PRESENT: lambda s: mean_rank(s.relation, s.loss),
    "mean rank of relation, margin": lambda s: mean_rank(s.relation, s.margin),
    "mean rank of relation, log margin": lambda s: mean_rank(s.relation, s.log_margin),
    "mean rank of relation, loss, margin": lambda s: mean_rank(s.relation, s.loss, s.margin),
    "mean rank of relation, loss, votes": lambda s: mean_rank(s.relation, s.loss, s.of(s.votes)),
    "Fisher of relation, loss": lambda s: fisher(s.relation, s.loss),
    "Fisher of relation, margin": lambda s: fisher(s.relation, s.margin),
    "Fisher of relation, loss, margin": lambda s: fisher(s.relation, s.loss, s.margin),
    "highest rank of relation, loss": lambda s: highest_rank(s.relation, s.loss),
    "standardised relation and loss": lambda s: standardised(s.relation, s.loss),
    "product of votes and model": lambda s: s.product,
    "mixture of votes and model": lambda s: s.mixture,
    "mean rank of relation, product": lambda s: mean_rank(s.relation, s.product),
    "Fisher of relation, product": lambda s: fisher(s.relation, s.product),
    "mean rank of margin, product": lambda s: mean_rank(s.margin, s.product),
}


def measure(task: data.Task, folder: Path, scratch: Path) -> tuple[common.Cell, float]:
    """Every rule on one sample, in a process of its own."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    sample = data.load(task, folder, scratch).scored()
    scores = Scores(sample)
    out: common.Cell = {name: judge(rule(scores), sample.wrong) for name, rule in RULES.items()}
    out[RIGHT] = accuracy(sample.probs, sample.truth)
    return out, time.perf_counter() - start


def regrets(run: common.Run, rule: str, group: data.Group, seeds: Sequence[int]) -> list[float]:
    """Average precision that a rule is behind the better of relation and loss; each seed."""
    cells = [run.cells[task.name] for task in data.tasks((group,), seeds)]
    best = max(BASES, key=lambda base: float(np.mean([c[base][0] for c in cells])))
    return [c[best][0] - c[rule][0] for c in cells]


def worst(run: common.Run, rule: str, groups: Sequence[data.Group], seeds: Sequence[int]) -> float:
    return max(float(np.mean(regrets(run, rule, group, seeds))) for group in groups)


def _table(run: common.Run, groups: Sequence[data.Group], rules: Sequence[str], seeds: Sequence[int]) -> str:
    rows = []
    for rule in rules:
        row = [rule]
        for group in groups:
            found = [run.cells[task.name][rule][0] for task in data.tasks((group,), seeds)]
            row.append(f"{np.mean(found):.3f}")
        rows.append([*row, f"{worst(run, rule, groups, seeds):+.3f}"])
    right = [np.mean([run.cells[t.name][RIGHT] for t in data.tasks((group,), seeds)]) for group in groups]
    rows.append([RIGHT, *(f"{value:.1f}" for value in right), ""])
    return common.table(["rule", *(data.Task(*group).group for group in groups), "worst regret"], rows)


def report(
    run: common.Run, choosing: Sequence[data.Group], confirming: Sequence[data.Group], seeds: Sequence[int]
) -> None:
    rules = sorted(RULES, key=lambda rule: worst(run, rule, choosing, seeds))
    chosen = next(rule for rule in rules if rule not in BASES)
    rows = []
    for rule in dict.fromkeys((chosen, PRESENT, *BASES)):
        row = [rule]
        for group in confirming:
            found = regrets(run, rule, group, seeds)
            error = f" ({np.std(found, ddof=1) / len(found) ** 0.5:.3f})" if len(found) > 1 else ""
            row.append(f"{np.mean(found):+.3f}{error}")
        rows.append(row)
    run.report(
        "Choosing sets, AP, mean over the seeds, the rule with the smallest worst regret first:",
        _table(run, choosing, rules, seeds),
        f"Chosen: {chosen}. Confirming sets, AP:",
        _table(run, confirming, rules, seeds),
        "Confirming sets, regret paired by seed (standard error of the mean):",
        common.table(["rule", *(data.Task(*group).group for group in confirming)], rows),
        common.verdict(
            "worst regret of the chosen rule on the confirming sets", worst(run, chosen, confirming, seeds),
            most=round(worst(run, PRESENT, confirming, seeds), 4),
        ),
    )  # fmt: skip


def main() -> None:
    arguments = common.parser(__doc__)
    common.add_data_option(arguments)
    args = arguments.parse_args()
    choosing, confirming, seeds = CHOOSING, CONFIRMING, data.SEEDS
    if args.quick:
        choosing = confirming = data.QUICK_LABELS
        seeds = (0,)
    wanted = data.tasks(list(dict.fromkeys((*choosing, *confirming))), seeds)
    settings = {"samples": [task.settings for task in wanted], "rules": list(RULES), "rows": data.SCORED}
    title = "Wrong labels: rules that combine relation and loss"
    run = common.start("relation_rules", title, args, 1, settings, workers=data.WORKERS, packages=PACKAGES, timed=False)
    missing = [task for task in wanted if task.name not in run.cells]
    data.check(args.data, [task for task in missing if not data.kept(task, run.scratch)])
    features = [data.Task("pretrained", "features", None, seed) for seed in seeds]
    base = [*data.TEACHERS, *features] if not args.quick else []
    needed = [task for task in base if missing and not data.kept(task, run.scratch)]
    data.in_processes(run, data.make, {task.name: (task, args.data, run.scratch) for task in needed})
    data.in_processes(run, measure, {task.name: (task, args.data, run.scratch) for task in missing})
    report(run, choosing, confirming, seeds)


if __name__ == "__main__":
    main()
