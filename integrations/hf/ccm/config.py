"""How a memory is compressed and trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from dataopt.core.ccm.layout import check_options

from .. import hub

KIND, VERSION, FILE = "dataopt ccm adapter", 1, "ccm_config.json"


@dataclass(frozen=True)
class CCMConfig:
    """Options of :class:`CCMModel`.

    Attributes:
        mode: "concat" keeps the COMP pairs of every context, "merge" their average (section 7.3.1).
        comp_tokens: n, COMP tokens of a context.
        r, lora_alpha, lora_dropout: of the LoRA; 8, 16 and .05 in the released code.
        target_modules: names of the linear layers that get it; None takes those of the attention, as the released
            code does.
        conditional: the LoRA works on COMP tokens only (eq. 7.4); False is ordinary LoRA, for comparison.
        recurrent: contexts see the memory of those before them; False is what the released code does for MetaICL and
            LaMP.
        positions: "cache" keeps positions small, so conversations may go on for ever; "abs" counts all text, as the
            released code does.
        ema: of mode "merge": a constant a_t; None is the arithmetic mean.
        sink: the tokenizer's first token stays visible to all, uncompressed (an attention sink).
        comp_ids: token ids that serve as COMP, such as reserved ones; None appends new ones to the vocabulary.
    """

    mode: str = "concat"
    comp_tokens: int = 2
    r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    target_modules: Sequence[str] | None = None
    conditional: bool = True
    recurrent: bool = True
    positions: str = "cache"
    ema: float | None = None
    sink: bool = False
    comp_ids: Sequence[int] | None = None

    def __post_init__(self) -> None:
        check_options(self.mode, self.positions, self.ema, self.comp_tokens)
        if type(self.r) is not int or self.r < 1:
            raise ValueError(f"r={self.r!r} must be a whole number of at least 1")
        numbers = {"lora_alpha": "above 0 and finite", "lora_dropout": "in [0, 1)"}
        for name, where in numbers.items():
            value = getattr(self, name)
            fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
            if not fits or (value == 0 if name == "lora_alpha" else value >= 1):
                raise ValueError(f"{name}={value!r:.40} must be a number {where}")
        for name in ("conditional", "recurrent", "sink"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False")
        if isinstance(self.target_modules, str):
            raise ValueError(f"target_modules={self.target_modules!r} must be a list of names, or None")
        for name in ("target_modules", "comp_ids"):
            if getattr(self, name) is not None:  # a list, as it comes back from a file
                object.__setattr__(self, name, list(getattr(self, name)))
        if not all(isinstance(name, str) for name in self.target_modules or ()):
            raise ValueError(f"target_modules={self.target_modules!r:.80} must be a list of names, or None")
        if self.comp_ids is not None:
            ids = list(self.comp_ids)
            if len(set(ids)) != self.comp_tokens or any(type(i) is not int or i < 0 for i in ids):
                raise ValueError(f"comp_ids={ids} must be comp_tokens={self.comp_tokens} different token ids")

    def save(self, folder: Path, vocabulary: int, weights: str | None = None) -> None:
        """Write ``ccm_config.json``.

        Args:
            vocabulary: rows of the base model's embedding before COMP tokens were appended.
            weights: checksum of the weights' file, if they lie in one.
        """
        content = {"options": asdict(self), "vocabulary": vocabulary, "weights": weights}
        hub.write_record(folder / FILE, KIND, VERSION, content)

    @classmethod
    def load(cls, folder: Path) -> tuple[CCMConfig, int, str | None]:
        """The options, the vocabulary and the checksum of the weights from ``ccm_config.json``.

        Raises:
            ValueError: a file that is missing, damaged, of another kind or of a newer format.
        """
        path = hub.member(folder, FILE)
        record = hub.read_record(path, KIND, VERSION)
        options: Any = record.get("options")
        vocabulary = record.get("vocabulary")
        names = {f.name for f in fields(cls)}
        if not isinstance(options, dict) or options.keys() != names or type(vocabulary) is not int or vocabulary < 1:
            raise ValueError(f"{path} does not hold the options of a CCM adapter; save or download it again")
        try:
            return cls(**options), vocabulary, record.get("weights")
        except (TypeError, ValueError) as e:
            raise ValueError(f"{path}: {e}") from e

    def with_ids(self, comp_ids: Sequence[int]) -> CCMConfig:
        """The same options with the COMP ids known."""
        return replace(self, comp_ids=list(comp_ids))
