"""Beyond the thesis: cheaper scoring, and other rules for the ratios 0.1 and 0.2, where KVzip starts to lose.

Variants are compared on some seeds; the best one is then measured unchanged on unseen seeds and on scikit-learn's
descriptions. One thread, SmolLM2-135M-Instruct in float32.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import common
import kvzip_task as task
import torch
from dataopt.smollm2 import load_smollm2
from torch import Tensor

CHOOSE, UNSEEN, TEXTS = (10, 11), (20, 21, 22), (2, 7)
TOKENS, RATIOS = 1200, (0.2, 0.1)
PLAIN = "KVzip"


def plain(reading: task.Reading) -> list[Tensor]:
    return reading.kvzip()


def chunks(reading: task.Reading, size: int, norm: str = "full") -> list[Tensor]:
    return reading.kvzip(size, norm)


def shared(reading: task.Reading, every: int) -> list[Tensor]:
    """Score one layer of ``every`` and use its scores for the layers up to the next."""
    scores = reading.kvzip()
    return [scores[i - i % every] for i in range(len(scores))]


def value_norm(reading: task.Reading, power: float) -> list[Tensor]:
    """Attention times a power of the norm of the value, as what a pair adds to the output is both."""
    pairs = zip(reading.kvzip(), reading.layers, strict=True)
    return [s + power * p.values[0].float().norm(dim=-1).clamp(min=1e-6).log() for s, p in pairs]


def floor(reading: task.Reading, share: float) -> list[Tensor]:
    """The best ``share`` of every head stays whatever the others score."""
    out = []
    for scores in reading.kvzip():
        new = scores.clone()
        count = max(1, round(share * len(reading.context)))
        best = scores[:, reading.prefix :].topk(count, dim=1).indices + reading.prefix
        new.scatter_(1, best, torch.inf)
        out.append(new)
    return out


def ends(reading: task.Reading, first: int, last: int) -> list[Tensor]:
    """The first and last tokens of the context stay in every head."""
    out = []
    for scores in reading.kvzip():
        new = scores.clone()
        new[:, reading.prefix : reading.prefix + first] = torch.inf
        new[:, new.shape[1] - last :] = torch.inf
        out.append(new)
    return out


RULES: dict[str, Callable[[task.Reading], list[Tensor]]] = {
    PLAIN: plain,
    "value norm": partial(value_norm, power=1.0),
    "root of value norm": partial(value_norm, power=0.5),
    "floor of 1 % a head": partial(floor, share=0.01),
    "floor of 3 % a head": partial(floor, share=0.03),
    "first 4 stay": partial(ends, first=4, last=0),
    "first 4 and last 16 stay": partial(ends, first=4, last=16),
}
CHEAPER: dict[str, Callable[[task.Reading], list[Tensor]]] = {
    "chunks of 128": partial(chunks, size=128),
    "chunks of 256": partial(chunks, size=256),
    "chunks of 512": partial(chunks, size=512),
    "chunks of 2048": partial(chunks, size=2048),
    "subset norm, 512": partial(chunks, size=512, norm="subset"),
    "every second layer": partial(shared, every=2),
    "every third layer": partial(shared, every=3),
}


@lru_cache(maxsize=1)
def model() -> Any:
    return load_smollm2(dtype=torch.float32)


@lru_cache(maxsize=1)
def subject(kind: str, number: int, lines: int) -> tuple[task.Reading, list[task.Ask]]:
    if kind == "text":
        return task.read(*model(), task.descriptions(number), TOKENS), []
    document = task.lines(number, lines)
    return task.read(*model(), document.text), document.asks["codes"]


def measure(
    kind: str, number: int, lines: int, rule: Callable[[task.Reading], list[Tensor]], ratios: Sequence[float]
) -> common.Cell:
    """``{ratio: {codes or continue, repeat}}``, and the seconds of scoring where the rule made its own."""
    reading, asks = subject(kind, number, lines)
    start = time.perf_counter()
    scores = rule(reading)
    out: common.Cell = {"scoring": time.perf_counter() - start}
    for ratio in ratios:
        cache = reading.cache(scores, ratio)
        found = {"repeat": task.forced(cache, task.repeat_rows(reading))["nll"]}
        rows = task.question_rows(cache, asks) if asks else task.continue_row(reading)
        found["codes" if asks else "continue"] = task.forced(cache, rows)["nll"]
        out[str(ratio)] = found
    return out


def loss(cell: common.Cell) -> float:
    """Mean over ratios and tasks."""
    return statistics.mean(v for r in cell.values() if isinstance(r, dict) for v in r.values())


def mean_loss(run: common.Run, name: str, subjects: Sequence[tuple[str, int]]) -> float:
    return statistics.mean(loss(run.cells[f"{kind} {n}: {name}"]) for kind, n in subjects)


def best_of(run: common.Run, names: Sequence[str], subjects: Sequence[tuple[str, int]]) -> str:
    return min(names, key=lambda name: mean_loss(run, name, subjects))


def report(
    run: common.Run,
    choosing: Sequence[tuple[str, int]],
    confirming: Sequence[tuple[str, int]],
    chosen: Sequence[str],
) -> None:
    parts = []
    for title, names in (("Rules", RULES), ("Cheaper scoring", (PLAIN, *CHEAPER))):
        rows = []
        for name in names:
            cells = [run.cells[key] for kind, n in choosing if (key := f"{kind} {n}: {name}") in run.cells]
            if not cells:
                continue
            ratios = [r for r, c in cells[0].items() if isinstance(c, dict)]
            columns = [f"{statistics.mean(c[r][k] for c in cells):.3f}" for r in ratios for k in ("codes", "repeat")]
            rows.append([name, *columns, f"{statistics.mean(map(loss, cells)):.3f}"])
        header = ["", *(f"{k} {r}" for r in ratios for k in ("codes", "repeat")), "mean"]
        parts += [f"{title}, NLL on seeds {', '.join(str(n) for _, n in choosing)}:", common.table(header, rows)]
    parts.append(
        "Scores of shared layers come from a full pass here, so only their quality counts; the forward through the "
        "layers, which is most of a scoring pass, cannot be skipped."
    )
    rows = []
    for name in (PLAIN, *chosen):
        values = {kind: [s for s in confirming if s[0] == kind] for kind in dict(confirming)}
        rows.append([name, *(f"{mean_loss(run, name, s):.3f}" for s in values.values())])
    parts += [
        "The best rule and the best cheaper scoring, unchanged, on unseen seeds and on scikit-learn's descriptions; "
        "mean NLL:",
        common.table(["", *dict(confirming)], rows),
    ]
    for name in chosen:
        wins = [
            mean_loss(run, name, [s for s in confirming if s[0] == kind])
            < mean_loss(run, PLAIN, [s for s in confirming if s[0] == kind])
            for kind in dict(confirming)
        ]
        where = "wins on both" if all(wins) else "does not win on both: not adopted"
        parts.append(f"{name}: {where}.")
    run.report(*parts)


def main() -> None:
    args = common.parser(__doc__).parse_args()
    lines, ratios, rules, cheaper = 1, RATIOS, list(RULES), list(CHEAPER)
    choosing: list[tuple[str, int]] = [("lines", s) for s in CHOOSE]
    confirming: list[tuple[str, int]] = [*(("lines", s) for s in UNSEEN), *(("text", t) for t in TEXTS)]
    if args.quick:
        lines, ratios, rules, cheaper = 0, (0.2,), [PLAIN, "value norm"], ["chunks of 128"]
        choosing, confirming = [("lines", 0)], [("lines", 1)]
    settings = {"lines": lines, "ratios": ratios, "choosing": choosing, "confirming": confirming, "tokens": TOKENS}
    run = common.start("kvzip_variants", "KVzip: variants", args, 1, settings, packages=task.PACKAGES)
    known = RULES | CHEAPER

    def cells(subjects: Sequence[tuple[str, int]], names: Sequence[str]) -> None:
        for kind, number in subjects:
            for name in names:
                run.cell(f"{kind} {number}: {name}", partial(measure, kind, number, lines, known[name], ratios))

    cells(choosing, [*rules, *cheaper])
    chosen = [best_of(run, [r for r in rules if r != PLAIN], choosing), best_of(run, cheaper, choosing)]
    cells(confirming, [PLAIN, *chosen])
    report(run, choosing, confirming, chosen)


if __name__ == "__main__":
    main()
