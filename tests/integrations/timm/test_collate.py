"""Puzzle Mix in loader workers: equal on any number of them, and what it promises about its inputs."""

import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dataopt.core.mixup import Adversarial, CutMix, PuzzleMix
from dataopt.integrations.timm.collate import PuzzleCollate
from PIL import Image
from timm.data import ImageDataset, create_loader
from torch.utils.data import DataLoader

K = 8


def brightness(images: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) to (B, H, W); a function of this module, so spawned workers find it."""
    return (images - images.min()).amax(1) ** 8


def random_samples(n: int = 8, dtype: torch.dtype = torch.float32, s=(16, 16), side: int = 16) -> list[tuple]:
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (n, 3, side, side), generator=g, dtype=torch.uint8)
    images = pixels if dtype == torch.uint8 else (pixels / 255).to(dtype)
    # one quarter stands out, or the masks would show one input only
    quarter = torch.eye(4).view(4, 1, 2, 2)
    stand_out = F.interpolate(quarter, size=s, mode="nearest")[:, 0]
    return [(images[i], (stand_out[i % 4] + 0.2 * torch.rand(s, generator=g)).half(), i) for i in range(n)]


def flat_samples(dtype: torch.dtype) -> list[tuple]:
    """Eight classes, each image of one shade: targets @ shades is then the mean of the mixed image."""
    return [
        (torch.full((3, 16, 16), v, dtype=dtype), s, y)
        for v, (_, s, y) in zip(shades(dtype), random_samples(), strict=True)
    ]


def shades(dtype: torch.dtype) -> list:
    return [36 * i for i in range(K)] if dtype == torch.uint8 else [i / 7 for i in range(K)]


def equal(a, b) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16])
def test_targets_are_the_shares_of_the_mixed_pixels(dtype):
    mix = PuzzleMix(K, beta=0, eta=0)  # shows the more salient input, whatever the share
    x, target = PuzzleCollate(mix)(flat_samples(dtype))
    assert x.dtype == dtype and x.shape == (8, 3, 16, 16)
    assert target.dtype == torch.float32 and target.shape == (8, K)
    torch.testing.assert_close(target.sum(1), torch.ones(8))
    assert ((target > 0).sum(1) == 2).sum() >= 4  # most have a partner
    values = torch.tensor(shades(dtype), dtype=torch.float32)
    tolerance = {torch.uint8: 0.51, torch.float32: 1e-5, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(x.float().mean((1, 2, 3)), target @ values, rtol=0, atol=tolerance)


def test_uint8_pixels_come_through_unchanged_where_the_mask_is_hard():
    mix = PuzzleMix(K, labels=2, beta=0, eta=0)
    x, target = PuzzleCollate(mix)(flat_samples(torch.uint8))
    assert ((target > 0).sum(1) == 2).any()
    assert set(x.unique().tolist()) <= set(shades(torch.uint8))


def test_uint8_and_float_images_are_mixed_by_the_same_rule():
    """Without the prior the mix depends on who is whose partner alone, of the draws."""
    whole, real = random_samples(dtype=torch.uint8, n=2), random_samples(n=2)
    mix = PuzzleMix(K, eta=0, grids=(4,))

    def mixed(samples):
        batches = [PuzzleCollate(mix, seed=seed)(samples) for seed in range(12)]
        return next((x, target) for x, target in batches if target[0, 0] < 1)

    (x, target), (twin, twin_target) = mixed(whole), mixed(real)
    assert target[0, 0] > 0 and torch.equal(target, twin_target)
    assert (twin * 255 - x).abs().max() < 0.51


@pytest.mark.parametrize("size", [(16, 16), (5, 7), (24, 32), (3, 32)])
def test_saliency_decides_which_region_is_shown(size):
    """One image is salient on the left, the other on the right: the mix shows those halves."""
    height, width = size
    across = (torch.arange(width) + 0.5) / width
    left = (across < 0.5).float().expand(height, width)
    samples = [(torch.zeros(3, 24, 32), left, 0), (torch.ones(3, 24, 32), 1 - left, 1)]
    mix = PuzzleMix(2, beta=0, eta=0, transport=None, grids=(2,))
    expected = (torch.arange(32) >= 16).float().expand(3, 24, 32)
    seen = 0
    for seed in range(12):
        x, target = PuzzleCollate(mix, seed=seed)(samples)
        if target[0, 0] < 1:  # otherwise each was its own partner
            assert torch.equal(x, torch.stack([expected, expected]))
            assert target.tolist() == [[0.5, 0.5], [0.5, 0.5]]
            seen += 1
    assert seen >= 3


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_useless_saliency_counts_as_uniform(bad):
    samples = [(x, y) for x, _, y in random_samples()]

    def collate(values):
        return PuzzleCollate(PuzzleMix(K), lambda x: torch.full((len(x), 4, 4), values))(samples)

    assert equal(collate(bad), collate(1.0))


def test_draws_follow_from_seed_labels_saliency_and_pixels_alone():
    samples = random_samples()
    collate = PuzzleCollate(PuzzleMix(K), seed=3)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = collate(samples)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert equal(collate(samples), first)
    assert equal(pickle.loads(pickle.dumps(collate))(samples), first)

    def order(samples, seed=3):
        """Partners and shares, from the targets."""
        return PuzzleCollate(PuzzleMix(K), seed=seed)(samples)[1]

    assert not torch.equal(order(samples, seed=4), first[1])
    assert not torch.equal(order([(x, s, K - 1 - y) for x, s, y in samples]).flip(1), first[1])
    assert not torch.equal(order([(x, s * 2, y) for x, s, y in samples]), first[1])
    assert not torch.equal(order([(x.flip(2), s, y) for x, s, y in samples]), first[1])


@pytest.mark.parametrize("prefetch", [True, False])
def test_timm_loader_gives_equal_batches_on_any_number_of_workers(image_folder, prefetch):
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    mix = PuzzleMix(4, beta=0, eta=0, **({} if prefetch else {"mean": mean, "std": std}))
    epochs = []
    for workers in (0, 1, 2):
        collate = PuzzleCollate(mix, brightness, smoothing=0.1)
        loader = create_loader(
            ImageDataset(str(image_folder / "train")),
            input_size=32,
            batch_size=6,
            is_training=True,
            no_aug=True,
            mean=mean,
            std=std,
            num_workers=workers,
            collate_fn=collate,
            use_prefetcher=prefetch,
            device=torch.device("cpu"),
        )
        if prefetch:
            assert loader.mixup_enabled is False
            loader.mixup_enabled = False
            assert collate.mixup_enabled  # as the docstring says: the loader's switch is not ours
        torch.manual_seed(0)
        epochs.append(list(loader))
    assert [len(e) for e in epochs] == [2, 2, 2]
    for x, target in epochs[0]:
        assert x.shape == (6, 3, 32, 32) and x.dtype == torch.float32
        assert target.min() >= 0.1 / 4 - 1e-6
        assert ((target > 0.05).sum(1) == 2).any()
        pixels = x * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
        assert pixels.min() > -1e-4 and pixels.max() < 1 + 1e-4
    for other in epochs[1:]:
        assert all(equal(a, b) for a, b in zip(epochs[0], other, strict=True))


def test_spawned_workers_give_the_same_batches():
    samples = random_samples(16)
    collate = PuzzleCollate(PuzzleMix(16), seed=1)
    spawned = list(DataLoader(samples, 8, num_workers=1, multiprocessing_context="spawn", collate_fn=collate))
    here = list(DataLoader(samples, 8, collate_fn=collate))
    assert len(here) == 2 and all(equal(a, b) for a, b in zip(spawned, here, strict=True))


def test_switch_reaches_persistent_workers():
    samples = random_samples()
    collate = PuzzleCollate(PuzzleMix(K), smoothing=0.2)
    loader = DataLoader(samples, 8, num_workers=1, persistent_workers=True, collate_fn=collate)
    mixed = next(iter(loader))
    collate.mixup_enabled = False
    x, target = next(iter(loader))
    assert torch.equal(x, torch.stack([s[0] for s in samples]))
    torch.testing.assert_close(target, torch.eye(K) * 0.8 + 0.2 / K)
    collate.mixup_enabled = True
    assert equal(next(iter(loader)), mixed) and not torch.equal(mixed[0], x)


def test_prob_is_the_share_of_mixed_batches():
    samples = random_samples()
    plain = torch.stack([s[0] for s in samples])
    mix = PuzzleMix(K, beta=0, eta=0)  # shows the more salient input, whatever the share
    for prob, low, high in ((0.0, 0, 0), (0.3, 8, 26), (1.0, 60, 60)):
        collates = [PuzzleCollate(mix, prob=prob, seed=seed) for seed in range(60)]
        assert low <= sum(not torch.equal(c(samples)[0], plain) for c in collates) <= high


def test_dict_samples_with_arrays_and_pictures_mix_like_tuples():
    samples = random_samples(dtype=torch.uint8)
    expected = PuzzleCollate(PuzzleMix(K))(samples)
    hwc = [x.permute(1, 2, 0).numpy() for x, _, _ in samples]
    for images in (hwc, [Image.fromarray(a) for a in hwc], [x.numpy() for x, _, _ in samples]):
        rows = [
            {"pixel_values": x, "s": s.tolist(), "labels": np.int64(y), "id": y}
            for x, (_, s, y) in zip(images, samples, strict=True)
        ]
        # lists of datasets are float64; the draws see the values, so give the dtype that was stored
        for row in rows:
            row["s"] = np.array(row["s"], np.float16)
        collate = PuzzleCollate(PuzzleMix(K), image_key="pixel_values", saliency_key="s", label_key="labels")
        out = collate(rows)
        assert list(out) == ["pixel_values", "labels"]
        assert equal(out.values(), expected)


def test_soft_labels():
    labels = torch.full((8, K), 1 / K)
    _, target = PuzzleCollate(PuzzleMix(K))([(x, s, labels[y]) for x, s, y in random_samples()])
    torch.testing.assert_close(target, labels)


def test_errors_name_what_is_wrong():
    mix, samples = PuzzleMix(K), random_samples()
    with pytest.raises(TypeError, match="mix is a CutMix"):
        PuzzleCollate(CutMix(K))
    with pytest.raises(ValueError, match="adversarial"):
        PuzzleCollate(PuzzleMix(K, adversarial=Adversarial(0.1, 0.1, 0.1)))
    with pytest.raises(ValueError, match=r"prob=1.5"):
        PuzzleCollate(mix, prob=1.5)
    with pytest.raises(ValueError, match=r"smoothing=-1"):
        PuzzleCollate(mix, smoothing=-1)

    collate = PuzzleCollate(mix)
    with pytest.raises(ValueError, match=r"tuple of 2; give tuples \(image, saliency, label\)"):
        collate([(x, y) for x, _, y in samples])
    with pytest.raises(ValueError, match=r"tuple of 3; give tuples \(image, label\)"):
        PuzzleCollate(mix, brightness)(samples)
    with pytest.raises(ValueError, match=r"samples are Tensor; give tuples"):
        collate([x for x, _, _ in samples])
    with pytest.raises(ValueError, match=r"lack \['saliency'\]; give them \(add_saliency"):
        collate([{"image": x, "label": y} for x, _, y in samples])
    with pytest.raises(ValueError, match=r"image of the samples has the shapes \[\(3, 16, 16\), \(3, 16, 20\)\]"):
        collate([samples[0], (torch.rand(3, 16, 20), *samples[1][1:])])
    with pytest.raises(ValueError, match=r"saliency of the samples has the shapes \[\(4,\)\]; give \(h, w\)"):
        collate([(x, torch.ones(4), y) for x, _, y in samples])
    with pytest.raises(ValueError, match=r"images are torch\.int64"):
        collate([(x.long(), s, y) for x, s, y in samples])
    with pytest.raises(ValueError, match="leave mean and std out of PuzzleMix"):
        PuzzleCollate(PuzzleMix(K, mean=[0.5], std=[0.5]))(random_samples(dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"saliency= gave the shape \(8, 3\) for 8 images"):
        PuzzleCollate(mix, lambda x: x.mean((2, 3)))([(x, y) for x, _, y in samples])
    with pytest.raises(ValueError, match="negative"):
        collate([(x, s - 10 * s.mean() * (s == s.max()), y) for x, s, y in samples])
    with pytest.raises(ValueError, match="drop_last=True"):
        collate(samples[:1])
    with pytest.raises(ValueError, match="class ids from 8 to 15"):
        collate([(x, s, y + K) for x, s, y in samples])
    with pytest.raises(ValueError, match="mean= and std="):
        collate([(x * 4 - 2, s, y) for x, s, y in samples])
