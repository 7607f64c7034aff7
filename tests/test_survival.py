"""Full disks, folders that cannot be written to, several writers at once, and commands that are killed.

What is killed runs as in ``benchmarks/endurance.py``, which does the same at length: in a forked child, by SIGKILL.
"""

import importlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from dataopt.core.artifacts import alone_in, hold, whole_file, write_whole
from dataopt.core.condense import files
from dataopt.core.tensor_file import load_tensors, save_tensors
from dataopt.out_folder import claim
from typer.testing import CliRunner

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
FRESH = multiprocessing.get_context("forkserver")
LIMIT = 4096


# ---- full disks


def table(path: Path, size: int) -> None:
    with whole_file(path) as temporary:
        pd.DataFrame({"a": torch.rand(size, generator=torch.Generator().manual_seed(0)).numpy()}).to_parquet(temporary)


def tensors(path: Path, size: int) -> None:
    save_tensors(path, {"a": torch.zeros(size)}, {})


def text(path: Path, size: int) -> None:
    write_whole(path, "x" * size)


WRITERS = {"text": text, "tensors": tensors, "table": table}


def _on_a_full_disk(folder: Path) -> None:
    """No file may grow beyond LIMIT: what a full disk does, for one process alone."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
    for kind, write in WRITERS.items():
        try:
            write(folder / kind, 10 * LIMIT)
        except OSError as e:
            (folder / f"{kind} error").write_text(json.dumps([e.errno, str(e)]))


def test_a_full_disk_leaves_the_old_file_and_names_the_path(tmp_path):
    before = {}
    for kind, write in WRITERS.items():
        write(tmp_path / kind, 10)
        before[kind] = (tmp_path / kind).read_bytes()
    child = FRESH.Process(target=_on_a_full_disk, args=(tmp_path,))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    for kind in WRITERS:
        number, said = json.loads((tmp_path / f"{kind} error").read_text())
        assert os.strerror(number) == "File too large"
        assert said == f"[Errno {number}] File too large: {str(tmp_path / kind)!r}"
        assert (tmp_path / kind).read_bytes() == before[kind]
    assert len(os.listdir(tmp_path)) == 2 * len(WRITERS)  # and nothing half-written


def test_no_room_for_one_byte_more(tmp_path, monkeypatch):
    """ENOSPC where it often shows first: when what was written is flushed to the disk."""
    path = tmp_path / "artifact"
    write_whole(path, "old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device: '.*artifact'$"):
        write_whole(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["artifact"]


def test_an_error_about_another_file_keeps_its_name(tmp_path):
    missing = tmp_path / "missing"
    with pytest.raises(FileNotFoundError, match="missing"), whole_file(tmp_path / "artifact"):
        missing.read_text()
    assert not os.listdir(tmp_path)


# ---- folders that cannot be written to


def test_a_path_below_a_file_is_named(tmp_path):
    """chmod does not bind root; a file in the place of the folder binds everybody."""
    (tmp_path / "file").write_text("kept")
    for below in ("a", "b/a"):
        with pytest.raises(NotADirectoryError) as error:
            write_whole(tmp_path / "file" / below, "new")
        assert error.value.filename == str(tmp_path / "file" / below)
    assert (tmp_path / "file").read_text() == "kept" and os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere; the test above takes its place")
def test_a_folder_for_reading_only_is_named(tmp_path):
    path = tmp_path / "folder" / "artifact"
    write_whole(path, "old")
    path.parent.chmod(0o555)
    try:
        with pytest.raises(PermissionError) as error:
            write_whole(path, "new")
    finally:
        path.parent.chmod(0o755)
    assert error.value.filename == str(path) and path.read_text() == "old"
    assert os.listdir(path.parent) == ["artifact"]


def test_a_command_says_it_in_one_line(tmp_path):
    from dataopt.cli import app

    (tmp_path / "file").write_text("")
    (tmp_path / "data.csv").write_text("text,label\n" + "good,1\nbad,0\n" * 10)
    out = tmp_path / "file" / "out"
    made = ["clean", str(tmp_path / "data.csv"), "--model", "none", "--out", str(out)]
    result = CliRunner(env={"COLUMNS": "300", "TERM": "dumb"}).invoke(app, made)
    assert result.exit_code == 1 and len(result.output.strip().splitlines()) == 1
    assert "Not a directory" in result.output and str(out) in result.output


# ---- what killed processes leave


def test_old_temporary_files_go_and_young_ones_stay(tmp_path):
    old, young, other = (tmp_path / name for name in (".a.abcdefgh", ".a.bcdefghi", ".b.abcdefgh"))
    for path in (old, young, other):
        path.write_text("half")
    for path in (old, other):
        os.utime(path, (time.time() - 100_000,) * 2)
    write_whole(tmp_path / "a", "whole")
    assert sorted(os.listdir(tmp_path)) == [young.name, other.name, "a"]


def test_a_folder_whose_first_file_was_not_finished_is_empty(tmp_path):
    """Killed while it noted its arguments, a command could neither begin nor go on."""
    out = tmp_path / "out"
    (out / "work").mkdir(parents=True)
    (out / "work" / ".arguments.json.abcdefgh").write_text("{")
    claim(out, {"a": 1}, True, "dataopt clean")
    assert [p.name for p in (out / "work").iterdir()] == ["arguments.json"]
    (out / ".scores.parquet.abcdefgh").write_text("half")
    claim(out, {"a": 1}, True, "dataopt clean")
    assert [p.name for p in out.iterdir()] == ["work"]


# ---- several processes


def _write_often(folder: Path, value: int, started, go) -> None:
    torch.set_num_threads(1)
    started.release()
    go.wait(60)
    until = time.monotonic() + 2
    while time.monotonic() < until:
        filled = {"a": torch.full((10_000,), float(value))}
        write_whole(folder / "text", str(value) * 200_000)
        files.write(folder, "data", filled, {"value": value})
        save_tensors(folder / "tensors", filled, {"value": str(value)})


def test_two_writers_never_make_a_torn_file(tmp_path):
    started, go = FRESH.Semaphore(0), FRESH.Event()
    children = [FRESH.Process(target=_write_often, args=(tmp_path, value, started, go)) for value in (1, 2)]
    for child in children:
        child.start()
    assert all(started.acquire(timeout=60) for _ in children)
    go.set()
    seen: set[str] = set()
    while any(child.is_alive() for child in children):
        if not (tmp_path / "tensors").exists():
            continue
        content = (tmp_path / "text").read_text()
        assert content in ("1" * 200_000, "2" * 200_000)
        seen.add(content[0])
        found, about = load_tensors(tmp_path / "tensors")
        assert (found["a"] == float(about["value"])).all()
        with alone_in(tmp_path):  # two files are a pair for whom waits
            found, record = files.read(tmp_path, "data")
        assert (found["a"] == record["value"]).all()
    assert [child.exitcode for child in children] == [0, 0] and seen == {"1", "2"}
    assert len(list(tmp_path.glob("data-*"))) == 1 and not list(tmp_path.rglob(".*"))


def _claim_and_wait(out: Path, ready, go) -> None:
    claim(out, {"a": 1}, True, "dataopt clean")
    ready.set()
    go.wait(60)


def test_a_folder_in_use_is_refused_until_its_process_dies(tmp_path):
    out, ready, go = tmp_path / "out", FRESH.Event(), FRESH.Event()
    child = FRESH.Process(target=_claim_and_wait, args=(out, ready, go))
    child.start()
    assert ready.wait(60)
    with pytest.raises(ValueError, match="is not empty; give another folder, or --resume"):
        claim(out, {"a": 1}, False, "dataopt clean")
    with pytest.raises(ValueError, match="in use by another dataopt clean; wait for its end, or give another folder"):
        claim(out, {"a": 1}, True, "dataopt clean")
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    claim(out, {"a": 1}, True, "dataopt clean")
    claim(out, {"a": 1}, True, "dataopt clean")  # it is ours already
    assert hold(out / "work" / "arguments.json")


def _begin_to_train(folders: list[Path], barrier, begun) -> None:
    from dataopt.integrations.timm.saver import make_saver

    args = SimpleNamespace(resume="", val_split="validation", checkpoint_hist=1)
    for folder in folders:
        task = SimpleNamespace(trainable_module=torch.nn.Linear(1, 1))
        barrier.wait(60)
        with suppress(SystemExit):
            make_saver(args, str(folder), SimpleNamespace(seed=0), task, None, SimpleNamespace(scaler=None))
            begun.put(folder.name)
    barrier.wait(60)  # what a process holds goes with it


def test_one_of_two_trainings_that_begin_at_once_gets_the_folder(tmp_path):
    folders = [tmp_path / str(i) for i in range(20)]
    barrier, begun = FRESH.Barrier(2), FRESH.Queue()
    children = [FRESH.Process(target=_begin_to_train, args=(folders, barrier, begun)) for _ in range(2)]
    for child in children:
        child.start()
    names = [begun.get(timeout=60) for _ in folders]
    for child in children:
        child.join()
    assert sorted(names) == sorted(f.name for f in folders) and begun.empty()


# ---- commands that are killed

# Shares of their file operations: ccm train in its first checkpoint, train between its first checkpoint and the copies.
MOMENTS = {
    "dataopt train": 0.45,
    "dataopt clean": 0.6,
    "dataopt condense": 0.5,
    "dataopt ccm train": 0.17,
    "dataopt kvzip compress": 0.8,
}


def _kill_all(folder: Path) -> None:
    """In a process of its own, since children are forked from it: without threads, and with everything imported."""
    torch.set_num_threads(1)
    sys.path.insert(0, str(BENCHMARKS))
    of, on = (importlib.import_module(f"endurance_{name}") for name in ("commands", "kills"))
    of.import_all()
    of.make_inputs(folder / "inputs", sentences=500)
    for name, command in of.commands(quick=True).items():
        place = folder / name.replace(" ", "-")
        place.mkdir()
        out, log = place / on.OUT, place / "log"
        expected = on.straight(command, folder / "inputs", place)
        shutil.rmtree(out)
        arguments = command.arguments(folder / "inputs", out)
        at = round(MOMENTS[name] * expected.operations)
        codes = [on.wait(on.begin(arguments, out, log, die_at=at))]
        with on.noted(problems := []):
            command.whole(out)
        codes.append(on.wait(on.begin([*arguments, *command.again(out)], out, log)))
        if name == "dataopt ccm train":  # all trained, nothing saved: the Trainer would take one step more
            (out / "adapter_model.safetensors").unlink()
            codes[1] += on.wait(on.begin([*arguments, *command.again(out)], out, log))
        with on.noted(problems):
            problems += on.unequal(expected.result, command.result(out))
        found = {"codes": codes, "problems": problems, "log": log.read_text()[-2000:]}
        (folder / f"{name}.json").write_text(json.dumps(found))


def test_a_checkpoint_that_is_not_whole_is_passed_over(tmp_path):
    """Resuming from what a kill left of a checkpoint failed for the lack of its last files."""
    from dataopt.ccm_commands import _checkpoint

    assert _checkpoint(tmp_path / "missing") is None
    for number, state in ((4, '{"global_step": 4}'), (5, '{"global'), (12, None)):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_text("weights")
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert _checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert os.listdir(tmp_path) == ["checkpoint-4"]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    child = FRESH.Process(target=_kill_all, args=(folder,))
    child.start()
    child.join(300)
    child.kill()
    return folder


@pytest.mark.parametrize("name", MOMENTS)
def test_a_killed_command_goes_on_to_the_same_result(killed, name):
    found = json.loads((killed / f"{name}.json").read_text())
    assert found["codes"] == [-signal.SIGKILL, 0], found["log"]
    assert found["problems"] == []
