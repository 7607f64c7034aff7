"""``dataopt train`` over a train.py: finding it, teaching it --mixup puzzle, and leaving it alone otherwise."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from dataopt.integrations.timm.task import PuzzleMixTask
from dataopt.integrations.timm.train import main
from timm.loss import BinaryCrossEntropy, PolyCrossEntropy, SoftTargetCrossEntropy

from .conftest import LIKE_TIMM, alike, needs_script, same, two_processes, weights

PUZZLE = ("--mixup", "puzzle")

Run = Callable[..., Path]


def refused(run: Run, capsys: pytest.CaptureFixture[str], *flags: object) -> str:
    """The one line with which a run stops."""
    with pytest.raises(SystemExit) as stopped:
        run(*flags)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("dataopt train: error: ")
    return lines[0]


# --- a script like timm's ---


def test_the_script_mixes_in_our_task(like_timm, steps):
    like_timm(*PUZZLE, "--cutmix", 1.0, "--smoothing", 0.2, "--puzzle-grids", "4x2", 8, "--puzzle-transport", "none")
    assert len(steps) == 4 and all(s["mixed"] is not None for s in steps)
    task = steps[0]["task"]
    assert isinstance(task, PuzzleMixTask) and isinstance(task.criterion, SoftTargetCrossEntropy)
    assert task.mixer.smoothing == 0.2 and task.mixer.cutmix.alpha == 1.0 and task.mixer.seed == 42
    mix = task.mixer.mix
    assert mix.grids == ((4, 2), 8) and mix.transport is None and mix.num_classes == 4
    assert list(mix.mean) == pytest.approx(list(task.trainable_module.pretrained_cfg["mean"]))
    assert [s["epoch"] for s in steps] == [0, 0, 1, 1]


def test_the_scripts_other_losses_get_soft_targets(like_timm, steps):
    like_timm(*PUZZLE, "--loss", "bce", "--epochs", 1)
    assert isinstance(steps[0]["task"].criterion, BinaryCrossEntropy)
    assert steps[0]["task"].criterion.smoothing == 0
    like_timm(*PUZZLE, "--loss", "poly", "--epochs", 1)
    assert isinstance(steps[-1]["task"].criterion, PolyCrossEntropy)
    with pytest.raises(ValueError, match="class index targets"):
        like_timm(*PUZZLE, "--loss", "asl")


def test_args_yaml_keeps_the_users_values_and_can_be_given_back(like_timm, steps):
    folder = like_timm(*PUZZLE, "--cutmix", 0.7, "--puzzle-beta", 0.9, "--mixup-off-epoch", 1)
    saved = yaml.safe_load((folder / "args.yaml").read_text())
    assert (saved["mixup"], saved["cutmix"], saved["puzzle_beta"]) == ("puzzle", 0.7, 0.9)
    logged = yaml.safe_load((folder / "logged.yaml").read_text())  # what a logger gets
    assert (logged["mixup_method"], logged["mixup_method_cutmix"]) == ("puzzle", 0.7)
    first = [None if s["mixed"] is None else s["mixed"].inputs for s in steps]
    assert [m is None for m in first] == [False, False, True, True]
    steps.clear()
    again = like_timm("-c", folder / "args.yaml", "--output", str(folder.parent / "again"), out="again")
    assert all((s["mixed"] is None) == (m is None) for s, m in zip(steps, first, strict=True))
    assert all(m is None or torch.equal(s["mixed"].inputs, m) for s, m in zip(steps, first, strict=True))
    assert same(torch.load(folder / "model.pt"), torch.load(again / "model.pt"))


def test_the_command_line_beats_the_config(like_timm, steps, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("mixup: puzzle\nsmoothing: 0.0\n")
    like_timm("-c", config)
    assert len(steps) == 4 and steps[0]["task"].mixer.smoothing == 0.0
    steps.clear()
    config.write_text("smoothing: 0.0\nmixup: 0.3\n")
    like_timm("-c", config, *PUZZLE, "--epochs", 1)
    assert len(steps) == 2


def test_without_a_method_of_ours_the_script_is_left_alone(like_timm, steps):
    folder = like_timm("--mixup", 0.2, "--cutmix", 1.0)
    assert not steps
    assert yaml.safe_load((folder / "args.yaml").read_text())["mixup"] == 0.2
    script = sys.modules["like_timm"]
    assert script.ClassificationTask.__module__.startswith("timm.")
    assert script.train_one_epoch.__module__ == "like_timm"
    assert pickle.loads(pickle.dumps(script.train_one_epoch)) is script.train_one_epoch
    plain = folder.parent / "plain"
    plain.mkdir()
    command = [sys.executable, str(LIKE_TIMM), "--mixup", "0.2", "--cutmix", "1.0", "--output", str(plain)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})
    assert same(torch.load(folder / "model.pt"), torch.load(plain / "model.pt"))


def test_argv_is_given_back(like_timm):
    before = list(sys.argv)
    like_timm(*PUZZLE, "--epochs", 1)
    assert sys.argv == before


def test_another_task_stops_the_run(like_timm):
    with pytest.raises(RuntimeError, match="timm built MultiLabelClassificationTask, not PuzzleMixTask: nothing would"):
        like_timm(*PUZZLE, "--another-task")


def test_a_run_that_mixes_nothing_stops_after_the_first_epoch(like_timm):
    with pytest.raises(RuntimeError, match="epoch 0 passed without one batch through PuzzleMixTask"):
        like_timm(*PUZZLE, "--bypass-task")
    like_timm(*PUZZLE, "--bypass-task", "--mixup-prob", 0.0)  # that is what was asked for


@pytest.mark.parametrize(
    "flags",
    [
        ("--naflex-loader",),
        ("--aug-splits", 3),
        ("--loss", "jsd"),
        ("--kd-model-name", "resnet50"),
        ("--cutmix-minmax", 0.2, 0.8),
        ("--mixup-mode", "pair"),
        ("--task", "multilabel"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(like_timm, capsys, flags):
    error = refused(like_timm, capsys, *PUZZLE, *flags)
    assert f"--mixup puzzle does not go with {flags[0]}" in error


def test_bad_values_stop_before_a_model_is_built(like_timm, capsys):
    assert "gamma=1.5 must lie in [0, 1]" in refused(like_timm, capsys, *PUZZLE, "--puzzle-gamma", 1.5)
    assert "clean_weight=-1.0" in refused(like_timm, capsys, *PUZZLE, "--puzzle-clean-weight", -1)


def test_unknown_methods_name_those_there_are(like_timm, capsys, tmp_path):
    assert "method 'cutout' must be one of puzzle, comixup" in refused(like_timm, capsys, "--mixup", "cutout")
    config = tmp_path / "run.yaml"
    config.write_text("mixup: mosaic\n")
    assert "method 'mosaic' must be one of" in refused(like_timm, capsys, "-c", config)
    config.write_text("- mixup\n")
    assert "holds list" in refused(like_timm, capsys, "-c", config)


def test_unknown_flags_are_argparses_own_error(like_timm, capsys):
    with pytest.raises(SystemExit) as stopped:
        like_timm(*PUZZLE, "--no-such-flag")
    assert stopped.value.code == 2
    assert "unrecognized arguments: --no-such-flag" in capsys.readouterr().err


def test_help_is_the_scripts_with_our_group(like_timm, capsys):
    with pytest.raises(SystemExit) as stopped:
        like_timm("--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "A script like timm's" in text and "--puzzle-saliency-resolution" in text and "--train-script" in text


# --- finding it ---


def test_importing_the_package_imports_no_timm():
    code = "import sys, dataopt.integrations.timm; sys.exit('timm' in sys.modules or 'torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_environment_names_a_script(like_timm, steps, monkeypatch, tmp_path):
    monkeypatch.setenv("TIMM_TRAIN_SCRIPT", str(LIKE_TIMM))
    main([*PUZZLE, "--epochs", "1"])
    assert len(steps) == 2


def test_a_train_py_of_timms_in_this_folder_is_found(steps, monkeypatch, tmp_path):
    monkeypatch.delenv("TIMM_TRAIN_SCRIPT", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(LIKE_TIMM.read_text())
    main([*PUZZLE, "--epochs", "1"])
    assert len(steps) == 2


def test_another_train_py_in_this_folder_is_not_run(train, steps, tmp_path):
    (tmp_path / "train.py").write_text("from timm.models import create_model\nraise SystemExit('executed')\n")
    folder = train(*PUZZLE)  # our loop
    assert len(steps) == 2 and (folder / "last.pth.tar").exists()


def test_a_script_that_is_not_timms_is_refused(like_timm, capsys, tmp_path, monkeypatch):
    other = tmp_path / "other.py"
    other.write_text("raise SystemExit('executed')\n")
    run = lambda *flags: main([str(f) for f in flags])  # noqa: E731
    assert "does not look like timm's train.py" in refused(run, capsys, "--train-script", other)
    assert "--train-script nowhere.py does not exist" in refused(run, capsys, "--train-script", "nowhere.py")
    monkeypatch.setenv("TIMM_TRAIN_SCRIPT", "nowhere.py")
    assert "$TIMM_TRAIN_SCRIPT nowhere.py does not exist" in refused(run, capsys)


def test_a_script_without_the_task_api_runs_only_without_our_methods(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TIMM_TRAIN_SCRIPT", raising=False)
    old = tmp_path / "train.py"
    old.write_text(
        "from timm.models import create_model\n"
        "config_parser = None\n"
        "def train_one_epoch(): pass\n"
        "def _parse_args(): pass\n"
        "def main():\n"
        "    import pathlib, sys\n"
        "    pathlib.Path(__file__).with_name('ran').write_text(' '.join(sys.argv))\n"
    )
    run = lambda *flags: main(["--train-script", str(old), *map(str, flags)])  # noqa: E731
    assert "older than timm's training tasks" in refused(run, capsys, *PUZZLE)
    assert not (tmp_path / "ran").exists()
    run("--mixup", 0.2)
    assert (tmp_path / "ran").read_text() == f"{old} --mixup 0.2"


# --- timm's own train.py ---


@needs_script
@pytest.mark.parametrize(
    "flags",
    [
        ("--amp", "--amp-dtype", "bfloat16", "--bce-loss"),
        ("--amp", "--amp-dtype", "float16"),
        ("--model-ema", "--channels-last", "--grad-accum-steps", 2, "--no-prefetcher", "--epochs", 2),
        ("--mixup-mode", "elem", "--clip-grad", 1.0, "--puzzle-saliency-resolution", 0.5),
        ("--puzzle-clean-weight", 0.5, "--puzzle-adv-prob", 1.0, "--model-dtype", "bfloat16"),
        ("--train-img-sizes", 32, 48, "--train-batch-sizes", 8, 4),
        ("--in-chans", 1),
    ],
    ids=lambda flags: " ".join(f for f in map(str, flags) if f.startswith("--")),
)
def test_timms_flags_work(train_script, steps, flags):
    folder = train_script(*PUZZLE, *flags)
    assert len(steps) >= 2 and all(s["mixed"] is not None for s in steps)
    assert all(torch.isfinite(v).all() for v in weights(folder).values())
    assert not same(weights(folder), steps[0]["task"].state_dict())
    assert yaml.safe_load((folder / "args.yaml").read_text())["mixup"] == "puzzle"
    if "--model-ema" in flags:
        assert not same(weights(folder, key="state_dict_ema"), weights(folder))


@needs_script
@pytest.mark.parametrize("flags", [("--torchcompile", "aot_eager"), ("--torchscript",)])
def test_compiled_models_train(train_script, flags):
    folder = train_script(*PUZZLE, *flags)  # stops if an epoch mixes nothing
    assert (folder / "last.pth.tar").exists()
    assert all("_orig_mod" not in k for k in weights(folder))


@needs_script
def test_timms_script_switches_to_cutmix_and_stops_mixing(train_script, steps):
    flags = ("--cutmix", 1.0, "--mixup-off-epoch", 3, "--epochs", 4, "--smoothing", 0.2)
    folder = train_script(*PUZZLE, *flags)
    mixed = [s["mixed"] for s in steps]
    assert [m is None for m in mixed] == [False] * 6 + [True] * 2
    assert 0 < sum(m.moves is None for m in mixed[:6]) < 6
    assert all(s["label"].ndim == 1 for s in steps)  # timm's collate mixed nothing
    assert steps[-1]["target"].unique().tolist() == pytest.approx([0.05, 0.85])
    assert yaml.safe_load((folder / "args.yaml").read_text())["cutmix"] == 1.0
    again = train_script("-c", folder / "args.yaml", "--epochs", 4, experiment="again")
    assert same(weights(folder), weights(again))
    steps.clear()
    train_script("-c", folder / "args.yaml", "--mixup", 0.2, experiment="plain")  # the command line beats the file
    assert not steps


@needs_script
def test_timms_script_resumes_with_the_same_draws(train_script, steps):
    plan = ("--sched", "step", "--decay-epochs", 100, "--mixup-prob", 0.7, "--cutmix", 1.0)
    train_script(*PUZZLE, *plan, "--epochs", 4, experiment="straight")
    draws = [None if s["mixed"] is None else s["mixed"].partner.tolist() for s in steps]
    assert None in draws and len([d for d in draws if d]) > 3
    steps.clear()
    part = train_script(*PUZZLE, *plan, "--epochs", 1, experiment="part")
    train_script(*PUZZLE, *plan, "--epochs", 4, "--resume", part / "last.pth.tar", experiment="resumed")
    assert [None if s["mixed"] is None else s["mixed"].partner.tolist() for s in steps] == draws


@needs_script
@pytest.mark.parametrize("flags", [("--kd-model-name", "test_resnet"), ("--jsd-loss", "--aug-splits", 3)])
def test_timms_script_refuses(train_script, capsys, flags):
    assert re.search("does not go with --(kd-model-name|aug-splits)", refused(train_script, capsys, *PUZZLE, *flags))


@needs_script
def test_plain_mixup_is_plain_timm_bit_for_bit(base_flags, tmp_path, image_folder):
    script = os.environ["TIMM_TRAIN_SCRIPT"]
    plan = [*base_flags, "--workers", "1", "--mixup", "0.2", "--cutmix", "1.0", "--experiment"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ours = [sys.executable, "-m", "dataopt.integrations.timm.train", *plan, "ours"]
    timms = [sys.executable, script, *plan, "timms"]
    for command in (ours, timms):
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=120)
    out = tmp_path / "out"
    assert same(weights(out / "ours"), weights(out / "timms"))
    texts = [(out / name / "args.yaml").read_text() for name in ("ours", "timms")]
    assert texts[0].replace("experiment: ours", "experiment: timms") == texts[1]


@needs_script
def test_two_processes_of_timms_script(base_flags, tmp_path):
    # in several processes timm's order of images depends on the epoch alone, so a resumed run can equal a straight one
    plan = [
        "--batch-size",
        "4",
        "--workers",
        "1",
        "--grad-accum-steps",
        "2",
        "--puzzle-clean-weight",
        "0.5",
        "--no-aug",
    ]
    run = [*base_flags, *PUZZLE, *plan, "--sched", "step", "--decay-epochs", "100", "--epochs"]
    last = str(tmp_path / "out" / "part" / "last.pth.tar")
    straight, part, resumed = two_processes(
        tmp_path,
        [*run, "2", "--experiment", "straight"],
        [*run, "1", "--experiment", "part"],
        [*run, "2", "--experiment", "resumed", "--resume", last],
    )
    for one, two in (straight, part, resumed):
        assert same(one["parameters"], two["parameters"])
        assert not alike(one["masks"], two["masks"]) and not alike(one["partners"], two["partners"])
    assert len(straight[0]["masks"]) == 4
    for whole, half in zip(straight, resumed, strict=True):
        assert same(whole["parameters"], half["parameters"])
        assert alike(whole["masks"][2:], half["masks"]) and alike(whole["partners"][2:], half["partners"])
    assert not same(straight[0]["parameters"], part[0]["parameters"])


@needs_script
def test_help_is_timms_with_our_group(train_script, capsys):
    with pytest.raises(SystemExit):
        train_script("--help")
    text = capsys.readouterr().out
    assert "--naflex-loader" in text and "--puzzle-beta" in text
