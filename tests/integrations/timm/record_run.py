"""Not a test: one rank of ``dataopt train``, which writes down its draws, its masks and its parameters.

Run by torchrun: record_run.py OUT ARGS... [++ PORT ARGS...]; each run is recorded in OUT.<run>.<rank>.
A second run in the same processes needs a rendezvous of its own, at PORT: the launcher's remembers the first.
"""

import itertools
import os
import sys
from typing import Any

import torch
from accelerate.state import AcceleratorState
from dataopt.core.mixup import CoMixed
from dataopt.integrations.timm.train import main

seen: list[tuple[Any, Any]] = []


def watch(module: torch.nn.Module, inputs: Any, result: Any) -> None:
    if isinstance(result, dict) and "mixed" in result:
        seen.append((module, result["mixed"]))


torch.nn.modules.module.register_module_forward_hook(watch)
out, *rest = sys.argv[1:]
runs = [list(args) for split, args in itertools.groupby(rest, lambda arg: arg == "++") if not split]
for i, argv in enumerate(runs):
    seen.clear()
    if i:
        os.environ.update(TORCHELASTIC_USE_AGENT_STORE="False", MASTER_PORT=argv.pop(0))
    main(argv)
    AcceleratorState._reset_state(reset_partial_state=True)
    parameters = {name: p.detach() for name, p in seen[-1][0].trainable_module.named_parameters()}
    plans: dict[str, list] = {"masks": [], "partners": []}
    for _, m in seen:
        plans["masks"].append(m.sources if isinstance(m, CoMixed) else m.mask)
        plans["partners"].append(m.first if isinstance(m, CoMixed) else m.partner)
    torch.save({**plans, "parameters": parameters}, f"{out}.{i}.{os.environ['RANK']}")
