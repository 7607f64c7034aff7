"""Scores against the softmax of eq. 8.2, materialised."""

import subprocess
import sys
import textwrap

import pytest
import torch
from dataopt.core.kvzip import attention, merge, pair_scores

from .reference import normal

SCALE = 0.5


def reference(q, keys, chunk, scale, softcap=None, sinks=None):
    """The largest softmax weight of each key of the chunk, over the queries of its group (eq. 8.2).

    q (Hq, n, d); keys (H, K, d), those of the n inputs last; chunk: slice of the keys. Returns (H, m).
    """
    groups, n = len(q) // len(keys), q.shape[1]
    scores = q.double() @ keys.double().repeat_interleave(groups, 0).mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    before = keys.shape[1] - n
    later = torch.arange(keys.shape[1]) > torch.arange(n).unsqueeze(1) + before
    scores = scores.masked_fill(later, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().view(-1, 1, 1).expand(-1, n, 1)], -1)
    weights = scores.softmax(-1)[:, :, chunk]
    return weights.unflatten(0, (-1, groups)).amax((1, 2))


def lse_over(q, context, own):
    """(Hq, n): over the context, and causally over the inputs themselves."""
    q, context, own = q[None], context[None], own[None]
    return merge(attention(q, context, context, SCALE), attention(q, own, own, SCALE, causal=True))[1][0]


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("norm", ["full", "subset"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_those_of_the_softmax(groups, norm, dtype):
    """A prefix of 5 keys and chunks of 40, the last one ragged; both sets of keys behind the softmax."""
    heads, n_context, n, d, prefix = 2, 115, 25, 16, 5
    q = (2 * normal(heads * groups, n, d, seed=1)).to(dtype)
    context, own = normal(heads, n_context, d, seed=2, dtype=dtype), normal(heads, n, d, seed=3, dtype=dtype)
    for start in range(prefix, n_context, 40):
        chunk = context[:, start : start + 40]
        if norm == "full":
            keys, where = context, slice(start, start + chunk.shape[1])
        else:
            keys, where = torch.cat([context[:, :prefix], chunk], 1), slice(prefix, prefix + chunk.shape[1])
        got = pair_scores(q, chunk, lse_over(q, keys, own), SCALE)
        tolerance = 2e-5 if dtype == torch.float32 else 5e-2  # the product is rounded to bfloat16
        assert got.dtype == torch.float32 and got.shape == chunk.shape[:2] and (got <= tolerance).all()
        expected = reference(q, torch.cat([keys, own], 1), where, SCALE)
        torch.testing.assert_close(got.exp().double(), expected, rtol=tolerance, atol=tolerance)


def test_softcap_and_sinks():
    q, keys, own, sinks = 3 * normal(6, 9, 8), normal(2, 30, 8, seed=1), normal(2, 9, 8, seed=2), normal(6, seed=3) + 2
    cap = 1.2
    parts = [
        attention(q[None], keys[None], keys[None], SCALE, softcap=cap),
        attention(q[None], own[None], own[None], SCALE, causal=True, softcap=cap),
    ]
    lse = torch.logaddexp(merge(*parts)[1][0], sinks.view(-1, 1))
    got = pair_scores(q, keys, lse, SCALE, softcap=cap).exp()
    expected = reference(q, torch.cat([keys, own], 1), slice(0, 30), SCALE, cap, sinks)
    torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=2e-5)
    assert (got - reference(q, torch.cat([keys, own], 1), slice(0, 30), SCALE).float()).abs().max() > 0.01


def test_many_queries_go_in_blocks():
    q, k, lse = normal(4, 900, 8), normal(1, 2000, 8, seed=1), normal(4, 900, seed=2) + 9
    expected = (q.reshape(-1, 8) @ k[0].T * SCALE - lse.reshape(-1, 1)).amax(0, keepdim=True)
    torch.testing.assert_close(pair_scores(q, k, lse, SCALE), expected, rtol=1e-5, atol=1e-5)


def test_no_large_matrix_is_formed():
    """One layer of a 135M model at 4096 context tokens in chunks of 1024: the softmax alone would take 156 MB."""
    code = """
        import resource, torch
        from dataopt.core.kvzip import attention, merge, pair_scores
        torch.set_num_threads(1)
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        def score(n, m):
            q, k, own = torch.randn(1, 9, m, 64), torch.randn(1, 3, n, 64), torch.randn(1, 3, m, 64)
            start = peak()
            own_part = attention(q, own, own, 0.125, causal=True)
            lse = merge(attention(q, k, k, 0.125), own_part)[1]
            pair_scores(q[0], k[0, :, :m], lse[0], 0.125)
            return peak() - start
        score(64, 32)
        print(score(4096, 1100))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert float(done.stdout) <= 60
