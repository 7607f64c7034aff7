"""Lightning: callbacks for the Trainer, and what they need in the data and the loss; imported on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..cleanable import CleanableDataset, weighted_loss
    from ..snapshots import read_snapshots
    from .condensed import CondensedDataModule
    from .label_cleaning import LabelCleaningCallback
    from .mixup import CoMixupCallback, PuzzleMixCallback

__all__ = [
    "CleanableDataset",
    "CoMixupCallback",
    "CondensedDataModule",
    "LabelCleaningCallback",
    "PuzzleMixCallback",
    "read_snapshots",
    "weighted_loss",
]

_MODULES = {
    "CleanableDataset": "..cleanable",
    "CoMixupCallback": ".mixup",
    "CondensedDataModule": ".condensed",
    "LabelCleaningCallback": ".label_cleaning",
    "PuzzleMixCallback": ".mixup",
    "read_snapshots": "..snapshots",
    "weighted_loss": "..cleanable",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_MODULES[name], __name__), name)
    except ModuleNotFoundError as e:
        if e.name is None or e.name.partition(".")[0] != "lightning":
            raise
        raise ModuleNotFoundError(
            f'{name} needs {e.name}; get it with: pip install "dataopt[lightning]"', name=e.name
        ) from e
