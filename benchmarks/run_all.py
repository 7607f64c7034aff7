"""Run every benchmark, in an order in which the trained network is made once.

Options are passed on: --fresh, --quick, --out FOLDER, --data FOLDER.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

# (script, whether it takes --data); cifar10 leaves the plainly trained network for the two below it, relation_data its
# samples for the four below it
SCRIPTS = (
    ("solver_time", False),
    ("transport_time", False),
    ("comixup_time", False),
    ("cifar10", True),
    ("figure_3_2", True),
    ("step_time", True),
    ("mixup", True),
    ("mixup_text", True),
    ("kvzip_quality", False),
    ("kvzip_variants", False),
    ("kvzip_speed", False),
    ("kvzip_kvpress", False),
    ("ccm", False),
    ("ccm_speed", False),
    ("ccm_stream", False),
    ("relation_data", True),
    ("relation_labels", True),
    ("relation_rules", True),
    ("relation_outliers", True),
    ("relation_after_cleaning", True),
    ("relation_rounds", True),
    ("relation_speed", True),
    ("condense", True),
    ("condense_speed", True),
    ("endurance", False),
)


def main(argv: list[str]) -> int:
    """Run the scripts in processes of their own; the number of those that failed."""
    data = []
    if "--data" in argv:
        at = argv.index("--data")
        data, argv = argv[at : at + 2], argv[:at] + argv[at + 2 :]
    failed = []
    start = time.perf_counter()
    for name, takes_data in SCRIPTS:
        print(f"\n=== {name}", flush=True)
        script = Path(__file__).with_name(f"{name}.py")
        if subprocess.run([sys.executable, script, *argv, *(data if takes_data else [])]).returncode:
            failed.append(name)
    print(f"\n{len(SCRIPTS) - len(failed)} of {len(SCRIPTS)} benchmarks in {time.perf_counter() - start:.0f} s")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
