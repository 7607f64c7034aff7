"""The result: a condensed data set, and its files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_channels, check_choice, check_label_names, check_strings, check_tensors
from . import files
from .formation import MultiFormation
from .real import normalise

NAME = "condensed"  # condensed.json and condensed-*.safetensors


@dataclass(frozen=True, eq=False)
class Condensed:
    """A condensed data set: what is stored, and how to make training images of it.

    Attributes:
        images: (n, C, H, W) float32 in [0, 1], as stored: tiles, for a factor above 1.
        labels: (n,) int64 class ids.
        factor, axes, mode: of the :class:`MultiFormation` that decodes; mode ``"single"`` or ``"multi"``.
        mean, std: per channel, of the source data; networks take (pixels - mean) / std.
        made: what made it: settings, versions, and the SHA-256 of the source; values that JSON can hold.
        label_names: of classes 0, 1, ..., or None.

    Examples:
        >>> import torch
        >>> from dataopt.core.condense import Condensed
        >>> c = Condensed(torch.rand(2, 1, 8, 8), torch.tensor([0, 1]), factor=2)
        >>> images, labels = c.decode()
        >>> images.shape, labels.tolist()
        (torch.Size([8, 1, 8, 8]), [0, 0, 0, 0, 1, 1, 1, 1])
    """

    images: Tensor
    labels: Tensor
    factor: int = 1
    axes: str = "space"
    mode: str = "single"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    made: dict[str, Any] = field(default_factory=dict)
    label_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_tensors(images=self.images, labels=self.labels)
        check_strings(mode=self.mode)
        x, y = self.images, self.labels
        if x.ndim != 4 or not x.numel() or x.dtype != torch.float32:
            raise ValueError(f"images is {x.dtype} of shape {tuple(x.shape)}; give (n, C, H, W) float32")
        low, high = (float(v) for v in x.aminmax())
        if not (low >= 0 and high <= 1):
            raise ValueError(f"images holds values from {low:g} to {high:g}; give finite pixels in [0, 1]")
        if y.dtype != torch.int64 or y.shape != (len(x),) or int(y.min()) < 0:
            raise ValueError(f"labels is {y.dtype} of shape {tuple(y.shape)}; give ({len(x)},) int64 class ids from 0")
        check_choice(("single", "multi"), mode=self.mode)
        self.formation.check((x.shape[2], x.shape[3]))
        check_channels(self.mean, self.std, x.shape[1])
        for name in ("mean", "std"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(float(v) for v in getattr(self, name)))
        if not isinstance(self.made, dict):
            raise TypeError(f"made is a {type(self.made).__name__}; give a dict")
        check_label_names(self.label_names)
        if self.label_names is not None and len(self.label_names) <= int(y.max()):
            raise ValueError(
                f"label_names has {len(self.label_names)} names for labels up to {int(y.max())}; give one a class"
            )

    def __repr__(self) -> str:  # not every pixel
        stored = " x ".join(map(str, self.images.shape))
        return (
            f"Condensed({stored}, {self.classes} classes, factor={self.factor}, axes={self.axes!r}, mode={self.mode!r})"
        )

    @property
    def formation(self) -> MultiFormation:
        """What decodes the stored images."""
        return MultiFormation(self.factor, self.axes, self.mode)

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1

    def decode(self, normalised: bool = False) -> tuple[Tensor, Tensor]:
        """Images and labels to train on.

        Args:
            normalised: subtract the mean and divide by the std of the source.

        Returns:
            (n', C, H, W) float32 and (n',) int64; those of one stored image stand together.
        """
        x = self.formation(self.images)
        if normalised:
            if self.mean is None or self.std is None:
                raise ValueError("normalised=True needs mean and std, which this data set does not have; leave it out")
            x = normalise(x, self.mean, self.std)
        return x, self.formation.labels(self.labels)

    def save(self, folder: str | Path) -> None:
        """Write ``condensed-*.safetensors`` and ``condensed.json``; what was saved there before is replaced at the end.

        Raises:
            OSError: the disk is full or the folder is read-only; what was there before stays whole.
        """
        record = {"kind": NAME, "factor": self.factor, "axes": self.axes, "mode": self.mode, "mean": self.mean,
                  "std": self.std, "made": self.made, "label_names": self.label_names}  # fmt: skip
        files.write(Path(folder), NAME, {"images": self.images, "labels": self.labels}, record)

    @classmethod
    def load(cls, folder: str | Path) -> Condensed:
        """Read what :meth:`save` wrote, bit for bit.

        Raises:
            FileNotFoundError: the folder holds no condensed data set.
            ValueError: files that are cut short, changed or damaged; the message says what differs.
        """
        path = Path(folder)
        try:
            tensors, record = files.read(path, NAME)
        except FileNotFoundError as e:
            raise FileNotFoundError(f"{path} holds no condensed data set: {e}") from e
        try:
            if record["kind"] != NAME or set(tensors) != {"images", "labels"}:
                raise ValueError(f"kind={record['kind']!r:.40} with the tensors {sorted(tensors)}")
            mean, std, names = (None if record[k] is None else tuple(record[k]) for k in ("mean", "std", "label_names"))
            return cls(
                tensors["images"], tensors["labels"], record["factor"], record["axes"], record["mode"],
                mean, std, dict(record["made"]), names,
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as e:
            raise ValueError(
                f"{path / NAME}.json is no record of a condensed data set ({e}); save or download it again"
            ) from e
