"""``CondensedDataModule`` under the Lightning ``Trainer``."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from dataopt.core.condense import Condensed
from dataopt.core.condense.evaluate import training_augment
from dataopt.integrations.hf import save_condensed
from dataopt.integrations.lightning import CondensedDataModule, PuzzleMixCallback
from dataopt.integrations.mixing import batch_generator
from datasets import Dataset as Rows
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from PIL import Image
from torch.utils.data import TensorDataset

from ..condensed_data import MEAN, NAMES, STD, condensed, pixels
from ..tiny import trainer


class Net(LightningModule):
    """Keeps the batches that it gets."""

    def __init__(self, channels: int = 3, lr: float = 0.01):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Conv2d(channels, 8, 3, 2), torch.nn.ReLU(), torch.nn.Flatten(),
                                       torch.nn.LazyLinear(4))  # fmt: skip
        self.lr = lr
        self.seen: list = []
        self.checked: list = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.seen.append((x.clone(), y.clone()))
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.checked.append((x.clone(), y.clone()))
        self.log("accuracy", (self(x).argmax(1) == y).float().mean(), batch_size=len(y))

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), self.lr)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    return str(save_condensed(condensed(), tmp_path_factory.mktemp("condensed") / "set"))


def fit(root: Path, data: CondensedDataModule, *callbacks, ckpt=None, net=None, **more) -> Net:
    net = net or Net(data.condensed.images.shape[1])
    net(torch.zeros(1, *data.condensed.images.shape[1:]))  # the lazy layer
    trainer(root, *callbacks, **{"epochs": 1, **more}).fit(net, datamodule=data, ckpt_path=ckpt)
    return net


def real(rows: int = 16) -> TensorDataset:
    return TensorDataset(pixels(rows, seed=1), torch.arange(rows) % 4)


def test_the_module_trains_on_the_decoded_images_and_is_checked_on_the_real(tmp_path, source):
    data = CondensedDataModule(source, val=real(), test=real(), batch_size=8, augment=False, config="exact", repeats=2)
    net = fit(tmp_path, data, epochs=10)
    x, y = condensed().decode(normalised=True)
    assert len(net.seen) == 10 * 8
    for epoch in range(2):
        seen, labels = (torch.cat([batch[i] for batch in net.seen[8 * epoch :][:8]]) for i in (0, 1))
        places = torch.cdist(seen.flatten(1), x.flatten(1), compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
        assert torch.allclose(seen, x[places], atol=1e-6) and torch.equal(labels, y[places])
        assert torch.equal(places.bincount(), torch.full((32,), 2))
    assert not torch.equal(net.seen[0][1], net.seen[8][1])  # shuffled anew
    checked = torch.cat([batch[0] for batch in net.checked[-2:]])
    assert torch.allclose(checked, (real().tensors[0] - MEAN) / STD, atol=1e-6)
    (scores,) = trainer(tmp_path).test(net, datamodule=data, verbose=False)
    assert scores["accuracy"] >= 0.75  # a quarter by chance
    assert data.num_classes == 4


def test_augmentation_follows_from_the_seed_and_the_step(tmp_path, source):
    def run(augment: bool, seed: int) -> tuple[CondensedDataModule, list]:
        data = CondensedDataModule(source, val=real(4), batch_size=16, augment=augment, seed=seed)
        net = Net()
        net(torch.zeros(1, 3, 16, 16))
        torch.manual_seed(0)  # of the order of the images
        return data, fit(tmp_path, data, net=net, epochs=2).seen

    _, clean = run(False, 5)
    data, seen = run(True, 5)
    augment = training_augment(condensed())
    for step, ((x, _), (changed, _)) in enumerate(zip(clean, seen, strict=True)):
        assert torch.equal(changed, augment(x, generator=batch_generator(5, step))) and not torch.equal(changed, x)
    assert data.step == len(seen) == 4  # validation takes no step
    assert not torch.equal(run(True, 6)[1][0][0], seen[0][0])


def test_a_resumed_run_goes_on_with_the_next_draw(tmp_path, source):
    keep = ModelCheckpoint(tmp_path, filename="{step}")
    fit(tmp_path, CondensedDataModule(source, batch_size=16, seed=5), keep, enable_checkpointing=True)
    path = tmp_path / "step=2.ckpt"
    assert torch.load(path, weights_only=False)["CondensedDataModule"] == {"seed": 5, "step": 2}
    data = CondensedDataModule(source, batch_size=16)
    fit(tmp_path, data, ckpt=path, epochs=2)
    assert (data.seed, data.step) == (5, 4)


@pytest.mark.parametrize("channels", [1, 3])
def test_validation_data_in_all_its_forms_is_the_same(tmp_path, channels):
    source = str(save_condensed(condensed(channels=channels), tmp_path / "set"))
    bytes_ = (pixels(8, channels, seed=1) * 255).round().byte()
    labels = [0, 1, 2, 3] * 2
    pictures = [Image.fromarray(row if channels == 3 else row[:, :, 0]) for row in bytes_.permute(0, 2, 3, 1).numpy()]
    forms = {
        "uint8": TensorDataset(bytes_, torch.tensor(labels)),
        "floating": TensorDataset(bytes_ / 255, torch.tensor(labels)),
        "PIL": list(zip(pictures, labels, strict=True)),
        "rows": Rows.from_dict({"image": pictures, "label": labels}),
    }
    for dataset in forms.values():
        data = CondensedDataModule(source, val=dataset)
        (batch,) = data.val_dataloader()
        assert torch.allclose(batch[0], bytes_ / 255, atol=1e-6) and batch[1].tolist() == labels
    assert data.test_dataloader() == []


def test_puzzle_mix_mixes_what_the_module_gives(tmp_path, source):
    callback = PuzzleMixCallback(4, grids=[4], mean=[MEAN] * 3, std=[STD] * 3)
    net = fit(tmp_path, CondensedDataModule(source, batch_size=16), callback)
    assert all(y.shape == (16, 4) and y.dtype == torch.float32 for _, y in net.seen) and len(net.seen) == 2


def test_a_configuration_file_builds_it(tmp_path, source):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({
        "trainer": {"max_steps": 1, "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
                    "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": str(tmp_path)},
        "data": {"source": source, "batch_size": 4, "repeats": 3, "augment": False,
                 "val": {"class_path": "torchvision.datasets.FakeData",
                         "init_args": {"size": 4, "image_size": [3, 16, 16], "num_classes": 4}}},
    }))  # fmt: skip

    class Small(Net):
        def __init__(self, lr: float = 0.01):
            super().__init__(lr=lr)
            self(torch.zeros(1, 3, 16, 16))

    cli = LightningCLI(Small, CondensedDataModule, run=False, args=["--config", str(config)], save_config_callback=None)
    assert cli.datamodule.repeats == 3 and len(cli.datamodule.val) == 4
    cli.trainer.fit(cli.model, cli.datamodule)
    assert cli.model.seen[0][0].shape == (4, 3, 16, 16)


@pytest.mark.parametrize("setting", [{"batch_size": 0}, {"repeats": 0}, {"num_workers": -1}, {"seed": -1}])
def test_arguments_outside_their_range(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=f"{name}={setting[name]}"):
        CondensedDataModule("somewhere", **setting)


def test_what_does_not_fit_is_refused(tmp_path, source):
    def fails(message: str, error=ValueError, where: str = source, **settings) -> None:
        data = CondensedDataModule(where, **settings)
        with pytest.raises(error, match=message):
            fit(tmp_path, data)

    labels = torch.zeros(4, dtype=torch.int64)
    fails(r"row 0 is an image of \(3, 8, 8\) and the condensed ones are of \(3, 16, 16\)",
          val=TensorDataset(torch.rand(4, 3, 8, 8), labels))  # fmt: skip
    fails("row 0 holds values from .* give pixels in", val=TensorDataset(torch.randn(4, 3, 16, 16) - 2, labels))
    fails("holds no condensed data set", FileNotFoundError, str(tmp_path))
    bare = Condensed(torch.rand(2, 3, 16, 16), torch.tensor([0, 1]))
    bare.save(tmp_path / "bare")
    fails("has no mean and std of its source; give normalised=False", where=str(tmp_path / "bare"))
    net = fit(tmp_path, CondensedDataModule(str(tmp_path / "bare"), normalised=False, augment=False, config="exact"))
    assert np.array_equal(np.sort(net.seen[0][0].flatten()), np.sort(bare.images.flatten()))
    assert CondensedDataModule(str(tmp_path / "bare")).num_classes == 2
    assert CondensedDataModule(source).num_classes == len(NAMES)
