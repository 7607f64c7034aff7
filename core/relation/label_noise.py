"""Algorithm 4: the noisy set and the noisiness scores, by a local search for the maximum cut (thesis section 5.3.2)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..arguments import check_choice, check_numbers, check_strings

if TYPE_CHECKING:
    import pandas as pd

MOST = 0.25  # share of rows above which a noisy set is no small set any more
_BATCH, _EDGES = 256, 2**24  # rows and edges computed together for single moves, at most
_GAIN = 1e-9  # smaller gains are rounding


@dataclass(frozen=True)
class LabelNoise:
    """What Algorithm 4 found.

    Attributes:
        noisiness: (n,) float64, s; high is bad, negative where a label agrees with its neighbours.
        noisy: (n,) bool, the set N.
        suggested: (n,) int64: for rows of N the class of the strongest similarity among the rows that the last
            correction left out of N (without corrections, among those outside N); else the label.
        given: (n,) int64, the labels.
        threshold: lambda that was used; a share of the largest score with ``mode="released"``.
    """

    noisiness: Tensor
    noisy: Tensor
    suggested: Tensor
    given: Tensor
    threshold: float

    @property
    def label_score(self) -> Tensor:
        """(n,) float64 in [0, 1], low is bad: falls linearly with the noisiness; 0.5 where that is 0."""
        return 0.5 - 0.5 * normalised(self.noisiness)

    def to_pandas(self) -> pd.DataFrame:
        """One row for each sample, in cleanlab's columns, and ``relation_noisiness``."""
        import pandas as pd

        return pd.DataFrame(
            {
                "is_label_issue": self.noisy.numpy(),
                "label_score": self.label_score.numpy(),
                "given_label": self.given.numpy(),
                "predicted_label": self.suggested.numpy(),
                "relation_noisiness": self.noisiness.numpy(),
            }
        )


def normalised(scores: Tensor) -> Tensor:
    """Scores over their largest magnitude, in [-1, 1]."""
    most = scores.abs().max()
    return scores / most if most > 0 else scores


@dataclass(frozen=True)
class Cut:
    """The edges as the search needs them; all vectors (n,) float64 on the processor.

    Attributes:
        first: sum over j of w(i, j).
        to_set: rows to ``sum over j in rows of w(i, j)``, w(i, i) = 0.
        edges: m rows to their (m, n) float32 edges w.
    """

    first: np.ndarray
    to_set: Callable[[np.ndarray], np.ndarray]
    edges: Callable[[np.ndarray], np.ndarray]

    def objective(self, noisy: np.ndarray, inside: np.ndarray, threshold: float) -> float:
        """Eq. 5.2 of a set, from its ``to_set``."""
        return float((self.first - inside)[noisy].sum() - threshold * noisy.sum())


def by_sets(cut: Cut, threshold: float, max_iter: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Algorithm 4 as printed, guarded: scores and set.

    The proof of convergence is for moves of single nodes. Moved as a set, nodes can jump back and forth for ever, so a
    set that comes again, or a worse cut, ends the search and the best set so far is the result.
    """
    scores, noisy = cut.first, cut.first > threshold
    if noisy.mean() > MOST and max_iter != 0:
        warnings.warn(
            f"{noisy.mean():.0%} of the labels have a positive score, more than a noisy set can hold ({MOST:.0%}); the "
            "plain sums are returned. A larger temperature sharpens the scores, and update='single' always converges",
            stacklevel=3,
        )
        return scores, noisy
    seen: list[np.ndarray] = []
    best: tuple[float, np.ndarray, np.ndarray] | None = None
    while max_iter is None or len(seen) < max_iter:
        inside = cut.to_set(noisy.nonzero()[0])
        value = cut.objective(noisy, inside, threshold)
        new_scores = cut.first - 2 * inside
        new = new_scores > threshold
        worse = best is not None and value < best[0] - 1e-9 * abs(best[0])
        if not worse:
            best = (value, noisy, new_scores)
        if np.array_equal(new, noisy):
            break
        if worse or any(np.array_equal(new, old) for old in seen):
            assert best is not None
            warnings.warn(
                f"Algorithm 4 {'found a worse cut' if worse else 'came back to an earlier set'} after {len(seen) + 1} "
                "updates; the best set is returned. update='single' always converges",
                stacklevel=3,
            )
            return best[2], best[1]
        seen.append(noisy)
        scores, noisy = new_scores, new
    else:
        return scores, noisy
    return new_scores, noisy


def by_single_moves(cut: Cut, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Algorithm 4 with one node at a time: every move raises eq. 5.2, so it ends in a local optimum (Proposition 9).

    The visiting order is by gain in rounds, whose edges are computed together; a node moves only if
    its gain is still positive when its turn comes.
    """
    scores = cut.first.copy()
    side = np.ones(len(scores))  # +1 outside N, -1 in it
    tolerance = _GAIN * max(1.0, float(np.abs(scores).max()))
    while True:
        gains = side * (scores - threshold)
        found = np.argsort(-gains, kind="stable")[: min(_BATCH, max(16, _EDGES // len(gains)))]
        found = found[gains[found] > tolerance]
        if not len(found):
            return scores, side < 0
        for i, edges in zip(found, cut.edges(found), strict=True):
            if side[i] * (scores[i] - threshold) > tolerance:
                scores -= 2 * side[i] * edges
                side[i] = -side[i]


def released(cut: Cut, own: np.ndarray, share: float, max_iter: int) -> tuple[np.ndarray, np.ndarray]:
    """The authors' arithmetic: reliability with r(i, i) = ``own``, and N below a share of the largest score."""
    first = own - cut.first
    score = first
    for _ in range(max_iter):
        noisy = _below(score, share)
        score = first + 2 * cut.to_set(noisy.nonzero()[0]) - 2 * np.where(noisy, own, 0)
    return -score, _below(score, share)


def _below(score: np.ndarray, share: float) -> np.ndarray:
    most = np.abs(score).max()
    return score < -share * most if most > 0 else np.zeros(len(score), bool)


def check(threshold: Any, update: str, max_iter: int | None, mode: str) -> None:
    """Refuse settings that mean nothing."""
    check_strings(update=update, mode=mode)
    check_numbers(threshold=0 if threshold is None else threshold, max_iter=0 if max_iter is None else max_iter)
    check_choice(("set", "single"), update=update)
    check_choice(("thesis", "released"), mode=mode)
    if threshold is not None and not (0 <= threshold < np.inf):
        raise ValueError(f"threshold={threshold} must be a number of at least 0; None takes 0.05 of the largest score")
    if max_iter is not None and not (0 <= max_iter < np.inf and max_iter == int(max_iter)):
        raise ValueError(
            f"max_iter={max_iter} must be a whole number of at least 0, or None to go on until it converges"
        )
    if mode == "released" and (update != "set" or max_iter is None):
        raise ValueError(f"mode='released' has update='set' and a number for max_iter; got {update!r} and {max_iter}")
