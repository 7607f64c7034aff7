"""Two processes of the Trainer train the adapter that one trains."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

from .two_processes import train


def test_two_processes_are_as_one(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "tests.integrations.hf.ccm.two_processes", tmp_path, str(port)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=Path(__file__).parents[4], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as program:
        one = train(tmp_path / "one", 8)
        output = program.communicate(timeout=200)[0]
    assert program.returncode == 0, output[-5000:]
    ranks = [torch.load(tmp_path / f"weights-{rank}.pt") for rank in range(2)]
    for name, weight in one.items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        torch.testing.assert_close(ranks[0][name], weight, rtol=1e-3, atol=1e-5, msg=name)
