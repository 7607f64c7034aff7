"""Each benchmark's smallest cells run, are kept, and make a report."""

import importlib
import importlib.util
import io
import json
import re
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from dataopt.integrations.hf import CCMConfig, CCMModel
from PIL import Image
from threadpoolctl import threadpool_limits
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
NAMES = (
    *("common", "synthetic", "cifar", "solver_time", "transport_time", "cifar10", "figure_3_2", "step_time"),
    "comixup_time",
    *("kvzip_task", "kvzip_baselines", "kvzip_quality", "kvzip_speed", "kvzip_kvpress", "kvzip_cuda"),
    *("relation_models", "relation_data", "relation_labels", "relation_outliers", "relation_after_cleaning"),
    *("relation_rules", "relation_rounds", "relation_speed", "mixup_methods", "mixup", "mixup_text"),
    *("condense_data", "condense_cells", "condense_plan", "condense_report", "condense", "condense_speed"),
    *("endurance_kills", "endurance_commands", "endurance_review", "endurance"),
    *("ccm_tasks", "ccm_methods", "ccm", "ccm_speed", "ccm_stream"),
)


@pytest.fixture(scope="module")
def scripts():
    """The scripts as modules, as they see each other when they are started by path."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield {name: importlib.import_module(name) for name in NAMES}
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in NAMES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images in the form of the CIFAR-10 files: each class a brightness, so that there is something to learn."""
    path = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name, count in (("train", 300), ("test", 100)):
        images, labels = [], np.arange(count) % 10
        for label in labels:
            pixels = (25 * label + rng.integers(0, 25, (32, 32, 3))).astype(np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            images.append({"bytes": file.getvalue(), "path": None})
        pq.write_table(pa.table({"image": images, "label": labels}), path / f"{name}.parquet")
    return path


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


@pytest.fixture
def run(scripts, folder, results, monkeypatch):
    """Run a script's smallest size; the threads are as before afterwards."""

    def call(name, *options):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--quick", "--out", str(results), *options])
        threads = torch.get_num_threads()
        try:
            with threadpool_limits(1):
                scripts[name].main()
        finally:
            torch.set_num_threads(threads)
        return json.loads((results / f"{name}.json").read_text())["cells"], (results / f"{name}.md").read_text()

    return call


def test_solver_time(run):
    cells, text = run("solver_time")
    for grid in ("2", "4"):
        for solver in ("numba", "scipy"):
            assert cells["0.5"][grid][solver]["ms"] > 0
            assert cells["0.5"][grid][solver]["optimal_percent"] == 100
    assert "1 thread;" in text and "times ours" in text


def test_transport_time_and_kept_cells(run, results, capsys):
    cells, text = run("transport_time")
    assert set(cells) == {"2x2", "4x4"} and all(c["plan and apply"]["dense"] > 0 for c in cells.values())
    assert "at least 40" in text
    before = (results / "transport_time.json").read_bytes()
    capsys.readouterr()
    assert run("transport_time")[0] == cells
    printed = capsys.readouterr().out
    assert "kept cells: 2x2, 4x4" in printed and ": ran" not in printed
    assert (results / "transport_time.json").read_bytes() == before
    run("transport_time", "--fresh")
    assert "2x2: ran" in capsys.readouterr().out


def test_comixup_time_without_gco_says_that_its_targets_are_not_measured(run, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gco" else find(name, *rest))
    cells, text = run("comixup_time")
    assert cells["time"]["ours, the whole call"] > cells["time"]["ours"] > 0 and "gco" not in cells["time"]
    assert cells["restarts 2"]["objective"] < cells["restarts 1"]["objective"]
    assert "targets against it are not measured" in text and "repeated supports per 1,000 outputs at most 10" in text


def test_cells_of_other_settings_are_not_kept(run, results, capsys):
    path = results / "transport_time.json"
    run("transport_time")
    stored = json.loads(path.read_text())
    stored["settings"]["batch"] = 7
    path.write_text(json.dumps(stored))
    capsys.readouterr()
    run("transport_time")
    printed = capsys.readouterr().out
    assert "other settings" in printed and "4x4: ran" in printed


def test_the_dense_plan_must_agree(scripts):
    transport = scripts["transport_time"]
    plan = torch.eye(4).unsqueeze(0)
    shown = np.array([[True, True, False, False]])
    transport.check(plan, np.array([[0, 1, 3, 2]]), shown)  # hidden places do not count
    with pytest.raises(RuntimeError, match="differ at 2 of 2 shown places"):
        transport.check(plan, np.array([[1, 0, 2, 3]]), shown)


def test_dense_apply_moves_regions(scripts):
    x = torch.arange(16.0).view(1, 1, 4, 4)
    plan = torch.eye(4)[[1, 0, 2, 3]].unsqueeze(0)  # the upper two regions change place
    moved = scripts["transport_time"].dense_apply(plan, x, 2)
    assert torch.equal(moved[..., :2, :], x[..., :2, :].roll(2, -1)) and torch.equal(moved[..., 2:, :], x[..., 2:, :])


def test_cifar10_figure_and_step_share_one_network(run, folder, results, capsys):
    cells, text = run("cifar10", "--data", str(folder))
    assert set(cells) == {"plain, seed 0", "Puzzle Mix, equal evaluations, seed 0"}
    assert len(cells["plain, seed 0"]["top1"]) == 2 and cells["Puzzle Mix, equal evaluations, seed 0"]["epochs"] == 1
    assert "2 processes of 1 thread each" in text

    cells, _ = run("figure_3_2", "--data", str(folder))
    assert cells["0.5"]["input mixup"]["saliency kept"] == pytest.approx(1, abs=1e-4)
    assert cells["0.5"]["input mixup"]["true share"] == pytest.approx(0.5)
    assert Image.open(results / "figure_3_2.png").format == "PNG"

    cells, text = run("step_time", "--data", str(folder))
    full = cells["grid 2"]["full"]
    assert 0 < full["solve"] + full["transport"] + full["paste"] < full["mixing in all"] < full["step"]
    assert -1 <= cells["agreement"]["correlation"] <= 1 and "at most 1.8" in text
    assert "training the plain network" not in capsys.readouterr().out


def test_missing_data_stop_with_one_line(run, folder, tmp_path, results):
    with pytest.raises(SystemExit, match="--data FOLDER"):
        run("cifar10", "--data", str(tmp_path), "--fresh")
    path = results / "step_time.json"
    run("step_time", "--data", str(folder))
    stored = json.loads(path.read_text())
    stored["cells"].pop("agreement", None)
    path.write_text(json.dumps(stored))
    _, text = run("step_time", "--data", str(tmp_path))
    assert "not measured" in text


def test_a_report_from_kept_cells_needs_no_data(run, folder, tmp_path, capsys):
    for name in ("cifar10", "figure_3_2", "step_time"):
        cells, text = run(name, "--data", str(folder))
        capsys.readouterr()
        assert run(name, "--data", str(tmp_path)) == (cells, text)
        assert ": ran" not in capsys.readouterr().out


def test_squares_cover_the_share(scripts):
    mask = scripts["figure_3_2"].squares(torch.zeros(50, 32, 32), 0.36, torch.Generator().manual_seed(0))
    side = round(32 * 0.8)
    assert torch.equal((mask == 0).sum((1, 2)), torch.full((50,), side * side))
    assert mask.flatten(1).unique(dim=0).shape[0] > 10


def test_crops_keep_pixels_of_their_own_image(scripts):
    x = torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1).expand(8, 3, 32, 32) + 1
    out = scripts["cifar"].crop_and_flip(x, torch.Generator().manual_seed(0))
    for image, value in zip(out, range(1, 9), strict=True):
        assert set(image.unique().tolist()) <= {0, value} and (image == value).float().mean() > 0.7


def test_targets_are_judged_in_words(scripts):
    common = scripts["common"]
    assert common.verdict("a ratio", 9.9, least=10).endswith("MISSED.")
    assert common.verdict("a ratio", 1.79, most=1.8).endswith("met.")


@pytest.mark.parametrize("timed", [True, False])
def test_times_of_another_processor_are_dropped_and_accuracies_kept(scripts, tmp_path, monkeypatch, timed):
    common = scripts["common"]
    args = types.SimpleNamespace(quick=True, fresh=False, out=tmp_path)

    def begun(cpu):
        monkeypatch.setattr(common, "_cpu", lambda: cpu)
        return common.start("kept", "Kept cells", args, 1, {}, timed=timed)

    begun("Alpha").cell("first", lambda: {"accuracy": 1.0})
    second = begun("Beta")
    second.cell("second", lambda: {"accuracy": 2.0})
    second.report()
    line = (tmp_path / "kept.md").read_text().splitlines()[2]
    assert line.startswith("Beta, " if timed else "Alpha (1 cells), Beta (1 cells), ")
    assert list(begun("Beta").cells) == (["second"] if timed else ["first", "second"])


def test_kvzip_quality(run, results):
    cells, text = run("kvzip_quality")
    ours, others = (cells[f"short lines 0: {name}"]["0.3"]["codes"]["nll"] for name in ("KVzip", "PyramidKV-like"))
    full = cells["short lines 0: full"]["1.0"]["codes"]["nll"]
    assert full < ours + 0.1 < others
    assert "Figure 8.12" in text and "Table 8.1" in text
    for number in ("8_5", "8_6"):
        assert Image.open(results / f"kvzip_figure_{number}.png").format == "PNG"


def test_kvzip_speed(run):
    cells, text = run("kvzip_speed")
    cell = cells["n=256"]
    assert cell["bytes"]["8"]["DynamicCache"] == 8 * cell["bytes"]["1"]["1.0"] > cell["bytes"]["1"]["0.3"]
    assert min(cell["decode"]["8"].values()) > 0 and "at most 1.8" in text
    assert cell["bytes"]["1"]["no context"] == 0 and "no context" in cell["decode"]["1"]
    assert cell["files"]["fsynced save"] > 0 and "the fsync alone takes" in text


def test_kvzip_kvpress_says_how_to_make_its_environment(scripts, monkeypatch, capsys, tmp_path):
    threads = torch.get_num_threads()
    try:
        monkeypatch.setattr(sys, "argv", ["kvzip_kvpress.py", "--quick", "--out", str(tmp_path)])
        scripts["kvzip_kvpress"].main()
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.startswith("Not measured: ") and "pip install kvpress, then --kvpress-python" in last
        assert not list(tmp_path.iterdir())
        for python, why in ((shutil.which("false"), "has no kvpress"), (str(tmp_path / "python"), "does not run")):
            monkeypatch.setattr(sys, "argv", ["x", "--quick", "--out", str(tmp_path), "--kvpress-python", python])
            with pytest.raises(SystemExit, match=f"{why}.*pip install kvpress"):
                scripts["kvzip_kvpress"].main()
    finally:
        torch.set_num_threads(threads)


def test_kvzip_cuda_says_that_it_needs_a_gpu(scripts, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["kvzip_cuda.py"])
    scripts["kvzip_cuda"].main()
    assert "finds no GPU" in capsys.readouterr().out


def test_relation_data_are_kept(run, results, capsys):
    cells, _ = run("relation_data")
    assert cells["digits top2 8 %, seed 0"]["wrong"] == pytest.approx(0.08, abs=1e-3)
    file = results / "scratch" / "relation" / "digits-top2-8-seed-0.safetensors"
    before = file.stat().st_mtime_ns
    capsys.readouterr()
    run("relation_data")
    assert ": ran" not in capsys.readouterr().out
    run("relation_labels")
    assert file.stat().st_mtime_ns == before


def test_relation_labels(run, results):
    cells, text = run("relation_labels")
    cell = cells["scores: digits top2 8 %, seed 0"]
    ap = {name: values[0] for name, values in cell["scores"].items()}
    assert min(ap["relation t=4 (thesis)"], ap["relation, whitened, t=2"]) > 0.9 > 0.5 > ap["entropy"]
    assert ap["relation t=4, released code"] == pytest.approx(ap["relation t=4 (thesis)"], abs=0.01)
    precision, recall, share = cell["flags"]["relation t=4 (thesis)"]
    assert precision > 0.9 and recall == pytest.approx(precision * share / 0.08, rel=0.02)
    assert len(cells["epochs: digits top2 8 %, seed 0"]["epochs"]["loss"]) == 30 and "Table 5.7" in text
    for number in ("5_5a", "5_5b", "5_6", "5_9"):
        assert Image.open(results / f"relation_labels_figure_{number}.png").format == "PNG"


def test_relation_rules(run):
    rules, text = run("relation_rules")
    labels, _ = run("relation_labels")
    ap = {name: values[0] for name, values in rules["digits top2 8 %, seed 0"].items() if isinstance(values, list)}
    known = labels["scores: digits top2 8 %, seed 0"]["scores"]
    same = {"relation": "relation, whitened, t=2", "loss": "loss", "margin": "margin"}
    same["mean rank of relation, loss"] = "relation, whitened, t=2 + loss"
    assert {mine: ap[mine] for mine in same} == pytest.approx({mine: known[other][0] for mine, other in same.items()})
    least = min(max(ap["relation"], ap["loss"]) - value for name, value in ap.items() if name not in same)
    chosen = re.search(r"Chosen: (.+)\. Confirming", text)[1]
    assert max(ap["relation"], ap["loss"]) - ap[chosen] <= least + 1e-9


def test_relation_outliers(run):
    cells, text = run("relation_outliers")
    scores = cells["digits pixels 5 %, seed 0"]["scores"]
    assert scores["relation t=1 (thesis)"][1] > 0.95 > scores["local outlier factor, 20"][1]
    assert cells["digits pixels 5 %, seed 0"]["subsets"]["1"] == scores["relation t=1 (thesis)"]
    assert "Mahalanobis" in text


def test_relation_after_cleaning(run):
    cells, _ = run("relation_after_cleaning")
    cell = {key.split(": ")[1]: value for key, value in cells.items()}
    assert cell["clean"]["wrong"] == 0 < cell["find_issues, drop"]["wrong"] < cell["noisy"]["wrong"] / 2
    assert cell["find_issues, relabel"]["kept"] == 1 > cell["find_issues, drop"]["kept"] > 0.85
    assert all(value["accuracy"] > 90 for value in cell.values())


def test_endurance_names_what_differs(scripts, tmp_path):
    kills = scripts["endurance_kills"]
    assert kills.unequal({"a": "1"}, {"a": "1"}) == []
    assert sorted(kills.unequal({"a": "1", "b": "2"}, {"a": "3", "c": "4"})) == ["a", "b", "c"]
    (tmp_path / ".half.12345678").write_text("")
    (tmp_path / "whole.json").write_text("{}")
    assert [path.name for path in kills.leftovers(tmp_path)] == [".half.12345678"]


def test_mixup_text_counts_as_the_others_do(scripts):
    text = scripts["mixup_text"]
    assert len(text.PLAN) == len(text.SIZES) * len(text.METHODS) * 3
    assert text.key_of((500, "plain", 2)) == "500 sentences, plain, seed 2"


def test_relation_rounds(run):
    cells, text = run("relation_rounds")
    cell = cells["digits 8 %, drop, seed 0"]
    assert len(cell["accuracy"]) == len(cell["found"]) + 1 >= 3 and cell["found"][-1] > 0.8 * cell["wrong"]
    assert cell["stable"] == (cell["changed"][-1] == 0) and "digits 8 %, drop" in text


def test_relation_speed(run):
    cells, text = run("relation_speed")
    assert cells["n=2000, C=10, very confident"]["computed"] < cells["n=2000, C=10"]["computed"] < 1
    assert cells["n=1000, C=10, textbook"]["error"] < 1e-4 and 0 < cells["n=2000, C=10, memory"]["over"] < 60
    assert set(cells["partitions: digits top2 8 %, seed 0"]) > {"1", "2"} and "at most 0.65" in text


def test_missing_relation_data_stop_with_one_line(scripts, tmp_path):
    data = scripts["relation_data"]
    with pytest.raises(SystemExit, match="no data for cifar10, fashion; give the folder"):
        data.check(tmp_path / "cifar10", data.tasks((("cifar10", "fashion", 0.05),)))


def test_labels_are_flipped_among_the_rows_that_may(scripts):
    truth, second = torch.zeros(100, dtype=torch.int64), torch.ones(100, dtype=torch.int64)
    may = torch.arange(100) < 40
    labels = scripts["relation_data"].flip(truth, second, may, 0.2, seed=0)
    assert int(labels.sum()) == 20 and not labels[~may].any()


def test_the_textbook_form_must_agree(scripts, monkeypatch):
    speed = scripts["relation_speed"]
    textbook = speed.textbook
    monkeypatch.setattr(speed, "textbook", lambda given: textbook(given, temperature=3))
    with pytest.raises(RuntimeError, match="differ by"):
        speed.against_textbook(400)


def test_mixup(run, folder, results):
    cells, text = run("mixup", "--data", str(folder))
    assert cells["Puzzle Mix, half the epochs, seed 0"]["epochs"] * 2 == cells["Puzzle Mix, seed 0"]["epochs"] == 2
    assert all(0 <= cells["plain, seed 0"][name] <= 100 for name in ("error", "fgsm", "pgd", "ece", "corruption"))
    figure = cells["Figure 4.2"]
    assert figure["input mixup"]["saliency"] == pytest.approx(1, abs=1e-3)
    assert figure["Co-Mixup 1.0"]["inputs"] >= figure["Co-Mixup 0.83"]["inputs"] >= 1
    assert "Table 4.4" in text and "Cells that have run" in text
    for name in ("reliability", "figure_4_2"):
        assert Image.open(results / f"mixup_{name}.png").format == "PNG"
    assert run("mixup", "--data", str(results)) == (cells, text)  # the kept cells need no data


def test_mixes_of_several_inputs_have_the_labels_of_what_they_show(scripts):
    methods = scripts["mixup_methods"]
    seen = []

    class Model(torch.nn.Module):
        def forward(self, x):
            seen.append(x)
            return torch.zeros(len(x), 10, requires_grad=True)

    y = torch.arange(8)
    x = y.view(-1, 1, 1, 1).expand(8, 3, 32, 32).float()  # every pixel says whose it is
    losses = []
    original = methods.F.cross_entropy
    methods.F.cross_entropy = lambda logits, target: losses.append(target) or original(logits, target)
    try:
        for inputs in (2, 3, 4):
            row = methods.Row("CutMix", {"inputs": inputs, "alpha": 1.0})
            methods.cutmix(row, None, Model(), 0)(x, y)
            shown = torch.stack([(seen[-1][:, 0] == k).float().mean((1, 2)) for k in range(10)], 1)
            assert torch.allclose(losses[-1], shown, atol=1e-6)
            row = methods.Row("input mixup", {"inputs": inputs, "alpha": 1.0})
            methods.input_mixup(row, None, Model(), 0)(x, y)
            assert torch.allclose(losses[-1] @ torch.arange(10.0), seen[-1][:, 0, 0, 0], atol=1e-5)
            assert torch.allclose(losses[-1].sum(1), torch.ones(8))
    finally:
        methods.F.cross_entropy = original


def test_no_mixup_cell_is_begun_without_time(run, results, folder, scripts):
    run("mixup", "--data", str(folder))
    mixup = scripts["mixup"]
    stored = types.SimpleNamespace(args=types.SimpleNamespace(quick=False), store=lambda *a: pytest.fail("ran"))
    mixup.run_cells(stored, {"a": (print, ())}, minutes=0, workers=1)


def test_condense(run, folder):
    cells, text = run("condense", "--data", str(folder))
    assert all(0 <= a <= 100 for cell in cells.values() for a in cell.get("accuracies", []))
    assert "Cells that have run" in text and "start alone" in text


def test_the_plain_loop_has_the_losses_of_released(scripts, folder):
    speed = scripts["condense_speed"]
    with threadpool_limits(1):
        assert speed.equal(speed.Setup(folder, True))["one network"][0] < 1e-12


def test_ccm(run, results):
    cells, text = run("ccm")
    assert all(len(cells["facts: bounds, seed 0"][f"{name}, test"]) == 16 for name in ("full", "none"))
    for row in ("CCM-merge, plain LoRA", "Gisting-online", "Gisting, fixed context", "recurrent soft prompts"):
        assert all(0 <= share <= 1 for share in cells[f"facts: {row}, seed 0"]["test"])
    assert "held out" in cells["16 tables: CCM-concat, plain LoRA, seed 0"]
    assert "facts: concat at every t" not in text and "16 tables: full context at least 0.97" in text
    assert (results / "ccm_accuracy.png").stat().st_size > 10_000


def test_ccm_rows_and_pairs(scripts):
    methods, tasks = scripts["ccm_methods"], scripts["ccm_tasks"]
    draw = tasks.Tables(tasks.tables_of(0), 3, 4, tied=True)
    contexts, questions, answers = draw(4, torch.Generator().manual_seed(0))
    table = tasks.tables_of(0)[3]
    assert torch.equal(table[questions[:, :, 1] - tasks._QUERY] + tasks._VALUE, answers)
    assert (questions[:, :, 0] == tasks._ID + 3).all()
    shown = table[contexts[:, :, 0::2] - tasks._KEY] + tasks._VALUE == contexts[:, :, 1::2]
    assert 0.6 < shown.float().mean() < 0.85  # 30 % are drawn anew, an eighth of them right
    assert methods.METHODS["CCM-concat, 2 COMP tokens"].pairs(16, 4) == (32, 36)
    assert methods.METHODS["CCM-merge"].pairs(16, 4) == (1, 6)
    assert methods.METHODS["Gisting, fixed context"].pairs(16, 4) == (1, 65)
    assert methods.METHODS["Gisting-online"].pairs(16, 4) == (16, 20)


def test_pooled_pairs_are_means_of_the_context(scripts):
    """Against the keys and values of the context's tokens, taken from a plain forward pass."""
    methods, tasks = scripts["ccm_methods"], scripts["ccm_tasks"]
    base = tasks.small_model(0)
    rows = tasks.facts(1, torch.Generator().manual_seed(0), 2)
    cache = DynamicCache(config=base.config)
    base(rows[0][:, 0], past_key_values=cache)
    model = methods.make(methods.METHODS["pooled pairs (Compressive)"], base, 0).eval()
    made = methods.flat_rows(rows, model.comp_ids)
    made.pop("labels")
    logits = model(**made).logits[0, 3:5]  # the first question, behind the first context
    memory = DynamicCache(config=base.config)
    for i, layer in enumerate(cache.layers):
        bare = model.rotation(layer.keys, torch.tensor([0, -1])).mean(2, keepdim=True)  # to position 0
        memory.update(bare, layer.values.mean(2, keepdim=True), i)
    with model.disable_adapter():
        asked = model.language_model(rows[1][:, 0], past_key_values=memory, position_ids=torch.tensor([[1, 2]])).logits[
            0
        ]
    torch.testing.assert_close(logits, asked, rtol=1e-4, atol=1e-4)


def test_ccm_speed(run):
    cells, text = run("ccm_speed")
    name = "training, hidden 64, 2 layers, batch 1, segments of 4, merge"
    assert cells[name]["difference"] < 1e-9 and cells[name]["seconds"]["parallel"][0] > 0
    assert cells["memory step, merge"]["bytes"]["t = 2"] == cells["memory step, merge"]["bytes"]["t = 64"]
    assert "conditional LoRA over none at most 1.02" in text
    assert cells["a whole model"]["difference"] < 1e-2 and cells["a whole model"]["same argmax"]
    sizes = {name: row["bytes"] for name, row in cells["a whole model"]["rows"].items()}
    assert sizes["full context"] == 25 * sizes["CCM-concat"] == 400 * sizes["CCM-merge"]


def test_ccm_stream(run):
    cells, text = run("ccm_stream")
    for mode in ("concat", "merge"):
        cell = cells["seed 0"][mode]
        assert cell["early difference"] < 1e-3 and cell["peak"] == 162  # nothing was compressed or dropped yet
        assert 0 < cell["CCM"] < 20 and 0 < cell["sinks"] < 20
    assert "gain of merge" in text


@torch.no_grad()
def test_sinks_see_the_first_token_and_the_window(scripts):
    """Against a forward pass over the tokens that are left, in one layer, where keys depend on nothing else."""
    stream, setup = scripts["ccm_stream"], scripts["ccm_stream"].Setup(max_pairs=12, memory=2, chunk=4)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=300, initializer_range=0.3, **shape)).eval()
    model = CCMModel(base, CCMConfig()).eval()
    ids = torch.randint(0, 300, (40,), generator=torch.Generator().manual_seed(0))
    got = stream.with_sinks(model, ids, setup, 2)
    kept, before, slots = [], [], 0
    for at, token in enumerate(ids.tolist()):
        if len(kept) == 12:
            more = 2 if slots < 2 else 0
            slots += more
            kept = kept[:1] + kept[1 + 4 - more :]
        if at:
            scores = base(torch.tensor([before])).logits[0, -1].log_softmax(-1)
            assert abs(float(scores[token] - got[at])) < 1e-4
        kept.append(token)
        before = list(kept)
