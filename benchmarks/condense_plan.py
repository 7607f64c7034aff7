"""Every cell of condense.py by its name, in the order in which they run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import condense_data as source
from condense_cells import (
    EPOCHS,
    PARTS,
    SETTINGS,
    Row,
    Setup,
    fixed_compute,
    norms,
    of_age,
    pretrain,
    real_images,
    scored,
    shrunk,
    transfer,
)
from mixup import Job

IMAGES, SPEECH = ("digits", "Fashion-MNIST", "CIFAR-10"), "spoken digits"
FACTORS = {  # of the main rows, at images a class; two condensation seeds each
    ("digits", 1): (1,), ("Fashion-MNIST", 1): (2, 1), ("CIFAR-10", 1): (3, 2, 1), ("digits", 10): (1,),
    ("Fashion-MNIST", 10): (1,), ("CIFAR-10", 10): (2, 1), (SPEECH, 1): (2, 1),
}  # fmt: skip
GROUPS = tuple(FACTORS)


def idc_rows(data: str, per_class: int) -> list[Row]:
    return [Row(data, per_class, "IDC", f, seed) for f in FACTORS[data, per_class] for seed in (0, 1)]


def fresh_rows() -> list[Row]:
    """Every row of IDC with networks that nothing has trained yet."""
    rows = [row for group in GROUPS for row in idc_rows(*group)] + factor_rows()
    return [dataclasses.replace(row, method="fresh networks") for row in rows]


def rival_rows(data: str, per_class: int) -> list[Row]:
    """DSA and DM; two condensation seeds at one image a class."""
    seeds = (0, 1) if per_class == 1 and data != SPEECH else (0,)
    return [Row(data, per_class, rival, 1, seed) for seed in seeds for rival in ("DSA", "DM")]


def factor_rows() -> list[Row]:
    """What Table 6.7 needs beside the main rows."""
    out = [Row("digits", 1, "IDC", f) for f in (2, 3, 4)] + [Row("digits", 10, "IDC", 2)]
    out += [Row("Fashion-MNIST", 1, "IDC", f) for f in (3, 4)] + [Row("Fashion-MNIST", 10, "IDC", 2)]
    return [*out, Row("CIFAR-10", 1, "IDC", 4)]


def setting_rows() -> list[Row]:
    return [Row("Fashion-MNIST", 1, m, 2) for m in SETTINGS] + [Row("CIFAR-10", 1, "feature matching from centres", 2)]


def part_rows() -> list[Row]:
    return [Row("Fashion-MNIST", 1, m, 1, seed) for seed in (0, 1) for m in PARTS]


TRANSFER, SHRINK, FIXED, GRADIENTS = "transfer", "shrunk afterwards", "fixed compute", "gradient norms"
TRANSFERRED: dict[str, Row | str] = {
    "random": "random", "herding": "herding", "DSA": Row("CIFAR-10", 1, "DSA"), "DM": Row("CIFAR-10", 1, "DM"),
}  # fmt: skip
TILED = {"IDC-I": 1, "IDC, factor 2": 2, "IDC, factor 3": 3}
TRANSFERRED |= {name: Row("CIFAR-10", 1, "IDC", f) for name, f in TILED.items()}
TRANSFERRED |= {f"{name}, fresh networks": Row("CIFAR-10", 1, "fresh networks", f) for name, f in TILED.items()}
COMPUTE = tuple(Row("CIFAR-10", 10, "fresh networks", f) for f in (1, 2))
SHRUNK = tuple(Row(data, 4, "fresh networks") for data in ("Fashion-MNIST", "CIFAR-10"))
NORMS = Row("CIFAR-10", 10, "DSA")


def planned(setup: Setup) -> dict[str, Job]:
    def rows(wanted: Iterable[Row]) -> dict[str, Job]:
        return {row.name: (scored, (row, setup)) for row in wanted}

    if setup.quick:
        few = [Row("digits", 1), Row("digits", 1, "DSA"), Row("digits", 10, "IDC", 2), Row("digits", 1, "DM")]
        return rows(few) | {real_name("digits", 1, h): (real_images, ("digits", 1, h, setup)) for h in source.REAL}
    out: dict[str, Job] = {}
    for groups in ([(d, 1) for d in IMAGES], [(d, 10) for d in IMAGES], [(SPEECH, 1)]):
        for data, n in groups:
            out |= {real_name(data, n, how): (real_images, (data, n, how, setup)) for how in source.REAL}
            out |= rows(idc_rows(data, n))
        for group in groups:
            out |= rows(rival_rows(*group))
    out |= rows([*part_rows()[: len(PARTS)], *setting_rows(), *factor_rows()])
    out |= {name_of(TRANSFER, what): (transfer, (what, 1, setup)) for what in TRANSFERRED.values()}
    out |= {name_of(SHRINK, row): (shrunk, (row, setup)) for row in SHRUNK}
    out |= {name_of(FIXED, row): (fixed_compute, (row, setup)) for row in COMPUTE}
    out[name_of(GRADIENTS, NORMS)] = norms, (NORMS, setup)
    out |= {f"networks of every age, seed {seed}": (pretrain, (seed, setup)) for seed in (0, 1)}
    out |= {f"condensed with epoch {age}": (of_age, (age, setup)) for age in EPOCHS}
    return out | rows(part_rows()) | rows(fresh_rows())


def name_of(kind: str, what: Row | str) -> str:
    """Of a cell that looks at a condensed set, whose budget is then in the name, or at real images."""
    return f"{kind}: {what.name if isinstance(what, Row) else what}"


def real_name(data: str, per_class: int, how: str) -> str:
    return f"{data}, {per_class} per class: {how}"
