"""What both hosts share, and both hosts in two processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from dataopt.core.condense.evaluate import training_augment
from dataopt.core.mixup import CoMixup, CutMix, PuzzleMix, augmix, clean_loss, saliency
from dataopt.integrations.hf import save_condensed
from dataopt.integrations.mixing import (
    Means,
    Mixing,
    batch_generator,
    check_soft_loss,
    log_picture,
    picture,
    source_shares,
)

from .condensed_data import condensed
from .hf.test_mixup import tiny_vit
from .lightning.test_mixup import CLASSES, Net


def batch(n: int = 8, shape: tuple = (3, 16, 16)) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(0)), torch.arange(n) % CLASSES


@pytest.mark.parametrize("mix", [PuzzleMix(CLASSES), CoMixup(CLASSES, partition=4)])
def test_shares_make_the_targets_and_a_state_makes_the_same_batch(mix):
    x, y = batch()
    mixing, net = Mixing(mix, seed=3), Net()
    mixing(net, x, y)
    state = mixing.state_dict()
    done = mixing(net, x, y)
    torch.testing.assert_close(source_shares(done.mixed) @ F.one_hot(y, CLASSES).float(), done.targets)
    again = Mixing(mix)
    again.load_state_dict(state)
    assert torch.equal(again(net, x, y).inputs, done.inputs)
    assert all(p.grad is None for p in net.parameters())


MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)


@pytest.mark.parametrize(
    "mix, own",
    [(PuzzleMix(CLASSES, mean=MEAN, std=STD), {}), (CoMixup(CLASSES, partition=4), {"mean": MEAN, "std": STD})],
)
def test_augmix_images_are_what_is_looked_at_and_mixed(mix, own):
    pixels, y = batch()
    x = ((pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)).contiguous(
        memory_format=torch.channels_last
    )
    mixing, net = Mixing(mix, augment="augmix", seed=2, clean_weight=1.0, cutmix_alpha=1.0, **own), Net().eval()
    kinds = set()
    for step in range(5):
        done = mixing(net, x, y)
        generator = batch_generator(2, step)
        images = augmix(x, generator, mean=MEAN, std=STD)
        assert not torch.equal(images, x) and done.inputs.is_contiguous(memory_format=torch.channels_last)
        if done.method == "cutmix":
            wanted = CutMix(CLASSES, 1.0)(images, y, generator=generator)
        else:
            loss, gradient = clean_loss(net, images, y)
            torch.testing.assert_close(done.clean_loss, loss)  # sums may be ordered by where a tensor lies
            wanted = mix(images, y, saliency(gradient), generator=generator)
        assert torch.equal(done.inputs, wanted.inputs) and torch.equal(done.targets, wanted.targets)
        kinds.add(done.method)
    assert len(kinds) == 2
    x[0] += 3  # as random erasing does
    assert mixing(net, x, y).inputs.isfinite().all()


def test_a_batch_that_is_not_mixed_is_not_augmented():
    x, y = batch()
    for settings, epoch in (({"prob": 0.0}, 0), ({"off_epoch": 1}, 1)):
        assert Mixing(PuzzleMix(CLASSES), augment="augmix", **settings)(Net(), x, y, epoch).inputs is x
    one = x[:1]
    assert Mixing(PuzzleMix(CLASSES), augment="augmix")(Net(), one, y[:1]).inputs is one


@pytest.mark.parametrize("mix", [PuzzleMix(CLASSES), CoMixup(CLASSES)])
def test_augment_refuses_what_is_no_image(mix, monkeypatch):
    with pytest.raises(ValueError, match="augment='jitter' must be one of 'augmix', None"):
        Mixing(mix, augment="jitter")
    with pytest.raises(ValueError, match="go together"):
        Mixing(mix, augment="augmix", mean=MEAN)
    for shape in ((2, 32), (4, 16, 16)):
        with pytest.raises(ValueError, match=r"augment='augmix' is for images \(B, 1, H, W\)"):
            Mixing(mix, augment="augmix", prob=0.0)(Net(), *batch(8, shape))
    x, y = batch()
    with pytest.raises(ValueError, match="give the mean= and std="):
        Mixing(mix, augment="augmix")(Net(), 4 * x, y)
    monkeypatch.setitem(sys.modules, "torchvision.transforms.v2", None)
    with pytest.raises(ModuleNotFoundError, match=r'torchvision is not installed; .*"dataopt\[eval\]"'):
        Mixing(mix, augment="augmix")


def test_a_picture_shows_inputs_partners_and_mixed_ones():
    x, y = batch(3)
    mixed = Mixing(PuzzleMix(CLASSES))(Net(), x, y).mixed
    shown = picture(x, mixed, count=2)
    assert shown.shape == (3, 3 * 18 - 2, 2 * 18 - 2)
    low, high = torch.cat([x[:2], x[mixed.partner[:2]], mixed.inputs[:2]]).aminmax()
    torch.testing.assert_close(shown[:, 18:34, 18:34], (x[mixed.partner[1]] - low) / (high - low))
    torch.testing.assert_close(shown[:, 36:52, :16], (mixed.inputs[0] - low) / (high - low))
    assert not log_picture(object(), "a", shown, 0)

    line, y = batch(6, (2, 32))
    m = CoMixup(CLASSES)(line, y, torch.rand(6, 32))
    assert picture(line, m).shape == (3, 2 * (2 + 2) - 2, 6 * (32 + 2) - 2)


def test_means_are_of_the_batches_since_the_last_look():
    means = Means()
    means.add({"mixed": 0.0})
    means.add({"mixed": 1.0, "largest_share": 0.6})
    assert means.take() == {"mixed": 0.5, "largest_share": 0.6} and means.take() == {}


def test_losses_are_tried():
    check_soft_loss(F.cross_entropy, 3)
    check_soft_loss(torch.nn.BCEWithLogitsLoss(), 3)
    with pytest.raises(ValueError, match="loss_fn=multi_margin_loss does not take soft targets"):
        check_soft_loss(F.multi_margin_loss, 3)
    with pytest.raises(ValueError, match=r"loss of shape \(2,\)"):
        check_soft_loss(torch.nn.CrossEntropyLoss(reduction="none"), 3)


def test_other_methods_are_refused():
    with pytest.raises(TypeError, match="mix is a str"):
        Mixing("puzzle")


def test_two_processes_end_with_the_same_parameters_and_share_the_condensed_images(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    save_condensed(condensed(), tmp_path / "set")
    command = [sys.executable, "-m", "tests.integrations.mixup_processes", tmp_path, str(port)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=Path(__file__).parents[2], env=env, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for host, start in (("hf", tiny_vit()), ("lightning", Net())):
        for name in dict(start.named_parameters()):
            assert torch.equal(first[host][name], second[host][name]), (host, name)
        assert any(not torch.equal(first[host][name], value) for name, value in start.named_parameters())
    x, y = condensed().decode(normalised=True)
    places = []
    for rank, seen in enumerate((first["condensed"], second["condensed"])):
        for step, ((clean, labels), (changed, same)) in enumerate(zip(seen["plain"], seen["augmented"], strict=True)):
            place = torch.cdist(clean.flatten(1), x.flatten(1)).argmin(1)
            assert torch.allclose(clean, x[place], atol=1e-6) and torch.equal(labels, y[place])
            augment, draws = training_augment(condensed()), batch_generator(5, step, rank)
            assert torch.equal(changed, augment(clean, generator=draws)) and torch.equal(labels, same)
            places.append(place)
    assert torch.equal(torch.cat(places).bincount(), torch.ones(len(x), dtype=torch.int64))  # an epoch, shared
