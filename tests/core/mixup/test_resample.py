"""Saliency on another grid keeps its mass where it was."""

import pytest
import torch
from dataopt.core.mixup.resample import resample


@pytest.mark.parametrize("old,new", [((16, 16), (224, 160)), ((5, 7), (12, 9)), ((31, 20), (16, 16)), ((3, 4), (3, 4))])
def test_area_sums_are_those_of_the_common_refinement(old, new):
    s = torch.rand(3, *old, generator=torch.Generator().manual_seed(0))
    # cut every old cell into new[0] x new[1] equal pieces; old[0] x old[1] of them make a new cell
    pieces = s.double().repeat_interleave(new[0], 1).repeat_interleave(new[1], 2) / (new[0] * new[1])
    expected = pieces.view(3, new[0], old[0], new[1], old[1]).sum((2, 4))
    out = resample(s, new)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(out.sum((1, 2)), s.sum((1, 2)))


def test_half_precision_is_summed_in_float32():
    s = torch.full((1, 64, 64), 1 / 4096, dtype=torch.float16)
    assert resample(s, (1, 1)).item() == 1
