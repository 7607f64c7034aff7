"""Puzzle Mix and Co-Mixup: saliency-guided mixup of pairs and of whole batches (thesis chapters 3 and 4)."""

from .adversarial import Adversarial, Noise
from .augmix import augmix, jensen_shannon_loss
from .comixup import CoMixed, CoMixup
from .cutmix import CutMix
from .mixed import Mixed
from .puzzle import PuzzleMix
from .saliency import clean_loss, input_gradient, saliency

__all__ = [
    "Adversarial",
    "CoMixed",
    "CoMixup",
    "CutMix",
    "Mixed",
    "Noise",
    "PuzzleMix",
    "augmix",
    "clean_loss",
    "input_gradient",
    "jensen_shannon_loss",
    "saliency",
]
