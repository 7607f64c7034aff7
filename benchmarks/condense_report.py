"""Tables, figures and floors of condense.py, from the cells that have run."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

import common
import condense_data as source
import numpy as np
from cifar10 import spread
from condense_cells import AGE_STEPS, BUDGETS, EPOCH, EPOCHS, LONG, PART_STEPS, PARTS, SETTINGS, TEST_SEEDS, Row
from condense_plan import (
    COMPUTE,
    FIXED,
    GRADIENTS,
    GROUPS,
    NORMS,
    SHRINK,
    SHRUNK,
    TRANSFER,
    TRANSFERRED,
    name_of,
    real_name,
)
from dataopt import plots
from mixup import picture

FLOORS = (  # data, factors, least accuracy, least gain over the init
    ("digits", (1,), 88.0, None),
    ("Fashion-MNIST", (2,), 74.0, 7.0),
    ("CIFAR-10", (2, 3), 34.0, None),
)


def cells_of(run: common.Run, row: Row) -> list[common.Cell]:
    """Those of every condensation seed that has run."""
    return [cell for key, cell in run.cells.items() if key.startswith(f"{row.group}, seed")]


def accuracies(cells: Sequence[common.Cell], of: str = "accuracies") -> list[float]:
    return [a for cell in cells for a in cell.get(of, [])]


def line_of(run: common.Run, row: Row, name: str) -> list[object] | None:
    cells = cells_of(run, row)
    if not cells:
        return None
    found, start = accuracies(cells), accuracies(cells, "start")
    minutes = statistics.mean(c["processor_seconds"] for c in cells) / 60
    gain = f"{statistics.mean(found) - statistics.mean(start):+.1f}" if start else ""
    return [
        name, cells[0]["init"], len(cells), cells[0]["steps"], f"{minutes:.1f}", cells[0]["shown"],
        cells[0]["evaluation_steps"], spread(found), spread(start) if start else "", gain,
    ]  # fmt: skip


HEADER = ["", "starts from", "seeds", "steps", "minutes", "shown", "test steps", "accuracy %", "start alone %", "gain"]


def main_table(run: common.Run, data: str, per_class: int) -> list[str]:
    lines: list[list[object]] = []
    for how in source.REAL:
        cell = run.cells.get(real_name(data, per_class, how))
        if cell:
            shown, steps = cell["shown"], cell["evaluation_steps"]
            lines.append([how, "", "", "", "", shown, steps, spread(cell["accuracies"]), "", ""])
    wanted = [(Row(data, per_class, rival), rival) for rival in ("DSA", "DM")]
    for f in BUDGETS[data, per_class]:
        name = f"IDC, factor {f}" if f > 1 else "IDC-I (factor 1)"
        wanted += [(Row(data, per_class, "IDC", f), name)]
        wanted += [(Row(data, per_class, "fresh networks", f), f"{name}, fresh networks")]
    found = [line_of(run, row, name) for row, name in wanted]
    lines += [line for line in found if line]
    return [f"{data}, {per_class} stored per class:", common.table(HEADER, lines)] if lines else []


def verdicts(run: common.Run) -> list[str]:
    """The floors, each beside random, herding and the start; the best factor where there are several."""
    out = []
    for data, factors, least, gain in FLOORS:
        rows = [(Row(data, 1, "IDC", f), cells_of(run, Row(data, 1, "IDC", f))) for f in factors]
        rows = [(row, cells) for row, cells in rows if len(cells) >= 2]
        if not rows:
            out.append(f"{data}, 1 per class: not measured with two condensation seeds yet, so no verdict.")
            continue
        row, cells = max(rows, key=lambda pair: statistics.mean(accuracies(pair[1])))
        found, start = statistics.mean(accuracies(cells)), statistics.mean(accuracies(cells, "start"))
        beside = {
            how: statistics.mean(run.cells[key]["accuracies"])
            for how in source.REAL
            if (key := real_name(data, 1, how)) in run.cells
        }
        shown = ", ".join(f"{name} {value:.1f}" for name, value in (beside | {"its start": start}).items())
        what = f"{data}, 1 per class, factor {row.factor}, % after {cells[0]['evaluation_steps']} steps"
        out.append(f"{common.verdict(what, found, least=least)} Beside it: {shown}.")
        if gain is not None:
            out.append(common.verdict(f"its points above the start ({start:.1f} %)", found - start, least=gain))
    return out


def explained(run: common.Run) -> list[str]:
    """Where the start alone explains the gain."""
    none = []
    for data, per_class in GROUPS:
        for factor in BUDGETS[data, per_class]:
            cells = cells_of(run, Row(data, per_class, "IDC", factor))
            found, start = accuracies(cells), accuracies(cells, "start")
            if found and start and statistics.mean(found) - statistics.mean(start) < 1:
                none.append(f"{data} {per_class} per class factor {factor}")
    if not none:
        return []
    return [f"The start alone explains the accuracy (condensing adds less than a point to it): {'; '.join(none)}."]


def factors_table(run: common.Run) -> list[str]:
    lines = []
    for (data, per_class), method in itertools.product(GROUPS, ("IDC", "fresh networks")):
        row = [f"{data}, {per_class} per class, {method}", "", "", "", ""]
        for factor in BUDGETS[data, per_class]:
            cells = cells_of(run, Row(data, per_class, method, factor))
            start = accuracies(cells, "start")
            row[factor] = f"{spread(accuracies(cells))} ({statistics.mean(start):.1f})" if start else ""
        if sum(map(bool, row)) > 2:
            lines.append(row)
    if not lines:
        return []
    title = "Factors (Table 6.7), accuracy % and in brackets the start alone; steps as in the tables above:"
    return [title, common.table(["", "1", "2", "3", "4"], lines)]


def parts_table(run: common.Run) -> list[str]:
    out = []
    lines = [line for m in PARTS if (line := line_of(run, Row("Fashion-MNIST", 1, m, 1), m))]
    if lines:
        out += [
            f"What the parts bring (Table 6.5): Fashion-MNIST, 1 per class, factor 1, {PART_STEPS} steps each under "
            "networks trained for 4 batches between two steps, on synthetic (Syn) or real images; Reg is CutMix:",
            common.table(HEADER, lines),
        ]
    for data, title in (
        ("Fashion-MNIST", "Other settings, each with fresh networks: Fashion-MNIST, 1 per class, factor 2:"),
        ("CIFAR-10", "The same on CIFAR-10:"),
    ):
        lines = [line for m in ("fresh networks", *SETTINGS) if (line := line_of(run, Row(data, 1, m, 2), m))]
        if len(lines) > 1:
            out += [title, common.table(HEADER, lines)]
    return out


def transfer_table(run: common.Run) -> list[str]:
    keys = {name: name_of(TRANSFER, what) for name, what in TRANSFERRED.items()}
    cells = {name: run.cells[key] for name, key in keys.items() if key in run.cells}
    if not cells:
        return []
    networks, lines = list(source.transfer_networks()), []
    for name, cell in cells.items():
        what = TRANSFERRED[name]
        key = what.name if isinstance(what, Row) else real_name("CIFAR-10", 1, what)
        own = spread(run.cells[key]["accuracies"]) if key in run.cells else ""
        lines.append([name, own, *(spread(cell["accuracies"][n]) for n in networks)])
    title = "Other test networks (Table 6.1): CIFAR-10, 1 per class, condensation seed 0, accuracy %:"
    return [title, common.table(["", "ConvNet-3", *networks], lines)]


def compute_table(run: common.Run) -> list[str]:
    lines = []
    for row in COMPUTE:
        cell = run.cells.get(name_of(FIXED, row))
        for name in ("own", "same"):
            if cell and name in cell:
                what = "epochs of its own" if name == "own" and row.factor > 1 else "steps of factor 1"
                lines.append([f"factor {row.factor}", what, cell[name]["steps"], spread(cell[name]["accuracies"])])
    if not lines:
        return []
    title = (
        f"Fixed training steps (Table 6.2): CIFAR-10, 10 per class, condensed with fresh networks, {LONG} epochs, "
        "condensation seed 0:"
    )
    return [title, common.table(["", "trained for", "steps", "accuracy %"], lines)]


def shrunk_table(run: common.Run) -> list[str]:
    lines = []
    for row in SHRUNK:
        cell = run.cells.get(name_of(SHRINK, row))
        if cell:
            found = accuracies(cells_of(run, Row(row.data, 1, "fresh networks", 2)))
            idc = spread(found) if found else ""
            lines.append([row.data, idc, spread(cell["shrunk"]), spread(cell["whole"]), cell["evaluation_steps"]])
    if not lines:
        return []
    header = ["", "IDC, 1 stored", "IDC-I of 4, shrunk to 1", "IDC-I, 4 stored", "test steps"]
    return ["Shrinking afterwards (Table 6.6), with fresh networks, accuracy %:", common.table(header, lines)]


def norms_figure(run: common.Run) -> list[str]:
    cell = run.cells.get(name_of(GRADIENTS, NORMS))
    if not cell:
        return []
    panels = {
        trained: {name: (cell["x"], cell[f"{trained}, norm on {name}"]) for name in ("synthetic", "real")}
        for trained in ("trained on synthetic", "trained on real")
    }
    ends = [
        [trained, name, *(f"{curve[i]:.1f}" for i in (0, len(curve) // 4, -1))]
        for trained, curves in panels.items()
        for name, (_, curve) in curves.items()
    ]
    x = cell["x"]
    header = ["network", "L1 norm on", *(f"step {x[i]}" for i in (0, len(x) // 4, -1))]
    return [
        "Gradient norms (Figure 6.4): CIFAR-10, a set condensed by DSA, 10 per class:",
        picture(run, "figure_6_4", plots.show_curves(panels, "training steps of the network")),
        common.table(header, ends),
    ]


def age_figure(run: common.Run) -> list[str]:
    left = {age: run.cells[key]["accuracies"] for age in EPOCHS if (key := f"condensed with epoch {age}") in run.cells}
    keys = [f"networks of every age, seed {seed}" for seed in (0, 1)]
    if len(left) < len(EPOCHS) or not all(key in run.cells for key in keys):
        return []
    right = {what: np.mean([run.cells[key][what] for key in keys], 0).tolist() for what in ("norm", "cosine")}
    panels = {
        "accuracy %": {"condensed": (EPOCHS, [statistics.mean(v) for v in left.values()])},
        "L1 norm of a class": {"gradient": (EPOCHS, right["norm"])},
        "cosine in a class": {"gradient": (EPOCHS, right["cosine"])},
    }
    lines = [
        [age, spread(v), f"{n:.1f}", f"{c:.3f}"]
        for (age, v), n, c in zip(left.items(), right["norm"], right["cosine"], strict=True)
    ]
    return [
        f"Networks of one age (Figure 6.5): CIFAR-10, 1 per class, factor 2, {AGE_STEPS} steps under two networks that "
        f"stay as they are; an epoch is {EPOCH} batches of 64:",
        picture(run, "figure_6_5", plots.show_curves(panels, "epoch")),
        common.table(["epoch", "accuracy %", "L1 norm", "cosine"], lines),
    ]


def report(run: common.Run, plan: Sequence[str]) -> None:
    ran = run.ran(plan)
    if not run.cells:
        print(ran)
        return
    parts = [
        f"{ran} Accuracy on all test images after the last step, mean +- standard deviation over condensation seeds "
        f"and {len(TEST_SEEDS)} test networks each. Minutes are the processor's, of one condensation in one "
        "thread; shown are the images that a test network trains on.",
        *verdicts(run),
        *explained(run),
    ]
    for group in GROUPS:
        parts += main_table(run, *group)
    for part in (
        factors_table, parts_table, transfer_table, compute_table, shrunk_table, norms_figure, age_figure,
    ):  # fmt: skip
        parts += part(run)
    run.report(*parts)
