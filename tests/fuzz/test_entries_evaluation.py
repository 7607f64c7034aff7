"""Attacks, corruptions, backgrounds, places and calibration, on images, labels and boxes that make no sense."""

import dataclasses

import pytest
import torch
from dataopt.core.evaluation import (
    CORRUPTIONS,
    CorruptionError,
    background_error,
    box_of_map,
    class_activation_map,
    corrupt,
    corruption_error,
    expected_calibration_error,
    fgsm,
    fgsm_error,
    localisation_accuracy,
    noisy_background,
    pgd,
    pgd_error,
    predict,
    reliability,
    replace_background,
    top1_error,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from .budget import tries
from .spoiled import VALUES, answer, finite, images, spoil, vary

B, K = 4, 3
G = torch.Generator().manual_seed(0)
PIXELS = torch.rand(B, 3, 8, 8, generator=G)
Y = torch.tensor([0, 2, 1, 2])
BOXES = torch.tensor([[0, 0, 4, 4], [2, 1, 8, 8], [1.5, 1.5, 3.5, 4], [0, 0, 8, 8]])
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
SHIFT, SCALE = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
X = (PIXELS - SHIFT) / SCALE
SCALED = {"mean": MEAN, "std": STD}


class Net(nn.Module):
    """A linear head on the mean of three channels; it takes whatever has two axes or more."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = nn.Identity(), nn.Linear(3, K)
        self.head.weight.data.copy_(torch.tensor([[2.0, -1, 0], [0, 2, -1], [-1, 0, 2]]))
        self.head.bias.data.copy_(torch.tensor([0.1, 0.0, -0.1]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.float() if x.ndim > 1 else x.float().view(-1, 1)
        rows = nn.functional.pad(rows.flatten(2) if x.ndim > 2 else rows.unsqueeze(-1), (0, 0, 0, 3))[:, :3]
        maps = self.features(rows.view(*rows.shape[:2], *(x.shape[2:] if x.ndim == 4 else (-1, 1))))
        return self.head(maps.mean((2, 3)))


NET = Net()
WORDS = ["x", "y", "labels", "logits", "batches"]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def pixels(x: torch.Tensor, settings: dict) -> torch.Tensor:
    mean, std = settings["mean"], settings["std"]
    if mean is None:
        return x.double()
    shape = (-1, *[1] * (x.ndim - 2))
    return x.double() * torch.as_tensor(std).double().view(shape) + torch.as_tensor(mean).double().view(shape)


def slack(dtype: torch.dtype) -> float:
    """What rounding to the dtype may move a pixel, once normalised."""
    return 1e-5 if dtype in (torch.float32, torch.float64) else 0.05


@tries(160)
@given(st.data())
def test_attacks(data):
    """Within the ball, within [0, 1], and no gain without a step."""
    call = {"model": NET, "x": X, "y": Y, "eps": 0.1} | SCALED
    stepped = data.draw(st.booleans(), "pgd")
    call |= {"step": 0.05, "steps": 2, "generator": generator()} if stepped else {}
    others = {"x": [*images(X), X[:, :, 0]], "y": [Y.int(), Y.to(torch.uint8)], "eps": [0, 1, 8 / 255]}
    given_ = vary(data, call, others | ({"step": [0, 1], "steps": [1, 5]} if stepped else {}))
    moved = answer(pgd if stepped else fgsm, given_, [*call, *WORDS])
    if moved is not None:
        x = given_["x"]
        assert moved.shape == x.shape and moved.dtype == x.dtype and finite(moved) and not moved.requires_grad
        before, after = pixels(x, given_).clamp(0, 1), pixels(moved, given_)
        room = slack(x.dtype)
        assert float(after.min()) >= -room and float(after.max()) <= 1 + room
        assert float((after - before).abs().max()) <= given_["eps"] + room


BATCHES = [[], [None], [(X,)], [(X, Y, Y, Y)], [X], ["xy"], [(None, Y)], [(X, None)], [(X.numpy(), Y)],
           [(X, Y.tolist())], [(X, Y[:2])],
           [(X, Y + 1)], [(X, Y.float())], [(X, Y - 1)], [(X[:0], Y[:0])], [(X * torch.nan, Y)], {"a": 1},
           [(X, Y[:, None])], [(X.to(torch.complex64), Y)], [{"x": X, "y": Y}], X, [(X, Y), (X[:2], Y[:2])],
           [[X, Y.to(torch.uint8)]], ((X, Y) for _ in range(0))]  # fmt: skip
MODELS = [None, "x", 3, lambda x: x, nn.Identity(), nn.Flatten(), Net, nn.Module]


def spoil_call(data: st.DataObject, call: dict, settings: str = "settings") -> dict:
    """With a model or batches that are none, now and then."""
    what = data.draw(st.sampled_from(["nothing", settings, "batches", "batches", "model"]), "what")
    if what == "nothing":
        return dict(call)
    if what == "settings":
        return spoil(data, call, ["model", "batches"])
    return call | {what: data.draw(st.sampled_from(BATCHES if what == "batches" else MODELS), what)}


def naive_error(batches) -> float:
    wrong = [int(NET(x[i : i + 1]).argmax() != y[i]) for x, y, *_ in batches for i in range(len(x))]
    return sum(wrong) / len(wrong)


@pytest.mark.filterwarnings("ignore")
@tries(160)
@given(st.data())
def test_errors_of_batches(data):
    """Shares; and the plain one is what a loop over the images finds."""
    entries = [(predict, {}), (top1_error, {}), (fgsm_error, {"eps": 0.1} | SCALED)]
    entries.append((pgd_error, {"eps": 0.1, "step": 0.1, "steps": 1, "generator": generator()} | SCALED))
    corruptions = {"names": ["contrast", "shot_noise"], "severities": (1, 3), "generator": generator()}
    entries.append((corruption_error, corruptions | SCALED))
    entry, settings = data.draw(st.sampled_from(entries), "entry")
    call = {"model": NET, "batches": [(X, Y), (X[:2], Y[:2])]} | settings
    given_ = spoil_call(data, call, "settings" if settings else "nothing")
    found = answer(entry, given_, [*call, *WORDS, "name", "severity"])
    if found is None or given_["model"] is not NET:
        return
    expected = naive_error(given_["batches"])
    if entry is predict:
        assert found[0].dtype == torch.float32 and found[1].dtype == torch.int64 and len(found[0]) == len(found[1])
        assert torch.equal(found[1], torch.cat([y for _, y in given_["batches"]]).long())
        torch.testing.assert_close(found[0], torch.cat([NET(x) for x, _ in given_["batches"]]).detach())
    elif entry is top1_error:
        assert found == pytest.approx(expected)
    elif entry is corruption_error:
        assert found.clean == pytest.approx(expected)
        assert list(found.errors) == list(CORRUPTIONS if given_["names"] is None else given_["names"])
        assert all(0 <= e <= 1 for row in found.errors.values() for e in row) and 0 <= found.mean <= 1
    else:
        assert 0 <= found <= 1
        assert found == pytest.approx(expected) or given_["eps"] > 0


@tries(160)
@given(st.data())
def test_corrupt(data):
    """Images of the same form, in [0, 1], that the generator alone decides."""
    sizes = [PIXELS[:1, :1, :1, :1], PIXELS[:2, :, :1], PIXELS[..., :1], PIXELS[..., :3, :2]]
    call = {"x": PIXELS, "name": "fog", "severity": 3}
    others = {"x": [*images(PIXELS), *sizes], "name": list(CORRUPTIONS), "severity": [1, 2, 4, 5]}
    given_ = vary(data, call, others)
    out = answer(corrupt, given_ | {"generator": generator()})
    if out is not None:
        x = given_["x"]
        assert out.shape == x.shape and out.dtype == x.dtype and finite(out)
        assert float(out.min()) >= 0 and float(out.max()) <= 1
        assert torch.equal(out, corrupt(**given_, generator=generator()))


@tries(30)
@given(st.data())
def test_relative_corruption_error(data):
    one = {"clean": 0.1, "errors": {"fog": (0.2, 0.4), "jpeg": (0.5, 0.5)}}
    baseline = CorruptionError(**one)
    other = data.draw(st.sampled_from([baseline, CorruptionError(0.1, {"fog": (0.1, 0.1)}), CorruptionError(0, {}),
                                       CorruptionError(0, {"fog": (0, 0), "jpeg": (1, 1)}), *VALUES]))  # fmt: skip
    found = answer(baseline.relative_to, {"baseline": other})
    assert found is None or (other is baseline and found == 1)


def inside(boxes, height: int, width: int) -> torch.Tensor:
    """(H, W): pixels whose square meets a box, one after the other."""
    out = torch.zeros(height, width, dtype=torch.bool)
    for left, top, right, bottom in boxes.reshape(-1, 4).tolist():
        for r in range(height):
            for c in range(width):
                out[r, c] |= r + 1 > top and r < bottom and c + 1 > left and c < right
    return out


SEVERAL = [BOXES[:2], BOXES[1:2], BOXES[2], BOXES[3:]]
NO_BOXES = [[None] * 4, [[0, 0, 1, 1]] * 4, [BOXES[:0]] * 4, [BOXES[0]] * 3, list(BOXES - 1), list(BOXES * torch.nan),
            ["abcd"] * 4, "abcd", BOXES.to(torch.complex64), 4, {0: 1, 1: 1, 2: 1, 3: 1}]  # fmt: skip


def spoil_boxes(data: st.DataObject, call: dict, others: dict) -> dict:
    given_ = vary(data, call | {"boxes": BOXES}, others | {"boxes": [SEVERAL, BOXES.long(), tuple(SEVERAL)]})
    none = data.draw(st.integers(0, 3), "no boxes") == 0
    return given_ | ({"boxes": data.draw(st.sampled_from(NO_BOXES))} if none else {})


@tries(120)
@given(st.data())
def test_replaced_background(data):
    """The boxes hold what they held; around them every image has another one."""
    given_ = spoil_boxes(data, {"x": X, "generator": generator()}, {"x": [*images(X), X * torch.nan]})
    out = answer(replace_background, given_)
    if out is not None:
        x, boxes = given_["x"], given_["boxes"]
        assert out.shape == x.shape and out.dtype == x.dtype
        for i in range(len(x)):
            here = inside(boxes[i], *x.shape[2:])
            others = [torch.where(here, x[i], x[j]) for j in range(len(x)) if j != i]
            assert any(torch.equal(out[i].nan_to_num(), other.nan_to_num()) for other in others)


@tries(120)
@given(st.data())
def test_noisy_background(data):
    call = {"x": X, "sigma": 0.3, "generator": generator()} | SCALED
    given_ = spoil_boxes(data, call, {"x": images(X), "sigma": [0, 0.1, 1e30]})
    out = answer(noisy_background, given_)
    if out is not None:
        x = given_["x"]
        assert out.shape == x.shape and out.dtype == x.dtype and finite(out)
        room = slack(x.dtype)
        changed = (out != x).any(1)
        for i in range(len(x)):
            here = inside(given_["boxes"][i], *x.shape[2:])
            assert torch.equal(out[i][:, here], x[i][:, here])
            assert bool(changed[i][~here].any()) or bool(here.all()) or given_["sigma"] < 1e-3 or x[0].numel() < 40
        after = pixels(out, given_)
        assert float(after.min()) >= -0.01 - room and float(after.max()) <= 1.01 + room


@tries(120)
@given(st.data())
def test_background_error(data):
    call = {"model": NET, "batches": [(X, Y, BOXES), (X[:2], Y[:2], SEVERAL[:2])], "sigma": 0.1,
            "generator": generator()} | SCALED  # fmt: skip
    given_ = spoil_call(data, call)
    if isinstance(given_["batches"], list) and data.draw(st.booleans(), "with boxes"):
        given_["batches"] = [(*b, BOXES) if isinstance(b, tuple) and len(b) == 2 else b for b in given_["batches"]]
    found = answer(background_error, given_, [*call, *WORDS, "boxes"])
    if found is not None and given_["model"] is NET:
        assert found.clean == pytest.approx(naive_error(given_["batches"]))
        assert all(0 <= e <= 1 for e in dataclasses.astuple(found))


@tries(120)
@given(st.data())
def test_activation_maps(data):
    """The mean of a map and the bias are the logit."""
    call = {"model": NET, "x": X, "features": "features", "head": "head", "classes": Y}
    given_ = vary(data, call, {"x": images(X), "classes": [None, Y.int()], "model": [NET, NET, *MODELS]})
    maps = answer(class_activation_map, given_, [*call, *WORDS])
    if maps is not None:
        x, classes = given_["x"], given_["classes"]
        logits = NET(x).detach()
        classes = logits.argmax(1) if classes is None else classes.long()
        expected = logits[range(len(x)), classes] - NET.head.bias.detach()[classes]
        assert maps.shape == (len(x), *x.shape[2:]) and maps.dtype == torch.float32 and finite(maps)
        torch.testing.assert_close(maps.mean((1, 2)), expected, atol=1e-4, rtol=1e-4)


@tries(160)
@given(st.data())
def test_box_of_map(data):
    """A box in the image that holds what is highest, where the map is as large as the image."""
    activation = torch.rand(5, 6, generator=G)
    call = {"activation": activation, "size": (5, 6), "threshold": 0.25}
    maps = [activation.half(), activation.double() - 1e30, (activation * 1e-44), activation * 6e38 - 3e38,
            torch.zeros(5, 6), activation * 9 > 4, activation[:1, :1]]  # fmt: skip
    given_ = vary(data, call, {"activation": maps, "size": [(1, 1), (9, 4), [5, 6]], "threshold": [0, 0.5, 0.999]})
    box = answer(box_of_map, given_)
    if box is not None:
        left, top, right, bottom = box.tolist()
        height, width = given_["size"]
        assert box.dtype == torch.int64 and 0 <= left < right <= width and 0 <= top < bottom <= height
        seen = given_["activation"].float()
        if tuple(seen.shape) == (height, width) and given_["threshold"] < 1:
            part = seen[top:bottom, left:right].double()
            low, high = (v.double() for v in seen.aminmax())
            assert bool((part - low > given_["threshold"] * (high - low)).any()) or low == high


@tries(120)
@given(st.data())
def test_localisation(data):
    call = {"model": NET, "batches": [(PIXELS, Y, BOXES)], "features": "features", "head": "head", "threshold": 0.25,
            "iou": 0.5}  # fmt: skip
    given_ = spoil_call(data, call)
    batches = given_["batches"]
    if isinstance(batches, list) and data.draw(st.booleans(), "with boxes"):
        boxes = data.draw(st.sampled_from([BOXES, SEVERAL, *NO_BOXES]))
        given_["batches"] = [(*b, boxes) if isinstance(b, tuple) and len(b) == 2 else b for b in batches]
    found = answer(localisation_accuracy, given_, [*call, *WORDS, "boxes"])
    if found is not None and given_["model"] is NET:
        assert 0 <= found.top1 <= found.known <= 1 and found.top1 <= 1 - naive_error(given_["batches"]) + 1e-9


def by_bins(logits: torch.Tensor, labels: torch.Tensor, bins: int) -> float:
    """The calibration error in a loop over the bins."""
    confidence, predicted = logits.double().softmax(1).max(1)
    place = [min(int(c * bins), bins - 1) for c in confidence.tolist()]
    error = 0.0
    for b in set(place):
        rows = [i for i, p in enumerate(place) if p == b]
        error += abs(float(sum(confidence[rows]) - sum(predicted[rows] == labels[rows]))) / len(place)
    return error


@tries(160)
@given(st.data())
def test_calibration(data):
    logits = torch.randn(20, K, generator=torch.Generator().manual_seed(0)) * 2
    call = {"logits": logits, "labels": torch.arange(20) % K, "bins": 7}
    others = {"logits": [logits.half(), logits * 1e38, logits * 1e-40, logits.double() * 1e307, logits[:, :2] * 0],
              "labels": [torch.zeros(20, dtype=torch.int32), call["labels"] % 2], "bins": [1, 2, 1000]}  # fmt: skip
    given_ = vary(data, call, others)
    error = answer(expected_calibration_error, given_)
    found = answer(reliability, given_)
    assert (error is None) == (found is None)
    if found is not None:
        expected = by_bins(given_["logits"].detach(), given_["labels"], given_["bins"])
        assert error == pytest.approx(expected, abs=1e-4)
        full = found.share > 0
        gap = (found.confidence - found.accuracy).abs() * found.share
        assert float(gap[full].sum()) == pytest.approx(expected, abs=1e-6)
        assert float(found.share.sum()) == pytest.approx(1) and found.share.shape == (given_["bins"],)
