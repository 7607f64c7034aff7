"""The released code's solver, run as a child process: costs on stdin (npz), labels on stdout (npy).

Alpha-beta swap of gco-v3 through the extra ``pygco``, with the released integer scaling, which
truncates and can overflow. Only a baseline; the licence of gco-v3 allows research use only.
"""

from __future__ import annotations

import sys
from io import BytesIO

import numpy as np


def swap(unary: np.ndarray, down: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Labels (B, rows, cols) int64 of alpha-beta swap on the arrays of ``MaskCosts``."""
    import gco

    labels = unary.shape[-1]
    scale = 1000 * unary.shape[1] * unary.shape[2]
    t = np.arange(labels)
    pairwise = ((t[:, None] - t) ** 2 / (labels - 1) ** 2).astype(np.float32)
    # label 0 shows the first input there, so ties fall as they do in the released code
    u, v, h = ((scale * a).astype(np.int32) for a in (unary[..., ::-1], down, right))
    cuts = [gco.cut_grid_graph(u[b], pairwise, v[b], h[b], algorithm="swap") for b in range(len(u))]
    return labels - 1 - np.asarray(cuts, dtype=np.int64).reshape(unary.shape[:-1])


if __name__ == "__main__":
    costs = np.load(BytesIO(sys.stdin.buffer.read()))
    result = BytesIO()
    np.save(result, swap(costs["unary"], costs["down"], costs["right"]))
    sys.stdout.buffer.write(result.getvalue())
