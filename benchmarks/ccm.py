"""What a compressed memory remembers: CCM beside full and no context and other ways to compress.

Three tasks on a small frozen model (``ccm_tasks.py``): distinct facts; 64 tables with an id in the question that tells
the training tables apart; 16 tables. All methods have the same LoRA (rank 16 on all linear layers), steps and rows; see
``ccm_methods.py``. Not reproduced: MemoryBank (table 7.9), which needs another model to summarise.

Two processes of one thread; the main rows come first. No cell is begun that might not end within --minutes, and the
same command goes on with those that are missing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median, stdev

import ccm_methods as methods
import ccm_tasks as tasks
import common
import torch
from dataopt import plots
from dataopt.core.artifacts import write_whole
from mixup import Job, run_cells
from torch.nn.functional import cross_entropy

SEEDS = (0, 1, 2)
ADAPTER_STEPS = 250
ROWS = 2048
MINUTES, WORKERS = 45, 2
SHOWN = (1, 2, 4, 8, 12, 16)
PACKAGES = ("dataopt", "torch", "transformers", "peft")
BASES = ("facts", "64 tables", "16 tables")
MAIN = ("CCM-concat", "CCM-merge", "CCM-concat, plain LoRA", "CCM-merge, plain LoRA")
OTHERS = ("Gisting-online", "Gisting, fixed context", "pooled pairs (Compressive)", "recurrent soft prompts")
LENGTHS = tuple(name for name in methods.METHODS if "COMP tokens" in name)
SOURCES = ("facts", "16 tables", "facts and tables")
TIMED = ("CCM-concat", "CCM-merge", "CCM-concat, plain LoRA", "pooled pairs (Compressive)", "recurrent soft prompts")
ROUNDS, ROUND_STEPS = 6, 4  # of each timed method
QUICK = ("facts: bounds", "facts: CCM-merge,", "16 tables: bounds", "16 tables: CCM-concat,", "facts: Gisting",
         "facts: pooled", "facts: recurrent", "facts: steps in turn", "sources: facts and tables")  # fmt: skip
KNOWN, TIED = 12, 48  # tables that the adapters are trained on, of 16 and of 64


def draws(task: str, seed: int) -> dict[str, tasks.Draw]:
    """Rows for training and for testing; "held out" are tables that the adapter has not met."""
    values = tasks.tables_of(seed)
    if task == "facts":
        return {"train": tasks.facts, "test": tasks.facts}
    if task == "64 tables":
        tied = tasks.Tables(values, 0, TIED, tied=True)
        # Ids of the held-out tables never occurred in the adapter's training.
        return {"train": tied, "test": tied, "held out": tasks.Tables(values, TIED, tasks.TABLES, tied=True)}
    known = tasks.Tables(values, 0, KNOWN)
    return {"train": known, "test": known, "held out": tasks.Tables(values, KNOWN, 16)}


def bounds(task: str, seed: int, base_steps: int, rows: int, scratch: Path) -> common.Cell:
    """Full and no context."""
    model = tasks.base_model(task, seed, base_steps, scratch)
    out: common.Cell = {}
    for name, draw in draws(task, seed).items():
        if name != "train":
            out[f"full, {name}"] = methods.tested(lambda r: tasks.full_context(model, r), draw, rows)
            out[f"none, {name}"] = methods.tested(lambda r: tasks.no_context(model, r), draw, rows)
            some = draw(rows, torch.Generator().manual_seed(9))
            out[f"loss without, {name}"] = float(
                cross_entropy(tasks.no_context(model, some).flatten(0, 1), some[2].flatten())
            )
    return out


def asked_before(task: str, seed: int, base_steps: int, rows: int, scratch: Path) -> common.Cell:
    """Full context with the earlier questions and answers, as the model was trained."""
    model = tasks.base_model(task, seed, base_steps, scratch)
    sets = draws(task, seed).items()
    return {
        f"full, {name}": methods.tested(lambda r: tasks.with_questions(model, r), draw, rows)
        for name, draw in sets
        if name != "train"
    }


def trained(task: str, row: str, seed: int, base_steps: int, steps: int, rows: int, scratch: Path) -> common.Cell:
    method = methods.METHODS[row]
    base = tasks.base_model(task, seed, base_steps, scratch)
    sets = draws(task, seed)
    model, seconds = methods.train(method, base, sets["train"], seed, steps)
    out: common.Cell = {"step_seconds": seconds}
    for name, draw in sets.items():
        if name != "train":
            out[name] = methods.tested(lambda r: methods.logits_of(method, model, r), draw, rows)
            some = draw(rows, torch.Generator().manual_seed(9))
            out[f"loss without, {name}"] = methods.without_memory(method, model, some)
    return out


def step_times(seed: int, base_steps: int, rounds: int, steps: int, scratch: Path) -> common.Cell:
    """Table 7.8: a few training steps of each method in turn, so that all see the machine under the same load."""
    found: dict[str, list[float]] = {row: [] for row in TIMED}
    for _ in range(rounds):
        for row, seconds in found.items():
            base = tasks.base_model("facts", seed, base_steps, scratch)
            seconds.append(methods.train(methods.METHODS[row], base, tasks.facts, seed, steps)[1])
    return {"seconds": found}


def mixed(source: str, seed: int, base_steps: int, steps: int, rows: int, scratch: Path) -> common.Cell:
    """Table 7.4: one base, adapters of one or both sources, each tested on both."""
    base = tasks.base_model("both", seed, base_steps, scratch)
    values = tasks.tables_of(seed)
    parts: dict[str, tasks.Draw] = {"facts": tasks.facts, "16 tables": tasks.Tables(values, 0, 16)}
    wanted = [draw for name, draw in parts.items() if source in (name, "facts and tables")]
    turn = iter(range(10**9))
    method = methods.METHODS["CCM-concat"]
    model, _ = methods.train(method, base, lambda count, g: wanted[next(turn) % len(wanted)](count, g), seed, steps)
    out: common.Cell = {}
    for name, draw in parts.items():
        out[name] = methods.tested(lambda r: methods.logits_of(method, model, r), draw, rows)
        out[f"full, {name}"] = methods.tested(lambda r: tasks.full_context(base, r), draw, rows)
    return out


def planned(seeds: Sequence[int], base_steps: dict[str, int], steps: int, rows: int, scratch: Path) -> dict[str, Job]:
    """Every cell by its name; main rows of all seeds first."""
    out: dict[str, Job] = {}
    for seed in seeds:
        for task in BASES:
            out[f"{task}: bounds, seed {seed}"] = bounds, (task, seed, base_steps[task], rows, scratch)
        for task in BASES:
            for row in MAIN:
                given = (task, row, seed, base_steps[task], steps, rows, scratch)
                out[f"{task}: {row}, seed {seed}"] = trained, given
    for seed in seeds:
        for task in BASES:
            out[f"{task}: questions too, seed {seed}"] = asked_before, (task, seed, base_steps[task], rows, scratch)
        for row in OTHERS:
            out[f"facts: {row}, seed {seed}"] = trained, ("facts", row, seed, base_steps["facts"], steps, rows, scratch)
    timed = (seeds[0], base_steps["facts"], min(ROUNDS, steps), min(ROUND_STEPS, steps), scratch)
    out[f"facts: steps in turn, seed {seeds[0]}"] = step_times, timed
    for row in OTHERS:
        given = ("16 tables", row, seeds[0], base_steps["16 tables"], steps, rows, scratch)
        out[f"16 tables: {row}, seed {seeds[0]}"] = trained, given
    for task in ("facts", "16 tables"):
        for row in LENGTHS:
            given = (task, row, seeds[0], base_steps[task], steps, rows, scratch)
            out[f"{task}: {row}, seed {seeds[0]}"] = trained, given
    for source in SOURCES:
        given_sources = (source, seeds[0], base_steps["both"], steps, rows, scratch)
        out[f"sources: {source}, seed {seeds[0]}"] = mixed, given_sources
    return out


# The report


def cells_of(run: common.Run, prefix: str) -> list[common.Cell]:
    return [cell for key, cell in run.cells.items() if key.startswith(f"{prefix}, seed ")]


def spread(values: Sequence[float]) -> str:
    return f"{mean(values):.3f} +- {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def accuracies(run: common.Run, task: str, test: str) -> str:
    """A row for each method, a column for each t."""
    context = 2 if task == "facts" else 4
    lines = []
    for name, key in (("no context", "none"), ("full context", "full")):
        cells = [cell[f"{key}, {test}"] for cell in cells_of(run, f"{task}: bounds") if f"{key}, {test}" in cell]
        if cells:
            pairs = str(context * tasks.STEPS) if key == "full" else "0"
            lines.append([name, pairs, pairs, str(len(cells)), *columns(cells)])
    cells = [cell[f"full, {test}"] for cell in cells_of(run, f"{task}: questions too")]
    if cells:
        pairs = str((context + 3) * tasks.STEPS - 3)
        lines.append(["full context and earlier questions", pairs, pairs, str(len(cells)), *columns(cells)])
    for row, method in methods.METHODS.items():
        cells = [cell[test] for cell in cells_of(run, f"{task}: {row}")]
        if cells:
            kept, peak = method.pairs(tasks.STEPS, context)
            lines.append([row, str(kept), str(peak), str(len(cells)), *columns(cells)])
    return common.table(["method", "pairs at 16", "peak", "seeds", *(f"t = {t}" for t in SHOWN)], lines)


def pairs_by_t(context: int) -> str:
    """Pairs that an answer reads, and the peak, by t."""
    lines = [["full context", *(f"{t * context} / {t * context}" for t in SHOWN)]]
    for row, method in methods.METHODS.items():
        lines.append([row, *("{} / {}".format(*method.pairs(t, context)) for t in SHOWN)])
    return common.table(["method", *(f"t = {t}" for t in SHOWN)], lines)


def times(run: common.Run) -> str:
    lines = []
    for cell in cells_of(run, "facts: steps in turn"):
        ours = median(cell["seconds"]["CCM-concat"])
        for row, seconds in cell["seconds"].items():
            shown = [f"{1000 * value:.0f}" for value in (median(seconds), min(seconds), max(seconds))]
            lines.append([row, shown[0], f"{shown[1]} to {shown[2]}", f"{median(seconds) / ours:.2f}"])
    return common.table(["method", "median ms", "range", "times CCM-concat"], lines) if lines else ""


def columns(cells: Sequence[Sequence[float]]) -> list[str]:
    return [spread([cell[t - 1] for cell in cells]) for t in SHOWN]


def losses(run: common.Run) -> str:
    """Section 7.3.1: what the adapter answers without any memory."""
    lines = []
    for task in ("64 tables", "16 tables"):
        for row in ("bounds", *MAIN):
            cells = cells_of(run, f"{task}: {row}")
            if cells:
                tests = [spread([c[f"loss without, {test}"] for c in cells]) for test in ("test", "held out")]
                lines.append([task, "frozen model" if row == "bounds" else row, str(len(cells)), *tests])
    return common.table(["task", "method", "seeds", "tables of the training", "held-out tables"], lines)


def sources(run: common.Run) -> str:
    lines = []
    for source in SOURCES:
        for cell in cells_of(run, f"sources: {source}"):
            lines.append([source, *(f"{cell[name][-1]:.3f}" for name in SOURCES[:2])])
            full = ["(full context)", *(f"{cell[f'full, {name}'][-1]:.3f}" for name in SOURCES[:2])]
    return common.table(["adapter trained on", *SOURCES[:2]], [*lines, full]) if lines else ""


def floors(run: common.Run) -> list[str]:
    """Those of the plan, met or missed."""

    def at(task: str, row: str, test: str, t: int = 16) -> float | None:
        cells = cells_of(run, f"{task}: {row}")
        return mean(c[test][t - 1] for c in cells) if cells and all(test in c for c in cells) else None

    def lowest(task: str, row: str, test: str) -> float | None:
        cells = cells_of(run, f"{task}: {row}")
        return min(min(c[test]) for c in cells) if cells else None

    def gap(a: float | None, b: float | None) -> float | None:
        return None if a is None or b is None else a - b

    concat, merge = at("facts", "CCM-concat", "test"), at("facts", "CCM-merge", "test")
    tied = {row: at("64 tables", row, "held out") for row in MAIN}
    loss = "loss without, "
    plain = [cell for row in MAIN[2:] for cell in cells_of(run, f"64 tables: {row}")]
    known, others = ([cell[loss + test] for cell in plain] for test in ("test", "held out"))
    frozen = {seed: run.cells.get(f"64 tables: bounds, seed {seed}") for seed in SEEDS}
    moved = [
        abs(cell[loss + test] - base[loss + test])
        for row in MAIN[:2]
        for seed, base in frozen.items()
        if base and (cell := run.cells.get(f"64 tables: {row}, seed {seed}"))
        for test in ("test", "held out")
    ]
    checks: list[tuple[str, float | None, float | None, float | None]] = [
        ("facts: full context at every t", lowest("facts", "bounds", "full, test"), 0.98, None),
        ("facts: full context and questions at every t", lowest("facts", "questions too", "full, test"), 0.98, None),
        ("facts: concat at every t", lowest("facts", "CCM-concat", "test"), 0.95, None),
        ("facts: merge at t = 1", at("facts", "CCM-merge", "test", 1), 0.95, None),
        ("facts: merge at t = 16", merge, None, 0.35),
        ("facts: concat over merge", gap(concat, merge), 0.5, None),
        ("facts: no context", at("facts", "bounds", "none, test"), None, 0.12),
        ("facts: concat over Gisting-online", gap(concat, at("facts", "Gisting-online", "test")), 0.3, None),
        ("tied ids: full context", at("64 tables", "bounds", "full, held out"), 0.88, None),
        ("tied ids: concat, held out", tied["CCM-concat"], 0.55, None),
        ("tied ids: concat over its plain LoRA", gap(tied["CCM-concat"], tied["CCM-concat, plain LoRA"]), 0.3, None),
        ("tied ids: merge over its plain LoRA", gap(tied["CCM-merge"], tied["CCM-merge, plain LoRA"]), 0.03, None),
        ("tied ids: loss without memory of plain LoRA, known tables", max(known, default=None), None, 1.0),
        ("tied ids: the same, held out", min(others, default=None), 2.5, None),
        ("tied ids: change of that loss by the conditional LoRA", max(moved, default=None), None, 0),
        ("16 tables: full context", at("16 tables", "bounds", "full, test"), 0.97, None),
        ("16 tables: merge on tables of the training", at("16 tables", "CCM-merge", "test"), 0.95, None),
    ]
    return [common.verdict(what, value, least, most) for what, value, least, most in checks if value is not None]


def picture(run: common.Run, path: Path) -> None:
    """Right answers over contexts: full and no context, and three methods."""
    panels = {}
    for task, test in (("facts", "test"), ("16 tables", "test"), ("64 tables", "held out")):
        found = {
            "full context": [c[f"full, {test}"] for c in cells_of(run, f"{task}: bounds")],
            **{row: [c[test] for c in cells_of(run, f"{task}: {row}")] for row in MAIN[:3]},
            "no context": [c[f"none, {test}"] for c in cells_of(run, f"{task}: bounds")],
        }
        x = list(range(1, tasks.STEPS + 1))
        panels[f"{task}, {test}"] = {
            name: (x, [mean(v) for v in zip(*cells, strict=True)]) for name, cells in found.items() if cells
        }
    write_whole(path, plots.to_png(plots.show_curves(panels, "contexts")))


def report(run: common.Run, plan: Sequence[str]) -> None:
    parts = [
        f"{run.ran(plan)} Accuracy over {run.settings['rows']} rows (standard error at most .011), mean +- standard "
        "deviation over the seeds; pairs per head that an answer reads at t = 16, and the most while contexts are "
        "compressed. Fixed gisting learns from one answer a row, the others from up to 16; pooled pairs and soft "
        "prompts have LoRA on all tokens, which trains the reader too.",
    ]
    titles = {
        ("facts", "test"): "Distinct facts, one COMP token unless a number stands there:",
        ("64 tables", "test"): "Ids tied to tables, tables of the adapter's training:",
        ("64 tables", "held out"): "The same, held-out tables with unseen ids (table 7.5):",
        ("16 tables", "test"): "16 tables, those of the adapter's training:",
        ("16 tables", "held out"): "16 tables, the four held out:",
    }
    for (task, test), title in titles.items():
        if cells_of(run, f"{task}: bounds"):
            parts += [title, accuracies(run, task, test)]
    parts += ["Nats per answer without any memory (section 7.3.1):", losses(run)]
    parts += ["Pairs per head that an answer reads / peak, contexts of 4 tokens (table 7.6):", pairs_by_t(4)]
    if timed := times(run):
        parts += ["Training steps on the facts, in turn in one process (table 7.8):", timed]
    if mixed_table := sources(run):
        parts += ["CCM-concat, one adapter for one or both sources, t = 16 (table 7.4):", mixed_table]
    run.report(*parts, "![accuracy over contexts](ccm_accuracy.png)", *floors(run))
    picture(run, run.args.out / "ccm_accuracy.png")


def main() -> None:
    arguments = common.parser(__doc__)
    arguments.add_argument(
        "--minutes", type=float, default=MINUTES, help=f"no cell is begun that may not end within them ({MINUTES})"
    )
    args = arguments.parse_args()
    seeds, base_steps, steps, rows = SEEDS, tasks.BASE_STEPS, ADAPTER_STEPS, ROWS
    if args.quick:
        seeds, base_steps, steps, rows = (0,), dict.fromkeys(base_steps, 2), 1, 32
    settings = {"base_steps": base_steps, "steps": steps, "rows": rows, "rank": methods.RANK, "rate": methods.RATE}
    run = common.start("ccm", "What a compressed memory remembers", args, 1, settings, WORKERS, PACKAGES, timed=False)
    plan = planned(seeds, base_steps, steps, rows, run.scratch)
    if args.quick:  # every kind of cell once
        plan = {key: job for key, job in plan.items() if key.startswith(QUICK)}
    start = time.perf_counter()
    run_cells(run, {key: plan[key] for key in run.missing(list(plan))}, args.minutes, WORKERS)
    common.say(f"{time.perf_counter() - start:.0f} s in this run")
    report(run, list(plan))


if __name__ == "__main__":
    main()
