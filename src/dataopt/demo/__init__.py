"""``dataopt demo``: one walk through all methods on data that pip packages carry, and a page that shows it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from tqdm.auto import tqdm

from ..core.artifacts import write_whole
from . import ccm, condensing, kvzip, labels, mixing, report
from .digits import Digits, load
from .labels import Cleaning
from .step import Step

SEEDS = 3


class Walk:
    """The steps of one run, a method each; what several of them need is made once.

    Args:
        out: folder for pictures and files.
        quick: one seed, half the epochs, and fewer sizes of the text's cache.
        epochs: of the trainings on images; None is 20, or 10.
        ccm_steps: of the conversation's two trainings.
    """

    def __init__(
        self, out: Path, quick: bool = False, epochs: int | None = None, ccm_steps: dict[str, int] = ccm.STEPS
    ) -> None:
        self.out, self.quick, self.ccm_steps = out, quick, ccm_steps
        self.epochs = epochs or mixing.EPOCHS // (2 if quick else 1)
        self.seeds = range(1 if quick else SEEDS)

    @cached_property
    def digits(self) -> Digits:
        return load()

    @cached_property
    def cleanings(self) -> list[Cleaning]:
        with progress(len(self.seeds), "seed") as say:
            out = []
            for seed in self.seeds:
                done = say("rounds of cleaning")
                out.append(labels.clean(self.digits, seed))
                done()
            return out

    def clean(self) -> Step:
        return labels.find(self.digits, self.cleanings, self.out)

    def rounds(self) -> Step:
        return labels.again(self.cleanings)

    def mix(self) -> Step:
        with progress(len(self.seeds) * len(mixing.METHODS) * self.epochs, "epoch") as say:
            return mixing.mix(self.digits, self.cleanings, self.epochs, say)

    def condense(self) -> Step:
        return condensing.condense(self.digits, self.cleanings[0], self.seeds, self.out)

    def kvzip(self) -> Step:
        return kvzip.ask(kvzip.QUICK if self.quick else kvzip.RATIOS)

    def ccm(self) -> Step:
        with progress(sum(self.ccm_steps.values()), "step") as say:
            return ccm.converse(self.ccm_steps, say)


@contextmanager
def progress(total: int, unit: str) -> Iterator[Callable[[str], Callable[[], object]]]:
    """A bar: call what it gives with what runs now, and what that returns after each unit."""
    with tqdm(total=total, unit=unit, disable=None, leave=False) as bar:

        def say(what: str) -> Callable[[], object]:
            bar.set_description(what)
            return bar.update

        yield say


def main(walk: Walk, parts: Sequence[str]) -> None:
    """Take the steps in turn, print what came out, and write pictures, ``report.json`` and ``report.html``.

    Args:
        parts: names of :class:`Walk`'s steps.

    Raises:
        ValueError: ``walk.out`` is a file.
    """
    out = walk.out
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out} is a file; give a folder")
    taken: dict[str, tuple[Step, float]] = {}
    for part in parts:
        start = time.perf_counter()
        step: Step = getattr(walk, part)()
        taken[part] = (step, time.perf_counter() - start)
        print(f"\n{step.text()}\n", flush=True)
        for name, (_, png) in step.pictures.items():
            write_whole(out / name, png)
    run = report.about(len(walk.seeds))
    figures = {part: step.figures | {"seconds_in_all": seconds} for part, (step, seconds) in taken.items()}
    write_whole(out / "report.json", json.dumps(run | {"steps": figures}, indent=1) + "\n")
    write_whole(out / "report.html", report.render(run, taken))
    minutes = sum(seconds for _, seconds in taken.values()) / 60
    print(f"{minutes:.1f} minutes in all. {out / 'report.html'} shows every step with its pictures.")
