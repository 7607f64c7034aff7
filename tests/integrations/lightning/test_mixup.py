"""Puzzle Mix and Co-Mixup inside the Lightning Trainer."""

import copy
import inspect
import io
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from dataopt.core.mixup import Adversarial, CoMixup, CutMix, PuzzleMix, augmix, input_gradient, saliency
from dataopt.integrations.lightning import CleanableDataset, CoMixupCallback, PuzzleMixCallback
from dataopt.integrations.lightning.mixup import check_strategy
from dataopt.integrations.mixing import batch_generator, picture
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, SingleDeviceStrategy
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, Subset, TensorDataset

from ..tiny import trainer

CLASSES = 4


def data(rows: int = 16, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.rand(rows, 3, 16, 16, generator=generator), torch.arange(rows) % CLASSES)


class Net(LightningModule):
    """Keeps what its steps get, and what it was before each training step."""

    def __init__(self, lr: float = 0.1):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Dropout(0.2),
            torch.nn.Flatten(), torch.nn.Linear(8 * 49, CLASSES),
        )  # fmt: skip
        self.lr = lr
        self.seen: list = []
        self.checked: list = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.seen.append((x.clone(), y.clone(), copy.deepcopy(self.net)))
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        self.checked.append([t.clone() for t in batch])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


def fit(root, callback, module=None, rows: int = 16, batch: int = 8, ckpt=None, callbacks=(), val=None, **more):
    module = Net() if module is None else module
    callbacks = [callback, *callbacks] if callback else list(callbacks)
    trainer(root, *callbacks, **{"epochs": 1, **more}).fit(
        module, DataLoader(data(rows), batch), None if val is None else DataLoader(val, batch), ckpt_path=ckpt
    )
    return module


def expected(mix, net, x, y, step, autocast=False, augment=False):
    """What core makes of a batch with the generator of that step."""
    generator = batch_generator(0, step)
    if augment:
        x = augmix(x, generator)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        s = saliency(input_gradient(net, x, y))
    return mix(x, y, s, generator=generator)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(
    "callback, mix", [(PuzzleMixCallback, PuzzleMix(CLASSES)), (CoMixupCallback, CoMixup(CLASSES, beta=0.05))]
)
def test_the_module_trains_on_what_core_makes(tmp_path, callback, mix, precision):
    settings = {"beta": 0.05} if callback is CoMixupCallback else {}
    module = fit(tmp_path, callback(CLASSES, **settings), precision=precision, epochs=2)
    assert len(module.seen) == 4
    for step, (x, targets, net) in enumerate(module.seen):
        clean, y = (t[step % 2 * 8 :][:8] for t in data().tensors)
        m = expected(mix, net, clean, y, step, precision == "bf16-mixed")
        assert torch.equal(x, m.inputs) and torch.equal(targets, m.targets)
        assert targets.dtype == torch.float32
    assert torch.cat([targets for _, targets, _ in module.seen]).max(1).values.min() < 0.9


@pytest.mark.parametrize(
    "callback, mix", [(PuzzleMixCallback, PuzzleMix(CLASSES)), (CoMixupCallback, CoMixup(CLASSES))]
)
def test_augmix_images_are_mixed(tmp_path, callback, mix):
    module = fit(tmp_path, callback(CLASSES, augment="augmix", off_epoch=1), epochs=2)
    for step, (x, targets, net) in enumerate(module.seen):
        clean, y = (t[step % 2 * 8 :][:8] for t in data().tensors)
        if step < 2:
            m = expected(mix, net, clean, y, step, augment=True)
            assert torch.equal(x, m.inputs) and torch.equal(targets, m.targets)
        else:
            assert torch.equal(x, clean)


def test_validation_and_sanity_check_see_clean_data_and_the_module_is_given_back(tmp_path):
    val = data(8, seed=1)
    module = fit(tmp_path, PuzzleMixCallback(CLASSES), val=val, epochs=2, num_sanity_val_steps=1)
    assert len(module.checked) == 3  # the sanity check, two epochs
    for x, y in module.checked:
        assert torch.equal(x, val.tensors[0]) and torch.equal(y, val.tensors[1])
    assert not {"on_after_batch_transfer", "training_step"} & set(vars(module))


class Halved(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(data(), 8)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return {"x": batch[0] / 2, "target": batch[1], "kept": "a"}


class Named(Net):
    def training_step(self, batch):
        assert batch["kept"] == "a"
        return super().training_step((batch["x"], batch["target"]), 0)


def test_hooks_of_a_data_module_run_first_and_dicts_are_batches(tmp_path):
    module, source = Named(), Halved()
    callback = PuzzleMixCallback(CLASSES, input_key="x", target_key="target")
    trainer(tmp_path, callback, epochs=1).fit(module, datamodule=source)
    x, targets, net = module.seen[0]
    m = expected(PuzzleMix(CLASSES), net, data().tensors[0][:8] / 2, data().tensors[1][:8], 0)
    assert torch.equal(x, m.inputs) and torch.equal(targets, m.targets)
    assert "on_after_batch_transfer" not in vars(source)


def test_entries_are_counted_from_the_end_too(tmp_path):
    found = [
        fit(tmp_path / str(i), PuzzleMixCallback(CLASSES, **keys)).seen
        for i, keys in enumerate(({}, {"input_key": -2, "target_key": -1}))
    ]
    for (x, y, _), (other_x, other_y, _) in zip(*found, strict=True):
        assert torch.equal(x, other_x) and torch.equal(y, other_y) and y.is_floating_point()
    with pytest.raises(TypeError, match="holds no tensor at -3"):
        fit(tmp_path, PuzzleMixCallback(CLASSES, target_key=-3))


def test_probability_switch_off_epoch_and_cutmix(tmp_path):
    settings = dict(prob=0.5, cutmix_alpha=1.0, switch_prob=0.5, off_epoch=6)
    module = fit(tmp_path, PuzzleMixCallback(CLASSES, **settings), epochs=7)
    kinds = []
    for step, (x, targets, net) in enumerate(module.seen):
        clean, y = (t[step % 2 * 8 :][:8] for t in data().tensors)
        if torch.equal(x, clean):
            assert torch.equal(targets, F.one_hot(y, CLASSES).float())
            kinds.append("clean")
            continue
        cut = CutMix(CLASSES, 1.0)(clean, y, generator=batch_generator(0, step))
        kinds.append("cutmix" if torch.equal(x, cut.inputs) else "puzzle")
        m = cut if kinds[-1] == "cutmix" else expected(PuzzleMix(CLASSES), net, clean, y, step)
        assert torch.equal(x, m.inputs) and torch.equal(targets, m.targets)
    assert set(kinds[:12]) == {"clean", "cutmix", "puzzle"} and kinds[12:] == ["clean", "clean"]


def test_saliency_leaves_no_trace_and_a_last_batch_of_one_stays_clean(tmp_path):
    module = fit(tmp_path, PuzzleMixCallback(CLASSES), Net(lr=0.0), rows=9)
    bare = Net()
    for x, _, _ in module.seen:
        bare(x)  # the batch norm sees each mixed batch once
    assert torch.equal(module.net[1].running_mean, bare.net[1].running_mean)
    assert torch.equal(module.seen[1][0], data(9).tensors[0][8:])


class Still(Net):
    """Without what depends on the other samples or on chance."""

    def __init__(self):
        super().__init__()
        self.net[1], self.net[3] = torch.nn.Identity(), torch.nn.Identity()


def test_accumulation_is_one_large_batch_of_the_same_mixed_samples(tmp_path):
    several = fit(tmp_path, PuzzleMixCallback(CLASSES), Still(), accumulate_grad_batches=2)
    x, y = (torch.cat([seen[i] for seen in several.seen]) for i in range(2))
    once = Still()
    trainer(tmp_path, epochs=1).fit(once, DataLoader(TensorDataset(x, y), 16))
    for a, b in zip(several.parameters(), once.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not torch.equal(once.net[0].weight, Still().net[0].weight)


def test_clean_weight_adds_the_clean_loss(tmp_path):
    module = fit(tmp_path, CoMixupCallback(CLASSES, clean_weight=0.5), Still(), rows=8)
    x, targets, net = module.seen[0]
    clean, y = data(8).tensors
    loss = F.cross_entropy(net(x), targets) + 0.5 * F.cross_entropy(net(clean), y)
    wanted = torch.autograd.grad(loss, list(net.parameters()))
    for p, before, g in zip(module.net.parameters(), net.parameters(), wanted, strict=True):
        torch.testing.assert_close(p, before - 0.1 * g, rtol=1e-5, atol=1e-6)


def test_resumed_training_goes_on_with_the_same_draws(tmp_path):
    saved = ModelCheckpoint(tmp_path / "ckpt", save_top_k=-1, filename="{epoch}")
    first = PuzzleMixCallback(CLASSES, seed=5)
    whole = fit(tmp_path, first, Still(), epochs=2, callbacks=[saved], enable_checkpointing=True)
    again = PuzzleMixCallback(CLASSES, seed=1)
    resumed = fit(tmp_path, again, Still(), epochs=2, ckpt=tmp_path / "ckpt" / "epoch=0.ckpt")
    assert again.state_dict() == {"seed": 5, "step": 4}
    assert len(resumed.seen) == 2
    for a, b in zip(whole.seen[2:], resumed.seen, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


class Gallery(CSVLogger):
    """A logger that takes images, as wandb's does."""

    def __init__(self, root):
        super().__init__(root)
        self.images: list = []

    def log_image(self, key, images, step):
        self.images.append((key, images, step))


def test_statistics_and_pictures_reach_the_logger(tmp_path):
    logger = Gallery(tmp_path)
    fit(tmp_path, PuzzleMixCallback(CLASSES, log_every=3), rows=32, logger=logger, log_every_n_steps=1)
    assert [(key, step) for key, _, step in logger.images] == [("mixup/examples", 1), ("mixup/examples", 4)]
    (image,) = logger.images[0][1]
    assert image.shape == (3 * 16 + 2 * 2, 8 * 16 + 7 * 2, 3) and image.min() == 0 and image.max() == 1
    header, *rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    table = [dict(zip(header.split(","), row.split(","), strict=True)) for row in rows]
    assert [row["mixup/mixed"] for row in table] == ["1.0"] * 4
    assert all(1 <= float(row["mixup/inputs_per_output"]) <= 2 for row in table)
    assert all(0.5 <= float(row["mixup/largest_share"]) <= 1 for row in table)
    assert min(float(row["mixup/largest_share"]) for row in table) < 0.9


def test_tensorboard_gets_the_picture_and_the_statistics(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    module = fit(tmp_path, CoMixupCallback(CLASSES, log_every=3), rows=32, logger=logger, log_every_n_steps=1)
    events = EventAccumulator(logger.log_dir).Reload()
    plans = [
        (x, expected(CoMixup(CLASSES), seen[2], x, y, step))
        for step, (seen, x, y) in enumerate(zip(module.seen, *(t.split(8) for t in data(32).tensors), strict=True))
    ]
    logged = events.Images("mixup/examples")
    assert [image.step for image in logged] == [1, 4]
    for image, (x, m) in zip(logged, (plans[0], plans[3]), strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
        np.testing.assert_allclose(pixels / 255, picture(x, m).permute(1, 2, 0), atol=1 / 255)
    shares = [m.sources for _, m in plans]
    for name, wanted in (
        ("mixed", [1.0] * 4),
        ("inputs_per_output", [float((v > 0).sum(1).float().mean()) for v in shares]),
        ("largest_share", [float(v.amax(1).mean()) for v in shares]),
    ):
        scalars = events.Scalars(f"mixup/{name}")
        assert [s.step for s in scalars] == [0, 1, 2, 3]
        assert [s.value for s in scalars] == pytest.approx(wanted)
    assert all(s.value > 0 for s in events.Scalars("mixup/seconds"))


# every argument, with a value that is not its default
PUZZLE = dict(
    alpha=0.5, beta=1.0, gamma=0.4, eta=0.1, labels=2, grids=[2, (4, 2)], neigh_size=2, data_term="thesis",
    transport="exact", transport_cost=0.7, transport_patch=2, adversarial=Adversarial(0.5, 0.04, 0.05, True, False),
    solver="scipy", mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4],
)  # fmt: skip
COMIXUP = dict(
    alpha=1.5, beta=0.3, gamma=0.9, eta=0.04, tau=0.8, omega=0.002, grid=(4, 2), partition=5, outputs=4, n_iter=3,
    restarts=2, threshold="soft",
)  # fmt: skip
MIXING = dict(
    prob=0.75, cutmix_alpha=1.0, switch_prob=0.25, off_epoch=3, clean_weight=0.5, saliency_resolution=1.0,
    augment="augmix", mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4], seed=8,
)  # fmt: skip


@pytest.mark.parametrize("callback, settings", [(PuzzleMixCallback, PUZZLE), (CoMixupCallback, COMIXUP)])
def test_lightning_cli_builds_the_callback_from_yaml_and_trains_with_it(tmp_path, monkeypatch, callback, settings):
    given = {"num_classes": CLASSES, **settings, **MIXING, "input_key": "x", "target_key": "target", "log_every": 0}
    assert set(given) == set(inspect.signature(callback).parameters)
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
    if callback is PuzzleMixCallback:
        plain.update(adversarial=vars(PUZZLE["adversarial"]), grids=[2, [4, 2]])
    made = {"class_path": f"dataopt.integrations.lightning.{callback.__name__}", "init_args": plain}
    of_trainer = {
        "accelerator": "cpu", "max_epochs": 1, "default_root_dir": str(tmp_path), "callbacks": [made], "logger": False,
        "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    (tmp_path / "given.yaml").write_text(yaml.safe_dump({"trainer": of_trainer, "model": {"lr": 0.2}}))
    monkeypatch.setattr("sys.argv", ["train"])
    wanted = callback(**given).mixing

    def fit(config: str, **more):  # what the module saw
        args = ["fit", "--config", str(tmp_path / config)]
        cli = LightningCLI(Named, Halved, args=args, seed_everything_default=False, **more)
        found = next(c for c in cli.trainer.callbacks if isinstance(c, callback))
        assert found.state_dict() == {"seed": 8, "step": 2} and cli.model.lr == 0.2
        assert (found.input_key, found.target_key, found.log_every) == ("x", "target", 0)
        for of, own in ((wanted, found.mixing), (wanted.mix, found.mixing.mix), (wanted.cutmix, found.mixing.cutmix)):
            for name in set(vars(of)) - {"mix", "cutmix", "step"}:
                assert getattr(own, name) == getattr(of, name), name
        return [(x, targets) for x, targets, _ in cli.model.seen]

    seen = fit("given.yaml")
    assert all(not torch.equal(x, clean / 2) for (x, _), clean in zip(seen, data().tensors[0].split(8), strict=True))
    again = fit("config.yaml", save_config_callback=None)  # the file that Lightning wrote
    assert all(torch.equal(a, b) for one, two in zip(seen, again, strict=True) for a, b in zip(one, two, strict=True))


class HardOnly(Net):
    def training_step(self, batch, batch_idx):
        return F.nll_loss(self(batch[0]).log_softmax(1), batch[1])


class Iterates(Net):
    def training_step(self, dataloader_iter):
        return None


class Manual(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class NoForward(Net):
    forward = LightningModule.forward


@pytest.mark.parametrize(
    "module, settings, error, message",
    [
        (HardOnly, {"prob": 0.0}, ValueError, "training_step failed on its first batch, whose targets are soft"),
        (Iterates, {}, ValueError, "takes dataloader_iter"),
        (Manual, {"clean_weight": 1.0}, ValueError, "needs automatic optimization"),
        (NoForward, {}, ValueError, "has no forward"),
        (Net, {"input_key": "x"}, TypeError, "no tensor at 'x'"),
        (Net, {"target_key": 2}, TypeError, "with 2 entries"),
        (Net, {"grids": (3,)}, ValueError, "grid=3 does not divide"),
    ],
)
def test_refusals_at_the_start(tmp_path, module, settings, error, message):
    module = module()
    with pytest.raises(error, match=message):
        fit(tmp_path, PuzzleMixCallback(CLASSES, **settings), module)
    assert not {"on_after_batch_transfer", "training_step"} & set(vars(module))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"prob": 1.5}, "prob=1.5"), ({"switch_prob": -1}, "switch_prob=-1"), ({"off_epoch": -1}, "off_epoch=-1"),
        ({"saliency_resolution": 0}, "saliency_resolution=0"), ({"log_every": -1}, "log_every=-1"),
        ({"clean_weight": 1, "saliency_resolution": 0.5}, "leave saliency_resolution at 1"),
        ({"beta": -1}, "beta=-1"), ({"cutmix_alpha": float("inf")}, "cutmix_alpha=inf"),
    ],
)  # fmt: skip
def test_bad_settings(settings, message):
    for callback in (PuzzleMixCallback, CoMixupCallback):
        with pytest.raises(ValueError, match=message):
            callback(CLASSES, **settings)


class Weighted(TensorDataset):
    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return {"x": x, "target": y, "sample_weight": 1.0}


CLEANABLE = CleanableDataset(data(8))


@pytest.mark.parametrize(
    "loaders, keys, message",
    [
        (DataLoader(CLEANABLE, 8), {}, "the training data is a CleanableDataset: a mixed input is of several samples"),
        (DataLoader(Subset(CLEANABLE, range(4)), 4), {}, "the training data is a CleanableDataset"),
        ({"a": DataLoader(data(), 8), "b": DataLoader(CLEANABLE, 8)}, {}, "the training data is a CleanableDataset"),
        (DataLoader(Weighted(*data().tensors), 8), {"input_key": "x", "target_key": "target"}, "batch holds 'sample_w"),
    ],
)
def test_weights_of_samples_are_refused(tmp_path, loaders, keys, message):
    module = Named()
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, CoMixupCallback(CLASSES, **keys)).fit(module, loaders)
    assert not module.seen and not {"on_after_batch_transfer", "training_step"} & set(vars(module))


def test_sharded_strategies_are_refused_by_name():
    with pytest.raises(ValueError, match="strategy=FSDPStrategy"):
        check_strategy(FSDPStrategy())
    # made without its library, which only the start of training needs
    for stage in (2, 3):
        strategy = DeepSpeedStrategy.__new__(DeepSpeedStrategy)
        strategy.config = {"zero_optimization": {"stage": stage}}
        if stage == 3:
            with pytest.raises(ValueError, match="strategy=DeepSpeed ZeRO-3"):
                check_strategy(strategy)
        else:
            check_strategy(strategy)
    check_strategy(SingleDeviceStrategy("cpu"))
