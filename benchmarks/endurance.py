"""Whether long commands survive kills, and whether memory stays flat over long loops.

Every command that runs for long is killed with SIGKILL at random moments and gone on with as its page says, until
enough kills have landed while it ran; each run that comes to its end is compared with one that was left alone. Half of
the kills come at a random time, half just before a random one of the operations by which the command writes into its
folder. Memory is the resident set of a process of its own after a garbage collection, at several counts of a loop.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import common
import endurance_commands as of
import synthetic
import torch
import torch.nn.functional as F
from endurance_kills import OUT, Command, kills, straight, wait
from endurance_review import review
from torch import nn

KILLS = 20
FLAT = 4.0  # MiB of growth that count as none: pages come and go
REVIEW = "dataopt review"
Step = Callable[[int], object]


# Memory


def mixing(name: str, folder: Path) -> Step:
    """A step of training a small network on mixed batches of 16 pictures of 32 x 32."""
    from dataopt.core.mixup import CoMixup, PuzzleMix, input_gradient, saliency

    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    mix = PuzzleMix(10) if name == "Puzzle Mix" else CoMixup(10)

    def step(i: int) -> None:
        x, y = synthetic.images(16, generator, 32), torch.randint(10, (16,), generator=generator)
        mixed = mix(x, y, saliency(input_gradient(net, x, y)), generator=generator)
        loss = F.cross_entropy(net(mixed.inputs), mixed.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def generating(name: str, folder: Path) -> Step:
    """A question, eight tokens of an answer; the CCM memory also takes a turn in each time."""
    from dataopt.integrations.hf import CCMCache, CCMConfig, CCMModel, KVzipCache

    model, tokenizer = of.language_model(), of.byte_tokenizer()
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 257}
    if name == "KVzipCache":
        text = (folder / "inputs" / "note.txt").read_text()
        cache = KVzipCache(model, tokenizer, text, ratio=0.3)

        def step(i: int) -> None:
            model.generate(**cache.inputs(f"Where is key {i}?"), past_key_values=cache, **options)

        return step
    wrapped = CCMModel(model, CCMConfig(mode="merge")).eval()
    memory = CCMCache(wrapped, tokenizer)

    def step_with_memory(i: int) -> None:
        memory.append(f"I have {i} bees. ")
        wrapped.generate(**memory.inputs("How many?"), past_key_values=memory, **options)

    return step_with_memory


def condensing(name: str, folder: Path) -> Step:
    """The condenser goes on from its checkpoint for one step more."""
    from dataopt.core.condense import Condenser, ConvNet

    generator = torch.Generator().manual_seed(0)
    x, y = synthetic.images(60, generator, 16), torch.arange(60) % 3

    def step(i: int) -> None:
        condenser = Condenser(lambda: ConvNet(3, 3, (16, 16), 2, 8), 1, 2, init="centres", steps=i + 1)
        condenser.fit(x, y, resume=folder / "condense", progress=False)

    return step


def relating(name: str, folder: Path) -> Step:
    """The sums of a relation graph of 2,000 rows: found whole, or with half of the lanes gone."""
    from dataopt.core.relation import RelationGraph

    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2000, 32, generator=generator)
    probs = torch.randn(2000, 5, generator=generator).softmax(1)
    labels = torch.randint(5, (2000,), generator=generator)

    def step(i: int) -> None:
        RelationGraph(features, probs, labels, resume=folder / "sums", progress=False).label_noise(max_iter=0)
        for path in sorted((folder / "sums").glob("lane-*"))[i % 2 :: 2]:
            path.unlink()

    return step


# loop: (what makes a step, counts at which memory is read)
LOOPS: dict[str, tuple[Callable[[str, Path], Step], tuple[int, ...]]] = {
    "Puzzle Mix": (mixing, (100, 400, 700, 1000)),
    "Co-Mixup": (mixing, (100, 400, 700, 1000)),
    "KVzipCache": (generating, (50, 200, 350, 500)),
    "CCMCache": (generating, (50, 200, 350, 500)),
    "condenser resumes": (condensing, (5, 20, 35, 50)),
    "relation resumes": (relating, (5, 20, 35, 50)),
}


def resident() -> float:
    """MiB of this process, after what is free was given back."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc keeps freed pages; they are no growth
    if trim is not None:
        trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def memory(name: str, folder: Path, divide: int) -> common.Cell:
    """MiB at each count, measured in a child."""
    make, counts = LOOPS[name]
    counts = tuple(max(1, c // divide) for c in counts)
    result = folder / "memory.json"
    result.unlink(missing_ok=True)
    pid = os.fork()
    if not pid:
        try:
            sys.stdout.flush()
            step, read = make(name, folder), {}
            for i in range(counts[-1]):
                step(i)
                if i + 1 in counts:
                    read[i + 1] = round(resident(), 2)
            result.write_text(json.dumps(read))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0 if result.exists() else 1)
    if wait(pid):
        raise RuntimeError(f"the loop of {name} failed")
    read = json.loads(result.read_text())
    first, last = read[str(counts[0])], read[str(counts[-1])]
    return {"mib": read, "growth": round(last - first, 2)}


# Kills


def killed(name: str, folder: Path, times: int, quick: bool) -> common.Cell:
    """A straight run, and the kills of both kinds."""
    command = of.commands(quick)[name]
    place = folder / name.replace(" ", "-")
    place.mkdir(parents=True, exist_ok=True)
    expected = straight(command, folder / "inputs", place)
    found = {
        kind: kills(command, folder / "inputs", place, count, kind, expected).cell()
        for kind, count in (("time", times - times // 2), ("file", times // 2))
    }
    shutil.rmtree(place / OUT, ignore_errors=True)
    return {"seconds": round(expected.seconds, 1), "operations": expected.operations, "values": len(expected.result),
            **found}  # fmt: skip


def reviewed(folder: Path, times: int, quick: bool) -> common.Cell:
    command = of.commands(quick)["dataopt clean"]
    place = folder / "review"
    place.mkdir(parents=True, exist_ok=True)
    straight(command, folder / "inputs", place)
    return review(place / OUT, place, times)


def rows_of_kills(run: common.Run, commands: dict[str, Command]) -> list[list[object]]:
    rows: list[list[object]] = []
    for name, command in commands.items():
        cell = run.cells.get(f"kill {name}")
        if cell is None:
            continue
        halves = cell["time"], cell["file"]
        landed, finished, leftovers = (sum(half[key] for half in halves) for key in ("landed", "finished", "leftovers"))
        bad = {key: sum(len(half[key]) for half in halves) for key in ("unequal", "refused", "torn")}
        equal = "yes" if finished and not any(bad.values()) else ", ".join(f"{v} {k}" for k, v in bad.items() if v)
        most = max(half["worst"] for half in halves)
        rows.append(
            [name, command.promise, landed, most, finished, cell["values"], equal or "none finished", leftovers]
        )
    return rows


def main() -> None:
    args = common.parser(__doc__).parse_args()
    times, divide = (2, 20) if args.quick else (KILLS, 1)
    settings = {"kills": times, "divide": divide, "flat": FLAT, "loops": {k: v[1] for k, v in LOOPS.items()}}
    run = common.start("endurance", "Survival of kills, and memory over long loops", args, 1, settings,
                       packages=(*common.PACKAGES, "transformers", "datasets"))  # fmt: skip
    commands = of.commands(args.quick)
    plan = [*(f"memory {name}" for name in LOOPS), *(f"kill {name}" for name in commands), f"kill {REVIEW}"]
    if run.missing(plan):
        of.import_all()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if run.missing(plan):
            of.make_inputs(folder / "inputs")
        for name in commands:
            run.cell(f"kill {name}", partial(killed, name, folder, times, args.quick))
        reviews = run.cell(f"kill {REVIEW}", partial(reviewed, folder, times, args.quick))
        for name in LOOPS:
            run.cell(f"memory {name}", partial(memory, name, folder, divide))
    head = [
        "command",
        "its page says",
        "kills",
        "most in a run",
        "runs ended",
        "values",
        "all equal",
        "temporary files",
    ]
    rows = rows_of_kills(run, commands)
    lost = "yes" if not reviews["lost"] + reviews["unasked"] and reviews["equal"] else "NO"
    loops = []
    for name, (_, counts) in LOOPS.items():
        cell = run.cells[f"memory {name}"]
        first, *_, last = cell["mib"].values()
        span = " to ".join(str(max(1, c // divide)) for c in (counts[0], counts[-1]))
        slope = 1024 * cell["growth"] / max(1, (counts[-1] - counts[0]) // divide)
        loops.append([name, span, f"{first:.1f}", f"{last:.1f}", f"{cell['growth']:+.2f}", f"{slope:.2f}",
                      "yes" if cell["growth"] < FLAT else "NO"])  # fmt: skip
    run.report(
        run.ran(plan),
        f"{times} kills that landed while the command ran, half at a random time, half before a random file operation; "
        "after each it was started again as its page says. A run that came to its end was compared with one that was "
        "left alone, value by value (tensors, tables, pictures, losses) and bit for bit. Temporary files are those "
        "that lay hidden in finished folders; the next write of the same file a day later removes them.",
        common.table(head, rows),
        f"{REVIEW}: {reviews['landed']} kills under {reviews['decided']:,} decisions that the server had confirmed; "
        f"{reviews['lost']} of them lost, {reviews['unasked']} stored that nobody made; the data set that is written "
        f"afterwards is that of a review without kills: {lost}.",
        f"Resident set in MiB, each loop in a process of its own, after a garbage collection and malloc_trim; flat is "
        f"a growth below {FLAT:g} MiB:",
        common.table(["loop", "counts", "MiB at first", "MiB at last", "growth", "KiB a pass", "flat"], loops),
        "What a resume of the condenser leaves is safetensors' own: each tensor read or written keeps some 32 bytes "
        "(0.8.0).",
    )


if __name__ == "__main__":
    main()
