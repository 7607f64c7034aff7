"""Checkpoints of a condensation run."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from . import files
from .rounds import Run


class Checkpoints:
    """Checkpoints of one process in a folder; with several processes the last two, as one may be killed first."""

    def __init__(self, folder: Path, fingerprint: dict[str, Any], rank: int, world: int):
        self.folder, self.fingerprint, self.world = folder, fingerprint, world
        self.names = [f"checkpoint-{rank}of{world}{slot}" for slot in (("",) if world == 1 else ("-a", "-b"))]
        self.count = 0
        self.step: int | None = None  # of the newest whole checkpoint

    def newest(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest checkpoint that every process has; None where there is none.

        Raises:
            ValueError: of other settings or data, or damaged.
        """
        there = (re.fullmatch(r"checkpoint-\d+of(\d+)(-[ab])?\.json", p.name) for p in self.folder.glob("checkpoint-*"))
        others = sorted(m[0] for m in there if m and int(m[1]) != self.world)
        if others:
            raise ValueError(
                f"resume={str(self.folder)!r} holds {others[0]}, of another number of processes; start as many as "
                "then, or give another folder"
            )
        found = {}
        for name in self.names:
            with suppress(FileNotFoundError):
                tensors, record = files.read(self.folder, name)
                self._compare(record.get("fingerprint", {}))
                found[int(record["steps"])] = (tensors, record, name)
        common = set(found)
        if self.world > 1:
            everyone: list[Any] = [None] * self.world
            dist.all_gather_object(everyone, sorted(found))
            common = set.intersection(*map(set, everyone))
        if not common:
            return None
        self.step = max(common)
        tensors, record, name = found[self.step]
        self.count = self.names.index(name) + 1
        return tensors, record

    def save(self, run: Run) -> None:
        if self.world > 1:
            dist.barrier()  # so that no process is two checkpoints ahead
        tensors, record = run.state()
        record |= {"fingerprint": self.fingerprint, "factor": run.settings.factor}
        try:
            files.write(self.folder, self.names[self.count % len(self.names)], tensors, record)
        except OSError as e:
            whole = "none was written before" if self.step is None else f"the one of step {self.step} is whole"
            raise OSError(
                e.errno, f"the checkpoint of step {run.steps} could not be written ({e.strerror or e}); {whole}: make "
                "room and run again with the same resume", str(self.folder),
            ) from e  # fmt: skip
        self.count, self.step = self.count + 1, run.steps

    def _compare(self, then: dict[str, Any]) -> None:
        now = self.fingerprint
        for key in sorted(now.keys() | then.keys()):
            if now.get(key) != then.get(key):
                raise ValueError(
                    f"resume={str(self.folder)!r} was saved with {key}={then.get(key)!r:.80}, now it is "
                    f"{now.get(key)!r:.80}; give the same settings and data, or another folder"
                )
