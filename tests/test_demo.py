"""``dataopt demo``: its steps, the report and the pictures."""

import io
import json
import re

import numpy as np
import pytest
import torch
from dataopt import demo, plots
from dataopt.core.condense import Condensed
from dataopt.core.mixup import Mixed
from dataopt.core.relation import find_issues
from dataopt.demo import ccm, condensing, kvzip, labels, mixing
from dataopt.demo.digits import flip
from dataopt.demo.step import Step, aligned, spread
from matplotlib.colors import to_rgb
from PIL import Image
from torch import nn


@pytest.fixture(scope="module")
def walk(tmp_path_factory) -> demo.Walk:
    return demo.Walk(
        tmp_path_factory.mktemp("walk") / "demo", quick=True, epochs=1, ccm_steps={"model": 3, "adapter": 2}
    )


def test_the_split_is_stratified_and_always_the_same():
    digits, again = demo.load(), demo.load()
    assert digits.x.shape == (600, 1, 8, 8) and digits.test_x.shape == (1197, 1, 8, 8)
    counts = torch.bincount(digits.y)
    assert len(counts) == 10 and counts.min() >= 57 and counts.max() <= 62
    assert torch.equal(digits.x, again.x) and torch.equal(digits.test_y, again.test_y)
    assert digits.x.min() == 0 and digits.x.max() == 1
    as_file = (digits.x * 255).round().byte()  # a picture file holds the same numbers
    assert torch.equal(as_file.float() / 255, digits.x)


def test_a_share_of_the_labels_is_changed():
    y = demo.load().y
    first, second = flip(y, 0), flip(y, 1)
    assert (first != y).sum() == (second != y).sum() == 48 and not torch.equal(first, second)
    assert first.min() >= 0 and first.max() <= 9 and torch.equal(first, flip(y, 0))


def test_augmentation_moves_a_little_and_fills_with_black():
    x = torch.full((64, 1, 32, 32), -0.7)
    x[:, :, 14:18, 14:18] = 1.0
    out = mixing.augment(x, -0.7, torch.Generator().manual_seed(0))
    assert torch.allclose(out[:, :, 0], torch.tensor(-0.7)) and torch.allclose(out[..., -1], torch.tensor(-0.7))
    mass = (out + 0.7).squeeze(1)
    place = torch.arange(32).float()
    for axis in (1, 2):
        centre = (mass.sum(3 - axis) * place).sum(1) / mass.sum((1, 2))
        assert (centre - 15.5).abs().max() < 2.1 and (centre - 15.5).abs().max() > 1


def test_the_seed_decides(walk):
    def count():
        nonlocal epochs
        epochs += 1

    epochs, images = 0, mixing.images_of(walk.digits, torch.arange(100), walk.digits.y[:100])
    assert abs(float(mixing.images_of(walk.digits, torch.arange(600), walk.digits.y).x.mean())) < 1e-4
    for method in ("plain", "Co-Mixup"):
        a, b = (mixing.train(method, 1, 1, images, count).state_dict() for _ in range(2))
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert epochs == 4


def test_accuracy_and_calibration_error():
    class Sure(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :10] * 100

    y = torch.arange(40) % 10
    x = nn.functional.one_hot(y, 10).float()
    assert mixing.evaluate(Sure(), x, y) == pytest.approx((100, 0), abs=1e-3)
    assert mixing.evaluate(Sure(), x, (y + (y < 3).long()) % 10) == pytest.approx((70, 30), abs=1e-3)


def test_the_first_round_is_what_dataopt_clean_finds(walk):
    cleaning = walk.cleanings[0]
    step = walk.clean()
    record = json.loads((walk.out / "clean/record.json").read_text())
    issues = cleaning.result.rounds[0].issues
    assert record["counts"]["label_issues"] == int(issues.is_label_issue.sum())
    assert (walk.out / "clean/report.html").exists()
    model = labels.train(walk.digits.x.flatten(1), cleaning.given, 0)
    with torch.no_grad():
        hidden = model[:2](walk.digits.x.flatten(1))
        again = find_issues(hidden, model[2](hidden).softmax(1), cleaning.given)
    assert torch.equal(again.is_label_issue, issues.is_label_issue)
    found = 100 * float((issues.is_label_issue & cleaning.wrong).sum() / cleaning.wrong.sum())
    assert step.figures["found"] == [found] and found > 50 and step.figures["right"][0] > 80
    assert step.rows[0][1] == f"{found:.1f}"


def test_rounds_are_reported_as_they_went(walk):
    step, cleaning = walk.rounds(), walk.cleanings[0]
    rounds = cleaning.result.rounds
    assert len(step.rows) == len(rounds) + 1 and step.rows[0][0] == "before"
    for row, made, accuracy in zip(step.rows[1:], rounds, step.figures["accuracy"][0][1:], strict=False):
        found = 100 * float((made.issues.is_label_issue & cleaning.wrong).sum() / cleaning.wrong.sum())
        assert row[1] == f"{found:.1f}" and row[3] == f"{accuracy:.1f}"


def test_every_way_of_training_is_in_the_table(walk):
    step = walk.mix()
    assert [row[0] for row in step.rows] == list(mixing.METHODS)
    for run, row in zip(step.figures["runs"], step.rows, strict=True):
        assert row[0] == run["method"] and row[1] == f"{run['accuracy']:.2f}"
    assert Image.open(io.BytesIO(step.pictures["puzzle_mix.png"][1])).format == "PNG"


def test_what_was_condensed_comes_back_from_the_hub(walk):
    step = condensing.condense(walk.digits, walk.cleanings[0], [0], walk.out, steps=2, evaluation_steps=2)
    assert step.figures["came_back_equal"] and "bit for bit" in step.found and step.figures["bytes"] > 1000
    assert step.rows[0][0] == "10 condensed digits, downloaded" and len(step.rows) == 4
    assert len(Condensed.load(walk.out / "condense").labels) == 10
    assert set(step.pictures) == {"condensed.png"}
    assert not (walk.out / "condense/pulled.safetensors").exists()


def test_a_text_is_asked_at_every_ratio():
    start = "\n\n".join(kvzip.handbook().split("\n\n")[:3])
    questions = [("What is the name of the supply boat?", "petrel"), ("Who is the doctor?", "no such word")]
    step = kvzip.ask([1.0, 0.3, 0.1], start, questions)
    results = step.figures["results"]
    assert [r["ratio"] for r in results] == [1.0, 0.3, 0.1] and step.header[1:] == ["100% kept", "30% kept", "10% kept"]
    sizes = [r["nbytes"] for r in results]
    assert sizes == sorted(sizes, reverse=True) and list(step.rows[0][1:]) == [f"{size:,}" for size in sizes]
    # all pairs of 30 layers and 3 heads: keys and values of 64 floats each
    assert sizes[0] == step.figures["tokens"] * 30 * 3 * 2 * 64 * 4
    assert "Petrel" in results[0]["answers"][0]  # the model really reads
    assert all(r["right"] == ("petrel" in r["answers"][0].lower()) for r in results)
    assert step.rows[2][1] == f"{results[0]['right']} of 2"
    assert Image.open(io.BytesIO(step.pictures["kvzip_kept.png"][1])).format == "PNG"


def test_a_conversation_is_remembered(walk):
    step = walk.ccm()
    assert set(step.figures["accuracy"]) == {"nothing", "CCM", "everything"}
    assert all(len(shares) == ccm.FACTS for shares in step.figures["accuracy"].values())
    assert [turn["pairs"] for turn in step.figures["conversation"]] == list(ccm.SHOWN)
    assert all(turn["said"] in ccm.WORDS for turn in step.figures["conversation"])
    assert [row[0] for row in step.rows] == [str(n) for n in ccm.SHOWN]


def test_the_report_holds_what_was_printed(walk, capsys):
    (walk.out / "mine.txt").parent.mkdir(exist_ok=True)
    (walk.out / "mine.txt").write_text("keep me")
    demo.main(walk, ["rounds", "ccm"])
    printed = capsys.readouterr().out
    page = (walk.out / "report.html").read_text()
    content = json.loads((walk.out / "report.json").read_text())
    assert list(content["steps"]) == ["rounds", "ccm"] and content["versions"]["torch"] and content["seeds"] == 1
    for title in ("Clean, train, look again", "Keep a conversation in a small memory"):
        assert title in printed and title in page
    found = content["steps"]["rounds"]["found"][0]
    assert f"<td>{found[-1]:.1f}</td>" in page and f"{found[-1]:.1f}" in printed
    # the page loads nothing: pictures are in it, and also beside it
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page) and page.count("data:image/png") == 2
    for name in ("rounds.png", "ccm.png", "mine.txt"):
        assert (walk.out / name).exists()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "demo").write_text("")
    with pytest.raises(ValueError, match="is a file; give a folder"):
        demo.main(demo.Walk(tmp_path / "demo"), ["clean"])


def test_steps_are_printed_within_the_width():
    step = Step(
        "Title", "Why? " * 30, ["", "a", "b"], [["row", "1.5", "word " * 20], ["x", "22", "y"]], "That.", ["do it"]
    )
    lines = step.text(60).splitlines()
    assert max(map(len, lines)) <= 60 and lines[0] == "Title" and lines[-1] == "  $ do it"
    table = aligned(["", "a"], [["row", "1.5"], ["longer", "22"]], 80).splitlines()
    assert table == ["          a", "row     1.5", "longer   22"]
    assert spread([1.0]) == "1.0" and spread([1.0, 3.0], 2) == "2.00 ± 1.41"


def test_shown_pairs_differ_in_class_and_are_really_mixed():
    n = 60
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 10, (n,), generator=generator)
    mask = torch.ones(n, 4, 4)
    mask[::3, :2] = 0  # half and half
    mask[1::3] = 0.5  # all blended; the rest shows the first input alone
    m = Mixed(torch.zeros(n, 1, 4, 4), torch.zeros(n, 10), mask, torch.randperm(n, generator=generator))
    rows = mixing.pairs_to_show(y, m)
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


def test_labels_are_framed_by_whether_they_were_right():
    figure = plots.show_labels(np.zeros((3, 1, 8, 8)), ["1 → 2", "b", "c"], np.array([True, False, True]), columns=2)
    first, second, _, empty = figure.axes
    assert first.get_title() == "1 → 2" and first.spines["top"].get_edgecolor() != second.spines["top"].get_edgecolor()
    assert not empty.axison


def test_curves_go_through_their_points():
    x, y = [0.1, 0.5], [1.0, 2.0]
    figure = plots.show_curves({"loss": {"a": (x, y), "b": (y, x)}, "top-1": {"a": (x, x), "b": (y, y)}}, "share")
    lines = figure.axes[0].lines
    assert [list(line.get_xdata()) for line in lines] == [x, y] and list(lines[1].get_ydata()) == x
    assert [ax.get_title() for ax in figure.axes] == ["loss", "top-1"]


def test_the_handbook_holds_every_answer():
    text = kvzip.handbook()
    assert 1000 < len(text.split()) < 1400 and text.isascii()
    assert all(word in text for _, word in kvzip.QUESTIONS)


def test_only_the_first_sentence_of_an_answer_is_shown():
    assert kvzip.first_sentence("The dog is\n Biscuit. It barks. Loud") == "The dog is Biscuit."
    assert kvzip.first_sentence("") == ""


def test_the_relation_map_shows_every_neighbour():
    mean, std, last = np.array([0.4, -0.1, 0.0]), np.array([0.1, 0.2, 0.0]), np.array([0.3, -0.2, 0.0])
    figure = plots.show_relation_map(mean, std, last, "row 7")
    dots = figure.axes[0].collections[0]
    places = {tuple(p): v for p, v in zip(dots.get_offsets().round(6), dots.get_array(), strict=True)}
    assert places == {(0.4, 0.1): 0.3, (-0.1, 0.2): -0.2, (0.0, 0.0): 0.0}
    assert figure.axes[0].get_title() == "row 7" and dots.get_clim() == (-0.4, 0.4)
    assert Image.open(io.BytesIO(plots.to_png(plots.show_relation_map(*np.zeros((3, 0)))))).format == "PNG"


def test_conversations_ask_about_what_was_said():
    facts, queries = ccm.conversations(50, 16, 32, torch.Generator().manual_seed(0))
    for told, asked in zip(facts.tolist(), queries.tolist(), strict=True):
        assert len({who for who, _ in told}) == 16
        for t, (_, who, what) in enumerate(asked):
            assert [who, what] in told[: t + 1]
