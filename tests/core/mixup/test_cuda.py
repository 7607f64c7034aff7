"""The same results on a GPU, where there is one."""

import pytest
import torch
from dataopt.core.mixup import Adversarial, CoMixup, CutMix, PuzzleMix, clean_loss, input_gradient, saliency

from .conftest import smooth_saliency

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("transport", ["iterative", "exact", None])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_mix_is_the_one_of_the_cpu(transport, channels_last):
    x, y, s = torch.rand(8, 3, 32, 32), torch.arange(8), smooth_saliency(8, 32, 32, 0)
    mix = PuzzleMix(8, transport=transport)
    for grid in (2, 8):
        one, two = (
            mix(x.to(device), y.to(device), s.to(device), generator=torch.Generator().manual_seed(3), grid=grid)
            for device in ("cpu", "cuda")
        )
        assert two.inputs.is_cuda and two.targets.is_cuda and two.mask.is_cuda
        torch.testing.assert_close(two.inputs.cpu(), one.inputs)
        torch.testing.assert_close(two.targets.cpu(), one.targets)
        torch.testing.assert_close(two.apply(x.cuda()).cpu(), one.apply(x))
    z = x.cuda().half().to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    out = mix(z, y, s, grid=4)
    assert out.inputs.dtype == torch.float16
    assert out.inputs.is_contiguous(memory_format=torch.channels_last) == channels_last


@pytest.mark.parametrize("grid", [2, 4, 8])
def test_a_joint_mix_is_the_one_of_the_cpu(grid):
    x, y, s = torch.rand(12, 3, 32, 32), torch.arange(12), smooth_saliency(12, 32, 32, 0)
    mix = CoMixup(12, grid=grid, partition=8)
    one, two = (
        mix(x.to(device), y.to(device), s.to(device), generator=torch.Generator().manual_seed(3))
        for device in ("cpu", "cuda")
    )
    assert two.inputs.is_cuda and two.targets.is_cuda and two.sources.is_cuda and two.first.is_cuda
    assert torch.equal(two.first.cpu(), one.first) and torch.equal(two.second.cpu(), one.second)
    torch.testing.assert_close(two.inputs.cpu(), one.inputs)
    torch.testing.assert_close(two.targets.cpu(), one.targets)
    torch.testing.assert_close(two.apply(x.cuda()).cpu(), one.apply(x))
    z = x.cuda().half().to(memory_format=torch.channels_last)
    with torch.autocast("cuda", torch.float16):
        out = mix(z, y, s)
    assert out.inputs.dtype == torch.float16 and out.targets.dtype == torch.float32
    assert out.inputs.is_contiguous(memory_format=torch.channels_last)


def test_gradients_noise_and_random_state_on_the_device():
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3),
        torch.nn.BatchNorm2d(8),
        torch.nn.Dropout(),
        torch.nn.Flatten(),
        torch.nn.Linear(1568, 8),
    ).cuda()
    x, y = torch.rand(8, 3, 16, 16, device="cuda"), torch.arange(8, device="cuda")
    state = torch.cuda.get_rng_state()
    with torch.autocast("cuda", torch.float16):
        g = input_gradient(net, x, y)
    assert torch.equal(state, torch.cuda.get_rng_state())
    exact = input_gradient(net, x, y)
    assert torch.nn.functional.cosine_similarity(g.flatten(1), exact.flatten(1)).min() > 0.95
    loss, g = clean_loss(net, x, y)
    mix = PuzzleMix(8, adversarial=Adversarial(1.0, 10 / 255, 12 / 255), grids=(4,))
    noisy, noise = mix.adversarial.start(x)
    m = mix(x, y, saliency(g), noise=noise, gradient=input_gradient(net, noisy, y))
    (loss + torch.nn.functional.cross_entropy(net(m.inputs), m.targets)).backward()
    assert all(p.grad is not None for p in net.parameters())
    assert CutMix(8)(x, y).inputs.is_cuda
