"""Puzzle Mix: saliency-guided mixup with exact masks and optimal transport (thesis chapter 3)."""

from .adversarial import Adversarial, Noise
from .cutmix import CutMix
from .mixed import Mixed
from .puzzle import PuzzleMix
from .saliency import clean_loss, input_gradient, saliency

__all__ = ["Adversarial", "CutMix", "Mixed", "Noise", "PuzzleMix", "clean_loss", "input_gradient", "saliency"]
