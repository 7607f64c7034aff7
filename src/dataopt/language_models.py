"""What the commands about language models share: the model that is named, and the text that is read."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging
from transformers.utils.peft_utils import find_adapter_config_file

from .devices import find_device

SMOLLM2 = "smollm2"


@dataclass(frozen=True)
class Source:
    """Where a model comes from and how it runs; the options of the command line."""

    model: str
    dtype: str = "auto"
    device: str = "auto"
    revision: str | None = None

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model in eval mode, on its device, and its tokenizer.

        Raises:
            ValueError: an impossible device, a revision of what has none, an adapter with tokens of its own, or a model
                without a language-model head.
            OSError: no such model.
            ModuleNotFoundError: smollm2 without its package.
        """
        device = find_device(self.device)
        if not sys.stderr.isatty():
            logging.disable_progress_bar()
        logging.set_verbosity_error()
        if self.model == SMOLLM2:
            from .smollm2 import load_smollm2

            if self.revision is not None:
                raise ValueError(
                    f"revision={self.revision!r} is for the Hub and {SMOLLM2} is a pip package; leave it out"
                )
            model, tokenizer = load_smollm2(torch.float32 if self.dtype == "auto" else getattr(torch, self.dtype))
        else:
            _check_adapter(self.model, self.revision)
            found: Any = AutoModelForCausalLM.from_pretrained(
                self.model, revision=self.revision, dtype=self.dtype, output_loading_info=True
            )
            model, info = found
            model.eval()
            head = model.get_output_embeddings()
            if any(model.get_submodule(key.rpartition(".")[0]) is head for key in info["missing_keys"]):
                raise ValueError(f"model={self.model!r} has no language-model head; give a model that writes text")
            tokenizer = AutoTokenizer.from_pretrained(self.model, revision=self.revision)
        moved: Any = model
        return moved.to(device), tokenizer


def _check_adapter(model: str, revision: str | None) -> None:
    """Transformers puts an adapter on its base model, whose vocabulary lacks the COMP tokens of a CCM adapter."""
    file = find_adapter_config_file(model, revision=revision)
    if file and json.loads(Path(file).read_text()).get("trainable_token_indices"):
        raise ValueError(f"model={model!r} is an adapter with tokens of its own, as CCM trains; give its base model")


def read_text(file: str) -> str:
    """The text of a file, or of stdin for ``-``, without the line break at its end.

    Raises:
        ValueError: it is not UTF-8.
        OSError: it cannot be read.
    """
    content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    return decode(content, "stdin" if file == "-" else file).rstrip("\r\n")


def decode(content: bytes, name: str) -> str:
    """UTF-8 as text; a ValueError names what is not."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{name} is not UTF-8 text (byte {e.start}); convert it first") from e


def check_out(out: Path, overwrite: bool) -> None:
    """Raises ValueError for a folder with something in it."""
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ValueError(f"--out {out} is not empty; give another folder, or --overwrite")
