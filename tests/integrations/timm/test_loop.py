"""dataopt's short loop, which runs where no train.py of timm's is found."""

from __future__ import annotations

import csv
import itertools
import re
from pathlib import Path

import pytest
import torch
import yaml
from dataopt.core.mixup import augmix
from dataopt.integrations.mixing import batch_generator
from dataopt.integrations.timm import loop
from dataopt.integrations.timm.options import _grids
from dataopt.integrations.timm.task import PuzzleMixTask
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from timm.task import ClassificationTask

from .conftest import alike, same, two_processes, weights

PUZZLE = ("--mixup", "puzzle")


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "summary.csv").open() as f:
        return list(csv.DictReader(f))


def test_the_loop_is_short():
    assert len(Path(loop.__file__).read_text().splitlines()) <= 250


def test_every_batch_is_mixed_and_timms_files_are_written(train, steps):
    folder = train(*PUZZLE, "--epochs", 2, "--smoothing", 0.2, "--puzzle-grids", 2, 4)
    assert len(steps) == 4 and all(s["mixed"] is not None for s in steps)
    assert [s["epoch"] for s in steps] == [0, 0, 1, 1]
    assert isinstance(steps[0]["task"].criterion, SoftTargetCrossEntropy)
    assert steps[0]["target"].min() >= 0.2 / 4 - 1e-6
    assert steps[0]["task"].mixer.mix.grids == (2, 4)
    checkpoints = {f"{name}.pth.tar" for name in ("last", "model_best", "checkpoint-0", "checkpoint-1")}
    assert {p.name for p in folder.iterdir()} == {"args.yaml", "summary.csv", *checkpoints}
    args = yaml.safe_load((folder / "args.yaml").read_text())
    assert (args["mixup"], args["smoothing"], args["puzzle_grids"]) == ("puzzle", 0.2, [2, 4])
    assert [r["epoch"] for r in rows(folder)] == ["0", "1"]
    assert 0 <= float(rows(folder)[-1]["eval_top1"]) <= 100


def test_cutmix_switching_and_bce_and_bf16(train, steps):
    flags = ("--cutmix", 1.0, "--mixup-switch-prob", 0.5, "--bce-loss", "--amp", "--amp-dtype", "bfloat16")
    dtypes = set()
    watch = lambda module, _, out: dtypes.add(out.dtype) if isinstance(module, torch.nn.Conv2d) else None  # noqa: E731
    handle = torch.nn.modules.module.register_module_forward_hook(watch)
    folder = train(*PUZZLE, *flags, "--epochs", 4, "--val-split", "")
    handle.remove()
    assert dtypes == {torch.bfloat16}  # of the saliency pass too
    cut = [s["mixed"].moves is None for s in steps]
    assert 0 < sum(cut) < len(cut) == 8
    assert isinstance(steps[0]["task"].criterion, BinaryCrossEntropy)
    assert steps[0]["output"].dtype == torch.float32  # accelerate gives full precision back
    assert all(v.dtype != torch.bfloat16 for v in weights(folder).values())
    assert yaml.safe_load((folder / "args.yaml").read_text())["cutmix"] == 1.0


@pytest.mark.parametrize("method", ["puzzle", "comixup"])
def test_augmix_images_are_mixed(train, steps, method):
    train("--mixup", method, f"--{method}-augment", "augmix", "--mean", 0.5, 0.4, 0.3, "--std", 0.2, 0.3, 0.4)
    assert len(steps) == 2
    for step, seen in enumerate(steps):
        images = augmix(seen["input"], batch_generator(42, step), mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4])
        assert not torch.equal(images, seen["input"])
        assert torch.equal(seen["mixed"].inputs, seen["mixed"].apply(images))


def test_off_epoch_and_prob(train, steps):
    train(*PUZZLE, "--epochs", 2, "--mixup-off-epoch", 1)
    assert [s["mixed"] is not None for s in steps] == [True, True, False, False]
    steps.clear()
    train(*PUZZLE, "--mixup-prob", 0.0, experiment="never")
    assert [s["mixed"] for s in steps] == [None, None]


def test_elem_channels_last_and_ema(train, steps):
    flags = ("--mixup-mode", "elem", "--channels-last", "--model-ema", "--model-ema-decay", 0.5)
    folder = train(*PUZZLE, *flags)
    assert len(steps[0]["mixed"].mask.mean((1, 2)).unique()) > 1
    assert all(s["input"].is_contiguous(memory_format=torch.channels_last) for s in steps)
    ema = weights(folder, key="state_dict_ema")
    assert not same(ema, weights(folder))
    assert all(torch.isfinite(v).all() for v in ema.values())


@pytest.mark.parametrize(("batch", "accum", "groups"), [(8, 2, [2]), (4, 3, [3, 1])], ids=["whole", "last short"])
def test_accumulated_gradients_are_the_mean(train, steps, batch, accum, groups):
    plan = (*PUZZLE, "--batch-size", batch, "--opt", "momentum", "--momentum", 0, "--weight-decay", 0)
    after = weights(train(*plan, "--grad-accum-steps", accum))
    task, batches = steps[0]["task"], iter(steps[:])
    model = task.trainable_module
    model.load_state_dict(weights(train(*plan, "--lr", 0.0, experiment="before")))  # the same start
    model.train()
    for group in groups:  # by hand, from the same mixed batches
        model.zero_grad()
        for s in itertools.islice(batches, group):
            (task.criterion(model(s["mixed"].inputs), s["target"]) / group).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.05 * p.grad
    for name, p in model.named_parameters():
        assert torch.allclose(after[name], p, atol=1e-6), name


def test_gradients_are_clipped(train):
    plan = (*PUZZLE, "--opt", "momentum", "--momentum", 0, "--weight-decay", 0, "--lr", 1.0, "--batch-size", 16)
    after = weights(train(*plan, "--clip-grad", 1e-3))
    before = weights(train(*plan, "--clip-grad", 0.0, experiment="before"))
    moved = torch.stack([(after[k] - before[k]).square().sum() for k in after if "running" not in k and "num" not in k])
    assert moved.sum().sqrt().item() == pytest.approx(1e-3, rel=1e-2)


def test_a_resumed_run_is_the_straight_run(train, steps):
    plan = (*PUZZLE, "--sched", "step", "--decay-epochs", 100, "--mixup-prob", 0.7, "--cutmix", 1.0, "--model-ema")
    straight = train(*plan, "--epochs", 3, experiment="straight")
    partners = [None if s["mixed"] is None else s["mixed"].partner.tolist() for s in steps]
    steps.clear()
    part = train(*plan, "--epochs", 1, experiment="part")
    train(*plan, "--epochs", 3, "--resume", part / "last.pth.tar", experiment="part")
    assert [None if s["mixed"] is None else s["mixed"].partner.tolist() for s in steps] == partners
    assert same(weights(part), weights(straight))
    assert same(weights(part, key="state_dict_ema"), weights(straight, key="state_dict_ema"))
    assert [r["epoch"] for r in rows(part)] == ["0", "1", "2"]


def test_a_run_that_dies_while_saving_leaves_the_last_checkpoint_whole(train, monkeypatch):
    save, calls = torch.save, []

    def dying_save(state, path, *args, **kwargs):
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half a checkpoint")
            raise OSError("disk full")
        save(state, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", dying_save)
    with pytest.raises(OSError, match="disk full"):
        train(*PUZZLE, "--epochs", 2)
    folder = Path(calls[0]).parent
    assert torch.load(folder / "last.pth.tar", weights_only=False)["epoch"] == 0


@pytest.mark.parametrize("workers", [0, 1])  # a worker has the loader's collate function to itself
def test_timms_own_mixup_stays_timms(train, steps, workers):
    seen = []

    def watch(module, inputs, result):
        if isinstance(module, ClassificationTask):
            seen.append((type(module), inputs[1]))

    handle = torch.nn.modules.module.register_module_forward_hook(watch)
    try:
        train("--mixup", 0.2, "--epochs", 2, "--mixup-off-epoch", 1, "--smoothing", 0.0, "--workers", workers)
    finally:
        handle.remove()
    assert not steps
    assert [kind for kind, _ in seen] == [ClassificationTask] * 4
    targets = [t for _, t in seen]
    assert all(t.shape == (8, 4) for t in targets)  # soft, from timm's collate
    assert [bool(((t > 0) & (t < 1)).any()) for t in targets] == [True, True, False, False]


def test_a_whole_number_in_a_config_file_is_timms_mixup_too(train, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("mixup: 1\nsmoothing: 0.0\n")
    folder = train("-c", config)
    again = train("--mixup", 1.0, "--smoothing", 0.0, experiment="again")
    assert same(weights(folder), weights(again))


@pytest.mark.parametrize(("split", "mode"), [("", "min"), ("validation", "max")])
def test_the_plateau_schedule_knows_which_way_its_metric_goes(train, monkeypatch, split, mode):
    made, create = [], loop.create_scheduler_v2
    monkeypatch.setattr(
        loop, "create_scheduler_v2", lambda *args, **kwargs: made.append(kwargs) or create(*args, **kwargs)
    )
    train(*PUZZLE, "--sched", "plateau", "--val-split", split)
    assert [kwargs["plateau_mode"] for kwargs in made] == [mode]


def test_training_learns(train):
    folder = train(*PUZZLE, "--epochs", 15, "--no-aug", "--val-split", "train", "--opt", "adamw", "--lr", 0.01)
    assert max(float(r["eval_top1"]) for r in rows(folder)) >= 75


def test_one_channel(train, steps):
    train(*PUZZLE, "--in-chans", 1)
    mix = steps[0]["task"].mixer.mix
    assert steps[0]["mixed"].inputs.shape == (8, 1, 32, 32)
    assert (list(mix.mean), list(mix.std)) == ([0.5], [0.5])  # timm averages the model's three


def test_a_hugging_face_dataset_by_name(train, steps, image_folder):
    train(*PUZZLE, "--data-dir", "", "--dataset", f"hfds/{image_folder}")
    assert len(steps) == 2 and steps[0]["mixed"] is not None


def test_a_config_file_gives_defaults(train, steps, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({"mixup": "puzzle", "smoothing": 0.3, "puzzle_beta": 0.5, "lr": "1e-2"}))
    folder = train("-c", config, "--smoothing", 0.0)
    assert steps[0]["task"].mixer.mix.beta == 0.5 and steps[0]["task"].mixer.smoothing == 0.0
    for given, grids in ((8, (8,)), ("2x4", ((2, 4),)), ([2, "4x8"], (2, (4, 8))), ([[2, 4], 4], ((2, 4), 4))):
        assert tuple(_grids(given)) == grids
    assert yaml.safe_load((folder / "args.yaml").read_text())["lr"] == 0.05  # the command line's
    again = train("-c", folder / "args.yaml", experiment="again")
    assert same(weights(folder), weights(again))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (("--naflex-loader",), "this loop does not know --naflex-loader; .* --train-script"),
        (("--data-dir", "nowhere"), "--data-dir nowhere does not exist"),
        (("--amp",), "--amp-dtype bfloat16"),
        (("--amp-dtype", "int8"), "--amp-dtype int8"),
        (("--batch-size", 64), "--batch-size 64 .* 16 training images"),
        (("--mixup-mode", "pair"), "--mixup-mode pair"),
        (("--mixup", "cutout"), "method 'cutout' must be one of puzzle, comixup"),
        (("--device", "cuda:1"), "--device cuda:1"),
        (("--config", "missing.yaml"), "missing.yaml"),
        (("--resume", "missing.pth.tar"), "--resume missing.pth.tar does not exist"),
        (("--puzzle-gamma", 1.5), "gamma=1.5 must lie in"),
        (("--img-size", 30, "--puzzle-grids", 4), "grids that fit: 2, 3, 5"),
        (("--input-size", 3, 30, 30), "grid=4 does not divide inputs of size 30x30; grids that fit: 2, 3, 5"),
        (("--mixup-prob", 2), "prob=2.0"),
        (("--mixup-mode", "elem", "--cutmix", 1.0), "mode='elem' with cutmix_alpha=1.0"),
    ],
)
def test_a_bad_command_line_is_one_line(train, capsys, bad, message):
    with pytest.raises(SystemExit) as stopped:
        train(*PUZZLE, *bad)
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("dataopt train: error: ")
    assert re.search(message, error[0])


def test_unknown_config_keys_are_named(train, capsys, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("mixup: puzzle\nnaflex_loader: true\n")
    with pytest.raises(SystemExit):
        train("-c", config)
    assert "sets naflex_loader, which this loop does not know" in capsys.readouterr().err


def test_a_folder_with_a_run_in_it_is_not_written_over(train, capsys):
    folder = train(*PUZZLE)
    before = (folder / "summary.csv").read_text()
    with pytest.raises(SystemExit):
        train(*PUZZLE)
    assert "is not empty; give another --experiment, or --resume" in capsys.readouterr().err
    other = train(*PUZZLE, experiment="other")
    with pytest.raises(SystemExit):
        train(*PUZZLE, "--epochs", 2, "--resume", other / "last.pth.tar")
    assert "is not empty; give another --experiment, or --resume" in capsys.readouterr().err
    assert (folder / "summary.csv").read_text() == before


def test_labels_beyond_num_classes_are_named(train):
    with pytest.raises(ValueError, match="num_classes=2 allows 0 to 1"):
        train(*PUZZLE, "--num-classes", 2)


def test_help_names_our_options_and_the_script(train, capsys):
    with pytest.raises(SystemExit) as stopped:
        train("--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "--puzzle-beta" in text and "--train-script" in text


def test_two_processes_agree_on_parameters_and_not_on_masks(base_flags, tmp_path, monkeypatch):
    monkeypatch.delenv("TIMM_TRAIN_SCRIPT", raising=False)
    plan = [*base_flags, "--batch-size", "4", "--grad-accum-steps", "2", "--experiment"]
    runs = [[*plan, m, "--mixup", m, f"--{m}-clean-weight", "0.5"] for m in ("puzzle", "comixup")]
    for one, two in two_processes(tmp_path, *runs):
        assert len(one["masks"]) == len(two["masks"]) == 2
        assert not alike(one["masks"], two["masks"]) and not alike(one["partners"], two["partners"])
        assert same(one["parameters"], two["parameters"])


def test_the_task_is_ours(train, steps):
    train(*PUZZLE)
    assert type(steps[0]["task"]) is PuzzleMixTask
