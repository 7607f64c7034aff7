"""Published condensed data, the data module and head scores, on arguments that make no sense."""

import functools

import numpy as np
import pytest
import torch
from dataopt.integrations.hf import KVzipCache, decode_condensed, load_condensed, save_condensed
from dataopt.integrations.hf.condensed import read_condensed
from dataopt.integrations.lightning import CondensedDataModule
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ..integrations.condensed_data import SCORES, condensed, same
from .artifacts import CONTEXT, llama, tokenizer
from .budget import tries
from .spoiled import VALUES, answer, vary


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_condensed(condensed(), tmp_path_factory.mktemp("set") / "set")


@tries(25)
@given(data=st.data())
def test_saved(data, tmp_path_factory):
    """What is written comes back."""
    call = {"condensed": condensed(), "png": True, "scores": SCORES, "licence": "mit", "source": "digits"}
    others = {"condensed": [condensed(channels=2), condensed(factor=1)], "png": [False], "scores": [None]}
    given_ = vary(data, call, others)
    out = tmp_path_factory.mktemp("saved") / "set"
    saved = answer(functools.partial(save_condensed, folder=out), given_)
    if saved is not None:
        assert same(read_condensed(out, config="exact"), given_["condensed"])


@tries(40)
@given(data=st.data())
def test_config(data, folder):
    config = data.draw(st.sampled_from(["default", "exact", *VALUES]), "config")
    found = answer(functools.partial(load_condensed, folder, decode=False), {"config": config})
    if found is not None:
        assert config in (None, "default", "exact") and len(found) == 8


@tries(80)
@given(st.data())
def test_decoded(data):
    """As the data set itself decodes them; other columns are repeated."""
    c = condensed()
    rows = list(c.images[:2].numpy())
    pictures = [Image.fromarray(np.zeros((16, 16, 3), np.uint8))] * 2
    bad = [[None, None], ["x", "y"], [[1.0], [2.0, 3.0]], [rows[0], rows[1][:, :4]], [rows[0] * 9, rows[1]], [],
           [rows[0] * np.nan, rows[1]], [Image.new("RGBA", (16, 16))], [rows[0].astype(int)] * 2]  # fmt: skip
    call = {"batch": {"image": rows, "label": [3, 1]}, "factor": 2, "axes": "space", "mode": "single",
            "image_column": "image"}  # fmt: skip
    batches = [{"image": b, "label": [3, 1]} for b in (pictures, *bad)]
    given_ = vary(data, call, {"batch": [call["batch"], *batches], "factor": [1, 3], "mode": ["multi"]})
    out = answer(decode_condensed, given_, [*call, "image", "images", "s"])
    if out is not None:
        assert len(out["image"]) == len(out["label"]) >= 2
        if given_["batch"] is call["batch"] and given_["factor"] == 2 and given_["mode"] == "single":
            assert np.array_equal(np.stack(out["image"]), c.formation(c.images[:2]).numpy())
            assert out["label"] == [3] * 4 + [1] * 4


@tries(60)
@given(data=st.data())
def test_data_module(data, folder):
    call = {"source": str(folder), "batch_size": 4, "repeats": 1, "augment": True, "normalised": True, "config": None,
            "local_files_only": False, "num_workers": 0, "seed": 0}  # fmt: skip
    others = {"batch_size": [1, 64], "repeats": [3], "config": ["exact", "default"], "normalised": [False]}
    given_ = vary(data, call, others, ("num_workers", "source"))
    module = answer(CondensedDataModule, given_)
    if module is not None and answer(lambda config: module.setup("fit") or True, {"config": given_["config"]}):
        loader = module.train_dataloader()
        assert sum(len(y) for _, y in loader) == 32 * given_["repeats"]
        assert max(len(y) for _, y in loader) <= given_["batch_size"]


@tries(40)
@given(st.data())
def test_head_scores(data):
    """Half of the heads keep everything, those of the highest scores; the others the newest tokens."""
    scores = torch.tensor([[0.0, -1.0], [-2.0, -3.0]])
    call = {"head_scores": scores, "ratio": 0.5, "level": "head", "recent": 4}
    more = [scores.half(), scores.mT, scores.long(), -scores, scores.tolist(), scores.numpy()]
    given_ = vary(data, call, {"head_scores": more, "ratio": [0.25, 1.0], "recent": [0]})
    if isinstance(given_["head_scores"], str) and given_["head_scores"]:
        return  # could be a repository of the Hub
    cache = answer(functools.partial(KVzipCache, llama(), tokenizer(), CONTEXT), given_, [*given_, "folder"])
    if cache is not None and given_["head_scores"] is not None and given_["level"] == "head":
        table = given_["head_scores"].double()
        lengths = torch.tensor([layer.lengths for layer in cache._states[0].layers])
        count = round(given_["ratio"] * 4)
        full = lengths == len(cache._states[0].ids)
        assert int(full.sum()) >= count and lengths.max() <= len(cache._states[0].ids)
        best = torch.zeros(4, dtype=torch.bool)
        best[table.flatten().argsort(descending=True, stable=True)[:count]] = True
        assert bool(full.flatten()[best].all())


def test_spoiled_scores_of_a_file_are_refused(tmp_path):
    KVzipCache(llama(), tokenizer(), CONTEXT).save_head_scores(tmp_path)
    one = KVzipCache(llama(), tokenizer(), CONTEXT, level="head", head_scores=tmp_path)
    two = KVzipCache(llama(), tokenizer(), CONTEXT, level="head", head_scores=str(tmp_path))
    assert [p.lengths for p in one._states[0].layers] == [p.lengths for p in two._states[0].layers]
    with pytest.raises(ValueError, match="head_scores"):
        KVzipCache(llama(), tokenizer(), CONTEXT, head_scores=tmp_path)
