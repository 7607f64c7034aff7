"""Hugging Face: compressed caches for ``generate``, and functions for ``datasets``; imported on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..saliency_maps import as_tv_tensors
    from .data import add_saliency
    from .kvzip import KVzipCache

__all__ = ["KVzipCache", "add_saliency", "as_tv_tensors"]

_MODULES = {"KVzipCache": ".kvzip", "add_saliency": ".data", "as_tv_tensors": "..saliency_maps"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_MODULES[name], __name__), name)
    except ModuleNotFoundError as e:
        if e.name is None or e.name.partition(".")[0] not in (
            "datasets",
            "PIL",
            "huggingface_hub",
            "transformers",
            "xxhash",
        ):
            raise
        raise ModuleNotFoundError(f"{name} needs {e.name}: pip install 'dataopt[hf]'", name=e.name) from e
