"""Puzzle Mix and Co-Mixup inside timm training.

Names are imported on first use, so that ``dataopt train`` can let a timm checkout beside its
``train.py`` come first, as ``python train.py`` does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .collate import CoMixupCollate, PuzzleCollate
    from .mixup import CoMixupFn, PuzzleMixup
    from .sidecar import SaliencyFolder
    from .task import CoMixupTask, PuzzleMixTask

__all__ = [
    "CoMixupCollate",
    "CoMixupFn",
    "CoMixupTask",
    "PuzzleCollate",
    "PuzzleMixTask",
    "PuzzleMixup",
    "SaliencyFolder",
]

_MODULES = {
    "CoMixupCollate": "collate",
    "CoMixupFn": "mixup",
    "CoMixupTask": "task",
    "PuzzleCollate": "collate",
    "PuzzleMixTask": "task",
    "PuzzleMixup": "mixup",
    "SaliencyFolder": "sidecar",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    except ModuleNotFoundError as e:
        if e.name is None or e.name.partition(".")[0] not in ("timm", "torchvision"):
            raise
        raise ModuleNotFoundError(
            f'{name} needs {e.name}; get it with: pip install "dataopt[timm]"', name=e.name
        ) from e
