"""Image folders with their saliency in a file."""

import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from dataopt.core.mixup import PuzzleMix
from dataopt.integrations.saliency_maps import Squash
from dataopt.integrations.timm import sidecar
from dataopt.integrations.timm.collate import PuzzleCollate
from dataopt.integrations.timm.sidecar import SaliencyFolder
from PIL import Image
from safetensors import safe_open
from timm.data import create_loader
from timm.loss import SoftTargetCrossEntropy
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode, v2

from ..brightness import Brightness

AS_IS = Squash((3, 16, 16), (0, 0, 0), (1, 1, 1))


def write_images(root: Path, per_class: int) -> Path:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = rng.integers(0, 256, (16, 16), dtype=np.uint8)
            Image.fromarray(pixels.repeat(3).reshape(16, 16, 3)).save(root / name / f"{i:04d}.bmp")
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_images(tmp_path / "train", 4)


def make(root: Path, model: Brightness | None = None, **options) -> SaliencyFolder:
    return SaliencyFolder(root, model or Brightness(), saliency_transform=AS_IS, batch_size=3, **options)


def test_items_hold_image_saliency_and_label(root):
    model = Brightness()
    folder = make(root, model, num_workers=1)
    assert len(folder) == 8 and folder.classes == ["cat", "dog"]
    assert folder.saliency.shape == (8, 16, 16) and folder.saliency.dtype == torch.float16
    for i, (image, s, label) in enumerate(folder[i] for i in range(8)):
        assert image.shape == (3, 16, 16) and image.dtype == torch.uint8
        assert label == i // 4 == folder.samples[i][1]
        bright = torch.Tensor(image[0]).float()
        torch.testing.assert_close(torch.Tensor(s), bright / bright.sum(), rtol=2e-3, atol=1e-6)


def test_made_once(root):
    first = make(root)
    assert sorted(os.listdir(root)) == ["cat", "dog", "saliency.safetensors"]
    with safe_open(root / "saliency.safetensors", "pt") as file:
        about = file.metadata()
        assert file.keys() == ["saliency"]
    assert set(about) == {"model weights", "transform", "grid", "classes", "files", "crc"}
    assert about["classes"] == '["cat", "dog"]' and about["grid"] == "16"
    model = Brightness()
    assert torch.equal(make(root, model).saliency, first.saliency)
    assert model.calls == 0
    moved = shutil.copytree(root, root.parent / "moved")  # paths below the root count, not where it lies
    make(moved, model)
    assert model.calls == 0
    make(root, model, cache=root.parent / "elsewhere" / "s.safetensors")
    assert model.calls == 8 and os.listdir(root.parent / "elsewhere") == ["s.safetensors"]


def test_what_does_not_fit_is_refused_by_name_and_refreshed_on_request(root):
    make(root)
    path = root / "saliency.safetensors"
    old = path.read_bytes()
    with pytest.raises(ValueError, match=r"made from other model weights \(\w+, now \w+\); refresh=True"):
        make(root, Brightness(2.0))
    with pytest.raises(ValueError, match=r"made from other grid \(16, now 8\);"):
        make(root, grid=8)
    with pytest.raises(ValueError, match=r"other transform \(Squash.*, now Squash\(size=\(3, 8, 8\)"):
        SaliencyFolder(root, Brightness(), saliency_transform=Squash((3, 8, 8), (0, 0, 0), (1, 1, 1)))
    (root / "dog").rename(root / "wolf")
    with pytest.raises(ValueError, match=r'other classes \(\["cat", "dog"\], now \["cat", "wolf"\]\), files \(8 files'):
        make(root)
    (root / "wolf").rename(root / "dog")
    (root / "dog" / "0000.bmp").unlink()
    with pytest.raises(ValueError, match=r"other files \(8 files, \w+, now 7 files"):
        make(root)
    assert path.read_bytes() == old
    assert len(make(root, refresh=True).saliency) == 7
    model = Brightness()
    make(root, model, refresh=True)
    assert model.calls == 0  # it fits now
    path.write_bytes(old[: len(old) // 2])
    with pytest.raises(ValueError, match=r"cannot be read .*; refresh=True"):
        make(root)
    assert len(make(root, refresh=True).saliency) == len(make(root).saliency) == 7


def test_a_killed_run_goes_on_where_it_stopped(tmp_path):
    root = write_images(tmp_path / "train", 300)
    assert sidecar.PART < 600
    here = Path(__file__).parents[3]
    command = [sys.executable, "-m", "tests.integrations.timm.make_sidecar", str(root), "550"]
    run = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=120)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert sorted(p.name for p in root.iterdir() if p.is_file()) == [".saliency.safetensors.part00000"]

    other = Brightness(2.0)  # parts of other weights are not taken over
    SaliencyFolder(root, other, saliency_transform=AS_IS, cache=shutil.copytree(root, tmp_path / "b") / "s.safetensors")
    assert other.calls == 600
    model = Brightness()
    resumed = SaliencyFolder(root, model, saliency_transform=AS_IS)
    assert model.calls == 600 - sidecar.PART
    assert [p.name for p in root.iterdir() if p.is_file()] == ["saliency.safetensors"]
    whole = SaliencyFolder(root, Brightness(), saliency_transform=AS_IS, cache=tmp_path / "fresh.safetensors")
    assert torch.equal(resumed.saliency, whole.saliency)


def test_transform_moves_image_and_saliency_alike(root):
    augment = v2.Compose([v2.RandomResizedCrop(12, interpolation=InterpolationMode.NEAREST), v2.RandomHorizontalFlip()])
    folder = make(root, transform=augment)
    torch.manual_seed(0)
    for i in range(8):
        image, s, _ = folder[i]
        assert image.shape == (3, 12, 12)
        bright, s = torch.Tensor(image[0]).float(), torch.Tensor(s)
        torch.testing.assert_close(s / s.sum(), bright / bright.sum(), rtol=4e-3, atol=1e-6)


def test_through_timm_loader_into_a_training_step(root, caplog):
    """uint8 for the prefetcher; timm's own transform is refused aloud, the joint one stays."""
    model = timm.create_model("test_resnet", num_classes=2)
    augment = v2.Compose([v2.RandomResizedCrop(32), v2.RandomHorizontalFlip()])
    folder = SaliencyFolder(root, model, augment)
    with caplog.at_level(logging.WARNING):
        loader = create_loader(
            folder,
            input_size=32,
            batch_size=4,
            is_training=True,
            num_workers=2,
            collate_fn=PuzzleCollate(PuzzleMix(2)),
            device=torch.device("cpu"),
        )
    assert "SaliencyFolder keeps its own transform" in caplog.text
    assert folder.transform is augment
    take_a_step(model, loader)


def test_through_plain_loader_into_a_training_step(root):
    model = timm.create_model("test_resnet", num_classes=2)
    mean, std = [0.5] * 3, [0.25] * 3
    steps = [v2.RandomResizedCrop(32), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    folder = SaliencyFolder(root, model, v2.Compose(steps))
    loader = DataLoader(folder, 4, shuffle=True, collate_fn=PuzzleCollate(PuzzleMix(2, mean=mean, std=std)))
    take_a_step(model, loader)


def take_a_step(model: torch.nn.Module, loader) -> None:
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batches = list(loader)
    assert len(batches) == 2
    for x, target in batches:
        assert x.shape == (4, 3, 32, 32) and x.dtype == torch.float32 and x.min() < 0
        assert target.shape == (4, 2)
        loss = SoftTargetCrossEntropy()(model(x), target)
        loss.backward()
        optimizer.step()
        assert torch.isfinite(loss)
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_errors_name_what_is_wrong(root):
    with pytest.raises(ValueError, match=r"root='.*nowhere' is no folder"):
        make(root / "nowhere")
    with pytest.raises(ValueError, match="labels range from 0 to 1, and the model knows the classes 0 to 0"):
        SaliencyFolder(root, timm.create_model("test_resnet", num_classes=1))
    assert sorted(os.listdir(root)) == ["cat", "dog"]
