"""Predictions in evaluation mode, and one line for a missing extra."""

import sys

import pytest
import torch
from dataopt.core.evaluation import (
    corrupt,
    expected_calibration_error,
    fgsm_error,
    localisation_accuracy,
    pgd_error,
    predict,
    top1_error,
)
from dataopt.core.mixup import augmix

from .conftest import Net, quadrants


def test_predict_is_the_model_in_evaluation_mode(trained):
    x, y, _ = quadrants(20, 7)
    trained.eval()
    expected = trained(x).detach()
    trained.train()
    logits, labels = predict(trained, [(x[:12], y[:12]), (x[12:], y[12:])])
    torch.testing.assert_close(logits, expected)
    assert torch.equal(labels, y) and not logits.requires_grad
    wrong = (expected.argmax(1) != y).sum() / 20
    assert top1_error(trained, [(x, y)]) == pytest.approx(float(wrong))
    assert top1_error(trained, [(x, (expected.argmax(1) + 1) % 3)]) == 1


def test_flags_buffers_gradients_and_random_state_stay():
    model = Net()
    model.train()
    model.body[1].eval()  # a frozen layer
    flags = [m.training for m in model.modules()]
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.get_rng_state()
    batches = [(torch.rand(6, 3, 8, 8), torch.arange(6) % 4)]
    random = torch.Generator().manual_seed(0)
    torch.set_rng_state(state)
    fgsm_error(model, batches)
    pgd_error(model, batches, generator=random)
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="labels range from 0 to 9"):
        predict(model, [(torch.rand(2, 3, 8, 8), torch.tensor([0, 9]))])
    assert [m.training for m in model.modules()] == flags


def test_bad_batches(trained):
    with pytest.raises(ValueError, match="batches is empty"):
        top1_error(trained, [])
    x, y, _ = quadrants(4, 0)
    with pytest.raises(ValueError, match="class ids"):
        top1_error(trained, [(x, y[:3])])


@pytest.mark.parametrize(
    ("module", "call"),
    [
        ("skimage.util", lambda x, y: corrupt(x, "gaussian_noise", 1)),
        ("torchvision.transforms.v2.functional", lambda x, y: corrupt(x, "jpeg", 1)),
        ("torchvision.transforms.v2", lambda x, y: augmix(x)),
        ("torchmetrics.functional.classification", lambda x, y: expected_calibration_error(torch.rand(4, 3), y)),
        ("torchvision.ops", lambda x, y: localisation_accuracy(Net(), [], "body", "fc")),
    ],
)
def test_missing_extra_is_named(module, call, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)  # what Python itself does with a module that cannot be had
    x, y, _ = quadrants(4, 0)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "dataopt\[eval\]"') as caught:
        call(x, y)
    assert "\n" not in str(caught.value) and module.partition(".")[0] in str(caught.value)
