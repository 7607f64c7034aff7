"""An issue type ``relation`` for cleanlab's Datalab."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from cleanlab.datalab.internal import issue_finder, issue_manager_factory
from cleanlab.datalab.internal.issue_manager import IssueManager
from dataopt.core.relation import find_issues


class RelationIssueManager(IssueManager):
    """Labels that relation and loss together find wrong; see :func:`dataopt.core.relation.find_issues`.

    Args:
        datalab: the Datalab that runs it.
        top: conflicting rows to keep for each suspect.
        partitions, device: as in :class:`dataopt.core.relation.RelationGraph`.

    References:
        Thesis sections 5.3.1 to 5.3.4.
    """

    description = """A relation issue refers to an example whose given label is contradicted by the examples that a
    trained model holds for alike, or by the model's own prediction (neural relation graph)."""
    issue_name = "relation"
    verbosity_levels = {0: [], 1: [], 2: ["conflicts"], 3: []}  # noqa: RUF012, cleanlab's own form

    def __init__(self, datalab: Any, top: int = 8, partitions: int | None = None, device: Any = None, **_: Any) -> None:
        super().__init__(datalab)
        self.top, self.partitions, self.device = top, partitions, device

    def find_issues(self, pred_probs: Any = None, features: Any = None, **_: Any) -> None:
        """Fill ``issues`` (``is_relation_issue``, ``relation_score``), ``summary`` and ``info``.

        ``info`` holds the labels, the scores and ``conflicts``: (n, top), the strongest conflicting rows of the
        suspects, -1 where there is none.

        Args:
            pred_probs: (n, K). features: (n, d). Both are needed.

        Raises:
            ValueError: one of them is missing, or the data has no labels.
        """
        missing = [name for name, x in (("pred_probs", pred_probs), ("features", features)) if x is None]
        if missing or not self.datalab.has_labels:
            what = f"{' and '.join(missing)} in find_issues" if missing else "a label_name in Datalab"
            raise ValueError(f"the issue type 'relation' needs {what}")
        found = find_issues(
            features, pred_probs, self.datalab.labels, top=self.top, partitions=self.partitions, device=self.device
        )
        score = found.label_score.numpy()
        self.issues = pd.DataFrame({"is_relation_issue": found.is_label_issue.numpy(), self.issue_score_key: score})
        self.summary = self.make_summary(score=float(score.mean()))
        conflicting = found.relations.conflicting.numpy()
        conflicts = np.full(
            (len(score), conflicting.shape[1]), -1
        )  # strongest first; cleanlab cannot print uneven lists
        conflicts[found.suspects.numpy()] = conflicting
        table = found.to_pandas()
        kept = ["given_label", "predicted_label", "relation_noisiness", "loss"]
        names = dict(enumerate(self.datalab.class_names))  # the classes as the user knows them
        self.info = {
            **{name: table[name].to_numpy() for name in kept},
            "given_label": table["given_label"].map(names).to_numpy(),
            "predicted_label": table["predicted_label"].map(names).to_numpy(),
            "conflicts": conflicts,
        }


def register_relation_issue() -> type[RelationIssueManager]:
    """Make ``relation`` an issue type of classification in cleanlab's Datalab; calling it again changes nothing.

    Raises:
        RuntimeError: a cleanlab whose insides differ from 2.9's.

    Examples:
        >>> import numpy as np
        >>> from cleanlab import Datalab
        >>> from dataopt.integrations.hf import register_relation_issue
        >>> _ = register_relation_issue()
        >>> features = np.array([[1, 0.1], [1, 0], [0.9, 0.1], [0, 1], [0.1, 1], [1, 0.2]])
        >>> pred_probs = np.array([[0.9, 0.1], [0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.2, 0.8], [0.8, 0.2]])
        >>> lab = Datalab({"y": [0, 0, 0, 1, 1, 1]}, label_name="y", verbosity=0)  # the last label is wrong
        >>> lab.find_issues(pred_probs=pred_probs, features=features, issue_types={"relation": {}})
        >>> int(lab.get_issues("relation")["relation_score"].argmin())
        5
    """
    try:
        # which arguments of Datalab.find_issues the issue type gets
        issue_finder._CLASSIFICATION_ARGS_DICT["relation"] = ["pred_probs", "features"]
        known = issue_manager_factory.REGISTRY[issue_manager_factory.Task.CLASSIFICATION]
    except (AttributeError, KeyError, TypeError) as e:
        raise RuntimeError(
            f'this cleanlab differs inside from 2.9 ({e}); get it with: pip install "cleanlab[datalab]>=2.9,<2.10"'
        ) from e
    if known.get("relation") is not RelationIssueManager:
        issue_manager_factory.register(RelationIssueManager)
    return RelationIssueManager
