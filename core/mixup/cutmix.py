"""CutMix (Yun et al., ICCV 2019): the partner's rectangle, for switching with Puzzle Mix."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .grid import as_image
from .mixed import Mixed, blend, check_constructor, draw_rng, one_hot, resolve_lam, resolve_partner
from .saliency import check_batch


class CutMix:
    """Paste one random rectangle of the partner into every input of a batch.

    Args:
        num_classes: K, columns of the targets.
        alpha: the first input's expected share is drawn from Beta(alpha, alpha).
    """

    def __init__(self, num_classes: int, alpha: float = 1.0):
        check_constructor(num_classes, alpha)
        self.num_classes = num_classes
        self.alpha = alpha

    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
        partner: Tensor | None = None,
        lam: float | None = None,
    ) -> Mixed:
        """Mix a batch; one rectangle of area 1 - lam, clipped at the borders, for all samples.

        Args:
            x: (B, C, H, W) or (B, C, L).
            y: (B,) class ids or (B, K) weights.
            generator: CPU generator of every draw.
            partner, lam: given instead of drawn.

        Returns:
            :class:`Mixed`; the targets follow the area that is really shown.

        Raises:
            ValueError: as :class:`PuzzleMix`.
        """
        check_batch(x)
        labels = one_hot(y, self.num_classes, len(x)).to(x.device)
        rng = draw_rng(generator)
        partner = resolve_partner(partner, len(x), rng, x.device)
        share = float(resolve_lam(lam, self.alpha, 1, rng)[0])
        image = as_image(x)
        height, width = image.shape[2:]
        side = 1 - share if height == 1 else math.sqrt(1 - share)  # of a line, the length is the area
        spans = []
        for n in (height, width):
            centre, half = rng.uniform(0, n), n * side / 2
            spans.append(slice(0, 1) if n == 1 else slice(round(max(0, centre - half)), round(min(n, centre + half))))
        mask = torch.ones(len(x), height, width, device=x.device)
        mask[:, spans[0], spans[1]] = 0
        ratio = mask[0].mean()
        targets = labels * ratio + labels[partner] * (1 - ratio)
        out = blend(image, image[partner], mask, None)
        if x.ndim == 3:
            out, mask = out.squeeze(2), mask.squeeze(1)
        return Mixed(out, targets, mask, partner)
