"""Co-Mixup in timm: the task, the callable, the collate function, the loop and the script; what is shared with Puzzle
Mix is tested beside it."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from accelerate.state import AcceleratorState
from dataopt.core.mixup import CoMixed, CoMixup, Mixed, PuzzleMix, augmix, input_gradient, saliency
from dataopt.integrations.mixing import batch_generator
from dataopt.integrations.timm import (
    CoMixupCollate,
    CoMixupFn,
    CoMixupTask,
    PuzzleCollate,
    PuzzleMixTask,
    PuzzleMixup,
)
from timm.data.mixup import mixup_target
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from torch.utils.data import DataLoader

from .conftest import alike, needs_script, same, weights
from .test_collate import brightness, equal, flat_samples, random_samples, shades
from .test_task import K, Net, batch, smoothed  # noqa: F401
from .test_train import refused

COMIXUP = ("--mixup", "comixup")


def make(mix: dict[str, Any] | None = None, **kwargs: Any) -> CoMixupTask:
    torch.manual_seed(0)
    return CoMixupTask(Net(), mix=CoMixup(K, **(mix or {})), **{"verbose": False, **kwargs})


# --- the task and the callable ---


def test_a_batch_is_mixed_and_the_loss_is_that_of_the_mixed_batch(batch):  # noqa: F811
    task = make(smoothing=0.1)
    task.trainable_module.drop.p = 0.0
    x, y = batch
    result = task(x, y)
    mixed = result["mixed"]
    assert isinstance(mixed, CoMixed) and not torch.equal(mixed.inputs, x)
    assert torch.allclose(result["output"], task.trainable_module(mixed.inputs), atol=1e-6)
    expected = smoothed(mixed.sources @ F.one_hot(y, K).float(), 0.1)
    assert torch.allclose(result["target"], expected, atol=1e-6)
    assert torch.allclose(result["loss"], SoftTargetCrossEntropy()(result["output"], expected), atol=1e-6)
    result["loss"].backward()
    assert all(p.grad is not None for p in task.trainable_module.parameters())


def test_the_saliency_pass_leaves_no_trace(batch):  # noqa: F811
    task, plain = make(), make()
    task.trainable_module.drop.p = plain.trainable_module.drop.p = 0.0
    before = torch.get_rng_state()
    result = task(*batch)
    assert torch.equal(before, torch.get_rng_state())
    plain.trainable_module(result["mixed"].inputs)  # the only forward pass that may count
    assert same(task.trainable_module.state_dict(), plain.trainable_module.state_dict())
    assert all(p.grad is None for p in task.parameters())


def test_draws_follow_seed_and_step_and_a_checkpoint_carries_the_step(batch):  # noqa: F811
    first, again, other = make(seed=3), make(seed=3), make(seed=4)
    a, b, c = ([task(*batch)["mixed"].first for _ in range(3)] for task in (first, again, other))
    assert alike(a, b) and not torch.equal(a[0], a[1]) and not torch.equal(a[0], c[0])
    state = first.get_task_state()
    assert state == {"comixup": {"step": 3}}
    resumed = make(seed=3)
    resumed.load_task_state(state)
    assert torch.equal(resumed(*batch)["mixed"].first, first(*batch)["mixed"].first)


def test_prob_cutmix_and_off_epoch(batch):  # noqa: F811
    task = make(prob=0.5, cutmix_alpha=1.0, switch_prob=0.25, seed=5, off_epoch=1, smoothing=0.1)
    plans = [task(*batch)["mixed"] for _ in range(120)]
    mixed = [p for p in plans if p is not None]
    assert 40 <= len(mixed) <= 80
    assert 0.1 < sum(isinstance(p, Mixed) for p in mixed) / len(mixed) < 0.4
    assert sum(isinstance(p, CoMixed) for p in mixed) > 20
    task.set_epoch(1)
    result = task(*batch)
    assert result["mixed"] is None and torch.allclose(result["target"], mixup_target(batch[1], K, 1.0, 0.1))
    task.set_epoch(0)
    task.eval()
    assert task(*batch)["mixed"] is None


def test_the_clean_loss_and_bce_with_multi_hot_targets(batch):  # noqa: F811
    x, _ = batch
    y = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]]).repeat(4, 1)
    task = make(criterion_kwargs={"loss_type": "bce"}, clean_weight=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = task(x, y)
    assert torch.allclose(result["target"], result["mixed"].sources @ y, atol=1e-6)
    assert isinstance(task.criterion, BinaryCrossEntropy) and result["clean_loss"] > 0
    mixed_loss = task.criterion(result["output"], result["target"])
    assert result["loss"].item() == pytest.approx(mixed_loss.item() + 0.5 * result["clean_loss"].item(), rel=1e-2)
    result["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in task.trainable_module.parameters())


def test_another_number_of_outputs_and_a_batch_of_one(batch):  # noqa: F811
    result = make({"partition": 4, "outputs": 6})(*batch)
    assert result["output"].shape == result["target"].shape == (12, K)
    result["loss"].backward()
    one = make()(batch[0][:1], batch[1][:1])  # batch norm has its pixels
    assert torch.equal(one["mixed"].inputs, batch[0][:1])


def test_the_other_methods_mix_is_refused():
    with pytest.raises(TypeError, match=r"mix is a PuzzleMix; give dataopt\.core\.mixup\.CoMixup\("):
        CoMixupTask(Net(), mix=PuzzleMix(K))
    with pytest.raises(TypeError, match=r"mix is a CoMixup; give dataopt\.core\.mixup\.PuzzleMix\("):
        PuzzleMixTask(Net(), mix=CoMixup(K))
    with pytest.raises(ValueError, match="mode='elem' decides for each input, but Co-Mixup mixes them jointly"):
        make(mode="elem")
    with pytest.raises(ValueError, match="mode='pair'"):
        make(mode="pair")


def test_the_callable_and_the_task_make_the_same_batch(batch):  # noqa: F811
    task = make({"grid": 2, "restarts": 2}, smoothing=0.1, seed=7)
    mixup_fn = CoMixupFn(make().trainable_module, num_classes=K, label_smoothing=0.1, seed=7, grid=2, restarts=2)
    x, target = mixup_fn(*batch)
    result = task(*batch)
    assert torch.equal(x, result["mixed"].inputs) and torch.equal(target, result["target"])
    later = CoMixupFn(make().trainable_module, num_classes=K, seed=7, grid=2, restarts=2)
    later.load_state_dict(mixup_fn.state_dict())
    assert torch.equal(later(*batch)[0], mixup_fn(*batch)[0])
    mixup_fn.mixup_enabled = False
    assert mixup_fn(*batch)[0] is batch[0]
    loader = DataLoader(list(zip(*batch, strict=True)), batch_size=4, collate_fn=mixup_fn)
    with pytest.raises(TypeError, match=r"CoMixupFn got list .*CoMixupCollate"):
        next(iter(loader))


@pytest.mark.parametrize("made, core", [(PuzzleMixup, PuzzleMix), (CoMixupFn, CoMixup)])
def test_the_callables_mix_augmix_images(batch, made, core):  # noqa: F811
    pixels = {"mean": [0.5, 0.4, 0.3], "std": [0.9, 0.8, 0.9]}  # of which the batch's range is a part
    (x, y), model = batch, make().trainable_module
    x = (x - 0.5) / 2
    inputs, target = made(model, num_classes=K, label_smoothing=0.0, augment="augmix", **pixels)(x, y)
    generator = batch_generator(0, 0)
    images = augmix(x, generator, **pixels)
    mix = core(K, **pixels) if core is PuzzleMix else core(K)
    mixed = mix(images, y, saliency(input_gradient(model, images, y)), generator=generator)
    assert torch.equal(inputs, mixed.inputs) and torch.equal(target, mixed.targets)


# --- the collate function ---


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16])
def test_collated_targets_are_the_shares_of_the_mixed_pixels(dtype):
    x, target = CoMixupCollate(CoMixup(8), seed=1)(flat_samples(dtype))
    assert x.dtype == dtype and x.shape == (8, 3, 16, 16) and target.shape == (8, 8)
    torch.testing.assert_close(target.sum(1), torch.ones(8))
    assert ((target > 0).sum(1) > 1).sum() >= 4
    values = torch.tensor(shades(dtype), dtype=torch.float32)
    tolerance = {torch.uint8: 0.51, torch.float32: 1e-5, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(x.float().mean((1, 2, 3)), target @ values, rtol=0, atol=tolerance)


def test_collated_batches_are_equal_on_any_number_of_workers():
    samples = random_samples(16)
    collate = CoMixupCollate(CoMixup(16, partition=5), smoothing=0.1, seed=1)
    here = list(DataLoader(samples, 8, collate_fn=collate))
    assert len(here) == 2 and not torch.equal(here[0][0], torch.stack([s[0] for s in samples[:8]]))
    for workers in (1, 2):
        there = list(DataLoader(samples, 8, num_workers=workers, collate_fn=collate))
        assert all(equal(a, b) for a, b in zip(here, there, strict=True))
    assert equal(pickle.loads(pickle.dumps(collate))(samples[:8]), here[0])
    with_callable = CoMixupCollate(CoMixup(16), brightness)([(x, y) for x, _, y in samples])
    assert with_callable[1].shape == (16, 16)
    collate.mixup_enabled = False
    assert torch.equal(collate(samples)[0], torch.stack([s[0] for s in samples]))


def test_collate_functions_refuse_the_other_method():
    with pytest.raises(TypeError, match="mix is a PuzzleMix; give a CoMixup"):
        CoMixupCollate(PuzzleMix(4))
    with pytest.raises(TypeError, match="mix is a CoMixup; give a PuzzleMix"):
        PuzzleCollate(CoMixup(4))


# --- the loop ---


def test_the_loop_honours_what_it_does_for_puzzle_mix(train, steps):
    AcceleratorState._reset_state(reset_partial_state=True)  # an earlier test's Trainer may have made one
    flags = ("--cutmix", 1.0, "--amp", "--amp-dtype", "bfloat16", "--grad-accum-steps", 2, "--model-ema", "--bce-loss")
    options = ("--comixup-grid", "2x4", "--comixup-partition", 5, "--comixup-tau", 0.5, "--comixup-threshold", "soft")
    folder = train(*COMIXUP, *flags, *options, "--epochs", 5, "--mixup-off-epoch", 4, "--channels-last")
    assert all(type(s["task"]) is CoMixupTask for s in steps)
    kinds = [type(s["mixed"]) for s in steps]
    assert len(kinds) == 10 and kinds[8:] == [type(None)] * 2
    assert {CoMixed, Mixed} == set(kinds[:8])
    assert all(s["input"].is_contiguous(memory_format=torch.channels_last) for s in steps)
    mix = steps[0]["task"].mixer.mix
    assert (mix.grid, mix.partition, mix.tau, mix.threshold, mix.n_iter) == ((2, 4), 5, 0.5, "soft", 4)
    assert isinstance(steps[0]["task"].criterion, BinaryCrossEntropy)
    assert not same(weights(folder, key="state_dict_ema"), weights(folder))
    args = yaml.safe_load((folder / "args.yaml").read_text())
    assert (args["mixup"], args["cutmix"], args["comixup_grid"]) == ("comixup", 1.0, [2, 4])
    steps.clear()
    train("-c", folder / "args.yaml", "--epochs", 1, experiment="again")
    assert steps[0]["task"].mixer.mix.grid == (2, 4)


def test_a_resumed_run_is_the_straight_run(train, steps):
    plan = (*COMIXUP, "--sched", "step", "--decay-epochs", 100, "--mixup-prob", 0.7, "--comixup-clean-weight", 0.5)
    straight = train(*plan, "--epochs", 2, experiment="straight")
    assert any(s["mixed"] is not None for s in steps) and any("clean_loss" in s for s in steps)
    part = train(*plan, "--epochs", 1, experiment="part")
    assert not same(weights(part), weights(straight))
    train(*plan, "--epochs", 2, "--resume", part / "last.pth.tar", experiment="part")
    assert same(weights(part), weights(straight))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (("--mixup-mode", "elem"), "--mixup comixup does not go with --mixup-mode elem: it has batch"),
        (("--mixup-mode", "pair"), "--mixup comixup does not go with --mixup-mode pair: it has batch"),
        (("--comixup-omega", 1.5), "--mixup comixup: omega=1.5 must lie in [0, 1]"),
        (("--comixup-alpha", -1), "alpha=-1.0 leaves the Dirichlet prior undefined"),
        (("--comixup-partition", 0), "partition=0 must be a whole number of at least 1"),
        (("--comixup-outputs", 0), "outputs=0 must be a whole number of at least 1"),
        (("--comixup-grid", 5), "grid=5 does not divide inputs of size 32x32; grids that fit: 2, 4"),
        (("--comixup-clean-weight", -1), "clean_weight=-1.0 must be finite and not negative"),
        (("--comixup-saliency-resolution", 0), "saliency_resolution=0.0"),
    ],
)
def test_a_bad_command_line_is_one_line(train, capsys, bad, message):
    assert message in refused(train, capsys, *COMIXUP, *bad)


# --- a script like timm's, and timm's own ---


def test_the_script_mixes_in_our_task_and_records_the_method(like_timm, steps):
    options = ("--comixup-beta", 0.2, "--comixup-n-iter", 3, "--comixup-restarts", 2, "--comixup-outputs", 10)
    options += ("--comixup-augment", "augmix")
    folder = like_timm(*COMIXUP, "--cutmix", 0.7, "--smoothing", 0.2, *options)
    assert len(steps) == 4 and all(isinstance(s["task"], CoMixupTask) for s in steps)
    mixer = steps[0]["task"].mixer
    assert (mixer.smoothing, mixer.cutmix.alpha, mixer.seed) == (0.2, 0.7, 42)
    assert (mixer.mix.beta, mixer.mix.n_iter, mixer.mix.restarts, mixer.mix.outputs) == (0.2, 3, 2, 10)
    assert mixer.augment == "augmix" and list(mixer.mean) == list(
        steps[0]["task"].trainable_module.pretrained_cfg["mean"]
    )
    saved, logged = (yaml.safe_load((folder / f"{name}.yaml").read_text()) for name in ("args", "logged"))
    assert (saved["mixup"], saved["cutmix"], saved["comixup_beta"]) == ("comixup", 0.7, 0.2)
    assert (logged["mixup_method"], logged["mixup_method_cutmix"]) == ("comixup", 0.7)
    first = [s["target"] for s in steps]
    steps.clear()
    like_timm("-c", folder / "args.yaml", "--output", str(folder.parent / "again"), out="again")
    assert alike([s["target"] for s in steps], first)


def test_the_script_refuses_by_the_methods_name(like_timm, capsys):
    assert "--mixup comixup does not go with --naflex-loader" in refused(like_timm, capsys, *COMIXUP, "--naflex-loader")
    with pytest.raises(RuntimeError, match="epoch 0 passed without one batch through CoMixupTask"):
        like_timm(*COMIXUP, "--bypass-task")
    with pytest.raises(RuntimeError, match="not CoMixupTask: nothing would be mixed"):
        like_timm(*COMIXUP, "--another-task")


@needs_script
def test_timms_script_with_co_mixup(train_script, steps):
    flags = ("--amp", "--amp-dtype", "bfloat16", "--grad-accum-steps", 2, "--model-ema", "--channels-last")
    folder = train_script(*COMIXUP, *flags, "--cutmix", 1.0, "--epochs", 4, "--mixup-off-epoch", 3)
    kinds = [type(s["mixed"]) for s in steps]
    assert kinds[6:] == [type(None)] * 2 and {CoMixed, Mixed} == set(kinds[:6])
    assert yaml.safe_load((folder / "args.yaml").read_text())["mixup"] == "comixup"
    saved = torch.load(folder / "last.pth.tar", weights_only=False)["args"]
    assert (saved.mixup_method, saved.mixup_method_cutmix) == ("comixup", 1.0)
    assert not same(weights(folder, key="state_dict_ema"), weights(folder))
