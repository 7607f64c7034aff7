"""Model and data improve each other: clean, train, score again with the better model, until nothing changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_choice
from .checks import as_labels, as_tensor
from .cleaning import Issues, find_issues

Fit = Callable[[Tensor, Tensor], tuple[Any, Any]]


@dataclass(frozen=True)
class Round:
    """One model, what it says about all n samples, and what to train the next one on.

    Attributes:
        issues: of the samples under their given labels.
        rows: (m,) int64, samples to train on, ascending. labels: (m,) int64, theirs.
        changed: samples that the round before had kept, dropped or labelled in another way.
    """

    issues: Issues
    rows: Tensor
    labels: Tensor
    changed: int


@dataclass(frozen=True)
class Refinement:
    """The rounds of :func:`refine`.

    Attributes:
        rounds: in order, at least one.
        stable: the last round changed nothing; else the rounds came to their end, or to data that an earlier one had.
    """

    rounds: tuple[Round, ...]
    stable: bool

    @property
    def rows(self) -> Tensor:
        """(m,) int64, the samples that the last round keeps."""
        return self.rounds[-1].rows

    @property
    def labels(self) -> Tensor:
        """(m,) int64, their labels."""
        return self.rounds[-1].labels


def refine(fit: Fit, labels: Any, *, action: str = "drop", max_rounds: int = 5, **options: Any) -> Refinement:
    """Train, find label issues, take them out, train on the rest, score everything again (thesis chapter 2).

    Every round judges all samples under their given labels, so what one model threw out a better one can bring back:
    the data of a round is g(D, f), never g(g(D, f), f).

    Args:
        fit: (rows (m,), labels (m,)) -> (features (n, d), probs (n, C)): trains a model on these samples, from fresh
            weights, and says what it makes of all n.
        labels: (n,) class ids.
        action: ``"drop"`` leaves label issues out, ``"relabel"`` gives them the suggested label.
        max_rounds: models that are trained at most.
        options: for :func:`find_issues`.

    Raises:
        TypeError, ValueError: an argument, or an output of ``fit``, that the message names.
    """
    check_choice(("drop", "relabel"), action=action)
    if max_rounds < 1:
        raise ValueError(f"max_rounds={max_rounds} must be at least 1")
    if "resume" in options:
        raise ValueError("resume= keeps the sums of one model, and every round has another; leave it out")
    given = as_tensor(labels, "labels").cpu()
    if not given.numel():
        raise ValueError("labels is empty; give one class id a row")
    given = as_labels(given, len(given), max(2, int(given.max()) + 1))
    state = given  # -1 for a sample that is left out
    seen = [state]
    rounds: list[Round] = []
    stable = False
    while len(rounds) < max_rounds and not stable:
        rows = (state >= 0).nonzero().squeeze(1)
        issues = find_issues(*_outputs(fit(rows, state[rows]), len(given)), given, **options)
        state = torch.where(issues.is_label_issue, issues.predicted_label if action == "relabel" else -1, given)
        kept = (state >= 0).nonzero().squeeze(1)
        rounds.append(Round(issues, kept, state[kept], int((state != seen[-1]).sum())))
        stable = rounds[-1].changed == 0
        if any(torch.equal(state, earlier) for earlier in seen):
            break
        seen.append(state)
    return Refinement(tuple(rounds), stable)


def _outputs(made: Any, rows: int) -> tuple[Any, Any]:
    try:
        features, probs = made
    except (TypeError, ValueError):
        raise TypeError(f"fit returned a {type(made).__name__}; return the pair (features, probs)") from None
    for name, value in (("features", features), ("probs", probs)):
        if len(value) != rows:
            raise ValueError(f"fit returned {name} of {len(value)} rows; return those of all {rows}, dropped ones too")
    return features, probs
