"""Puzzle Mix, Co-Mixup, CutMix and saliency on arguments that nobody should give: refused, or mixed rightly."""

import torch
from dataopt.core.mixup import (
    Adversarial,
    CoMixup,
    CutMix,
    PuzzleMix,
    augmix,
    clean_loss,
    input_gradient,
    jensen_shannon_loss,
    saliency,
)
from hypothesis import given
from hypothesis import strategies as st

from .budget import tries
from .spoiled import VALUES, answer, finite, images, spoil, vary

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


COLOUR = torch.rand(2, 3, 9, 9, generator=G)


@tries(60)
@given(st.data())
def test_augmix(data):
    """Images of the same form, in [0, 1] as pixels, that the generator alone decides."""
    call = {"x": COLOUR, "severity": 3, "all_ops": False, "mean": None, "std": None}
    small = [*images(COLOUR), COLOUR[:, :1], (COLOUR * 255).to(torch.uint8), COLOUR[:1, :, :1, :1]]
    given_ = vary(data, call, {"x": small, "severity": [1, 10], "all_ops": [True]})
    out = answer(augmix, given_ | {"generator": generator()}, [*call, "generator"])
    if out is not None:
        x = given_["x"]
        assert out.shape == x.shape and out.dtype == x.dtype and finite(out)
        if given_["mean"] is None and out.is_floating_point():
            assert float(out.min()) >= 0 and float(out.max()) <= 1
        assert torch.equal(out, augmix(**given_, generator=generator()))


@tries(60)
@given(st.data())
def test_jensen_shannon(data):
    """Between 0 and log 2, and what the definition says; a class may be masked out."""
    first, second = torch.randn(2, 4, K, generator=G)
    masked = [t.index_fill(1, torch.tensor([1]), -torch.inf) for t in (first, second)]
    views = data.draw(st.sampled_from([(first, second), masked, (first, masked[1]), (first * 1e30, second)]), "views")
    given_ = dict(zip(("first", "second"), views, strict=True))
    given_ = spoil(data, given_) if data.draw(st.booleans(), "spoil") else given_
    loss = answer(lambda first, second: jensen_shannon_loss(first, second), given_, ["logits"])
    if loss is not None and all(not t.isnan().any() and bool((t < torch.inf).all()) for t in given_.values()):
        p, q = (t.detach().double().softmax(1) for t in given_.values())
        if bool((p.isfinite() & q.isfinite()).all()):
            kl = [torch.where(a > 0, a * (a / ((p + q) / 2)).log(), 0.0).sum(1) for a in (p, q)]
            assert abs(float(loss) - float((kl[0] + kl[1]).mean()) / 2) < 1e-4


class Flat(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(x.flatten(1), (0, K))[:, :K] * self.scale


@tries(60)
@given(st.data())
def test_clean_loss(data):
    """The loss and the gradients that one ordinary pass has."""
    net, entropy = Flat(), torch.nn.functional.cross_entropy
    call = {"forward": net, "x": X, "y": Y, "loss_fn": entropy}
    losses = [None, lambda z, y: entropy(z, y, reduction="none"), lambda z, y: 3.0, lambda z, y: z.sum()]
    given_ = vary(data, call, {"x": images(X), "loss_fn": losses, "forward": [*VALUES, torch.nn.Flatten]}, ("y",))
    if isinstance(given_["x"], torch.Tensor) and (not given_["x"].ndim or len(given_["x"]) != B):
        return  # what y may be is for the loss to say
    found = answer(clean_loss, given_)
    if found is not None:
        loss, gradient = found
        loss.backward()
        again, x = Flat(), given_["x"].detach().clone().requires_grad_()
        expected = given_["loss_fn"](again(x).float(), Y)
        expected.backward()
        assert gradient.shape == x.shape and gradient.dtype == torch.float32
        torch.testing.assert_close(loss, expected.detach(), check_dtype=False)
        torch.testing.assert_close(net.scale.grad, again.scale.grad, rtol=0.02, atol=1e-2)
        torch.testing.assert_close(gradient, x.grad.float() * B, rtol=0.05, atol=1e-2)
