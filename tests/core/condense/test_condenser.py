"""The condenser against a sequential loop, against itself after a stop, and against what it started from."""

import dataclasses
import os
import resource
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from dataopt.core.condense import Augment, Condenser, ConvNet, MultiFormation, RealData, evaluate, initial_images
from dataopt.core.condense.files import read
from dataopt.core.condense.rounds import _rows
from dataopt.core.condense.training import fresh, sgd, training_step
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from .problem import digit_net, digits, made, tiny_net, wide_net

FRESH = get_context("forkserver")
FRESH.set_forkserver_preload([__name__])


def sequential(images, labels, model_fn, images_per_class, factor, rounds, lr, network_steps, seed=0):
    """The authors' loop: one class after another, each followed by a step of one shared optimiser."""
    data = RealData(images, labels, dtype=torch.float64)
    classes, form, augment = data.classes, MultiFormation(factor), Augment()
    g = torch.Generator().manual_seed(seed)
    initial = initial_images(data, images_per_class, "mix", form, g)
    s = initial.clone().unflatten(0, (classes, -1)).requires_grad_()
    fresh(model_fn, g)  # the condenser makes one before it begins
    net = fresh(model_fn, g)
    trainer = sgd(net)
    optimiser = torch.optim.SGD([s], lr=lr, momentum=0.5)
    losses = []
    for _ in range(rounds):
        draws = [augment.draw(1, data.size, g) for _ in range(classes)]
        rows = [data.draw(c, 64, g) for c in range(classes)]
        total = 0.0
        for c in range(classes):
            both = torch.cat([data(rows[c]), data.normalise(form(s[c]))])
            both = augment(both, draws[c])
            real, synthetic = both.split([len(rows[c]), len(both) - len(rows[c])])
            weights = [m.weight for m in net.modules() if isinstance(m, nn.Conv2d)]

            def gradient(x, create_graph, c=c, weights=weights):
                loss = F.cross_entropy(net(x), torch.full((len(x),), c))
                return torch.autograd.grad(loss, weights, create_graph=create_graph)

            target = [t.detach() for t in gradient(real.detach(), False)]
            loss = sum((a - b).square().sum() for a, b in zip(gradient(synthetic, True), target, strict=True))
            optimiser.zero_grad(set_to_none=False)  # the other classes get zeros, and coast on their momentum
            s.grad = torch.autograd.grad(loss, s)[0]
            optimiser.step()
            total += float(loss.detach())
        losses.append(total)
        for batch in _rows(len(labels), network_steps, g):
            training_step(net, trainer, data(batch), data.labels[batch], Augment(cutout=0), 0.5, g, classes)
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize(("factor", "width"), [(1, 4), (2, 4), (3, 4)])  # grouped for 2 and 8 images, a loop for 18
def test_released_is_the_sequential_loop(factor, width):
    x, y = made(classes=4, each=30)
    model_fn = SmallNet(4, width)
    condenser = Condenser(model_fn, 2, factor, "released", lr=0.05, steps=20, network_steps=2)
    condenser.fit(x, y, progress=False)
    expected = sequential(x, y, model_fn, 2, factor, 20, 0.05, 2)
    torch.testing.assert_close(condenser.losses, expected, rtol=1e-11, atol=0)
    assert expected[-1] != expected[0]


@dataclasses.dataclass
class SmallNet:
    """A model_fn that processes of the tests can be given."""

    classes: int = 3
    width: int = 4

    def __call__(self) -> nn.Module:
        return tiny_net(3, self.classes, self.width).double()


def test_digits_one_image_a_class():
    train, test = digits()
    condenser = Condenser(digit_net, 1, 1, steps=140, repeats=2)
    c = condenser.fit(*train, progress=False)
    assert c.images.shape == (10, 1, 8, 8) and c.labels.tolist() == list(range(10))
    assert c.images.min() >= 0 and c.images.max() <= 1
    scores = evaluate(c, train, test, digit_net, baselines=("random",), progress=False)
    assert scores["condensed"].mean >= 0.86, str(scores)
    assert scores["condensed"].mean >= scores["random"].mean + 0.08, str(scores)
    png = dataclasses.replace(c, images=(c.images * 255).round() / 255)
    rounded = evaluate(png, train, test, digit_net, baselines=(), progress=False)
    assert rounded["condensed"].mean >= scores["condensed"].mean - 0.01


@pytest.mark.parametrize("objective", ["gradients", "features"])
def test_a_fixed_network_is_matched_better_with_every_step(objective):
    """Without augmentation, and with all real images in every look, the loss is one function that Adam descends."""
    x, y = made(each=20)
    torch.manual_seed(0)
    weights = tiny_net().state_dict()
    condenser = Condenser(tiny_net, 1, 2, steps=60, objective=objective, init="noise", augment=None, repeats=1, inner=1,
                          network_steps=0, pretrained=[weights], metric="mse")  # fmt: skip
    condenser.fit(x, y, progress=False)
    assert condenser.losses[-1] < 0.4 * condenser.losses[0]


VARIANTS = {
    "cosine on synthetic": {"match": "synthetic", "metric": "cosine", "preset": "released", "early_steps": None},
    "synthetic, fast": {"match": "synthetic", "early_steps": None},
    "features": {"objective": "features", "early_steps": None},
    "multi": {"formation": "multi", "metric": "l1"},
    "bound": {"formation": "bound", "bound": 5, "match": "synthetic", "early_steps": None},
    "time": {"axes": "time"},
    "all layers": {"layers": "all", "optimiser": "sgd"},
    "early": {"early_steps": 3, "inner": 1, "network_steps": 2},
    "early, on synthetic": {"early_steps": 3, "match": "synthetic", "networks": 1},
    "k-means": {"sampler": "kmeans", "real_batch": 5},
    "small batches": {"synthetic_batch": 3, "real_batch": 4, "bank_bytes": 1},
    "herding": {"init": "herding", "factor": 1},
    "uint8": {},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_runs_and_changes_the_images(name):
    x, y = made(each=12, shape=(3, 8, 10))
    settings = {"factor": 2, "steps": 3, "early_steps": 1, **VARIANTS[name]}

    def model_fn():
        return ConvNet(3, 3, (8, 10), depth=2, width=4)

    if name == "uint8":
        x = (x * 255).byte()
    condenser = Condenser(model_fn, 2, **settings)
    c = condenser.fit(x, y, progress=False)
    assert c.images.shape == condenser.initial.shape == (6, 3, 8, 10)
    assert not torch.equal(c.images, condenser.initial)
    assert torch.isfinite(condenser.losses).all() and len(condenser.losses) == 3
    images, labels = c.decode()
    assert len(images) == len(labels) == 6 * MultiFormation(c.factor, c.axes, c.mode).tiles()
    again = Condenser(model_fn, 2, **settings).fit(x, y, progress=False)
    assert torch.equal(again.images, c.images)
    other = Condenser(model_fn, 2, seed=1, **settings).fit(x, y, progress=False)
    assert not torch.equal(other.images, c.images)


class Plain(nn.Module):
    """A network of another kind, with batch norm and dropout."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(4, 5)  # more outputs than classes

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


@pytest.mark.parametrize("settings", [{"early_steps": 2}, {"preset": "released"}, {"objective": "features"}])
def test_any_network_will_do(settings):
    x, y = made(each=10)
    state = torch.get_rng_state()
    c = [Condenser(Plain, 1, 2, steps=5, **settings).fit(x, y, progress=False) for _ in range(2)]
    assert torch.equal(c[0].images, c[1].images)
    assert torch.equal(torch.get_rng_state(), state)  # dropout drew from the run's own state


@pytest.mark.parametrize("init", ["centres", "mix", "random", "herding", "noise"])
def test_classes_of_any_size(init):
    """One, three and thirty images where eight are needed."""
    x, y = made(each=30)
    keep = torch.cat([torch.tensor([0]), torch.arange(30, 33), torch.arange(60, 90)]).flip(0)
    c = Condenser(tiny_net, 2, 2, steps=2, early_steps=1, init=init).fit(x[keep], y[keep], progress=False)
    assert c.labels.tolist() == [0, 0, 1, 1, 2, 2] and c.made["source"]["classes"] == [1, 3, 30]


def test_inits_are_what_they_say():
    x, y = made(classes=2, each=40, shape=(1, 8, 8))
    data, g = RealData(x, y), torch.Generator().manual_seed(0)
    whole = [initial_images(data, 3, init, MultiFormation(1), g, digit_net) for init in ("random", "herding")]
    for images in whole:
        rows = [int((x == image).flatten(1).all(1).nonzero()) for image in images]
        assert len(set(rows)) == 6 and y[rows].tolist() == [0, 0, 0, 1, 1, 1]
    centre = initial_images(data, 1, "centres", MultiFormation(1), g)
    torch.testing.assert_close(centre, torch.stack([x[y == c].mean(0) for c in (0, 1)]))
    two = initial_images(data, 1, "centres", MultiFormation(2, "time"), g)
    assert two.shape == (2, 1, 8, 8)
    mixed = initial_images(data, 1, "mix", MultiFormation(2), g)[0, 0]
    pooled = F.avg_pool2d(x[y == 0], 2)[:, 0]
    for tile in (mixed[:4, :4], mixed[:4, 4:], mixed[4:, :4], mixed[4:, 4:]):
        assert (pooled - tile).abs().amax((1, 2)).min() < 1e-6


def test_strata_take_one_image_of_each_cluster():
    from dataopt.core.condense.real import Strata

    x, y = made(each=1)
    x, y = x.repeat_interleave(20, 0), y.repeat_interleave(20)
    groups = torch.arange(60) % 4  # four clusters a class, far apart
    x = (x * 0.1 + groups.view(-1, 1, 1, 1) * 0.25).clamp(0, 1)
    g = torch.Generator().manual_seed(0)
    strata = Strata(RealData(x, y), 4, g)
    seen = set()
    for _ in range(20):
        rows = strata.draw(1, 64, g)
        assert sorted(groups[rows].tolist()) == [0, 1, 2, 3] and (y[rows] == 1).all()
        seen |= set(rows.tolist())
    assert len(seen) > 15


def test_factor_auto_keeps_small_digits_whole():
    train, _ = digits()
    assert Condenser(digit_net, 1, "auto", factors=(1, 2)).choose_factor(*train) == 1
    c = Condenser(tiny_net, 1, "auto", steps=2, early_steps=0, factor_steps=2, factors=(2, 9)).fit(
        *made(), progress=False
    )
    assert c.factor == 2 and c.made["factor"] == 2


# Stopped and started again


def batch_norm_net():
    return nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3))


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


# Bad input

GOOD = {"model_fn": tiny_net, "images_per_class": 1, "factor": 2, "early_steps": 1}
BAD_SETTINGS = {
    "half a step": ({"steps": 2.5}, "steps=2.5 must be a whole number of at least 1"),
    "negative network steps": ({"network_steps": -3}, "network_steps=-3 must be a whole number of at least 0"),
    "negative early steps": ({"early_steps": -1}, "early_steps=-1 must be a whole number of at least 0"),
    "no images": ({"images_per_class": 0}, "images_per_class=0 must be a whole number of at least 1"),
    "no step": ({"steps": 0}, "steps=0 is a budget too short for one step"),
    "preset": ({"preset": "slow"}, "preset='slow' must be one of 'fast', 'released'"),
    "factor": ({"factor": 0}, "factor=0 must be a whole number"),
    "factor in words": ({"factor": "best"}, "factor='best' must be a whole number"),
    "metric": ({"metric": "l2"}, "metric='l2' must be one of 'mse', 'l1', 'cosine'"),
    "init": ({"init": "zeros"}, "init='zeros' must be one of 'centres'"),
    "rate": ({"lr": -1.0}, "lr=-1.0 must be above 0"),
    "cutmix": ({"cutmix": 2}, r"cutmix=2 must lie in \[0, 1\]"),
    "free": ({"match": "synthetic", "network_steps": "free"}, "network_steps='free' uses gradients of real images"),
    "network steps": ({"network_steps": "many"}, "network_steps='many' must be a number"),
    "augment": ({"augment": "strong"}, "augment='strong' must be an Augment"),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_settings(name):
    settings, message = BAD_SETTINGS[name]
    with pytest.raises(ValueError, match=message):
        Condenser(**GOOD | settings)


X, Y = made()


def put(t, at, value):
    t = t.clone()
    t[at] = value
    return t


def flat_net():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 3))


BAD_DATA = {
    "NaN": ({}, put(X, (7, 0, 0, 0), torch.nan), Y, ValueError, "images holds nan, first in row 7; give finite pixels"),
    "normalised": ({}, X * 4 - 2, Y, ValueError, r"images holds -\d.*first in row 0; give finite pixels in \[0, 1\]"),
    "flat": ({}, X[:, 0], Y, ValueError, r"images has the shape \(60, 8, 8\); give \(N, C, H, W\)"),
    "integers": ({}, X.long(), Y, TypeError, "images holds torch.int64; give floating values"),
    "short labels": ({}, X, Y[:59], ValueError, r"labels has the shape \(59,\) where \(60,\) was expected"),
    "float labels": ({}, X, Y.float(), TypeError, "labels holds torch.float32"),
    "negative": ({}, X, Y - 1, ValueError, "labels is -1 in row 0; give class ids from 0"),
    "empty class": ({}, X, Y * 2, ValueError, "labels has no image of class 1 though it goes up to 4"),
    "large factor": ({"factor": 9}, X, Y, ValueError, "factor=9 is larger than the 8 x 8 images"),
    "auto": ({"factor": "auto", "factors": (9, 10)}, X, Y, ValueError, r"factors=\(9, 10\) are all larger"),
    "no convolution": ({"model_fn": flat_net}, X, Y, ValueError, "layers='conv' matches no layer of Sequential"),
    "few outputs": ({"model_fn": lambda: tiny_net(3, 2)}, X, Y, ValueError, r"gives \(\d+, 2\) .* K = 3 classes"),
    "another size": (
        {"model_fn": lambda: ConvNet(3, 3, (16, 16), 2, 4)}, X, Y, ValueError,
        r"does not take images of \(3, 8, 8\) \(mat1 and mat2 .*\); give a network for this size"),
    "std": ({"mean": (0, 0, 0), "std": (1, 1, 0)}, X, Y, ValueError, "std above 0"),
    "one mean": ({"mean": (0,), "std": (1,)}, X, Y, ValueError, r"one number a channel \(3\)"),
    "names": ({}, X, Y, ValueError, "label_names has 2 names for the 3 classes"),
    "class without images": ({}, X[Y < 2], Y[Y < 2], ValueError, "label_names has 3 names .*: 'c' has no image"),
    "one value a channel": (
        {"model_fn": batch_norm_net, "factor": 1}, X, Y, ValueError, "does not take the 1 images of a class"),
    "diverging": ({"network_lr": 1e30, "steps": 60}, X, Y, ValueError, "the matching loss is (nan|inf) at step"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data(name, tmp_path):
    settings, x, y, error, message = BAD_DATA[name]
    names = {"names": ["a", "b"], "class without images": ["a", "b", "c"]}.get(name)
    with pytest.raises(error, match=message):
        Condenser(**GOOD | settings).fit(x, y, label_names=names, resume=tmp_path / "state", progress=False)
    assert not list(tmp_path.rglob("*.json"))


def test_half_precision_images():
    for dtype in (torch.float16, torch.bfloat16):
        found = Condenser(**GOOD, steps=2).fit(X.to(dtype), Y, progress=False)
        assert found.images.isfinite().all() and len(found.made["source"]["sha256"]) == 64


def test_bar_shows_the_matching_loss(capfd):
    Condenser(**GOOD, steps=3).fit(X, Y, progress=True)
    shown = capfd.readouterr().err
    assert "condensing" in shown and "matching loss a class=" in shown and "3/3" in shown
    Condenser(**GOOD, steps=3).fit(X, Y, progress=False)
    assert not capfd.readouterr().err


def test_spectrograms_shift_in_time_only():
    condenser = Condenser(lambda: ConvNet(1, 2, (8, 16), 2, 4), 1, 2, axes="time", steps=2, early_steps=1)
    x, y = made(classes=2, shape=(1, 8, 16))
    c = condenser.fit(x, y, progress=False)
    assert c.made["augment"]["crop"] == [0, 0.125] and not c.made["augment"]["colour"]
    assert c.decode()[0].shape == (4, 1, 8, 16)
