"""Multi-formation: shapes, labels, values by hand, exact constants, gradients."""

import pytest
import torch
from dataopt.core.condense import MultiFormation
from dataopt.core.condense.formation import spans
from hypothesis import given
from hypothesis import strategies as st


def linear(line: list[float], n: int) -> list[float]:
    """A line resized to n values, borders repeated: written from the definition, without torch."""
    out = []
    for i in range(n):
        at = min(max((i + 0.5) * len(line) / n - 0.5, 0), len(line) - 1)
        low = int(at)
        high = min(low + 1, len(line) - 1)
        out.append(line[low] * (1 - (at - low)) + line[high] * (at - low))
    return out


def test_factor_one_is_the_identity():
    s = torch.rand(3, 2, 5, 7)
    assert torch.equal(MultiFormation(1)(s), s)


@pytest.mark.parametrize(("height", "width", "factor"), [(4, 4, 2), (5, 7, 2), (7, 5, 3), (28, 28, 3), (33, 32, 4)])
def test_tiles_are_bilinear_enlargements_of_the_parts(height, width, factor):
    s = torch.rand(2, 1, height, width, dtype=torch.float64)
    out = MultiFormation(factor)(s)
    assert out.shape == (2 * factor**2, 1, height, width)
    at = 0
    for image in s[:, 0]:
        for i in range(factor):
            for j in range(factor):
                rows = slice(i * height // factor, (i + 1) * height // factor)
                cols = slice(j * width // factor, (j + 1) * width // factor)
                wide = torch.tensor([linear(row, width) for row in image[rows, cols].tolist()])
                both = torch.tensor([linear(col, height) for col in wide.T.tolist()]).T
                torch.testing.assert_close(out[at, 0], both.double(), rtol=0, atol=1e-6)
                at += 1


def test_factor_two_of_four_by_four_by_hand():
    s = torch.zeros(1, 1, 4, 4)
    s[0, 0, :2, 2:] = torch.tensor([[0.0, 4.0], [8.0, 12.0]])  # the second tile
    out = MultiFormation(2)(s)
    expected = torch.tensor([[0, 1, 3, 4], [2, 3, 5, 6], [6, 7, 9, 10], [8, 9, 11, 12]]).float()
    assert torch.equal(out[1, 0], expected) and not out[[0, 2, 3]].any()


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 5), st.sampled_from(["space", "time"]))
def test_constant_images_come_back_exactly(height, width, factor, axes):
    if factor > (width if axes == "time" else min(height, width)):
        return
    form = MultiFormation(factor, axes)
    values = torch.rand(2 * form.tiles(), 3, 1, 1)
    images = values.expand(-1, -1, height, width)
    stored = form.assemble(images)
    assert stored.shape == (2, 3, height, width)  # as many numbers as whole images have
    assert torch.equal(form(stored), images)


@given(st.integers(1, 300), st.integers(1, 9))
def test_spans_cover_a_side_evenly(n, parts):
    found = spans(n, parts)
    assert [i for s in found for i in range(n)[s]] == list(range(n))
    sizes = [s.stop - s.start for s in found]
    assert len(found) == parts and max(sizes) - min(sizes) <= 1


def test_time_cuts_the_last_axis_only():
    s = torch.rand(2, 1, 6, 9)
    form = MultiFormation(3, axes="time")
    out = form(s)
    assert out.shape == (6, 1, 6, 9) and form.tiles() == 3
    for row in range(6):
        expected = torch.tensor(linear(s[1, 0, row, 3:6].tolist(), 9))
        torch.testing.assert_close(out[4, 0, row], expected, rtol=0, atol=1e-6)


def test_multi_holds_every_factor():
    s = torch.rand(2, 3, 8, 8)
    form = MultiFormation(3, mode="multi")
    assert form.tiles() == 1 + 4 + 9 and form.counts(2) == [14, 14]
    parts = [MultiFormation(f)(s[1:]) for f in (1, 2, 3)]
    assert torch.equal(form(s)[14:], torch.cat(parts))
    assert form.labels(torch.tensor([5, 6])).tolist() == [5] * 14 + [6] * 14


@given(st.integers(1, 30), st.integers(1, 4), st.integers(1, 100))
def test_bound_forms_as_many_as_it_may(n, factor, bound):
    counts = MultiFormation(factor, mode="bound", bound=bound).counts(n)
    assert len(counts) == n and sorted(counts, reverse=True) == counts
    assert sum(counts) <= max(bound, n) and set(counts) <= {f**2 for f in range(1, factor + 1)}
    for f in range(2, factor + 1):  # one more of any factor would be over the bound
        smaller = [c for c in counts if c < f**2]
        if smaller:
            rest = [1] * (len(smaller) - 1)
            assert sum(c for c in counts if c >= f**2) + f**2 + sum(rest) > bound


def test_bound_decodes_each_image_by_its_factor():
    s = torch.rand(3, 1, 8, 8)
    form = MultiFormation(2, mode="bound", bound=7)
    assert form.counts(3) == [4, 1, 1]
    assert torch.equal(form(s), torch.cat([MultiFormation(2)(s[:1]), s[1:]]))
    assert form.labels(torch.arange(3)).tolist() == [0, 0, 0, 0, 1, 2]


@pytest.mark.parametrize("mode", ["single", "multi", "bound"])
def test_gradients_pass(mode):
    form = MultiFormation(2, mode=mode, bound=6)
    s = torch.rand(2, 1, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(form, s)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MultiFormation(0), "factor=0 must be a whole number of at least 1"),
        (lambda: MultiFormation(1.5), "factor=1.5 must be a whole number"),
        (lambda: MultiFormation(2, axes="frequency"), "axes='frequency' must be one of 'space', 'time'"),
        (lambda: MultiFormation(2, mode="all"), "mode='all' must be one of 'single'"),
        (lambda: MultiFormation(2, mode="bound", bound=0), "bound=0 must be at least 1"),
        (lambda: MultiFormation(9)(torch.rand(1, 1, 8, 8)), "factor=9 is larger than the 8 x 8 images"),
        (lambda: MultiFormation(9, "time")(torch.rand(1, 1, 16, 8)), "factor=9 is larger than the 16 x 8 images"),
        (lambda: MultiFormation(2)(torch.rand(3, 8, 8)), r"s has the shape \(3, 8, 8\); give \(n, C, H, W\)"),
        (lambda: MultiFormation(2).assemble(torch.rand(3, 1, 8, 8)), r"give \(n \* 4, C, H, W\)"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
