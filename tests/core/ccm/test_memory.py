import pytest
import torch
from dataopt.core.ccm import Rotation, add_lora_rows, concatenated, merged, without_oldest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn


@given(st.booleans(), st.integers(-40, 40), st.integers(-40, 40), st.integers(0, 4))
@settings(max_examples=40, deadline=None)
def test_rotations_add_up_and_keep_what_is_not_rotary(interleaved: bool, a: int, b: int, rest: int) -> None:
    rotate = Rotation(torch.tensor([1.0, 0.2, 0.01], dtype=torch.float64), interleaved)
    keys = torch.randn(2, 3, 4, 6 + rest, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    two = rotate(rotate(keys, torch.full((4,), a)), torch.full((4,), b))
    assert (two - rotate(keys, torch.full((4,), a + b))).abs().max() < 1e-12
    assert torch.equal(two[..., 6:], keys[..., 6:])
    assert torch.allclose(two.norm(dim=-1), keys.norm(dim=-1))


def test_a_rotation_by_hand() -> None:
    quarter = Rotation(torch.tensor([torch.pi / 2, 0.0], dtype=torch.float64))
    key = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64).view(1, 1, 1, 4)
    assert torch.allclose(quarter(key, torch.tensor([1])).flatten(), torch.tensor([-3.0, 2, 1, 4], dtype=torch.float64))
    pairs = Rotation(torch.tensor([torch.pi / 2, 0.0], dtype=torch.float64), interleaved=True)
    assert torch.allclose(pairs(key, torch.tensor([1])).flatten(), torch.tensor([-2.0, 1, 3, 4], dtype=torch.float64))


def test_rotation_takes_a_shift_for_each_row() -> None:
    rotate = Rotation(torch.tensor([0.5]))
    keys = torch.randn(2, 1, 3, 2, generator=torch.Generator().manual_seed(0))
    both = rotate(keys, torch.tensor([[1, 2, 3], [4, 5, 6]]))
    for row, shift in enumerate([[1, 2, 3], [4, 5, 6]]):
        assert torch.allclose(both[row : row + 1], rotate(keys[row : row + 1], torch.tensor(shift)))


@pytest.mark.parametrize("ema", [None, 0.2])
def test_streaming_merge_is_the_average(ema: float | None) -> None:
    new = torch.randn(64, 2, 3, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    memory = torch.full_like(new[0], torch.nan)  # nothing is read from an empty memory
    for t in range(64):
        memory = merged(memory, new[t], torch.full((2,), t + 1), ema)
    if ema is None:
        expected = new.mean(0)
    else:
        shares = [ema * (1 - ema) ** (63 - j) for j in range(64)]
        shares[0] = (1 - ema) ** 63
        expected = sum(s * h for s, h in zip(shares, new, strict=True))  # type: ignore[assignment]
    assert (memory - expected).abs().max() < 1e-12


def test_merge_counts_each_row_apart() -> None:
    memory, new = torch.zeros(3, 1, 1, 1), torch.ones(3, 1, 1, 1)
    assert merged(memory, new, torch.tensor([1, 2, 4])).flatten().tolist() == [1.0, 0.5, 0.25]


def test_concatenation_keeps_the_dtype_of_the_memory() -> None:
    out = concatenated(torch.zeros(1, 1, 2, 2, dtype=torch.bfloat16), torch.ones(1, 1, 1, 2))
    assert out.shape == (1, 1, 3, 2) and out.dtype == torch.bfloat16


def test_the_oldest_slots_leave_and_the_others_move_up() -> None:
    rotate = Rotation(torch.tensor([1.0, 0.1], dtype=torch.float64))
    bare = torch.randn(1, 2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    keys, values = without_oldest(rotate(bare, torch.arange(6)), bare, 2, rotate)
    assert (keys - rotate(bare[:, :, 2:], torch.arange(4))).abs().max() < 1e-12
    assert torch.equal(values, bare[:, :, 2:])
    assert torch.equal(without_oldest(bare, bare, 2, None)[0], bare[:, :, 2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conditional_lora_equals_the_masked_form_and_leaves_other_rows_bit_for_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear, down, up = nn.Linear(8, 12).to(dtype), nn.Linear(8, 2, bias=False), nn.Linear(2, 12, bias=False)
    hidden = torch.randn(2, 5, 8, dtype=dtype)
    rows = torch.tensor([1, 4, 9])
    plain = linear(hidden)
    out = add_lora_rows(linear(hidden), hidden, rows, lambda x: up(down(x.float())))
    mask = torch.zeros(10, 1)
    mask[rows] = 1
    expected = plain + (mask.view(2, 5, 1) * up(down(hidden.float()))).to(dtype)
    # a product of fewer rows may round otherwise, on some processors
    torch.testing.assert_close(out, expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    others = mask.view(2, 5) == 0
    assert torch.equal(out[others], plain[others])


def test_conditional_lora_has_the_gradients_of_the_masked_form() -> None:
    torch.manual_seed(0)
    linear, down, up = nn.Linear(6, 4).double(), nn.Linear(6, 2).double(), nn.Linear(2, 4).double()
    hidden = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    rows, mask = torch.tensor([0, 3]), torch.zeros(7, 1, dtype=torch.float64)
    mask[rows] = 1
    wanted = [hidden, *linear.parameters(), *down.parameters(), *up.parameters()]
    for in_place in (True, False):
        out = add_lora_rows(linear(hidden), hidden, rows, lambda x: up(down(x)), in_place=in_place)
        mine = torch.autograd.grad(out.square().sum(), wanted)
        theirs = torch.autograd.grad((linear(hidden) + mask * up(down(hidden))).square().sum(), wanted)
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(mine, theirs, strict=True))
