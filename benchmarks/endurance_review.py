"""Kills of the server of ``dataopt review`` while decisions come in."""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import shutil
import signal
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

from endurance_commands import short_hash
from endurance_kills import begin, wait


def review(folder: Path, work: Path, times: int, seed: int = 0) -> dict[str, Any]:
    """Decide over HTTP while the server is killed at a random moment, and start it again, so many times.

    Args:
        folder: of ``dataopt clean``.

    Returns:
        ``landed`` kills, ``decided`` answers that had come, ``lost`` ones among them that the file lacked, ``unasked``
        ones that it holds and nobody made, and whether the data set that is written at the end is the one of a review
        without kills.
    """
    from dataopt.review.decisions import Decisions, open_decisions
    from dataopt.review.folder import read_folder

    draw, out = random.Random(seed), work / "killed"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(folder, out)
    read = read_folder(out)
    rows, given = read.suspects.tolist(), read.scores["given_label"].to_dict()
    acked: dict[int, tuple[str, int | None]] = {}
    found = {"landed": 0, "decided": 0, "lost": 0, "unasked": 0, "suspects": len(rows)}
    while found["landed"] < times:
        log = work / "review.log"
        log.unlink(missing_ok=True)
        pid = begin(["review", str(out)], out, log)
        sent, stop = dict(acked), threading.Event()
        caller = threading.Thread(target=_decide, args=(log, rows, given, sent, acked, stop, draw.random(), found))
        caller.start()
        while not stop.is_set() and not os.waitpid(pid, os.WNOHANG)[0]:
            if log.exists() and "Ctrl+C" in log.read_text():
                break
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.4))
        os.kill(pid, signal.SIGKILL)
        wait(pid)
        stop.set()
        caller.join()
        found["landed"] += 1
        store = open_decisions(out, given)
        held = {row: (d.action, d.label) for row, d in store.all().items()}
        store.close()
        found["lost"] += sum(held.get(row) not in (value, sent[row]) for row, value in acked.items())
        found["unasked"] += sum(sent.get(row) != value and acked.get(row) != value for row, value in held.items())
        acked = held  # a decision in flight may or may not have been written
    plain = work / "plain"
    shutil.rmtree(plain, ignore_errors=True)
    shutil.copytree(folder, plain)
    store = Decisions(plain / "decisions.sqlite")
    for row, (action, label) in acked.items():
        store.decide(row, given[row], action, label)
    store.close()
    written = []
    for one in (out, plain):
        code = wait(begin(["review", str(one), "--export", str(one / "new")], one, work / "export.log"))
        written.append((code, short_hash((one / "new" / "train.parquet").read_bytes()) if not code else ""))
    return found | {"equal": written[0] == written[1] and written[0][0] == 0, "rows_decided": len(acked)}


def _decide(
    log: Path, rows: list[int], given: dict[int, int], sent: dict[int, Any], acked: dict[int, Any],
    stop: threading.Event, seed: float, found: dict[str, Any],
) -> None:  # fmt: skip
    """Decide as fast as the server answers."""
    draw = random.Random(seed)
    while not (log.exists() and (at := re.search(r"http://\S+?/\?token=\S+", log.read_text()))):
        if stop.wait(0.005):
            return
    host = at[0].partition("/?")[0]
    with suppress(OSError, http.client.HTTPException):
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        opener.open(at[0], timeout=5).read()
        while not stop.is_set():
            row = draw.choice(rows)
            action = draw.choice(("keep", "drop", "relabel"))
            label = 1 - given[row] if action == "relabel" else None
            sent[row] = (action, label)
            body = json.dumps({"row": row, "action": action, "label": label}).encode()
            asked = urllib.request.Request(f"{host}/decide", body, {"Origin": host, "Content-Type": "application/json"})
            opener.open(asked, timeout=5).read()
            acked[row] = sent[row]
            found["decided"] += 1
