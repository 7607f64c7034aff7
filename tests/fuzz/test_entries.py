"""Puzzle Mix, Co-Mixup, CutMix and saliency on arguments that nobody should give: refused, or mixed rightly."""

import torch
from dataopt.core.mixup import Adversarial, CoMixup, CutMix, PuzzleMix, input_gradient, saliency
from hypothesis import given
from hypothesis import strategies as st

from .budget import tries
from .spoiled import answer, finite, spoil

B, K = 4, 3
G = torch.Generator().manual_seed(0)
X = torch.rand(B, 2, 8, 8, generator=G)
Y = torch.tensor([0, 2, 1, 2])
S = torch.rand(B, 8, 8, generator=G)
SOFT = torch.rand(B, K, generator=G).softmax(1)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def check_mixed(m, x, share) -> None:
    """Targets are a convex combination of labels that were one-hot, and nothing but the inputs' own NaN is NaN."""
    assert m.inputs.dtype == x.dtype and m.inputs.shape[1:] == x.shape[1:] and finite(m.inputs)
    assert finite(m.targets) and finite(share) and bool((share >= 0).all()) and bool((share <= 1 + 1e-5).all())


@tries(150)
@given(st.data())
def test_puzzle_mix(data):
    call = {"x": X, "y": data.draw(st.sampled_from([Y, SOFT])), "s": S, "partner": torch.tensor([1, 2, 3, 0]),
            "lam": 0.4, "grid": 4, "generator": generator()}  # fmt: skip
    given_ = spoil(data, call)
    transport = data.draw(st.sampled_from(["iterative", "exact", None]))
    m = answer(PuzzleMix(K, transport=transport), given_, [*call, "num_classes"])
    if m is not None:
        check_mixed(m, given_["x"], m.mask)
        y = given_["y"]
        if y.ndim == 1:
            assert torch.allclose(m.targets.sum(1), torch.ones(len(m.targets)), atol=1e-5)
        assert m.partner.shape == (len(given_["x"]),)


@tries(150)
@given(st.data())
def test_puzzle_mix_settings(data):
    call = {"num_classes": K, "alpha": 1.0, "beta": 1.2, "gamma": 0.5, "eta": 0.2, "labels": 3, "grids": (2, 4),
            "neigh_size": 2, "data_term": "released", "transport": "iterative", "transport_cost": 0.8,
            "transport_patch": 2, "adversarial": Adversarial(0.5, 0.1, 0.1), "solver": "auto", "mean": (0.5, 0.5),
            "std": (0.5, 0.5)}  # fmt: skip
    settings = spoil(data, call)
    mix = answer(PuzzleMix, settings)
    if mix is not None:
        x = X if settings["mean"] is None else X * 2 - 1
        m = answer(mix, {"x": x, "y": Y, "s": S, "generator": generator()}, [*call, "grid", "x", "y"])
        if m is not None:
            check_mixed(m, x, m.mask)
            assert torch.allclose(m.targets.sum(1), torch.ones(B), atol=1e-5)


@tries(60)
@given(st.data())
def test_adversarial(data):
    call = {"p": 0.5, "eps": 0.1, "step": 0.1, "shared_draw": False, "decay": True}
    adversarial = answer(Adversarial, spoil(data, call, ("shared_draw", "decay")))
    if adversarial is not None:
        x = {"x": X, "generator": generator()}
        started = answer(adversarial.start, spoil(data, x))
        assert started is None or finite(started[0])


@tries(100)
@given(st.data())
def test_co_mixup(data):
    call = {"x": X, "y": data.draw(st.sampled_from([Y, SOFT])), "s": S, "lam": torch.ones(B), "generator": generator()}
    given_ = spoil(data, call)
    m = answer(CoMixup(K), given_, [*call, "num_classes", "grid"])
    if m is not None:
        check_mixed(m, given_["x"], m.sources)
        assert torch.allclose(m.sources.sum(1), torch.ones(len(m.sources)), atol=1e-5)


@tries(100)
@given(st.data())
def test_co_mixup_settings(data):
    call = {"num_classes": K, "alpha": 2.0, "beta": 0.3, "gamma": 1.0, "eta": 0.05, "tau": 0.8, "omega": 0.001,
            "grid": 4, "partition": 3, "outputs": None, "n_iter": 2, "restarts": 1, "threshold": "hard"}  # fmt: skip
    mix = answer(CoMixup, spoil(data, call))
    if mix is not None:
        m = answer(mix, {"x": X, "y": Y, "s": S, "generator": generator()}, [*call, "y"])
        if m is not None:
            check_mixed(m, X, m.sources)
            assert torch.allclose(m.targets.sum(1), torch.ones(len(m.targets)), atol=1e-5)


@tries(80)
@given(st.data())
def test_cut_mix(data):
    settings = {"num_classes": K, "alpha": 1.0}
    cut = answer(CutMix, spoil(data, settings) if data.draw(st.booleans()) else settings)
    call = {"x": X, "y": Y, "partner": torch.tensor([1, 2, 3, 0]), "lam": 0.4, "generator": generator()}
    given_ = spoil(data, call)
    m = None if cut is None else answer(cut, given_, [*call, *settings])
    if m is not None:
        check_mixed(m, given_["x"], m.mask)


@tries(80)
@given(st.data())
def test_apply(data):
    """The same mix on anything aligned."""
    mixed = data.draw(st.sampled_from([PuzzleMix(K), CoMixup(K)]))(X, Y, S, generator=generator())
    t = spoil(data, {"t": X})
    out = answer(mixed.apply, t)
    if out is not None:
        assert out.shape == t["t"].shape and out.dtype == t["t"].dtype
        assert finite(out) or not finite(t["t"])


@tries(80)
@given(st.data())
def test_saliency(data):
    call = {
        "forward": lambda x: torch.nn.functional.pad(x.flatten(1), (0, K))[:, :K],
        "x": X,
        "y": Y,
        "resolution": 1.0,
    }
    given_ = spoil(data, call, ("forward", "y"))  # what y may be is for the loss to say
    g = answer(input_gradient, given_) if len(getattr(given_["x"], "shape", "")) < 1 or len(given_["x"]) == B else None
    if g is not None:
        assert g.shape == given_["x"].shape and g.dtype == torch.float32 and finite(g)
        assert bool((saliency(g).flatten(1).sum(1) - 1).abs().max() < 1e-4)
    s = answer(saliency, spoil(data, {"gradient": X}))
    if s is not None:
        assert finite(s) and bool((s >= 0).all()) and bool((s.flatten(1).sum(1) - 1).abs().max() < 1e-3)
