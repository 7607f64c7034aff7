"""Time and memory of the relation graph, against the bare product of the features and against the textbook form.

20,000 rows of 384 features in clusters, one thread. The bare product is torch.mm of the rows, 512 at a time, into one
buffer, the fastest of five; a pass is one run of everything that ``RelationGraph(...).label_noise()`` does. Then what
partitions save and cost, and the graph beside the features it works on (the thesis' Tables 5.1 and 5.2).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import common
import numpy as np
import relation_data as data
import torch
import torch.nn.functional as F
from dataopt.core.relation import Outliers, RelationGraph, find_issues
from relation_labels import judge, mean
from torch import Tensor

PACKAGES = ("dataopt", "torch", "numpy", "numba")
WIDTH = 384
FLIPPED = 0.08
PARTITIONS = (1, 2, 4, 8, 16, 32)
PLENTY, FEW = 20_000, 8_000  # rows
REAL: tuple[data.Group, ...] = (("sst2", "top2", 0.08), ("cifar10", "top2", 0.08), ("fsdd", "top2", 0.08))


@dataclass(frozen=True)
class Inputs:
    """(n, d), (n, C), (n,)."""

    features: Tensor
    probs: Tensor
    labels: Tensor

    def graph(self, **options: Any) -> RelationGraph:
        return RelationGraph(self.features, self.probs, self.labels, progress=False, **options)


def inputs(n: int, classes: int, sharpness: float) -> Inputs:
    """Clusters, 8 % wrong labels; logits are noise plus ``sharpness`` for the true class.

    ``sharpness`` 2.6 gives a median maximum probability of about 0.5 with ten classes, 12 one above 0.999.
    """
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(classes, (n,), generator=generator)
    centres = torch.randn(classes, WIDTH, generator=generator)
    features = centres[truth] + 1.5 * torch.randn(n, WIDTH, generator=generator)
    logits = torch.randn(n, classes, generator=generator)
    logits[torch.arange(n), truth] += sharpness
    labels = truth.clone()
    flipped = torch.rand(n, generator=generator) < FLIPPED
    labels[flipped] = (truth[flipped] + torch.randint(1, classes, (n,), generator=generator)[flipped]) % classes
    return Inputs(features, logits.softmax(1), labels)


def timed(call: Callable[[], Any], repeats: int = 1) -> float:
    """Seconds, the fastest of the repeats."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def bare(features: Tensor) -> float:
    """Seconds of the product of the features alone."""
    buffer = torch.empty(512, len(features))

    def product() -> None:
        for part in features.split(512):
            torch.mm(part, features.T, out=buffer[: len(part)])

    return timed(product, 5)


def warm_up(classes: int) -> None:
    """Compile, and load what is loaded on first use."""
    few = inputs(600, classes, 3.0)
    for temperature in (1, 4):
        few.graph(temperature=temperature).label_noise()
    find_issues(few.features, few.probs, few.labels, progress=False)


def passes(n: int, classes: int, sharpness: float, parts: bool) -> common.Cell:
    """One full pass; with ``parts`` what else there is to compute."""
    warm_up(classes)
    given = inputs(n, classes, sharpness)
    product = bare(given.features)
    start = time.perf_counter()
    graph = given.graph()
    ready = time.perf_counter()
    graph.sums  # noqa: B018 (computed here, once)
    sums = time.perf_counter() - ready
    found = graph.label_noise()
    out: common.Cell = {
        "product": product,
        "pass": time.perf_counter() - start,
        "sums": sums,
        "confidence": given.probs.max(1).values.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist(),
        "computed": graph.sums.computed,
        "noisy": float(found.noisy.float().mean()),
    }
    if not parts:
        return out
    flagged = found.noisy.nonzero().squeeze(1)
    extra: dict[str, Callable[[], Any]] = {
        "label noise, bfloat16 products": lambda: given.graph(dtype=torch.bfloat16).label_noise(),
        "label noise, t=6": lambda: given.graph(temperature=6).label_noise(),
        "label noise, whitened, t=2": lambda: given.graph(temperature=2, whiten=True).label_noise(),
        "label noise, 10 partitions": lambda: given.graph(partitions=10).label_noise(),
        "and single moves": lambda: graph.label_noise(update="single"),
        f"and 20 neighbours of {len(flagged)} flagged rows": lambda: graph.relations(flagged),
        "outlier scores": lambda: given.graph().outlier_scores(),
        "find_issues": lambda: find_issues(given.features, given.probs, given.labels, progress=False),
    }
    out["extra"] = {name: timed(call) for name, call in extra.items()}
    torch.set_num_threads(2)
    out["extra"]["label noise, two threads"] = timed(lambda: given.graph().label_noise())
    torch.set_num_threads(1)
    return out


def textbook(given: Inputs, temperature: float = 4, cut: float = 0.03, share: float = 0.05) -> Tensor:
    """The authors' formula on whole matrices: noisiness after one correction, diagonal kept."""
    features = F.normalize(given.features)
    k = torch.clamp(features @ features.T, min=0) * (given.probs @ given.probs.T)
    k[k <= cut] = 0
    sign = (given.labels[:, None] == given.labels).float() * 2 - 1
    relation = sign * k**temperature
    score = relation.sum(1)
    noisy = score / score.abs().max() < -share
    return -(score - 2 * relation[:, noisy].sum(1))


def against_textbook(n: int) -> common.Cell:
    """Equal first, then the times of both, alternating, the fastest of three."""
    warm_up(10)
    given = inputs(n, 10, 2.6)
    dense = textbook(given)
    ours = given.graph().label_noise(mode="released").noisiness
    error = float((ours - dense).abs().max() / dense.abs().max())
    if error > 1e-4:
        raise RuntimeError(f"our scores and the textbook's differ by {error:.1e} of the largest")
    pairs = [
        (timed(lambda: textbook(given)), timed(lambda: given.graph().label_noise(mode="released"))) for _ in range(3)
    ]
    slow, fast = (min(times) for times in zip(*pairs, strict=True))
    return {"textbook": slow, "ours": fast, "error": error, "product": bare(given.features)}


def memory(n: int) -> common.Cell:
    """Peak memory over the inputs, in a fresh process that loads them from files."""
    given = inputs(n, 10, 2.6)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("features", "probs", "labels"):
            np.save(Path(folder) / f"{name}.npy", getattr(given, name).numpy())
        command = [sys.executable, __file__, "--memory-of", folder]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring the memory failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def memory_here(folder: Path) -> None:
    """Print by how much the peak of a pass exceeds what was held before it, in MB (Linux)."""
    torch.set_num_threads(1)
    inputs(600, 10, 3.0).graph().label_noise()
    given = Inputs(*(torch.from_numpy(np.load(folder / f"{name}.npy")) for name in ("features", "probs", "labels")))
    held = resident("VmRSS")
    given.graph().label_noise()
    size = sum(x.nbytes for x in (given.features, given.probs, given.labels))
    print(json.dumps({"inputs": size / 1e6, "over": resident("VmHWM") - held}))


def resident(field: str) -> float:
    """Memory of this process in MB, now (VmRSS) or at its peak (VmHWM); getrusage's peak includes its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024 / 1e6


def partitions(task: data.Task, counts: tuple[int, ...], folder: Path, scratch: Path) -> common.Cell:
    """Time, and AP of both settings, with the graph in parts."""
    sample = data.load(task, folder, scratch)
    given = Inputs(sample.features, sample.probs, sample.labels)
    out: common.Cell = {}
    for count in counts:
        options = {"partitions": count} if count > 1 else {}
        start = time.perf_counter()
        thesis = given.graph(**options).label_noise().noisiness.numpy()
        seconds = time.perf_counter() - start
        white = given.graph(**options, temperature=2, whiten=True).label_noise().noisiness.numpy()
        out[str(count)] = [seconds, judge(thesis, sample.wrong)[0], judge(white, sample.wrong)[0]]
    return out


def beside_features(task: data.Task, folder: Path, scratch: Path) -> common.Cell:
    """Tables 5.1 and 5.2: seconds of training and of the features, and of the graph on them."""
    warm_up(10)
    sample = data.load(task, folder, scratch)
    given = Inputs(sample.features, sample.probs, sample.labels)
    detector = Outliers().fit(given.features, given.probs)
    some = given.features[:2000], given.probs[:2000]
    return {
        "rows": len(given.labels),
        "dimensions": given.features.shape[1],
        "training": sample.facts["training_seconds"],
        "features": sample.facts["feature_seconds"],
        "label noise": timed(lambda: given.graph().label_noise()),
        "find_issues": timed(lambda: find_issues(given.features, given.probs, given.labels, progress=False)),
        "outlier ms": 1e3 * timed(lambda: detector.score(*some), 3) / len(some[0]),
    }


def report(run: common.Run, groups: tuple[data.Group, ...], seeds: tuple[int, ...]) -> None:
    rows, extra = [], []
    for key, cell in run.cells.items():
        if "pass" in cell:
            low, middle, high = cell["confidence"]
            shown = f"{middle:.4g} ({low:.4g} to {high:.4g})"
            rows.append([
                key, shown, f"{100 * cell['computed']:.1f} %", f"{100 * cell['noisy']:.1f} %", f"{cell['product']:.2f}",
                f"{cell['pass']:.2f}", f"{cell['pass'] / cell['product']:.3f}", f"{cell['sums'] / cell['product']:.3f}",
            ])  # fmt: skip
            extra += [
                [f"{key}: {n}", f"{s:.2f}", f"{s / cell['product']:.3f}"] for n, s in cell.get("extra", {}).items()
            ]
    header = ["rows", "confidence, median (10 to 90 %)", "computed of n^2", "noisy", "product s", "pass s", "ratio",
              "sums alone"]  # fmt: skip
    parts = [f"The whole label-noise pass, d={WIDTH}, t=4, one correction, one thread:", common.table(header, rows)]
    even, sure, book, use = (run.cells[k] for k in run.settings["targets"])
    parts += [
        common.verdict("pass over bare product, nothing skipped,", even["pass"] / even["product"], most=0.65),
        common.verdict("pass over bare product, very confident,", sure["pass"] / sure["product"], most=0.15),
        common.verdict("peak memory over the inputs, in MB,", use["over"], most=60),
        common.verdict("time over the textbook form", book["ours"] / book["textbook"], most=0.1),
        f"The inputs take {use['inputs']:.0f} MB. The textbook form takes {book['textbook']:.2f} s, "
        f"{book['textbook'] / book['product']:.1f} bare products, against {book['ours']:.2f} s; the scores differ by "
        f"{book['error']:.0e} of the largest.",
        "What else costs:",
        common.table(["computed", "s", "over bare product"], extra),
    ]
    for group in groups:
        name = data.Task(*group).group
        cells = [run.cells[f"partitions: {t.name}"] for t in data.tasks((group,), seeds)]
        counts = [c for c in cells[0] if c.isdigit()]
        rows = []
        for count in counts:
            seconds, thesis, white = mean(c[count] for c in cells)
            rows.append([count, f"{seconds:.2f}", f"{thesis:.3f}", f"{white:.3f}"])
        parts += [f"Partitions, {name}:", common.table(["parts", "s", "AP, t=4", "AP, whitened, t=2"], rows)]
    rows = []
    for group in groups:
        cell = run.cells[f"features: {data.Task(*group).name}"]
        share = cell["label noise"] / max(cell["features"], 1e-9)
        per_row = 1e3 * cell["features"] / cell["rows"]
        times = [f"{cell[n]:.2f}" for n in ("training", "features", "label noise", "find_issues")]
        last = [f"{share:.2f}", f"{per_row:.2f}", f"{cell['outlier ms']:.3f}"]
        rows.append([data.Task(*group).group, cell["rows"], cell["dimensions"], *times, *last])
    header = [
        "sample", "rows", "d", "training s", "features s", "label noise s", "find_issues s", "label noise / features",
        "features, ms a row", "outlier score, ms a row",
    ]  # fmt: skip
    parts += [
        "Tables 5.1 and 5.2, the graph beside the features (features and training were timed while two samples were "
        "made at a time):",
        common.table(header, rows),
    ]
    run.report(*parts)


def main() -> None:
    arguments = common.parser(__doc__)
    common.add_data_option(arguments)
    arguments.add_argument("--memory-of", type=Path, help="measure in this process; for the script's own use")
    args = arguments.parse_args()
    if args.memory_of:
        memory_here(args.memory_of)
        return
    plenty, few, groups, seeds, counts = PLENTY, FEW, REAL, data.SEEDS, PARTITIONS
    if args.quick:
        plenty, few, groups, seeds, counts = 2000, 1000, data.QUICK_LABELS, (0,), (1, 2)
    plan: dict[str, Callable[[], common.Cell]] = {
        f"n={plenty}, C=10": partial(passes, plenty, 10, 2.6, True),
        f"n={plenty}, C=10, very confident": partial(passes, plenty, 10, 12.0, False),
        f"n={few}, C=10, textbook": partial(against_textbook, few),
        f"n={plenty}, C=10, memory": partial(memory, plenty),
        f"n={plenty}, C=100": partial(passes, plenty, 100, 4.0, False),
        f"n={plenty}, C=100, very confident": partial(passes, plenty, 100, 14.0, False),
    }
    targets = [*list(plan)[:4]]
    settings = {"targets": targets, "width": WIDTH, "flipped": FLIPPED, "partitions": counts}
    title = "Time and memory of the relation graph"
    run = common.start("relation_speed", title, args, 1, settings, packages=PACKAGES)
    for key, measure in plan.items():
        run.cell(key, measure)
    real = data.tasks(groups, seeds)
    needed = [t for t in real if f"partitions: {t.name}" not in run.cells or f"features: {t.name}" not in run.cells]
    data.check(args.data, [t for t in needed if not data.kept(t, run.scratch)])
    for task in real:
        run.cell(f"partitions: {task.name}", partial(partitions, task, counts, args.data, run.scratch))
        run.cell(f"features: {task.name}", partial(beside_features, task, args.data, run.scratch))
    report(run, groups, seeds)


if __name__ == "__main__":
    main()
