"""Saliency as a column of a ``datasets.Dataset``."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from dataopt.integrations.saliency_maps import View, default_view, make_maps, provenance
from datasets import Array2D, Dataset, Features, concatenate_datasets
from PIL.Image import Image
from torch import nn

from .inputs import check_column, check_dataset


def add_saliency(
    dataset: Dataset,
    model: nn.Module,
    *,
    transform: View | None = None,
    image_column: str = "image",
    label_column: str = "label",
    column: str = "saliency",
    grid: int = 16,
    batch_size: int = 32,
) -> Dataset:
    """Add each image's saliency under a trained model, as a small map.

    Computed by ``Dataset.map`` where the model is, and cached by it: the same data, model weights,
    transform and grid are read back. The other columns are not copied. A format or transform that
    was set on ``dataset`` is not carried over; set it on the result.

    Args:
        dataset: with PIL images of any size and mode, and integer class ids.
        model: maps normalised (B, C, H, W) to logits (B, K). It is left as it was.
        transform: RGB PIL image to a normalised (C, H, W) tensor, the same shape for all. It must
            show the whole image, or the map will not be aligned with it. None resizes to the input
            size of ``model.pretrained_cfg`` and normalises as it says.
        image_column, label_column: where the images and labels are.
        column: name of the new column.
        grid: rows and columns of a map.
        batch_size: images per gradient.

    Returns:
        ``dataset`` with ``column``, (grid, grid) float16 non-negative, summing to one up to rounding.

    Raises:
        TypeError: ``dataset`` is no ``datasets.Dataset``, or a row holds no PIL image.
        ValueError: an empty dataset, a column that is missing or already there, labels that are no
            classes of the model, a transform without a stable ``repr``, or no ``transform`` for a
            model without ``pretrained_cfg``.

    References:
        Thesis section 3.4, s(x).

    Examples:
        Crops and flips carry the saliency along in a joint transform of torchvision v2, and
        ``PuzzleCollate`` mixes the batch:

        >>> import numpy as np, timm
        >>> from datasets import Dataset
        >>> from PIL import Image
        >>> from torch.utils.data import DataLoader
        >>> from torchvision.transforms import v2
        >>> from dataopt.core.mixup import PuzzleMix
        >>> from dataopt.integrations.hf import add_saliency, as_tv_tensors
        >>> from dataopt.integrations.timm import PuzzleCollate
        >>> images = [Image.fromarray(np.full((40, 50, 3), 60 * i, np.uint8)) for i in range(4)]
        >>> dataset = Dataset.from_dict({"image": images, "label": [0, 1, 0, 1]})
        >>> dataset = add_saliency(dataset, timm.create_model("test_resnet", num_classes=2))
        >>> augment = v2.Compose([v2.RandomResizedCrop(32), v2.RandomHorizontalFlip()])
        >>> def rows(batch):
        ...     pairs = [augment(*as_tv_tensors(*p)) for p in zip(batch["image"], batch["saliency"])]
        ...     return {"image": [i for i, _ in pairs], "saliency": [s for _, s in pairs], "label": batch["label"]}
        >>> loader = DataLoader(dataset.with_transform(rows), 4, collate_fn=PuzzleCollate(PuzzleMix(2)))
        >>> next(iter(loader))["image"].shape
        torch.Size([4, 3, 32, 32])
    """
    check_dataset(dataset)
    check_column(dataset, image_column=image_column, label_column=label_column)
    if column in dataset.column_names:
        raise ValueError(f"column={column!r} is already there; give another name, or remove_columns({column!r}) first")
    view = transform or default_view(model)

    def maps(batch: dict[str, list[Any]]) -> dict[str, Any]:
        for image in batch[image_column]:
            if not isinstance(image, Image):
                raise TypeError(
                    f"image_column={image_column!r} holds {type(image).__name__}, not PIL images; cast it: "
                    f"dataset.cast_column({image_column!r}, datasets.Image())"
                )
        images = [view(image.convert("RGB")) for image in batch[image_column]]
        return {column: make_maps(model, images, batch[label_column], grid).numpy()}

    settings = [dataset._fingerprint, image_column, label_column, column, provenance(model, view, grid)]
    read = [image_column, label_column]
    plain = dataset.with_format(None)
    added = plain.select_columns(read).map(
        maps,
        batched=True,
        batch_size=batch_size,
        remove_columns=read,
        features=Features({column: Array2D((grid, grid), "float16")}),
        # ours, because datasets would pickle the model to hash it
        new_fingerprint=hashlib.blake2b(json.dumps(settings).encode(), digest_size=16).hexdigest(),
        desc="saliency",
    )
    return concatenate_datasets([plain, added], axis=1)
