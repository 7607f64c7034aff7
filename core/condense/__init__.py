"""IDC: a data set condensed to about one per cent of its size (thesis chapter 6)."""

from .augment import Augment
from .condensed import Condensed
from .condenser import Condenser
from .evaluate import Score, Scores, evaluate
from .formation import MultiFormation
from .initial import herd, initial_images
from .matching import distance
from .memory import ExemplarMemory
from .networks import ConvNet, ResNet10, ResNetAP10
from .real import RealData

__all__ = [
    "Augment",
    "Condensed",
    "Condenser",
    "ConvNet",
    "ExemplarMemory",
    "MultiFormation",
    "RealData",
    "ResNet10",
    "ResNetAP10",
    "Score",
    "Scores",
    "distance",
    "evaluate",
    "herd",
    "initial_images",
]
