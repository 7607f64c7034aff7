"""Neural Relation Graph: label errors and outliers from how samples relate (thesis chapter 5)."""

from .cleaning import Issues, find_issues
from .duplicates import NearDuplicates, near_duplicates
from .graph import RelationGraph, Relations
from .label_noise import LabelNoise
from .outliers import Outliers
from .refine import Refinement, Round, refine
from .relation_map import RelationMap, average_scores, relation_map

__all__ = [
    "Issues",
    "LabelNoise",
    "NearDuplicates",
    "Outliers",
    "Refinement",
    "RelationGraph",
    "RelationMap",
    "Relations",
    "Round",
    "average_scores",
    "find_issues",
    "near_duplicates",
    "refine",
    "relation_map",
]
