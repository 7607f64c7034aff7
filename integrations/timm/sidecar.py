"""An image folder whose saliency lies beside it, in one file that is made once."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from dataopt.core.tensor_file import load_tensors, save_tensors
from dataopt.integrations.saliency_maps import View, as_tv_tensors, default_view, make_maps, provenance
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import tv_tensors
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from tqdm import tqdm

_logger = logging.getLogger(__name__)

PART = 512  # images per partial file: what a killed run loses at most


class SaliencyFolder(Dataset):
    """``torchvision.datasets.ImageFolder`` with each image's saliency under a trained model.

    The first construction computes all maps where the model is and writes them to ``cache``; a run
    that is killed goes on where it stopped. Later ones read the file, provided that it was made
    from the same model weights, files, classes, transform and grid. With several processes,
    construct it once before they start.

    Args:
        root: one folder per class.
        model: maps normalised (B, C, H, W) to logits over the folder's classes. It is left as it was.
        transform: joint transform of ``torchvision.transforms.v2``, called with (image, saliency);
            crops and flips move both. timm's ``create_loader`` assigns a transform of its own to
            every dataset: it sees the image alone and is not taken, with a warning.
        cache: the sidecar file; None is ``root/saliency.safetensors``.
        grid: rows and columns of a stored map.
        saliency_transform: as ``transform`` of ``add_saliency``: what the model sees.
        batch_size: images per gradient.
        num_workers: processes that load images while the maps are made.
        refresh: make the maps again if the sidecar does not fit, instead of refusing.

    Attributes:
        saliency: (N, grid, grid) float16, each summing to one up to rounding.
        classes, samples: as in ``ImageFolder``.

    Items are (image uint8 (C, H, W), saliency float32 (H, W), class id), before ``transform``; the
    first two are ``tv_tensors.Image`` and ``tv_tensors.Mask``.

    Raises:
        ValueError: no such folder, a sidecar made from something else or damaged, or what
            ``add_saliency`` raises about the model, its classes and the transform.

    References:
        Thesis section 3.4, s(x).
    """

    def __init__(
        self,
        root: str | Path,
        model: nn.Module,
        transform: Callable | None = None,
        *,
        cache: str | Path | None = None,
        grid: int = 16,
        saliency_transform: View | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        refresh: bool = False,
    ):
        root = Path(root)
        if not root.is_dir():
            raise ValueError(f"root={str(root)!r} is no folder; give the one that holds a folder per class")
        self._folder = ImageFolder(str(root))
        self._joint = transform
        view = saliency_transform or default_view(model)
        made_from = {**provenance(model, view, grid), **_files(self._folder, root)}
        path = Path(cache) if cache is not None else root / "saliency.safetensors"
        maps, difference = _read(path, made_from) if path.exists() else (None, "")
        if maps is not None:
            self.saliency = maps
        elif difference and not refresh:
            raise ValueError(f"the saliency in {path} {difference}; refresh=True computes it again")
        else:
            loading = {"batch_size": batch_size, "num_workers": num_workers, "collate_fn": list}
            self.saliency = _make(path, made_from, model, _Views(self._folder, view), grid, loading)

    @property
    def classes(self) -> list[str]:
        return self._folder.classes

    @property
    def samples(self) -> list[tuple[str, int]]:
        return self._folder.samples

    @property
    def transform(self) -> Callable | None:
        return self._joint

    @transform.setter
    def transform(self, transform: Callable | None) -> None:
        if transform is None or isinstance(transform, v2.Transform):
            self._joint = transform
        else:
            _logger.warning(
                "SaliencyFolder keeps its own transform: %s would move the image and leave its saliency behind. Give "
                "the augmentation as SaliencyFolder(transform=...), made of torchvision.transforms.v2",
                type(transform).__name__,
            )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask, int]:
        image, label = self._folder[index]
        picture, s = as_tv_tensors(image, self.saliency[index])
        if self._joint is not None:
            picture, s = self._joint(picture, s)
        return picture, s, label


class _Views(Dataset):
    """The folder as the model sees it."""

    def __init__(self, folder: ImageFolder, view: View):
        self.folder = folder
        self.view = view

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.folder[index]
        return self.view(image), label


def _files(folder: ImageFolder, root: Path) -> dict[str, str]:
    h = hashlib.blake2b(digest_size=16)
    for path, _ in folder.samples:
        file = Path(path)
        h.update(f"{file.relative_to(root).as_posix()}\0{file.stat().st_size}\0".encode())
    return {"classes": json.dumps(folder.classes), "files": f"{len(folder)} files, {h.hexdigest()}"}


def _read(path: Path, made_from: dict[str, str]) -> tuple[Tensor | None, str]:
    """The maps of a sidecar; None where it does not fit, and what is wrong with it."""
    try:
        tensors, found = load_tensors(path)
    except ValueError as e:
        return None, f"cannot be read ({e})"
    changed = [f"{k} ({found.get(k, 'unknown')}, now {v})" for k, v in made_from.items() if found.get(k) != v]
    return (None, f"was made from other {', '.join(changed)}") if changed else (tensors["saliency"], "")


def _make(
    path: Path, made_from: dict[str, str], model: nn.Module, views: _Views, grid: int, loading: dict[str, Any]
) -> Tensor:
    """All maps, part by part; a part that an earlier run finished is taken over."""
    maps = torch.empty(len(views), grid, grid, dtype=torch.float16)
    parts = []
    with tqdm(total=len(views), desc="saliency", unit="image", disable=None) as progress:
        for start in range(0, len(views), PART):
            stop = min(start + PART, len(views))
            parts.append(path.with_name(f".{path.name}.part{start // PART:05d}"))
            done = _read(parts[-1], made_from)[0] if parts[-1].exists() else None
            if done is not None:
                maps[start:stop] = done
                progress.update(stop - start)
                continue
            at = start
            for batch in DataLoader(Subset(views, range(start, stop)), **loading):
                images, labels = zip(*batch, strict=True)
                maps[at : at + len(batch)] = make_maps(model, images, labels, grid)
                at += len(batch)
                progress.update(len(batch))
            save_tensors(parts[-1], {"saliency": maps[start:stop].clone()}, made_from)
    save_tensors(path, {"saliency": maps}, made_from)
    for part in parts:
        part.unlink(missing_ok=True)
    return maps
