"""PuzzleMixTask and PuzzleMixup: what is mixed, when, and towards which targets."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

import pytest
import timm.data
import torch
import torch.nn.functional as F
from dataopt.core.mixup import Adversarial, PuzzleMix, clean_loss, input_gradient
from dataopt.integrations.timm import PuzzleMixTask, PuzzleMixup
from timm.data.mixup import mixup_target
from timm.loss import (
    BinaryCrossEntropy,
    JsdCrossEntropy,
    LabelSmoothingCrossEntropy,
    SoftTargetCrossEntropy,
)
from timm.task import resume_task_checkpoint
from timm.utils import CheckpointSaver
from torch import Tensor, nn

K = 4


class Net(nn.Module):
    """Small, with batch norm and dropout, which tell the modes apart."""

    num_classes = K

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.drop = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout(0.2)
        self.fc = nn.Linear(8, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(F.relu(self.bn(self.conv(x)))).mean((2, 3)))


def make(mix: dict[str, Any] | None = None, **kwargs: Any) -> PuzzleMixTask:
    torch.manual_seed(0)
    return PuzzleMixTask(Net(), mix=PuzzleMix(K, **(mix or {})), **{"verbose": False, **kwargs})


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.rand(8, 3, 16, 16, generator=g), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])


def smoothed(t: Tensor, smoothing: float) -> Tensor:
    off = smoothing / K
    return t * (1 - smoothing) + off


def test_a_batch_is_mixed_and_the_loss_is_that_of_the_mixed_batch(batch):
    task = make(smoothing=0.1)
    task.trainable_module.drop.p = 0.0
    result = task(*batch)
    mixed = result["mixed"]
    x, y = batch
    assert not torch.equal(mixed.inputs, x)
    assert torch.allclose(result["output"], task.trainable_module(mixed.inputs), atol=1e-6)
    ratio = mixed.mask.mean((1, 2)).unsqueeze(1)
    one_hot = F.one_hot(y, K).float()
    expected = smoothed(one_hot, 0.1) * ratio + smoothed(one_hot[mixed.partner], 0.1) * (1 - ratio)
    assert torch.allclose(result["target"], expected, atol=1e-6)
    assert torch.allclose(result["target"].sum(1), torch.ones(8), atol=1e-6)
    assert torch.allclose(result["loss"], SoftTargetCrossEntropy()(result["output"], expected), atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_unmixed_targets_are_timms(batch, smoothing):
    result = make(prob=0.0, smoothing=smoothing)(*batch)
    assert result["mixed"] is None
    assert torch.allclose(result["target"], mixup_target(batch[1], K, 1.0, smoothing), atol=1e-7)


def test_draws_follow_seed_and_step(batch):
    first, again, other = make(seed=3), make(seed=3), make(seed=4)
    torch.manual_seed(99)
    a = [first(*batch)["mixed"] for _ in range(3)]
    torch.manual_seed(100)  # the global generator takes no part
    b = [again(*batch)["mixed"] for _ in range(3)]
    c = [other(*batch)["mixed"] for _ in range(3)]
    assert all(torch.equal(p.inputs, q.inputs) and torch.equal(p.partner, q.partner) for p, q in zip(a, b, strict=True))
    assert not torch.equal(a[0].partner, a[1].partner)
    assert any(not torch.equal(p.partner, q.partner) for p, q in zip(a, c, strict=True))


def test_draws_leave_the_global_generator_alone(batch):
    task = make(cutmix_alpha=1.0)
    task.trainable_module.drop.p = 0.0
    before = torch.get_rng_state()
    for _ in range(4):
        task(*batch)
    assert torch.equal(before, torch.get_rng_state())


def test_a_checkpoint_carries_the_step(batch, tmp_path: Path):
    task = make()
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), 0.1)
    task.setup_ema()
    for _ in range(3):
        task(*batch)
    saver = CheckpointSaver(task.trainable_module, optimizer, checkpoint_dir=str(tmp_path), task=task)
    saver.save_checkpoint(0, 1.0)
    expected = task(*batch)["mixed"]
    resumed = make()
    assert resume_task_checkpoint(resumed, str(tmp_path / "last.pth.tar"), log_info=False) == 1
    assert torch.equal(resumed(*batch)["mixed"].inputs, expected.inputs)
    fresh = make()
    assert not torch.equal(fresh(*batch)["mixed"].inputs, expected.inputs)


def test_a_plain_checkpoint_is_taken_with_a_warning(batch, caplog):
    task = make(verbose=True)
    with caplog.at_level(logging.WARNING):
        task.load_checkpoint_state(Net().state_dict())
    assert "draws start from step 0" in caplog.text


def test_nothing_is_mixed_from_off_epoch_on(batch):
    task = make(off_epoch=2, smoothing=0.1)
    seen = []
    for epoch in range(3):
        task.set_epoch(epoch)
        seen.append(task(*batch))
    assert [r["mixed"] is not None for r in seen] == [True, True, False]
    assert torch.allclose(seen[2]["target"], smoothed(F.one_hot(batch[1], K).float(), 0.1))


@pytest.mark.parametrize("which", ["task", "model", "task but not the model"])
def test_nothing_is_mixed_in_evaluation_mode(batch, which):
    task = make()
    (task.trainable_module if which == "model" else task).eval()
    if which == "task but not the model":
        task.trainable_module.train()
    assert task(*batch)["mixed"] is None
    assert task.get_task_state() == {"puzzle_mix": {"step": 0}}


def test_the_saliency_pass_leaves_no_trace(batch):
    task, plain = make(), make()
    task.trainable_module.drop.p = plain.trainable_module.drop.p = 0.0
    result = task(*batch)
    plain.trainable_module(result["mixed"].inputs)  # the only forward pass that may count
    for (name, a), b in zip(task.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert all(p.grad is None for p in task.parameters())


def test_the_saliency_pass_does_not_go_through_wrappers(batch):
    class Wrapper(nn.Module):  # as DDP, whose forward pass would arm its reducer
        calls = 0

        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.module(x)

    for clean_weight in (0.0, 1.0):
        task = make(clean_weight=clean_weight)
        task.trainable_module = Wrapper(task.trainable_module)
        assert task(*batch)["mixed"] is not None
        assert task.trainable_module.calls == 1


def test_prob_and_switch_prob_are_frequencies(batch):
    task = make({"alpha": 1.0}, prob=0.5, cutmix_alpha=1.0, switch_prob=0.25, seed=5)
    plans = [task(*batch)["mixed"] for _ in range(200)]
    mixed = [p for p in plans if p is not None]
    cut = [p for p in mixed if p.moves is None]  # CutMix moves nothing
    assert 80 <= len(mixed) <= 120
    assert 0.15 < len(cut) / len(mixed) < 0.35
    assert (task.mixer.decided, task.mixer.mixed) == (200, len(mixed))


def test_cutmix_pastes_one_rectangle(batch):
    task = make(cutmix_alpha=1.0, switch_prob=1.0)
    m = task(*batch)["mixed"]
    hidden = m.mask[0] == 0
    rows, cols = hidden.any(1).nonzero().flatten(), hidden.any(0).nonzero().flatten()
    assert hidden[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1].all()
    assert hidden.sum() == len(rows) * len(cols)
    x = batch[0]
    assert torch.equal(m.inputs, torch.where(hidden, x[m.partner], x))


def test_elem_draws_for_each_element(batch):
    task = make(mode="elem", prob=0.5, seed=1)
    x, _ = batch
    kept = shares = 0
    for _ in range(20):
        m = task(*batch)["mixed"]
        own = m.partner == torch.arange(8)
        assert torch.equal(m.inputs[own], x[own])
        kept += int(own.sum())
        shares += len(m.mask.mean((1, 2))[~own].unique())
    assert 80 <= kept <= 120  # half of 160, and one in eight of the rest draws itself
    assert shares > 40


def test_a_batch_mode_share_is_common_and_an_elem_share_is_not(batch):
    x, y = torch.rand(8, 3, 16, 16), batch[1]
    x[:] = x[:1]  # flat costs but for the prior: the mask then shows what lambda was
    mix = {"beta": 0.0, "gamma": 0.0, "eta": 100.0, "transport": None, "labels": 9, "grids": [4]}
    common = make(mix)(x, y)["mixed"].mask.mean((1, 2)).unique()
    each = make(mix, mode="elem")(x, y)["mixed"].mask.mean((1, 2)).unique()
    assert len(common) == 1
    assert len(each) > 3


def test_the_clean_loss_adds_its_gradient(batch):
    task = make({"grids": [4]}, clean_weight=0.5)
    task.trainable_module.drop.p = 0.0
    x, y = batch
    reference = make().trainable_module
    reference.drop.p = 0.0
    loss, gradient = clean_loss(reference, x, y)
    result = task(x, y)
    mixed = SoftTargetCrossEntropy()(reference(result["mixed"].inputs), result["target"])
    (mixed + 0.5 * F.cross_entropy(reference(x), y)).backward()
    result["loss"].backward()
    assert torch.allclose(result["clean_loss"], loss)
    assert torch.allclose(result["loss"], mixed + 0.5 * loss, atol=1e-6)
    for (name, a), b in zip(task.trainable_module.named_parameters(), reference.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6), name
    # the saliency is that of training mode
    evaluation = input_gradient(make().trainable_module, x, y)
    assert not torch.allclose(gradient, evaluation, atol=1e-4)


def test_adversarial_noise_reaches_the_mix(batch):
    x, y = batch
    noise = Adversarial(p=1.0, eps=10 / 255, step=12 / 255)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.2, 0.2]
    shift = lambda v: torch.tensor(v).view(1, 3, 1, 1)  # noqa: E731
    normal = (x - shift(mean)) / shift(std)
    task = make({"adversarial": noise, "mean": mean, "std": std, "transport": None})
    mixed = task(normal, y)["mixed"]
    pixels = (mixed.inputs * shift(std) + shift(mean)).double()
    clean = (mixed.apply(normal) * shift(std) + shift(mean)).double()
    change = (pixels - clean).abs()
    assert 0 < change.max() <= 10 / 255 + 1e-5
    assert pixels.min() > -1e-5 and pixels.max() < 1 + 1e-5


@pytest.mark.parametrize("criterion", [SoftTargetCrossEntropy(), BinaryCrossEntropy(), nn.CrossEntropyLoss()])
def test_soft_criteria_are_taken(batch, criterion):
    result = make(criterion=criterion)(*batch)
    assert torch.allclose(result["loss"], criterion(result["output"], result["target"]))


@pytest.mark.parametrize(
    "criterion", [LabelSmoothingCrossEntropy(), nn.NLLLoss(), nn.CrossEntropyLoss(reduction="none"), JsdCrossEntropy()]
)
def test_criteria_on_indices_are_refused(criterion):
    with pytest.raises(ValueError, match="criterion"):
        make(criterion=criterion)


def test_the_criterion_is_built_for_soft_targets():
    assert isinstance(make(criterion_kwargs={"smoothing": 0.1}).criterion, SoftTargetCrossEntropy)
    bce = make(criterion_kwargs={"loss_type": "bce", "smoothing": 0.1, "soft_targets": False}).criterion
    assert isinstance(bce, BinaryCrossEntropy) and bce.smoothing == 0
    with pytest.raises(ValueError, match="give one of the two"):
        make(criterion=nn.CrossEntropyLoss(), criterion_kwargs={"smoothing": 0.1})


def test_multi_hot_targets_need_a_binary_criterion(batch):
    x, _ = batch
    y = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]]).repeat(4, 1)
    with pytest.raises(ValueError, match="binary cross-entropy"):
        make()(x, y)
    task = make(criterion_kwargs={"loss_type": "bce"}, smoothing=0.1)
    result = task(x, y)
    ratio = result["mixed"].mask.mean((1, 2)).unsqueeze(1)
    expected = (y * ratio + y[result["mixed"].partner] * (1 - ratio)) * 0.9 + 0.05
    assert torch.allclose(result["target"], expected, atol=1e-6)
    result["loss"].backward()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"mode": "pair"}, "pair"),
        ({"mode": "mosaic"}, "mosaic"),
        ({"mode": "elem", "cutmix_alpha": 1.0}, "cutmix_alpha=1.0"),
        ({"prob": 1.5}, "prob=1.5"),
        ({"switch_prob": -1}, "switch_prob=-1"),
        ({"smoothing": 1.0}, "smoothing=1.0"),
        ({"cutmix_alpha": -1.0}, "cutmix_alpha=-1.0"),
        ({"clean_weight": -1.0}, "clean_weight=-1.0"),
        ({"clean_weight": 1.0, "saliency_resolution": 0.5}, "saliency_resolution=0.5"),
        ({"saliency_resolution": 0.0}, "saliency_resolution=0.0"),
        ({"seed": -1}, "seed=-1"),
        ({"off_epoch": -1}, "off_epoch=-1"),
    ],
)
def test_bad_arguments_are_named(bad, message):
    with pytest.raises(ValueError, match=message):
        make(**bad)


def test_mix_must_be_given():
    with pytest.raises(TypeError, match="mix is missing"):
        PuzzleMixTask(Net())
    with pytest.raises(TypeError, match="give dataopt"):
        PuzzleMixTask(Net(), mix=timm.data.Mixup(num_classes=K), criterion=SoftTargetCrossEntropy())  # type: ignore


@pytest.mark.parametrize("mode", ["batch", "elem"])
def test_a_batch_of_one_is_an_error(batch, mode):
    with pytest.raises(ValueError, match="batch of one"):
        make(mode=mode)(batch[0][:1], batch[1][:1])


def test_labels_out_of_range_are_named_also_on_unmixed_batches(batch):
    for prob in (0.0, 1.0):
        with pytest.raises(ValueError, match="class ids from 0 to 7"):
            make(prob=prob)(batch[0], torch.arange(8))


def test_saliency_at_half_resolution(batch):
    result = make(saliency_resolution=0.5)(*batch)
    assert result["mixed"].inputs.shape == batch[0].shape


def test_a_compiled_task_gives_the_same(batch):
    plain, compiled = make(), make()
    for task in (plain, compiled):
        task.trainable_module.drop.p = 0.0
    compiled.compile(backend="eager")
    a, b = plain(*batch), compiled(*batch)
    assert torch.equal(a["mixed"].inputs, b["mixed"].inputs)
    assert torch.allclose(a["loss"], b["loss"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(batch, dtype):
    task = make(clean_weight=0.5, criterion_kwargs={"loss_type": "bce"})
    with torch.autocast("cpu", dtype=dtype):
        result = task(*batch)
    result["loss"].backward()
    assert result["output"].dtype == dtype
    assert torch.isfinite(result["loss"]) and result["mixed"] is not None
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in task.trainable_module.parameters())


def test_mixup_is_called_like_timms(batch):
    ours, timms = inspect.signature(PuzzleMixup).parameters, inspect.signature(timm.data.Mixup).parameters
    shared = {"cutmix_alpha", "prob", "switch_prob", "mode", "label_smoothing", "num_classes"}
    assert all(ours[name].default == timms[name].default for name in shared)
    mixup_fn = PuzzleMixup(make().trainable_module, num_classes=K, label_smoothing=0.1, alpha=1.0)
    x, target = mixup_fn(*batch)
    assert not torch.equal(x, batch[0]) and target.shape == (8, K)
    mixup_fn.mixup_enabled = False
    x, target = mixup_fn(*batch)
    assert x is batch[0]
    assert torch.allclose(target, mixup_target(batch[1], K, 1.0, 0.1))


def test_mixup_and_task_make_the_same_batch(batch):
    task = make(smoothing=0.1, seed=7)
    mixup_fn = PuzzleMixup(make().trainable_module, num_classes=K, label_smoothing=0.1, seed=7)
    x, target = mixup_fn(*batch)
    result = task(*batch)
    assert torch.equal(x, result["mixed"].inputs) and torch.equal(target, result["target"])


def test_mixup_has_a_state(batch):
    model = make().trainable_module
    a = PuzzleMixup(model, num_classes=K)
    a(*batch)
    b = PuzzleMixup(model, num_classes=K)
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(*batch)[0], b(*batch)[0])


def test_mixup_takes_multi_hot_targets_when_told(batch):
    y = F.one_hot(batch[1], K).float()
    with pytest.raises(ValueError, match="multi_label=True"):
        PuzzleMixup(make().trainable_module, num_classes=K)(batch[0], y)
    _, target = PuzzleMixup(make().trainable_module, num_classes=K, multi_label=True)(batch[0], y)
    assert target.shape == (8, K)


def test_mixup_as_collate_fn_names_the_collate(batch):
    samples = list(zip(*batch, strict=True))
    loader = torch.utils.data.DataLoader(
        samples, batch_size=4, collate_fn=PuzzleMixup(make().trainable_module, num_classes=K)
    )
    with pytest.raises(TypeError, match="PuzzleCollate"):
        next(iter(loader))
