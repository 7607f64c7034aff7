"""What a classifier is worth beyond its accuracy: attacks, corruptions, backgrounds, places, calibration.

Errors and accuracies are shares in [0, 1]. The extra ``eval`` brings scikit-image, torchmetrics and torchvision.

Examples:
    >>> import torch
    >>> from dataopt.core.evaluation import corruption_error, expected_calibration_error, pgd_error, predict
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 10))
    >>> batches = [(torch.rand(8, 3, 16, 16), torch.arange(8))]  # pixels; give mean= and std= for normalised inputs
    >>> 0 <= pgd_error(model, batches, eps=8 / 255) <= 1
    True
    >>> sorted(corruption_error(model, batches, names=["fog", "jpeg"]).errors)
    ['fog', 'jpeg']
    >>> 0 <= expected_calibration_error(*predict(model, batches)) <= 1
    True
"""

from .adversarial import fgsm, fgsm_error, pgd, pgd_error
from .background import BackgroundError, background_error, noisy_background, replace_background
from .calibration import Reliability, expected_calibration_error, reliability
from .corruption import CORRUPTIONS, CorruptionError, corrupt, corruption_error
from .localisation import Localisation, box_of_map, class_activation_map, localisation_accuracy
from .predictions import predict, top1_error

__all__ = [
    "CORRUPTIONS",
    "BackgroundError",
    "CorruptionError",
    "Localisation",
    "Reliability",
    "background_error",
    "box_of_map",
    "class_activation_map",
    "corrupt",
    "corruption_error",
    "expected_calibration_error",
    "fgsm",
    "fgsm_error",
    "localisation_accuracy",
    "noisy_background",
    "pgd",
    "pgd_error",
    "predict",
    "reliability",
    "replace_background",
    "top1_error",
]
