"""What works with what: the tests that show it, and the table that a run of the suite makes of them.

``python -m pytest --compatibility docs/compatibility.md`` writes the table between the marks of that page.
"""

import importlib.metadata
import platform
import re
from pathlib import Path

import pytest
from dataopt.core.artifacts import write_whole

_TIMM, _HF, _LIGHTNING = "tests/integrations/timm", "tests/integrations/hf", "tests/integrations/lightning"
_KVZIP, _CCM = f"{_HF}/kvzip", f"{_HF}/ccm"
_MIX_CUDA, _MIX_TWO = "tests/core/mixup/test_cuda.py::", "tests/integrations/test_mixing.py::test_two_processes_end"
ROWS = (
    "half precision", "accumulated gradients", "several processes", "`torch.compile`", "`device_map`", "CUDA",
)  # fmt: skip
# (column, row): the tests that show it, as the start of their names
CLAIMS: dict[tuple[str, str], tuple[str, ...]] = {
    ("mixing, timm", "half precision"): (
        f"{_TIMM}/test_task.py::test_autocast",
        f"{_TIMM}/test_loop.py::test_cutmix_sw",
    ),
    ("mixing, timm", "accumulated gradients"): (f"{_TIMM}/test_loop.py::test_accumulated_gradients_are_the_mean",),
    ("mixing, timm", "several processes"): (f"{_TIMM}/test_loop.py::test_two_processes_agree",),
    ("mixing, timm", "`torch.compile`"): (f"{_TIMM}/test_task.py::test_a_compiled_task_gives_the_same",),
    ("mixing, timm", "CUDA"): (_MIX_CUDA,),
    ("mixing, Lightning", "half precision"): (f"{_LIGHTNING}/test_mixup.py::test_the_module_trains_on",),
    ("mixing, Lightning", "accumulated gradients"): (f"{_LIGHTNING}/test_mixup.py::test_accumulation_is_one",),
    ("mixing, Lightning", "several processes"): (_MIX_TWO,),
    ("mixing, Lightning", "CUDA"): (_MIX_CUDA,),
    ("mixing, transformers", "half precision"): (f"{_HF}/test_mixup.py::test_the_model_trains_on",),
    ("mixing, transformers", "accumulated gradients"): (f"{_HF}/test_mixup.py::test_accumulation_is_one",),
    ("mixing, transformers", "several processes"): (_MIX_TWO,),
    ("mixing, transformers", "CUDA"): (_MIX_CUDA,),
    ("relation graph", "half precision"): (
        f"{_HF}/test_label_cleaning.py::test_schedule_and_half_precision",
        f"{_LIGHTNING}/test_label_cleaning.py::test_precision_of_the_trainer",
    ),
    ("relation graph", "accumulated gradients"): (f"{_HF}/test_label_cleaning.py::test_weights_enter_the_gradient",),
    ("relation graph", "several processes"): (
        "tests/integrations/test_two_processes.py::test_two_processes_are_as_one",
        "tests/core/relation/test_sums.py::test_two_processes_give_the_bits",
    ),
    ("IDC", "several processes"): ("tests/core/condense/test_condenser.py::test_two_processes_give_the_result",),
    ("CCM", "half precision"): (f"{_CCM}/test_parallel.py::test_half_precision",),
    ("CCM", "accumulated gradients"): (f"{_CCM}/test_trainer.py::test_accumulated_batches",),
    ("CCM", "several processes"): (f"{_CCM}/test_two_processes.py::test_two_processes_are_as_one",),
    ("KVzip", "half precision"): (f"{_KVZIP}/test_architectures.py::test_half_precision",),
    ("KVzip", "`torch.compile`"): (f"{_KVZIP}/test_architectures.py::test_a_compiled_model",),
    ("KVzip", "`device_map`"): (f"{_KVZIP}/test_architectures.py::test_device_map",),
}
# column: tests with a parameter for each model
MODELS = {
    "KVzip": f"{_KVZIP}/test_architectures.py::test_packed_is_full_attention_with_a_mask_per_head[",
    "CCM": f"{_CCM}/test_parallel.py::test_every_architecture[",
}
PACKAGES = (
    "torch", "torchvision", "numpy", "scipy", "scikit-learn", "numba", "timm", "accelerate", "transformers", "peft",
    "datasets", "huggingface_hub", "lightning", "cleanlab", "torchmetrics",
)  # fmt: skip
START, END = "<!-- made by the tests -->", "<!-- end -->"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--compatibility", type=Path, metavar="PAGE", help="write what works with what into this page")


def pytest_configure(config: pytest.Config) -> None:
    page = config.getoption("--compatibility")
    if page and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Collector(page))


class _Collector:
    def __init__(self, page: Path) -> None:
        self.page, self.outcomes = page, {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":  # a skip or an error before the call
            self.outcomes[report.nodeid] = report.outcome

    def pytest_sessionfinish(self) -> None:
        text = self.page.read_text()
        before, rest = text.split(START)
        write_whole(self.page, f"{before}{START}\n\n{table(self.outcomes)}\n\n{END}{rest.split(END)[1]}")


def table(outcomes: dict[str, str]) -> str:
    """The page's part: features by host, models, versions."""
    columns = list(dict.fromkeys(column for column, _ in CLAIMS))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in ROWS:
        lines.append(
            f"| {row} | " + " | ".join(_cell(CLAIMS.get((column, row), ()), outcomes) for column in columns) + " |"
        )
    for column, start in MODELS.items():
        kinds: dict[str, set[str]] = {}
        for name, outcome in outcomes.items():
            if name.startswith(start):
                kinds.setdefault(_kind(name.removeprefix(start)), set()).add(outcome)
        good = ", ".join(sorted(kind for kind, found in kinds.items() if found == {"passed"}))
        lines += ["", f"Models with {column}: {good}."]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    lines += ["", f"Python {platform.python_version()} on {platform.system()} {platform.machine()}, {versions}."]
    return "\n".join(lines)


def _cell(starts: tuple[str, ...], outcomes: dict[str, str]) -> str:
    found = {outcome for name, outcome in outcomes.items() if name.startswith(starts)} if starts else set()
    missing = any(not any(name.startswith(start) for name in outcomes) for start in starts)
    if not starts:
        return "–"
    if missing or not found:
        return "not run"
    if "failed" in found:
        return "fails"
    return "yes" if "passed" in found else "not run here"


def _kind(parameters: str) -> str:
    """The model's name out of "llama-0.7]" or "merge-llama]"."""
    words = [w for w in re.split(r"[-\]]", parameters) if w and not re.fullmatch(r"[\d.]+|concat|merge", w)]
    return words[0] + (" with sliding layers" if "sliding" in words else "")
