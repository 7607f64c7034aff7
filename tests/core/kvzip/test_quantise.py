"""Round trips of small integers."""

import pytest
import torch
from dataopt.core.kvzip import Quantised
from hypothesis import given, settings
from hypothesis import strategies as st

from .reference import normal


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    rows=st.integers(0, 6),
    groups=st.integers(1, 4),
    bits=st.sampled_from([8, 4]),
    size=st.sampled_from([1e-3, 1.0, 300.0]),
    offset=st.sampled_from([0.0, 5.0]),
)
def test_the_error_is_at_most_half_a_step(seed, rows, groups, bits, size, offset):
    x = size * (normal(rows, 32 * groups, seed=seed) + offset)
    q = Quantised.of(x, bits)
    assert q.shape == x.shape and len(q) == rows
    back = q.dequantise(torch.float32)
    assert back.shape == x.shape and back.dtype == torch.float32
    grouped = x.unflatten(1, (-1, 32))
    low, high = (grouped.amin(-1), grouped.amax(-1)) if rows else (grouped[..., 0], grouped[..., 0])
    # Half a step, and what float16 rounds off the minimum and, times the number of steps, off the scale.
    half = torch.finfo(torch.float16)
    rounding = low.abs() * half.eps + (high - low).abs() * half.eps + 2**bits * 2.0**-25 + 2.0**-24
    bound = (high - low) / (2**bits - 1) / 2 + rounding
    assert ((back - x).unflatten(1, (-1, 32)).abs() <= bound.unsqueeze(-1) * 1.001).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("value", [0.0, 1.5, -1024.0])
def test_a_group_of_one_value_is_exact(bits, value):
    """Values that float16 holds; the step is zero."""
    x = torch.full((3, 64), value)
    assert torch.equal(Quantised.of(x, bits).dequantise(torch.float32), x)


@pytest.mark.parametrize("bits", [8, 4])
def test_equidistant_values_are_exact(bits):
    x = torch.arange(2**bits).float().view(-1, 16).repeat(1, 2)[:, :32]
    x[:, 0], x[:, 1] = 0, 2**bits - 1
    assert torch.equal(Quantised.of(x, bits).dequantise(torch.float32), x)


def test_one_outlier_spoils_only_its_group():
    x = normal(2, 64)
    x[0, 3] = 1000
    error = (Quantised.of(x, 8).dequantise(torch.float32) - x).abs()
    assert error[0, 4:32].max() > 0.1 and error[0, 32:].max() < 0.02 and error[1].max() < 0.02


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_dtypes_and_bytes(bits):
    x = normal(5, 64)
    q = Quantised.of(x.bfloat16(), bits)
    assert q.nbytes == 5 * (64 * bits // 8 + 2 * 2 * 2) and q.device.type == "cpu"
    whole = q.dequantise(torch.float16)
    assert whole.dtype == torch.float16
    for rows in (slice(1, 3), torch.tensor([4, 0]), torch.tensor([True, False, True, False, True])):
        assert torch.equal(q[rows].dequantise(torch.float16), whole[rows])
    assert torch.equal(q[:2].cat(q[2:]).dequantise(torch.float16), whole)


@pytest.mark.parametrize("bits", [3, 16, 0])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits={bits} must be 8 or 4, or None"):
        Quantised.of(torch.zeros(1, 32), bits)


def test_a_group_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="group=32 must divide the head size 48"):
        Quantised.of(torch.zeros(1, 48), 8)


@pytest.mark.parametrize("value", [1e5, -1e5, torch.inf, torch.nan])
def test_values_that_float16_cannot_hold_are_refused(value):
    with pytest.raises(ValueError, match=r"beyond the range of float16 or not finite.*bits=None"):
        Quantised.of(torch.full((1, 32), value), 8)
