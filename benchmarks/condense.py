"""Condensed data sets beside what the same storage gives otherwise: the thesis' tables and figures of chapter 6, small.

Digits, Fashion-MNIST and CIFAR-10 (JPEG) at 1 and 10 stored images a class, spoken digits (FSDD spectrograms, cut along
time) at 1: random and herded images, the images that condensation starts from, DSA, DM, IDC-I (factor 1) and IDC, also
with networks that nothing trained before they are matched. Then factors 1 to 4 (Table 6.7), other test networks (Table
6.1), as many training steps for all (Table 6.2), what the parts bring (Table 6.5), shrinking afterwards (Table 6.6),
gradient norms (Figure 6.4), and networks of one age (Figure 6.5).

A row is the mean over condensation seeds (two where the report says so) and three test networks each, after the last of
a fixed number of steps with hard labels. DSA and DM are ours over the same parts: random real images to start from,
Adam, and for DSA networks trained on the synthetic images, cosine distance and a new siamese draw at every step.
Networks are narrow and runs take seconds to minutes; the thesis condenses for hours on a GPU (condense_gpu.py).

Two processes of one thread; the main rows come first. No cell is begun that might not end within --minutes, and the
report says which have run: call the script again for the others.
"""

from __future__ import annotations

import shutil

import common
import condense_cells as cells
import condense_data as source
from condense_plan import GROUPS, planned
from condense_report import report
from mixup import run_cells

WORKERS = 2
MINUTES = 60
PACKAGES = ("dataopt", "torch", "torchvision", "numpy", "scikit-learn")


def main() -> None:
    arguments = common.parser(__doc__)
    common.add_data_option(arguments)
    arguments.add_argument(
        "--minutes", type=float, default=MINUTES, help=f"no cell is begun that may not end within them ({MINUTES})"
    )
    args = arguments.parse_args()
    settings = {
        "methods": cells.METHODS, "rates": cells.RATES, "evaluation": cells.EVALUATION,
        "ages": [cells.EPOCH, cells.EPOCHS, cells.AGE_STEPS], "norms": [cells.NORM_STEPS, cells.NORM_EVERY],
        "long": cells.LONG,
    }  # fmt: skip
    run = common.start("condense", "Condensed data sets", args, 1, settings, WORKERS, PACKAGES, timed=False)
    setup = cells.Setup(args.data, run.scratch, args.quick)
    if args.fresh:
        shutil.rmtree(cells.kept_in(setup), ignore_errors=True)
    plan = planned(setup)
    missing = run.missing(list(plan))
    if missing and not args.quick:
        source.check(args.data, {name for name, _ in GROUPS})
    run_cells(run, {key: plan[key] for key in missing}, args.minutes, WORKERS)
    report(run, list(plan))


if __name__ == "__main__":
    main()
