"""The condenser against a sequential loop and against what it started from; its settings, and bad input."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dataopt.core.condense import Augment, Condenser, ConvNet, MultiFormation, RealData, evaluate, initial_images
from dataopt.core.condense.rounds import _rows
from dataopt.core.condense.training import fresh, sgd, training_step
from torch import nn

from .problem import Plain, digit_net, digits, made, tiny_net


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


def batch_norm_net():
    return nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3))


class Idle(nn.Module):
    """With a parameter that nothing depends on."""

    def __init__(self):
        super().__init__()
        self.body, self.idle = tiny_net(), nn.Conv2d(3, 3, 3)

    def forward(self, x):
        return self.body(x)


class Named(Idle):
    """Gives a record, as transformers do, and asserts its size, as timm does."""

    def forward(self, x):
        assert x.shape[-1] != 16, "Input width (16) doesn't match model (8)"
        return {"logits": self.body(x)}


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
    "idle": ({"model_fn": Idle}, X, Y, ValueError, "do not depend on its idle.weight; give a network without"),
    "record": ({"model_fn": Named}, X, Y, ValueError, "network gives dict for 4 images; give logits"),
    "asserted": ({"model_fn": Named}, X.repeat(1, 1, 1, 2), Y, ValueError, r"does not take .*\(Input width \(16\)"),
    "mean alone": ({"mean": (0.5,) * 3}, X, Y, ValueError, "go together; give both or neither"),
    "one value a channel": (
        {"model_fn": batch_norm_net, "factor": 1}, X, Y, ValueError, "does not take 1 images of a class"),
    "diverging": ({"network_lr": 1e30, "steps": 60}, X, Y, ValueError, "the matching loss is (nan|inf) at step"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data(name, tmp_path):
    settings, x, y, error, message = BAD_DATA[name]
    names = {"names": ["a", "b"], "class without images": ["a", "b", "c"]}.get(name)
    with pytest.raises(error, match=message):
        Condenser(**GOOD | settings).fit(x, y, label_names=names, resume=tmp_path / "state", progress=False)
    assert not list(tmp_path.rglob("*.json"))


def test_numpy_scalars_are_settings():
    settings = {"cutmix": np.float32(0.25), "seed": np.int64(3), "lr": np.float32(0.01), "factors": (np.int64(1),)}
    augment = Augment(colour=np.bool_(True), crop=np.float32(0.125), cutout=np.float64(0.5))
    found = Condenser(**GOOD | settings, augment=augment, mean=np.zeros(3), std=np.ones(3), steps=1)
    made = found.fit(X, Y, progress=False).made
    assert (made["cutmix"], made["seed"], made["augment"]["crop"]) == (0.25, 3, 0.125)


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
