"""The condenser stopped and started again, its checkpoints, and its classes split over processes."""

import os
import resource
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from dataopt.core.condense import Condenser
from dataopt.core.condense.files import read
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from .problem import Plain, made, tiny_net, wide_net

FRESH = get_context("forkserver")
FRESH.set_forkserver_preload([__name__])


RESUMED = {
    "fast": {"repeats": 4, "inner": 2},
    "released": {"preset": "released", "inner": 7, "network_steps": 2, "early_steps": None},
    "features": {"objective": "features", "early_steps": None},
    "dropout": {"model_fn": Plain},
    "time": {"axes": "time"},
    "two networks": {"early_steps": 2, "networks": 2, "repeats": 2, "inner": 1},
    "small bank": {"bank_bytes": 1, "sampler": "kmeans", "real_batch": 5},
}


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_is_bitwise_the_same(name, tmp_path):
    x, y = made()
    settings = {"model_fn": tiny_net, "images_per_class": 1, "factor": 2, "early_steps": 1, **RESUMED[name]}
    whole = Condenser(steps=22, **settings)
    once = whole.fit(x, y, progress=False)
    for steps in (9, 9, 13, 22):  # within a round of four, and once with nothing to do
        condenser = Condenser(steps=steps, checkpoint_every=4, **settings)
        c = condenser.fit(x, y, resume=tmp_path, progress=False)
    assert torch.equal(c.images, once.images) and torch.equal(condenser.losses, whole.losses)
    assert torch.equal(condenser.initial, whole.initial)
    assert len(os.listdir(tmp_path)) == 2


def test_an_interrupted_run_goes_on_from_its_last_checkpoint(tmp_path):
    x, y = made()
    settings = {
        "images_per_class": 1,
        "factor": 2,
        "steps": 20,
        "repeats": 3,
        "inner": 1,
        "checkpoint_every": 4,
        "early_steps": 0,
        "networks": 0,
    }
    whole = Condenser(tiny_net, **settings).fit(x, y, progress=False)
    nets = 0

    def interrupted():
        nonlocal nets
        nets += 1
        if nets == 9:  # some are made before the first round
            raise KeyboardInterrupt
        return tiny_net()

    with pytest.raises(KeyboardInterrupt):
        Condenser(interrupted, **settings).fit(x, y, resume=tmp_path, progress=False)
    steps = read(tmp_path, "checkpoint-0of1")[1]["steps"]
    assert 0 < steps < 20 and steps % 4 == 0
    again = Condenser(tiny_net, **settings).fit(x, y, resume=tmp_path, progress=False)
    assert torch.equal(again.images, whole.images)


def test_the_bank_stays_within_its_bytes(tmp_path):
    net = tiny_net()
    weights = sum(p.numel() for p in net.parameters())
    matched = sum(m.weight.numel() for m in net.modules() if isinstance(m, nn.Conv2d))
    look = 4 * (weights + 3 * matched)  # float32: a network, and the gradients of three classes
    x, y = made()
    for kept, size in ((3, 3 * look + 1), (1, look - 1), (64, 1 << 30)):
        condenser = Condenser(tiny_net, 1, 2, steps=140, bank_bytes=size, repeats=2, real_batch=4, early_steps=0)
        condenser.fit(x, y, resume=tmp_path / str(kept), progress=False)
        tensors, record = read(tmp_path / str(kept), "checkpoint-0of1")
        assert len(record["bank"]) == kept
        held = (t.nbytes for name, t in tensors.items() if "params" in name or "targets" in name)
        assert sum(held) == kept * look


@pytest.mark.parametrize("networks", [0, 1, 3])
def test_renewals_go_back_to_as_many_networks_as_told(networks, tmp_path):
    """Ten looks, each at a renewal; early steps make a network other than the one that model_fn gave."""
    x, y = made()
    weights = tiny_net().state_dict()
    settings = {"inner": 1, "repeats": 2, "steps": 20, "network_steps": 0, "pretrained": [weights]}
    for early in (0, 1):
        folder = tmp_path / str(early)
        condenser = Condenser(tiny_net, 1, 2, early_steps=early, networks=networks, **settings)
        condenser.fit(x, y, resume=folder, progress=False)
        tensors, record = read(folder, "checkpoint-0of1")
        seen = [tensors[f"bank.{k}.params.head.weight"] for k in range(len(record["bank"]))]
        assert len(seen) == 10 and record["pool"] == networks
        distinct = {t.numpy().tobytes() for t in seen}
        assert len(distinct) == (1 if not early else networks or 10)
        assert (weights["head.weight"].numpy().tobytes() in distinct) == (not early)


EVER_NEW = (
    {"early_steps": 0}, {"pretrained": True}, {"match": "synthetic"}, {"objective": "features"},
    {"pretrained": True, "early_steps": 1}, {"match": "synthetic", "early_steps": 1}, {"preset": "released"},
)  # fmt: skip


@pytest.mark.parametrize("settings", EVER_NEW, ids=str)
def test_networks_are_ever_new_where_the_preset_does_not_keep_any(settings, tmp_path):
    x, y = made()
    if "pretrained" in settings:
        settings = settings | {"pretrained": [tiny_net().state_dict() for _ in range(3)]}
    Condenser(tiny_net, 1, 2, steps=6, inner=1, repeats=1, **settings).fit(x, y, resume=tmp_path, progress=False)
    assert read(tmp_path, "checkpoint-0of1")[1]["pool"] == 0


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    x, y = made()
    Condenser(tiny_net, 1, 2, steps=2, early_steps=1).fit(x, y, resume=tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"was saved with lr=0\.01, now it is 0\.02; give the same settings"):
        Condenser(tiny_net, 1, 2, steps=2, early_steps=1, lr=0.02).fit(x, y, resume=tmp_path, progress=False)
    with pytest.raises(ValueError, match="was saved with source="):
        Condenser(tiny_net, 1, 2, steps=2, early_steps=1).fit(x.flip(3), y, resume=tmp_path, progress=False)
    with pytest.raises(ValueError, match="steps=1 is less than the 2 that resume="):
        Condenser(tiny_net, 1, 2, steps=1, early_steps=1).fit(x, y, resume=tmp_path, progress=False)
    file = next(tmp_path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"bytes where checkpoint-0of1\.json says"):
        Condenser(tiny_net, 1, 2, steps=2, early_steps=1).fit(x, y, resume=tmp_path, progress=False)


def test_a_checkpoint_of_another_network_or_number_of_processes_is_refused(tmp_path):
    x, y = made()
    weights = [tiny_net().state_dict() for _ in range(2)]
    Condenser(tiny_net, 1, 2, steps=2, pretrained=weights[:1]).fit(x, y, resume=tmp_path, progress=False)
    with pytest.raises(ValueError, match="was saved with pretrained weights="):
        Condenser(tiny_net, 1, 2, steps=2, pretrained=weights[1:]).fit(x, y, resume=tmp_path, progress=False)
    (tmp_path / "checkpoint-0of1.json").rename(tmp_path / "checkpoint-0of12-a.json")
    with pytest.raises(ValueError, match="another number of processes"):
        Condenser(tiny_net, 1, 2, steps=2, pretrained=weights[:1]).fit(x, y, resume=tmp_path, progress=False)


def test_dropout_is_refused_with_several_processes(monkeypatch):
    x, y = made()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    with pytest.raises(ValueError, match=r"has the dropout '.*', which draws differently in 2 processes"):
        Condenser(Plain, 1, 2, steps=1).fit(x, y, progress=False)


def _full_disk(folder: Path) -> None:
    torch.set_num_threads(1)
    x, y = made()
    Condenser(tiny_net, 1, 2, steps=3, early_steps=1).fit(x, y, resume=folder, progress=False)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    try:
        Condenser(tiny_net, 1, 2, steps=6, early_steps=1).fit(x, y, resume=folder, progress=False)
    except OSError as e:
        (folder / "error").write_text(str(e))


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    child = FRESH.Process(target=_full_disk, args=(tmp_path,))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    said = (tmp_path / "error").read_text()
    assert "the checkpoint of step 6 could not be written" in said and "the one of step 3 is whole" in said
    (tmp_path / "error").unlink()
    assert len(os.listdir(tmp_path)) == 2  # nothing half-written
    x, y = made()
    c = Condenser(tiny_net, 1, 2, steps=6, early_steps=1).fit(x, y, resume=tmp_path, progress=False)
    assert torch.equal(c.images, Condenser(tiny_net, 1, 2, steps=6, early_steps=1).fit(x, y, progress=False).images)


# Several processes

SHARED = {
    "fast": {"repeats": 2, "inner": 1, "early_steps": 2, "networks": 1},
    "synthetic": {"match": "synthetic", "network_steps": 1},
    "released": {"preset": "released", "lr": 0.05, "inner": 3},
}


def _process(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world)
    x, y = made()
    for name, settings in SHARED.items():
        for steps in (5, 8):  # stopped and started again in between
            condenser = Condenser(wide_net, 1, 2, steps=steps, checkpoint_every=2, **settings)
            c = condenser.fit(x, y, resume=folder / name, progress=False)
        save_file({"images": c.images, "losses": condenser.losses}, folder / f"{name}-{rank}")
    dist.destroy_process_group()


def test_two_processes_give_the_result_of_one(tmp_path):
    children = [FRESH.Process(target=_process, args=(rank, 2, tmp_path)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    x, y = made()
    for name, settings in SHARED.items():
        condenser = Condenser(wide_net, 1, 2, steps=8, **settings)
        c = condenser.fit(x, y, progress=False)
        for rank in range(2):
            with safe_open(tmp_path / f"{name}-{rank}", "pt") as file:
                torch.testing.assert_close(file.get_tensor("images"), c.images, rtol=0, atol=1e-6)
                torch.testing.assert_close(file.get_tensor("losses"), condenser.losses, rtol=1e-9, atol=0)
    with pytest.raises(ValueError, match="of another number of processes; start as many as then"):
        Condenser(wide_net, 1, 2, steps=8, **SHARED["fast"]).fit(x, y, resume=tmp_path / "fast", progress=False)
