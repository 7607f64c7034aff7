"""Saliency as a column, and through torchvision's joint transforms."""

import numpy as np
import pytest
import timm
import torch
from dataopt.core.mixup import PuzzleMix, input_gradient, saliency
from dataopt.integrations.hf import add_saliency, as_tv_tensors
from dataopt.integrations.saliency_maps import Squash, default_view
from dataopt.integrations.timm.collate import PuzzleCollate
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, load_from_disk
from PIL import Image as pil
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode, v2

from ..brightness import Brightness

SIDE = 16
AS_IS = Squash((3, SIDE, SIDE), (0, 0, 0), (1, 1, 1))


def grey(n: int, side: int = SIDE, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (n, side, side), dtype=np.uint8))


def in_colour(pixels: np.ndarray) -> pil.Image:
    return pil.fromarray(pixels.repeat(3).reshape(*pixels.shape, 3))


@pytest.fixture
def images() -> list[np.ndarray]:
    return grey(7)


@pytest.fixture
def dataset(images) -> Dataset:
    return Dataset.from_dict({"image": [in_colour(p) for p in images], "label": [0, 2, 0, 2, 0, 2, 0], "id": range(7)})


def assert_is_brightness(s, pixels):
    bright = torch.from_numpy(pixels).float()
    torch.testing.assert_close(torch.as_tensor(s).float(), bright / bright.sum(), rtol=2e-3, atol=1e-6)


def test_column_is_the_saliency_of_each_row(dataset, images):
    out = add_saliency(dataset, Brightness(), transform=AS_IS, batch_size=3)
    assert out.column_names == ["image", "label", "id", "saliency"]
    feature = out.features["saliency"]
    assert (feature.shape, feature.dtype) == ((16, 16), "float16")
    for row, pixels in zip(out, images, strict=True):
        assert_is_brightness(row["saliency"], pixels)
        assert np.array_equal(np.array(row["image"])[..., 0], pixels)
    assert out.with_format("torch")[0]["saliency"].shape == (16, 16)


def test_rows_stay_aligned_after_shuffle_and_under_a_transform(dataset, images):
    moved = dataset.shuffle(seed=1).select(range(5)).with_transform(lambda rows: {"image": ["no image"] * 5})
    out = add_saliency(moved, Brightness(), transform=AS_IS)
    assert out["id"] != list(range(5))
    for row in out:
        assert_is_brightness(row["saliency"], images[row["id"]])


def test_images_of_any_size_and_mode_under_a_timm_model():
    rng = np.random.default_rng(0)
    shapes = {"RGB": (40, 50, 3), "L": (90, 33), "RGBA": (20, 20, 4)}
    rows = [pil.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode) for mode, shape in shapes.items()]
    rows.append(rows[0].convert("P"))
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    out = add_saliency(Dataset.from_dict({"image": rows, "label": [0, 1, 2, 3]}), model, grid=5)
    s = torch.tensor(out["saliency"][:])
    assert s.shape == (4, 5, 5) and (s >= 0).all()
    torch.testing.assert_close(s.sum((1, 2)), torch.ones(4), rtol=0, atol=5e-3)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    # 5 divides timm's 160: plain sums over blocks, of the model's own view made by hand
    seen = rows[1].convert("RGB").resize((160, 160), pil.Resampling.BILINEAR)
    x = (v2.functional.pil_to_tensor(seen).float() / 255 - 0.5) / 0.5
    full = saliency(input_gradient(model, x.unsqueeze(0), torch.tensor([1])))
    torch.testing.assert_close(s[1], full.view(5, 32, 5, 32).sum((1, 3)), rtol=0.02, atol=1e-3)


def test_one_channel_model_sees_grey_images():
    model = timm.create_model("test_resnet", num_classes=2, in_chans=1)
    view = default_view(model)
    assert view == Squash((1, 160, 160), (0.5,), (0.5,))
    assert view(pil.new("RGB", (9, 9), (255, 255, 255))).unique().tolist() == [1]
    out = add_saliency(Dataset.from_dict({"image": [in_colour(p) for p in grey(2)], "label": [0, 1]}), model)
    assert np.isfinite(out["saliency"][:]).all()


def test_computed_once_per_data_weights_transform_and_grid(dataset, tmp_path):
    dataset.save_to_disk(tmp_path / "d")

    def images_seen(gain=1.0, transform=AS_IS, grid=16, rows=7) -> int:
        model = Brightness(gain)
        stored = load_from_disk(tmp_path / "d")
        add_saliency(stored if rows == 7 else stored.select(range(rows)), model, transform=transform, grid=grid)
        return model.calls

    assert images_seen() == 7
    assert images_seen() == 0
    assert images_seen(gain=2.0) == 7
    assert images_seen(grid=8) == 7
    assert images_seen(transform=Squash((3, 8, 8), (0, 0, 0), (1, 1, 1))) == 7
    assert images_seen(rows=6) == 6
    assert images_seen(gain=2.0) == images_seen(grid=8) == images_seen() == 0


def test_crops_and_flips_carry_the_saliency_along():
    """The saliency is a copy of the picture, so after the same moves it still is."""
    augment = v2.Compose(
        [
            v2.RandomResizedCrop((20, 24), interpolation=InterpolationMode.NEAREST),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5], [0.25]),
        ]
    )
    torch.manual_seed(0)
    flipped = set()
    for pixels in grey(20, side=32):
        pixels[:, :16] //= 4  # dark on the left, to see a flip
        picture, mask = as_tv_tensors(in_colour(pixels), pixels.tolist())
        assert torch.equal(mask, torch.from_numpy(pixels).float())
        x, s = augment(picture, mask)
        assert x.shape == (3, 20, 24) and s.shape == (20, 24)
        assert (type(x), type(s)) == (type(picture), type(mask))
        assert s.dtype == torch.float32
        torch.testing.assert_close(torch.Tensor(s), torch.Tensor(x[0] * 0.25 + 0.5) * 255)
        flipped.add(bool(s[:, :4].mean() > s[:, -4:].mean()))
    assert flipped == {False, True}


def test_small_float16_map_is_spread_over_the_picture():
    s = torch.rand(16, 16, generator=torch.Generator().manual_seed(0)).half()
    _, mask = as_tv_tensors(torch.zeros(3, 48, 32, dtype=torch.uint8), s)
    torch.testing.assert_close(torch.Tensor(mask).view(16, 3, 16, 2).sum((1, 3)), s.float())


def test_rows_feed_puzzle_collate(dataset):
    out = add_saliency(dataset, Brightness(), transform=AS_IS)
    augment = v2.RandomResizedCrop(SIDE)

    def rows(batch):
        pairs = [augment(*as_tv_tensors(*p)) for p in zip(batch["image"], batch["saliency"], strict=True)]
        return {"pixel_values": [i for i, _ in pairs], "saliency": [s for _, s in pairs], "labels": batch["label"]}

    collate = PuzzleCollate(PuzzleMix(3), image_key="pixel_values", label_key="labels")
    batches = list(DataLoader(out.with_transform(rows), 4, drop_last=True, collate_fn=collate))
    assert len(batches) == 1
    assert set(batches[0]) == {"pixel_values", "labels"}
    assert batches[0]["pixel_values"].dtype == torch.uint8
    assert batches[0]["labels"].shape == (4, 3)


def test_errors_name_what_is_wrong(dataset):
    model = Brightness()

    def add(d=dataset, m=model, transform=AS_IS, **options):
        return add_saliency(d, m, transform=transform, **options)

    with pytest.raises(TypeError, match="one split at a time"):
        add(DatasetDict(train=dataset))
    with pytest.raises(ValueError, match="dataset is empty"):
        add(dataset.select([]))
    with pytest.raises(ValueError, match=r"image_column='img' is not among the columns \['image'"):
        add(image_column="img")
    with pytest.raises(ValueError, match="label_column='y' is not among"):
        add(label_column="y")
    with pytest.raises(ValueError, match="column='id' is already there"):
        add(column="id")
    with pytest.raises(ValueError, match="grid=0"):
        add(grid=0)
    with pytest.raises(ValueError, match="labels range from 3 to 6, and the model knows the classes 0 to 2"):
        add(label_column="id", batch_size=3, d=dataset.select([3, 6]))
    with pytest.raises(ValueError, match="labels hold None"):
        add(Dataset.from_dict({"image": dataset["image"][:2], "label": [0, None]}))
    with pytest.raises(TypeError, match="holds str, not PIL images; cast it"):
        add(Dataset.from_dict({"image": ["a.png"], "label": [0]}))
    with pytest.raises(ValueError, match=r"Brightness has no pretrained_cfg .* give transform="):
        add(transform=None)
    with pytest.raises(ValueError, match="prints its address"):
        add(transform=lambda image: AS_IS(image))
    uneven = Dataset.from_dict({"image": [pil.new("RGB", (8, 8)), pil.new("RGB", (9, 8))], "label": [0, 0]})
    with pytest.raises(ValueError, match="must give one shape for all"):
        add(uneven, transform=v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]))


def test_unlabelled_split_is_refused():
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"]), "n": Value("int64")})
    d = Dataset.from_dict({"image": [in_colour(grey(1)[0])], "label": [-1], "n": [0]}, features=features)
    with pytest.raises(ValueError, match="labels range from -1 to -1"):
        add_saliency(d, Brightness(), transform=AS_IS)
