"""A condensed data set as a Lightning data module."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dataopt.core.arguments import check_flags, check_strings, check_whole
from dataopt.core.condense import Condensed
from dataopt.core.condense.evaluate import training_augment
from dataopt.core.condense.real import normalise
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, TensorDataset

from ..mixing import batch_generator


class CondensedDataModule(LightningDataModule):
    """Trains on the decoded images of a condensed data set, validates and tests on data that is given.

    Batches are (B, C, H, W) images, normalised with the mean and standard deviation of the source data, and (B,) class
    ids::

        data = CondensedDataModule("me/cifar10-idc", val=CIFAR10("data", train=False))
        Trainer(max_epochs=300).fit(module, datamodule=data)

    Args:
        source: repository id, or a folder that was published to or that ``Condensed.save`` wrote.
        val, test: data sets of (image, class id), or of rows with ``image`` and ``label`` as those of Hugging Face;
            images PIL, tensors (C, H, W) or arrays (H, W, C), uint8 or floating in [0, 1], in the size of the condensed
            ones and not normalised.
        batch_size: of all three.
        repeats: how many times an epoch passes over the images, which are few.
        augment: training images by random colour, crop and so on, as :func:`evaluate` does by default.
        normalised: False leaves the pixels in [0, 1].
        config, revision, cache_dir, local_files_only: as in :func:`load_condensed`. A token comes from the environment.
        num_workers: of the loaders of ``val`` and ``test``; training images are in memory.
        seed: of the augmentation; every draw follows from it, the step and the rank, so a resumed run goes on with the
            draws that it would have made.

    Attributes:
        condensed: the :class:`Condensed`, read when it is first asked for.
        num_classes: of its labels, or of their names.

    Raises:
        TypeError: an argument of another type.
        ValueError: an argument outside its range, no mean and std to normalise with, or what :func:`load_condensed`
            raises; at the first batch, images that do not fit.
    """

    def __init__(
        self,
        source: str,
        val: Dataset | None = None,
        test: Dataset | None = None,
        batch_size: int = 64,
        repeats: int = 1,
        augment: bool = True,
        normalised: bool = True,
        config: str | None = None,
        revision: str | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__()
        check_strings(source=str(source) if isinstance(source, Path) else source)
        check_whole(batch_size=batch_size, repeats=repeats, num_workers=num_workers, seed=seed)
        check_flags(augment=augment, normalised=normalised, local_files_only=local_files_only)
        for name, value in (("batch_size", batch_size), ("repeats", repeats)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if num_workers < 0 or seed < 0:
            raise ValueError(f"num_workers={num_workers} and seed={seed} must be at least 0")
        self.source, self.val, self.test = source, val, test
        self.batch_size, self.repeats, self.num_workers = batch_size, repeats, num_workers
        self.augment, self.normalised = augment, normalised
        self.where = dict(config=config, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only)
        self.seed, self.step = seed, 0
        self._train: Dataset | None = None

    @cached_property
    def condensed(self) -> Condensed:
        from ..hf import read_condensed

        return read_condensed(self.source, **self.where)  # type: ignore[arg-type]

    @property
    def num_classes(self) -> int:
        names = self.condensed.label_names
        return self.condensed.classes if names is None else len(names)

    def prepare_data(self) -> None:
        """Download, in one process of each machine."""
        self.condensed  # noqa: B018

    def setup(self, stage: str) -> None:
        """Decode."""
        if self.normalised and (self.condensed.mean is None or self.condensed.std is None):
            raise ValueError(f"{self.source} has no mean and std of its source; give normalised=False")
        if stage == "fit" and self._train is None:
            images, labels = self.condensed.decode()
            self._train = ConcatDataset([TensorDataset(images, labels)] * self.repeats)

    def train_dataloader(self) -> DataLoader:
        assert self._train is not None  # Lightning calls setup first
        return DataLoader(self._train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader | list:
        return self._loader(self.val)

    def test_dataloader(self) -> DataLoader | list:
        return self._loader(self.test)

    def _loader(self, given: Dataset | None) -> DataLoader | list:
        if given is None:
            return []
        rows = _Pixels(given, tuple(self.condensed.images.shape[1:]))
        return DataLoader(rows, self.batch_size, num_workers=self.num_workers)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Normalise and augment, on the device."""
        x, y = batch
        condensed = self.condensed
        if self.normalised and condensed.mean is not None and condensed.std is not None:
            x = normalise(x, condensed.mean, condensed.std)
        if self.trainer is None or not self.trainer.training or not self.augment:
            return x, y
        augment = training_augment(condensed)
        generator = batch_generator(self.seed, self.step, self.trainer.global_rank)
        self.step += 1
        return (x if augment is None else augment(x, generator=generator)), y

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed, "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seed, self.step = int(state_dict["seed"]), int(state_dict["step"])


class _Pixels(Dataset):
    """Rows of a data set as (C, H, W) float32 in [0, 1] and class ids."""

    def __init__(self, dataset: Any, shape: tuple[int, ...]):
        self.dataset, self.shape = dataset, shape

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        row = self.dataset[index]
        image, label = (row["image"], row["label"]) if isinstance(row, Mapping) else row
        x = image if isinstance(image, Tensor) else torch.from_numpy(np.array(image))
        if not isinstance(image, Tensor):  # of PIL or an array: rows, columns, channels
            x = x[None] if x.ndim == 2 else x.permute(2, 0, 1)
        x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
        if tuple(x.shape) != self.shape:
            raise ValueError(
                f"row {index} is an image of {tuple(x.shape)} and the condensed ones are of {self.shape}; bring it to "
                "this size and number of channels"
            )
        low, high = x.aminmax()
        if not (low >= 0 and high <= 1):
            raise ValueError(f"row {index} holds values from {low:g} to {high:g}; give pixels in [0, 1]")
        return x, int(label)
