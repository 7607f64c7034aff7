"""Matching losses and networks against finite differences, plain loops and definitions."""

import pytest
import torch
import torch.nn.functional as F
from dataopt.core.condense import ConvNet, MultiFormation, ResNet10, ResNetAP10, distance
from dataopt.core.condense.matching import Features, Gradients, matched_layers
from dataopt.core.condense.networks import InstanceNorm
from torch import nn

from .problem import wide_net


def look(net, objective, real):
    """Signatures of (C, B, ...) real images, stacked."""
    found = [objective.real(net, net, x, c)[0] for c, x in enumerate(real)]
    return [torch.stack(layer) for layer in zip(*found, strict=True)]


def params(net):
    return {name: p.detach() for name, p in net.named_parameters()}


def images(*shape, seed=0):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("metric", ["mse", "l1", "cosine"])
@pytest.mark.parametrize("kind", ["grouped", "loop", "all layers", "features"])
def test_slope_is_the_finite_difference_of_the_loss(metric, kind):
    torch.manual_seed(0)
    net = wide_net()
    objective = Features(net) if kind == "features" else Gradients(net, "all" if kind == "all layers" else "conv")
    if kind == "loop":
        objective.grouped = False
    real, s, form = images(3, 5, 3, 8, 8), images(3, 1, 3, 8, 8, seed=1), MultiFormation(2)
    targets = look(net, objective, real)

    def loss(stored):
        formed = form(stored.flatten(0, 1)).unflatten(0, (3, 4))
        return objective.match(net, params(net), formed, range(3), targets, metric)

    leaf = s.clone().requires_grad_()
    formed = form(leaf.flatten(0, 1)).unflatten(0, (3, 4))
    losses, slopes = objective.match(net, params(net), formed.detach(), range(3), targets, metric)
    formed.backward(slopes)
    direction, h = images(3, 1, 3, 8, 8, seed=2) - 0.5, 1e-6
    up, down = (loss(s + sign * h * direction)[0].sum() for sign in (1, -1))
    torch.testing.assert_close((leaf.grad * direction).sum(), (up - down) / (2 * h), rtol=1e-5, atol=1e-7)
    assert losses.shape == (3,) and (losses > 0).all()


@pytest.mark.parametrize("metric", ["mse", "l1", "cosine"])
@pytest.mark.parametrize("n", [1, 4, 8])
def test_grouped_convolution_is_the_loop(metric, n):
    torch.manual_seed(0)
    net = wide_net()
    objective = Gradients(net)
    assert objective.grouped
    xs = images(3, n, 3, 8, 8, seed=1)
    targets = look(net, objective, images(3, 6, 3, 8, 8))
    one = objective.match(net, params(net), xs, range(3), targets, metric)
    objective.grouped = False
    other = objective.match(net, params(net), xs, range(3), targets, metric)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("objective", [Gradients, Features])
def test_equal_images_have_no_loss(objective):
    torch.manual_seed(0)
    net, x = wide_net(), images(3, 4, 3, 8, 8)
    match = objective(net)
    losses, slopes = match.match(net, params(net), x, range(3), look(net, match, x), "mse")
    assert losses.max() < 1e-20 and slopes.abs().max() < 1e-12


def test_batch_statistics_are_those_of_a_class():
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 3)
    ).double()
    x = images(3, 4, 3, 8, 8)
    for objective in (Gradients(net), Features(net)):
        losses, _ = objective.match(net, params(net), x, range(3), look(net, objective, x), "mse")
        assert losses.max() < 1e-20


def test_a_network_of_the_users_own_forward_is_not_grouped():
    class Halved(ConvNet):
        def forward(self, x):
            return super().forward(x / 2)

    torch.manual_seed(0)
    net, x = Halved(3, 3, 8, depth=2, width=4).double(), images(3, 4, 3, 8, 8)
    match = Gradients(net)
    assert match.match(net, params(net), x, range(3), look(net, match, x), "mse")[0].max() < 1e-20


def test_loss_is_the_sum_of_squares_of_convolution_gradients_only():
    torch.manual_seed(0)
    net = wide_net()
    real, s = images(1, 6, 3, 8, 8), images(1, 2, 3, 8, 8, seed=1)
    objective = Gradients(net)
    assert objective.names == ["convs.0.weight", "convs.1.weight"]
    total = 0.0
    for module in net.convs:
        parts = []
        for x in (real[0], s[0]):
            loss = F.cross_entropy(net(x), torch.zeros(len(x), dtype=torch.long))
            parts.append(torch.autograd.grad(loss, module.weight)[0])
        total += float((parts[0] - parts[1]).square().sum())
    found = objective.match(net, params(net), s, [0], look(net, objective, real), "mse")[0]
    torch.testing.assert_close(float(found), total)


def test_all_gradients_come_in_the_order_of_the_parameters():
    torch.manual_seed(0)
    net, x = wide_net(), images(4, 3, 8, 8)
    found = Gradients(net).real(net, net, x, 2)[1]
    loss = F.cross_entropy(net(x), torch.full((4,), 2))
    for a, b in zip(found, torch.autograd.grad(loss, list(net.parameters())), strict=True):
        torch.testing.assert_close(a, b)


def test_distances_by_their_definitions():
    a, b = images(2, 3, 4, 2, 2), images(2, 3, 4, 2, 2, seed=1)
    assert distance([a], [b], "mse").tolist() == pytest.approx([float((a - b)[c].square().sum()) for c in (0, 1)])
    assert distance([a], [b], "l1").tolist() == pytest.approx([float((a - b)[c].abs().sum()) for c in (0, 1)])
    for c in (0, 1):
        by_channel = [1 - float(F.cosine_similarity(a[c, o].flatten(), b[c, o].flatten(), dim=0)) for o in range(3)]
        assert float(distance([a], [b], "cosine")[c]) == pytest.approx(sum(by_channel))
    assert float(distance([a, a], [b, b], "l1")[0]) == pytest.approx(2 * float(distance([a], [b], "l1")[0]))
    with pytest.raises(ValueError, match="metric='l2' must be one of 'mse', 'l1', 'cosine'"):
        distance([a], [b], "l2")


def test_a_network_without_convolution_says_what_would_be_matched():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"no layer of Sequential: none of its 4 parameters \(1.weight, 1.bias"):
        matched_layers(net)
    assert matched_layers(net, "all") == ["1.weight", "1.bias", "3.weight", "3.bias"]
    with pytest.raises(ValueError, match="Conv2d has no linear layer"):
        Features(nn.Conv2d(1, 1, 3))


# Networks


@pytest.mark.parametrize(
    ("net", "channels", "size", "convolutions"),
    [
        (lambda: ConvNet(3, 10, 32), 3, (32, 32), 3),
        (lambda: ConvNet(1, 10, 28, first_padding=3, width=16), 1, (28, 28), 3),
        (lambda: ConvNet(1, 8, (64, 32), depth=4, width=8), 1, (64, 32), 4),
        (lambda: ResNet10(3, 10, 32, width=8), 3, (32, 32), 12),
        (lambda: ResNetAP10(3, 10, 32, width=8), 3, (32, 32), 12),
        (lambda: ResNetAP10(3, 10, 112, width=4), 3, (112, 112), 12),
    ],
)
def test_networks_take_their_sizes(net, channels, size, convolutions):
    torch.manual_seed(0)
    model = net()
    classes = model.head.out_features
    assert model(torch.rand(2, channels, *size)).shape == (2, classes)
    assert len(matched_layers(model)) == convolutions
    assert all(m.bias is None for m in model.modules() if isinstance(m, nn.Conv2d))  # the norm would cancel it


def test_average_pooling_replaces_strides():
    for net, strides in ((ResNet10(3, 2, 32, 4), {1, 2}), (ResNetAP10(3, 2, 32, 4), {1})):
        assert {m.stride[0] for m in net.modules() if isinstance(m, nn.Conv2d)} == strides


def test_written_out_norm_is_group_norm():
    torch.manual_seed(0)
    norm = InstanceNorm(4).double()
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = images(3, 4, 5, 6)
    expected = F.instance_norm(x, weight=norm.weight, bias=norm.bias)
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm.written_out(x), expected)


@pytest.mark.parametrize("make", [lambda: ConvNet(1, 10, 8, depth=4), lambda: ResNet10(1, 10, 8)])
def test_images_too_small_for_the_network(make):
    with pytest.raises(ValueError, match="size=8 is too small"):
        make()
