"""The saliency pass: right values, and no trace on the model (one test per rule)."""

import copy

import pytest
import torch
import torch.nn.functional as F
from dataopt.core.mixup import clean_loss, input_gradient, saliency
from torch import nn


def network(scale=1.0):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    net[8].weight.data *= scale
    return net


@pytest.fixture
def batch():
    gen = torch.Generator().manual_seed(1)
    return torch.rand(6, 3, 16, 16, generator=gen), torch.randint(0, 5, (6,), generator=gen)


def test_gradient_by_finite_differences(batch):
    x, y = batch[0].double(), batch[1]
    net = network().double().eval()
    g = input_gradient(net, x, y)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    h = 1e-6
    with torch.no_grad():
        up, down = (F.cross_entropy(net(x + e * direction), y, reduction="sum") for e in (h, -h))
    assert (g.double() * direction).sum().item() == pytest.approx(((up - down) / (2 * h)).item(), rel=1e-3)


def test_equals_backward_and_does_not_depend_on_the_batch(batch):
    x, y = batch
    net = network().eval()
    copy_x = x.clone().requires_grad_()
    F.cross_entropy(net(copy_x), y, reduction="sum").backward()
    g = input_gradient(net, x, y)
    torch.testing.assert_close(g, copy_x.grad)
    torch.testing.assert_close(input_gradient(net, x[:2], y[:2]), g[:2])


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad_mode", [True, False])
def test_leaves_no_trace(batch, autocast, grad_mode):
    x, y = batch
    net = network().train()
    net[1].eval()  # a frozen batch norm inside a training model
    net[4].weight.requires_grad_(False)
    net[0].weight.grad = torch.full_like(net[0].weight, 3.0)
    before = copy.deepcopy(net.state_dict())
    flags = [m.training for m in net.modules()]
    wants = [p.requires_grad for p in net.parameters()]
    rng = torch.get_rng_state()
    with torch.set_grad_enabled(grad_mode), torch.autocast("cpu", autocast or torch.bfloat16, enabled=bool(autocast)):
        input_gradient(net, x, y)
        assert torch.is_grad_enabled() == grad_mode
    assert flags == [m.training for m in net.modules()]
    assert wants == [p.requires_grad for p in net.parameters()]
    assert torch.equal(rng, torch.get_rng_state())
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert (net[0].weight.grad == 3).all()
    assert all(p.grad is None for p in list(net.parameters())[1:])
    assert x.grad is None and not x.requires_grad


def test_flags_return_after_an_exception(batch):
    net = network().train()
    with pytest.raises(RuntimeError):
        input_gradient(net, torch.rand(2, 4, 8, 8), batch[1][:2])  # four channels
    assert all(m.training for m in net.modules())


def test_random_layers_in_the_forward_draw_nothing_from_outside(batch):
    x, y = batch

    def noisy(z):
        return z.flatten(1)[:, :5] + torch.rand(5)

    state = torch.get_rng_state()
    input_gradient(noisy, x, y)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("kind", ["model", "autocast"])
def test_float16_does_not_underflow(batch, kind):
    """Logit weights so small that the plain float16 gradient is zero."""
    x, y = batch
    net = network(scale=1e-4).eval()
    exact = input_gradient(net, x, y)
    half = copy.deepcopy(net).half()
    plain = x.half().requires_grad_()
    F.cross_entropy(half(plain).float(), y).backward()
    assert (plain.grad == 0).float().mean() > 0.5  # what would happen without care
    if kind == "model":
        g = input_gradient(half, x.half(), y)
    else:
        with torch.autocast("cpu", torch.float16):
            g = input_gradient(net, x, y)
    assert g.dtype == torch.float32
    cosine = F.cosine_similarity(g.flatten(1), exact.flatten(1))
    assert cosine.min() > 0.98


def test_float16_overflow_falls_back_to_a_smaller_scale(batch):
    x, y = batch
    net = network().eval()
    net[8].weight.data *= 3e2
    g = input_gradient(net.half(), x.half(), y)
    assert torch.isfinite(g).all() and (g != 0).any()


def test_bfloat16_agrees(batch):
    x, y = batch
    net = network().eval()
    exact = input_gradient(net, x, y)
    g = input_gradient(copy.deepcopy(net).bfloat16(), x.bfloat16(), y)
    assert F.cosine_similarity(g.flatten(1), exact.flatten(1)).min() > 0.97


def test_resolution_takes_the_gradient_on_a_smaller_input(batch):
    x, y = batch
    net = network().eval()
    g = input_gradient(net, x, y, resolution=0.5)
    small = F.interpolate(x, size=(8, 8), mode="bilinear", antialias=True)
    torch.testing.assert_close(g, input_gradient(net, small, y).repeat_interleave(2, 2).repeat_interleave(2, 3))
    line = nn.Sequential(nn.Flatten(), nn.LazyLinear(5))
    assert input_gradient(line, torch.rand(6, 2, 8), y, resolution=0.5).shape == (6, 2, 8)


def test_saliency_is_the_root_mean_square_over_channels():
    g = torch.randn(4, 3, 5, 7)
    s = saliency(g)
    expected = torch.stack([(sum(g[b, c] ** 2 for c in range(3)) / 3) ** 0.5 for b in range(4)])
    torch.testing.assert_close(s, expected / expected.sum((1, 2), keepdim=True))
    assert s.dtype == torch.float32
    torch.testing.assert_close(saliency(g * 1e-30), s)  # squares would underflow
    torch.testing.assert_close(saliency(g.half()).sum((1, 2)), torch.ones(4))


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(3, 2, 4, 6), (3, 2, 12)])
def test_unusable_gradient_gives_the_uniform_map(bad, shape):
    g = torch.randn(shape)
    g[1] = 0 if bad == 0 else g[1]
    if bad:
        g[1, 0, 0] = bad
    s = saliency(g)
    positions = g[0, 0].numel()
    torch.testing.assert_close(s[1], torch.full(shape[2:], 1 / positions))
    torch.testing.assert_close(s.flatten(1).sum(1), torch.ones(3))
    torch.testing.assert_close(s[[0, 2]], saliency(g[[0, 2]]))


def test_clean_loss_has_the_gradients_of_the_loss(batch):
    x, y = batch
    net = network().train()
    net[3].p = 0.0
    other = copy.deepcopy(net)
    loss, g = clean_loss(net, x, y)
    (0.7 * loss).backward()
    z = x.clone().requires_grad_()
    reference = F.cross_entropy(other(z), y)
    (0.7 * reference).backward()
    torch.testing.assert_close(loss, reference)
    torch.testing.assert_close(g, z.grad / 0.7 * len(x))
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    torch.testing.assert_close(net[1].running_mean, other[1].running_mean)  # training mode, once


def test_clean_loss_joins_another_loss_and_skips_frozen_parameters(batch):
    x, y = batch
    net = network().eval()
    net[0].weight.requires_grad_(False)
    loss, _ = clean_loss(net, x, y)
    (loss + F.cross_entropy(net(x), y)).backward()
    other = copy.deepcopy(net)
    other.zero_grad()
    (2 * F.cross_entropy(other(x), y)).backward()
    assert net[0].weight.grad is None
    torch.testing.assert_close(net[8].weight.grad, other[8].weight.grad)


class Spare(nn.Module):
    """A network with a layer that takes no part, and one that a branch may leave out."""

    def __init__(self):
        super().__init__()
        self.net, self.spare, self.gate = network(), nn.Linear(4, 4), nn.Linear(5, 5)
        self.gated = False

    def forward(self, x):
        logits = self.net(x)
        return self.gate(logits) if self.gated else logits


@pytest.mark.parametrize("half", [False, True])
def test_clean_loss_of_a_model_with_unused_parameters(batch, half):
    x, y = batch
    model, plain = Spare().eval(), network().eval()
    with torch.autocast("cpu", torch.float16, enabled=half):
        loss, g = clean_loss(model, x, y)
        expected, gradient = clean_loss(plain, x, y)
        model.gated = True
        logits = model(x)
    assert torch.equal(loss, expected) and torch.equal(g, gradient)
    (loss + logits.float().logsumexp(1).mean()).backward()
    assert all(p.grad is None for p in model.spare.parameters())
    # the gate takes part in the other loss only
    torch.testing.assert_close(model.gate.bias.grad, logits.float().softmax(1).mean(0), rtol=1e-2, atol=1e-3)
    expected.backward()
    (F.linear(plain(x), model.gate.weight, model.gate.bias)).logsumexp(1).mean().backward()
    tolerance = {"rtol": 2e-2, "atol": 2e-3} if half else {}
    for p, q in zip(model.net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, **tolerance)


def test_an_input_without_a_part_in_the_loss_is_named(batch):
    x, y = batch
    net = network()
    for lost in (lambda x: net(torch.zeros_like(x)), lambda x: net(x).detach()):
        with pytest.raises(ValueError, match="x has no part in the loss"):
            input_gradient(lost, x, y)


def test_bad_input():
    net, y = nn.Flatten(), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"non-finite values in samples \[1\]"):
        input_gradient(net, torch.tensor([[[0.0]], [[float("nan")]]]), y)
    with pytest.raises(ValueError, match=r"x is torch\.uint8 of shape"):
        input_gradient(net, torch.zeros(2, 3, 4, 4, dtype=torch.uint8), y)
    with pytest.raises(ValueError, match=r"resolution=1\.5 must lie in \(0, 1\]"):
        input_gradient(net, torch.zeros(2, 3, 4, 4), y, resolution=1.5)
    with pytest.raises(ValueError, match=r"gradient has the shape \(2, 3\)"):
        saliency(torch.zeros(2, 3))
