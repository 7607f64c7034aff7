"""The result and its files: bit for bit, and refused when they are not what was saved."""

import json
import os

import numpy as np
import pytest
import torch
from dataopt.core.condense import Condensed, MultiFormation
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file


def some(**changes) -> Condensed:
    g = torch.Generator().manual_seed(0)
    values = {
        "images": torch.rand(4, 3, 8, 8, generator=g), "labels": torch.tensor([0, 0, 1, 1]), "factor": 2,
        "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.25), "made": {"seed": 3, "source": {"sha256": "ab"}},
        "label_names": ("cat", "dog"),
    }  # fmt: skip
    return Condensed(**values | changes)


def test_decodes_as_its_formation():
    c = some()
    x, y = c.decode()
    assert torch.equal(x, MultiFormation(2)(c.images)) and y.tolist() == [0] * 8 + [1] * 8
    normal, _ = c.decode(normalised=True)
    torch.testing.assert_close(normal[:, 2], (x[:, 2] - 0.3) / 0.25)
    with pytest.raises(ValueError, match="needs mean and std"):
        some(mean=None, std=None).decode(normalised=True)
    assert c.images.numel() == 4 * 3 * 8 * 8  # storage does not grow with the factor


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 3), st.sampled_from(["space", "time"]), st.sampled_from(["single", "multi"]), st.booleans())
def test_what_is_saved_is_loaded(tmp_path_factory, factor, axes, mode, bare):
    folder = tmp_path_factory.mktemp("condensed")
    extra = {"mean": None, "std": None, "label_names": None, "made": {}} if bare else {}
    c = some(factor=factor, axes=axes, mode=mode, **extra)
    c.save(folder)
    other = Condensed.load(folder)
    assert torch.equal(other.images, c.images) and torch.equal(other.labels, c.labels)
    assert vars(c).keys() == vars(other).keys()
    assert all(getattr(other, k) == v for k, v in vars(c).items() if not isinstance(v, torch.Tensor))


def test_saving_again_replaces_the_files(tmp_path):
    some().save(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    c = some(factor=1)
    c.save(tmp_path)
    assert len(os.listdir(tmp_path)) == 3 and Condensed.load(tmp_path).factor == 1
    kinds = {name.rpartition(".")[2] for name in os.listdir(tmp_path)}
    assert kinds == {"json", "safetensors", "md"}


def change(folder, edit) -> None:
    path = folder / "condensed.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def cut(folder) -> None:
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])


def flip_a_bit(folder) -> None:
    file = next(folder.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def swap_the_pixels(folder) -> None:
    """Other tensors whose size and checksum the record is made to fit."""
    import hashlib

    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    save_file({**tensors, "images": 1 - tensors["images"]}, file, {"record": json.dumps({"kind": "condensed"})})
    content = file.read_bytes()
    new = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    change(folder, lambda c: c["tensors"].update(new))


BROKEN = {
    "cut short": (cut, r"has \d+ bytes where condensed.json says \d+; save or download it again"),
    "a bit flipped": (flip_a_bit, r"has the checksum [0-9a-f]{16} where condensed.json says '[0-9a-f]{16}"),
    "factor": (lambda f: change(f, lambda c: c["record"].update(factor=1)), r"says factor=1 where .* saved with 2"),
    "mean": (lambda f: change(f, lambda c: c["record"].pop("mean")), r"says mean=None where .* \[0.1, 0.2, 0.3\]"),
    "made": (lambda f: change(f, lambda c: c["record"]["made"].update(seed=4)), "says made="),
    "swapped": (swap_the_pixels, "says axes='space' where .* saved with None"),
    "no tensors": (lambda f: next(f.glob("*.safetensors")).unlink(), "lacks condensed-.*, which condensed.json names"),
    "record cut": (lambda f: (f / "condensed.json").write_text("{"), "condensed.json is damaged or none of ours"),
    "list": (lambda f: (f / "condensed.json").write_text("[]"), "condensed.json is damaged or none of ours"),
    "path": (lambda f: change(f, lambda c: c["tensors"].update(file="../x.safetensors")), "which no save does"),
    "format": (lambda f: change(f, lambda c: c.update(format=99)), "has format 99 where this dataopt reads 1"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_files_that_are_not_what_was_saved_are_refused(name, tmp_path):
    some().save(tmp_path)
    spoil, message = BROKEN[name]
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message):
        Condensed.load(tmp_path)


def test_a_folder_of_something_else(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no condensed data set"):
        Condensed.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.rand(4, 8, 8)}, r"images is torch.float32 of shape \(4, 8, 8\)"),
        ({"images": torch.rand(4, 3, 8, 8).double()}, "images is torch.float64"),
        ({"images": torch.rand(4, 3, 8, 8) + 1}, "images holds values from 1"),
        ({"images": torch.full((4, 3, 8, 8), torch.nan)}, "images holds values from nan"),
        ({"labels": torch.tensor([0, 0, 1])}, r"labels is torch.int64 of shape \(3,\); give \(4,\) int64"),
        ({"labels": torch.tensor([0, 0, 1, -1])}, "int64 class ids from 0"),
        ({"factor": 9}, "factor=9 is larger than the 8 x 8 images"),
        ({"mode": "bound"}, "mode='bound' must be one of 'single', 'multi'"),
        ({"std": (1.0, 1.0, 0.0)}, "std above 0"),
        ({"mean": (0.0,)}, r"one number a channel \(3\)"),
        ({"label_names": ("cat",)}, "label_names has 1 names for labels up to 1"),
    ],
)
def test_bad_values(changes, message):
    with pytest.raises(ValueError, match=message):
        some(**changes)


def test_repr_is_one_line():
    c = Condensed(torch.rand(2, 1, 8, 8), torch.tensor([0, 1]), factor=2)
    assert repr(c) == "Condensed(2 x 1 x 8 x 8, 2 classes, factor=2, axes='space', mode='single')"


def test_a_mean_without_a_deviation_is_refused_and_arrays_become_numbers(tmp_path):
    with pytest.raises(ValueError, match="go together; give both or neither"):
        some(std=None)
    some(mean=np.array([0.1, 0.2, 0.3], np.float32)).save(tmp_path)
    assert Condensed.load(tmp_path).mean == pytest.approx((0.1, 0.2, 0.3))


def test_a_record_of_another_kind_is_neither_replaced_nor_called_damaged(tmp_path):
    (tmp_path / "condensed.json").write_text('{"kind": "published thing", "version": 1}')
    for call in (lambda: some().save(tmp_path), lambda: Condensed.load(tmp_path)):
        with pytest.raises(ValueError, match="of a published thing"):
            call()
    assert [path.name for path in tmp_path.iterdir()] == ["condensed.json"]
