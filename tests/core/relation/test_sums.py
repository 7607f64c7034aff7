"""The long pass: exact, whatever the tiles, threads, processes and interruptions."""

import json
import os
import signal
import sys
import threading
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from dataopt.core.relation import RelationGraph, find_issues, sums
from safetensors import safe_open
from safetensors.torch import save_file

from .reference import kernel_matrix, problem

FRESH = get_context("forkserver")  # a process without threads, whose children need no import of their own
FRESH.set_forkserver_preload([__name__])


def in_order(graph: RelationGraph) -> tuple[torch.Tensor, torch.Tensor]:
    place = graph.pairs.place.cpu()
    return graph.sums.all[place], graph.sums.same[place]


def check(graph, k, labels, atol):
    k = k.clone().fill_diagonal_(0)
    every, same = in_order(graph)
    torch.testing.assert_close(every, k.sum(1), rtol=0, atol=atol)
    torch.testing.assert_close(same, torch.where(labels[:, None] == labels, k, 0.0).sum(1), rtol=0, atol=atol)


@pytest.mark.parametrize("t", [1, 2, 4, 6, 8, 2.5, 1e30])
def test_sums_are_those_of_the_whole_matrix(t):
    f, p, y = problem()
    k = kernel_matrix(f, p, t=t, cut=0)
    for block in (7, 64, 400, None):
        check(RelationGraph(f, p, y, temperature=t, edge_cut=0, block=block, dtype=torch.float64), k, y, 1e-10)
    most = float(k.clone().fill_diagonal_(0).sum(1).max())
    check(RelationGraph(f, p, y, temperature=t, edge_cut=0), k, y, 1e-6 * most)


def test_tiles_of_one_pair():
    f, p, y = (x[:90] for x in problem())
    check(RelationGraph(f, p, y, block=1, dtype=torch.float64), kernel_matrix(f, p), y, 1e-10)


@pytest.mark.parametrize("kernel", ["cosine", "rbf"])
@pytest.mark.parametrize("compatible", [True, False])
@pytest.mark.parametrize("cut", [0, 0.03])
def test_every_kernel(kernel, compatible, cut):
    f, p, y = problem(seed=1)
    k = kernel_matrix(f, p, kernel, compatible, cut=cut)
    settings = {"kernel": kernel, "compatibility": compatible, "edge_cut": cut}
    for block in (64, 400):
        check(RelationGraph(f, p, y, **settings, block=block, dtype=torch.float64), k, y, 1e-10)
    check(RelationGraph(f, p, y, **settings), k, y, 1e-6 * float(k.sum(1).max()))


def test_tiles_with_more_rows_than_columns_and_the_other_way_round():
    f, p, y = problem(seed=2)
    graph = RelationGraph(f, p, y, dtype=torch.float64)
    for block in ((64, 16), (16, 64), (300, 7)):
        other = sums.pair_sums(graph.pairs, graph._labels, graph.kernel, block=block)
        torch.testing.assert_close(other.all, graph.sums.all, rtol=0, atol=1e-11)
        torch.testing.assert_close(other.same, graph.sums.same, rtol=0, atol=1e-11)


def test_skipped_pairs_are_those_without_an_edge():
    f, p, y = problem(n=1000, classes=10, sharp=30.0)
    graph = RelationGraph(f, p, y, block=32, dtype=torch.float64)
    check(graph, kernel_matrix(f, p), y, 1e-10)
    assert 0.05 < graph.sums.computed < 0.1  # of ten classes, each against itself, one triangle
    flat = RelationGraph(f, torch.full_like(p, 0.1), y, block=32, dtype=torch.float64)
    assert 0.5 <= flat.sums.computed < 0.53  # nothing to skip: one triangle of everything


def test_mixed_confidence_is_skipped_row_by_row():
    """Unsure rows reach several classes, so that a block's rows do not lie together."""
    f, p, y = problem(n=600, classes=6, sharp=12.0, seed=3)
    p[::9] = torch.tensor([0.49, 0, 0, 0.49, 0.01, 0.01])
    graph = RelationGraph(f, p, y, block=32, dtype=torch.float64)
    gaps = [graph.pairs.reachable(slice(a, a + 32), a, 600, graph.kernel) for a in range(0, 600, 32)]
    assert any(isinstance(rows, torch.Tensor) for rows in gaps)
    check(graph, kernel_matrix(f, p), y, 1e-10)
    assert graph.sums.computed < 0.3


@pytest.mark.parametrize(
    "settings", [{}, {"kernel": "rbf", "edge_cut": 0}, {"compatibility": False}, {"partitions": 3}]
)
def test_tensor_operations_and_compiled_code_agree(settings):
    f, p, y = problem(sharp=8.0, seed=4)
    graph = RelationGraph(f, p, y, **settings, dtype=torch.float64)
    n = len(f)
    found = []
    for make in (sums._tensor_worker, lambda *a: sums._compiled_worker(*a, 48)):
        work = make(graph.pairs, graph._labels, graph.kernel, 64)
        lane = torch.zeros(2, n + 1, dtype=torch.float64)
        for start, stop in graph.pairs.bounds:
            for at in range(start, stop, 48):
                work(lane, at, min(at + 48, stop), stop)
        found.append(lane[:, :n])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-11)
    torch.testing.assert_close(found[0], torch.stack([graph.sums.all, graph.sums.same]), rtol=0, atol=1e-11)


def test_bfloat16_keeps_the_ranks():
    f, p, y = problem(n=1500, d=64, seed=5)
    exact, fast = (RelationGraph(f, p, y, dtype=dtype).label_noise(max_iter=0).noisiness
                   for dtype in (torch.float32, torch.bfloat16))  # fmt: skip
    ranks = torch.stack([exact.argsort().argsort(), fast.argsort().argsort()]).double()
    assert torch.corrcoef(ranks)[0, 1] >= 0.999
    assert not torch.equal(exact, fast)
    assert (exact - fast).abs().max() < 0.02 * exact.abs().max()


def test_two_threads_give_the_bits_of_one():
    f, p, y = problem(n=1500, seed=6)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(RelationGraph(f, p, y, block=64).sums)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0].all, results[1].all) and torch.equal(results[0].same, results[1].same)
    assert results[0].computed == results[1].computed


def test_an_error_in_a_thread_ends_the_pass_and_restores_the_threads():
    before, stopped = torch.get_num_threads(), threading.Event()
    done = []

    def work(lane):
        done.append(lane)
        if lane == 3:
            raise RuntimeError("lane 3")

    try:
        with pytest.raises(RuntimeError, match="lane 3"):
            torch.set_num_threads(2)
            sums._run(work, range(16), 2, stopped)
        assert torch.get_num_threads() == 2 and stopped.is_set() and 3 in done
    finally:
        torch.set_num_threads(before)


def _process(rank: int, world: int, store: Path, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    f, p, y = problem(n=700, seed=7)
    graph = RelationGraph(f, p, y, block=32, partitions=2, progress=False)
    found = graph.label_noise()
    save_file({"all": graph.sums.all, "same": graph.sums.same, "noisiness": found.noisiness,
               "noisy": found.noisy, "computed": torch.tensor(graph.sums.computed)}, out / f"{rank}")  # fmt: skip
    dist.destroy_process_group()


def test_two_processes_give_the_bits_of_one(tmp_path):
    children = [FRESH.Process(target=_process, args=(rank, 2, tmp_path / "store", tmp_path)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    f, p, y = problem(n=700, seed=7)
    graph = RelationGraph(f, p, y, block=32, partitions=2)
    found = graph.label_noise()
    for rank in range(2):
        with safe_open(tmp_path / f"{rank}", "pt") as file:
            assert torch.equal(file.get_tensor("all"), graph.sums.all)
            assert torch.equal(file.get_tensor("same"), graph.sums.same)
            assert torch.equal(file.get_tensor("noisiness"), found.noisiness)
            assert torch.equal(file.get_tensor("noisy"), found.noisy)
            assert float(file.get_tensor("computed")) == pytest.approx(graph.sums.computed)


# Killed and started again


def long_problem():
    return problem(n=3000, d=64, seed=8, sharp=1.0)


def _until_killed(folder: Path) -> None:
    torch.set_num_threads(1)
    sums._SAVE_EVERY = 0.0
    while True:  # until the signal comes, however fast the machine
        RelationGraph(*long_problem(), block=16, resume=folder, progress=False).label_noise(max_iter=0)
        for file in list(folder.iterdir())[8:]:
            file.unlink()


def saved_blocks(folder: Path) -> int:
    total = 0
    for path in folder.glob("lane-*.safetensors"):
        with safe_open(path, "pt") as file:
            total += int(file.metadata()["done"])
    return total


def test_killed_and_started_again_gives_the_same_bits(tmp_path, monkeypatch):
    expected = RelationGraph(*long_problem(), block=16).sums
    blocks = -(-3000 // 16)
    child = FRESH.Process(target=_until_killed, args=(tmp_path,))
    child.start()
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("lane-*.safetensors"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    before = saved_blocks(tmp_path)
    assert 0 < before < blocks  # in the middle

    counted = []
    make = sums._worker

    def counting(*args):
        work = make(*args)

        def counted_work(*block):
            counted.append(block[1])
            work(*block)

        return counted_work

    monkeypatch.setattr(sums, "_worker", counting)
    again = RelationGraph(*long_problem(), block=16, resume=tmp_path).sums
    assert len(counted) == blocks - before  # what was saved was not computed again
    assert torch.equal(again.all, expected.all) and torch.equal(again.same, expected.same)
    assert again.computed == expected.computed
    assert saved_blocks(tmp_path) == blocks

    counted.clear()
    finished = RelationGraph(*long_problem(), block=16, resume=tmp_path).sums
    assert not counted and torch.equal(finished.all, expected.all)


def test_saved_sums_of_other_data_or_settings_are_refused(tmp_path):
    f, p, y = problem(n=200)
    RelationGraph(f, p, y, resume=tmp_path).label_noise(max_iter=0)
    other_labels, other_features = y.clone(), f.clone()
    other_labels[7] = (y[7] + 1) % 5
    other_features[3, 2] += 0.1
    for data, settings in [
        ((f, p, other_labels), {}),
        ((other_features, p, y), {}),
        ((f, p, y), {"temperature": 2}),
        ((f, p, y), {"edge_cut": 0}),
        ((f, p, y), {"partitions": 2}),
        ((f, p, y), {"dtype": torch.float64}),
    ]:
        with pytest.raises(ValueError, match="belongs to other data or settings"):
            RelationGraph(*data, **settings, resume=tmp_path).label_noise(max_iter=0)
    RelationGraph(f, p, y, resume=tmp_path).label_noise(max_iter=0)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text", "folder", "foreign"])
def test_a_damaged_file_is_refused(tmp_path, damage):
    f, p, y = problem(n=200)
    RelationGraph(f, p, y, resume=tmp_path).label_noise(max_iter=0)
    path = tmp_path / "lane-00.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "folder":
        path.unlink()
        path.mkdir()
    elif damage == "foreign":
        save_file({"weights": torch.zeros(3)}, path)
    else:
        content[-9] ^= 1
        path.write_bytes({"cut": content[:-40], "flipped": content, "empty": b"", "text": b"not sums " * 9}[damage])
    with pytest.raises(ValueError, match=r"lane-00.safetensors is damaged .*delete it to begin anew"):
        RelationGraph(f, p, y, resume=tmp_path).label_noise(max_iter=0)


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    path = tmp_path / "sums"
    path.write_text("")
    with pytest.raises(ValueError, match="is a file; give a folder"):
        RelationGraph(*problem(n=50), resume=path)


def test_all_passes_of_the_cleaning_commands_are_saved(tmp_path, monkeypatch):
    f, p, y = problem(n=300)
    first = find_issues(f, p, y, resume=tmp_path)
    assert {path.parent.relative_to(tmp_path) for path in tmp_path.rglob("lane-*")} == {
        Path("whitened"), Path("raw"), Path("raw/outliers"),
    }  # fmt: skip

    def fail(*args):
        return lambda *block: pytest.fail("computed again")

    monkeypatch.setattr(sums, "_worker", fail)
    again = find_issues(f, p, y, resume=tmp_path)
    assert torch.equal(first.label_score, again.label_score) and torch.equal(first.outlier_score, again.outlier_score)


# Memory


def _peak() -> float:
    """MB that the process held at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def _measure(out: Path) -> None:
    torch.set_num_threads(1)
    for n in (2000, 20_000):  # the first loads and compiles everything
        y = torch.arange(n) % 10
        p = torch.full((n, 10), 1e-4)
        p[torch.arange(n), y] = 0.9991
        f = torch.empty(n, 384).normal_(generator=torch.Generator().manual_seed(0))
        y[::50] = (y[::50] + 1) % 10
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far: that of the compiler, for one
        before = _peak()
        graph = RelationGraph(f, p, y, progress=False)
        found = graph.label_noise(max_iter=1)
        extra = _peak() - before
    out.write_text(json.dumps([extra, graph.sums.computed, int(found.noisy.sum())]))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_peak_memory_is_one_copy_of_the_inputs(tmp_path):
    """At most 60 MB over what a process held when the inputs were there; 31 of them are the copy."""
    child = FRESH.Process(target=_measure, args=(tmp_path / "found",))
    child.start()
    child.join(120)
    assert child.exitcode == 0
    extra, computed, noisy = json.loads((tmp_path / "found").read_text())
    assert 29 < extra <= 60
    assert computed < 0.1 and noisy == 400
