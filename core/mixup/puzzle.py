"""Puzzle Mix: the mask and the transport that keep most saliency of both inputs (thesis ch. 3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import check_channels, check_choice, check_numbers, check_strings, check_whole
from .adversarial import Adversarial, Noise, unnormalise
from .grid import Grid, as_image, in_double, mask_costs, pool, region_distances, resolve_grid
from .labelling import check_solver, solve_mask
from .mixed import Mixed, Moves, blend, check_constructor, draw_rng, one_hot, resolve_lam, resolve_partner
from .saliency import check_batch, check_saliency
from .transport import TRANSPORTS, plan_transport

DATA_TERMS = ("released", "thesis")


class PuzzleMix:
    """Mix every input of a batch with a partner, each region showing the more salient of the two.

    Thesis eq. 3.3, one cycle: the mask of least energy (eq. 3.4, solved exactly), then the
    transport of both inputs under it (eq. 3.5).

    Args:
        num_classes: K, columns of the targets.
        alpha: one expected share per batch is drawn from Beta(alpha, alpha).
        beta: label smoothness, Definition 1; scaled as in the released code (see ``mask_costs``).
        gamma: data smoothness, Definition 3, relative to ``beta``; at most 1 (Proposition 1).
        eta: weight of the mixing prior.
        labels: size of the label set {0, 1/m, ..., 1}, m = labels - 1; the thesis uses 3.
        grids: the mask's grid is drawn from these once per batch; n means n x n regions (n on 1-d
            inputs), a pair (rows, cols).
        neigh_size: pixels averaged before borders are compared.
        data_term: ``"released"`` keeps the data interaction in the pairwise weight, as the code
            behind the thesis' numbers; ``"thesis"`` is Definition 3.
        transport: ``"iterative"`` (Algorithm 1), ``"exact"`` (assignment), or None.
        transport_cost: xi, price of moving; 0.8 in the thesis.
        transport_patch: side in pixels of the regions that move, where finer than the mask's;
            None moves the mask's own regions.
        adversarial: :class:`Adversarial` for Algorithm 2, or None.
        solver: ``"auto"``, ``"numba"``, ``"scipy"`` or ``"gco"`` (see ``solve_mask``).
        mean, std: per channel, how inputs were normalised: pixels = x * std + mean must lie in
            [0, 1]. None for inputs that already do.

    Raises:
        ValueError: an argument outside its range.

    References:
        Kim, Choo, Song, "Puzzle Mix: Exploiting saliency and local statistics for optimal mixup",
        ICML 2020; thesis chapter 3.

    Examples:
        >>> import torch
        >>> from dataopt.core.mixup import PuzzleMix, input_gradient, saliency
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 10))
        >>> x, y = torch.rand(8, 3, 16, 16), torch.arange(8)
        >>> m = PuzzleMix(num_classes=10)(x, y, saliency(input_gradient(model, x, y)))
        >>> m.inputs.shape, m.targets.sum(1).allclose(torch.ones(8))
        (torch.Size([8, 3, 16, 16]), True)
    """

    def __init__(
        self,
        num_classes: int,
        alpha: float = 1.0,
        beta: float = 1.2,
        gamma: float = 0.5,
        eta: float = 0.2,
        labels: int = 3,
        grids: Sequence[int | Grid] = (2, 4, 8, 16),
        neigh_size: int = 4,
        data_term: str = "released",
        transport: str | None = "iterative",
        transport_cost: float = 0.8,
        transport_patch: int | None = None,
        adversarial: Adversarial | None = None,
        solver: str = "auto",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        check_constructor(num_classes, alpha)
        check_numbers(beta=beta, gamma=gamma, eta=eta, transport_cost=transport_cost)
        check_whole(labels=labels, neigh_size=neigh_size)
        check_strings(data_term=data_term, solver=solver)
        if transport_patch is not None:
            check_whole(transport_patch=transport_patch)
        if transport is not None:
            check_strings(transport=transport)
        for name, value in (("beta", beta), ("eta", eta), ("transport_cost", transport_cost)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name}={value} must be finite and not negative")
        if not 0 <= gamma <= 1:
            raise ValueError(
                f"gamma={gamma} must lie in [0, 1]: it is relative to beta, and above 1 the pairwise term is no longer "
                "submodular (thesis Proposition 1)"
            )
        if labels < 2:
            raise ValueError(f"labels={labels} must be at least 2; 3 is the thesis' {{0, 1/2, 1}}")
        if not isinstance(grids, Sequence) or isinstance(grids, str):
            raise TypeError(f"grids={grids!r:.80} must be a sequence, for example (2, 4, 8, 16)")
        if not grids:
            raise ValueError("grids is empty; give at least one, for example (2, 4, 8, 16)")
        for name, size in (("neigh_size", neigh_size), ("transport_patch", transport_patch)):
            if size is not None and size < 1:
                raise ValueError(f"{name}={size} must be at least 1 pixel")
        check_choice(DATA_TERMS, data_term=data_term)
        check_choice(TRANSPORTS, transport=transport)
        check_solver(solver)
        if not isinstance(adversarial, Adversarial | None):
            raise TypeError(f"adversarial={adversarial!r:.80} must be an Adversarial, or None")
        check_channels(mean, std)
        self.num_classes = num_classes
        self.alpha = alpha
        self.beta = beta
        self.gamma = gamma
        self.eta = eta
        self.labels = labels
        self.grids = tuple(grids)
        self.neigh_size = neigh_size
        self.data_term = data_term
        self.transport = transport
        self.transport_cost = transport_cost
        self.transport_patch = transport_patch
        self.adversarial = dataclasses.replace(adversarial, mean=mean, std=std) if adversarial else None
        self.solver = solver
        self.mean = mean
        self.std = std

    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        s: Tensor,
        noise: Noise | None = None,
        gradient: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        partner: Tensor | None = None,
        lam: float | Tensor | None = None,
        grid: int | Grid | None = None,
    ) -> Mixed:
        """Mix a batch.

        Args:
            x: (B, C, H, W) images or (B, C, L) sequences, normalised as ``mean`` and ``std`` say.
            y: (B,) class ids or (B, K) weights (soft or multi-hot).
            s: (B, H, W) or (B, L) saliency, non-negative; :func:`saliency` makes it.
            noise: what ``self.adversarial.start`` returned, with ``gradient`` taken at its inputs.
            gradient: like ``x``; only with ``noise``.
            generator: CPU generator of every draw; the default one if None.
            partner: (B,) indices of the second inputs, drawn as a permutation otherwise; a sample
                that is its own partner comes back unmixed.
            lam: expected share of the first input (one minus the thesis' lambda), a number or (B,).
            grid: the mask's grid, drawn from ``grids`` otherwise.

        Returns:
            :class:`Mixed`; ``inputs`` has the dtype, device and memory format of ``x``.

        Raises:
            ValueError: non-finite or badly shaped inputs, labels out of range, a batch of one
                without ``partner``, a grid or patch that does not divide the inputs, pixels outside
                [0, 1] without ``mean`` and ``std``, or ``noise`` without ``gradient``.
        """
        check_batch(x)
        labels = one_hot(y, self.num_classes, len(x)).to(x.device)
        s = check_saliency(s, x)
        if noise is not None and (gradient is None or gradient.shape != x.shape or self.adversarial is None):
            raise ValueError("noise needs gradient= like x and PuzzleMix(adversarial=...), which made the noise")

        rng = draw_rng(generator)
        partner = resolve_partner(partner, len(x), rng, x.device)
        share = resolve_lam(lam, self.alpha, len(x), rng)
        drawn = grid if grid is not None else self.grids[rng.integers(len(self.grids))]
        cells = resolve_grid(drawn, tuple(x.shape[2:]))
        image = as_image(x)

        pooled = pool(s, cells)
        costs = mask_costs(
            pooled,
            pooled[partner],
            share,
            self._distances(image, partner, cells),
            labels=self.labels,
            beta=self.beta,
            gamma=self.gamma,
            eta=self.eta,
            data_term=self.data_term,
        )
        chosen = solve_mask(costs, self.solver)
        coarse = torch.from_numpy(chosen).to(x.device, torch.float32) / (self.labels - 1)
        mask = F.interpolate(coarse.unsqueeze(1), size=image.shape[2:], mode="nearest").squeeze(1)
        ratio = in_double(coarse).mean((1, 2)).float().to(x.device).unsqueeze(1)
        targets = labels * ratio + labels[partner] * (1 - ratio)
        moves = self._transport(chosen, s, partner, cells)

        first, second = image, image[partner]
        if noise is not None and gradient is not None and self.adversarial is not None:
            noise = Noise(noise.on, None if noise.kappa is None else as_image(noise.kappa))
            first, second = self.adversarial.finish(first, second, partner, noise, as_image(gradient), rng)
        out = blend(first, second, mask, moves)
        if x.ndim == 3:
            out, mask = out.squeeze(2), mask.squeeze(1)
        elif x.is_contiguous(memory_format=torch.channels_last):
            out = out.contiguous(memory_format=torch.channels_last)
        return Mixed(out, targets, mask, partner, cells, moves)

    def _distances(self, image: Tensor, partner: Tensor, cells: Grid) -> tuple[Tensor, Tensor] | None:
        if self.gamma == 0 or self.beta == 0:
            return None
        pixels = unnormalise(image.detach().float(), self.mean, self.std)
        low, high = (float(v) for v in pixels.aminmax())
        if self.mean is None and (low < -0.01 or high > 1.01):
            raise ValueError(
                f"x ranges from {low:.3g} to {high:.3g}; region distances need pixels in [0, 1], so give the mean= and "
                "std= that x was normalised with"
            )
        # random erasing and colour jitter may leave the range a little
        return region_distances(pixels.clamp(0, 1), partner, cells, self.neigh_size)

    def _transport(self, chosen: np.ndarray, s: Tensor, partner: Tensor, cells: Grid) -> tuple[Moves, Moves] | None:
        if self.transport is None:
            return None
        rows, cols = cells
        if self.transport_patch is not None:
            height, width = s.shape[1:]
            sides = (height // rows, width // cols)
            patch = [min(self.transport_patch, side) for side in sides]
            if sides[0] % patch[0] or sides[1] % patch[1]:
                raise ValueError(
                    f"transport_patch={self.transport_patch} does not divide the {rows}x{cols} grid's regions of "
                    f"{sides[0]}x{sides[1]} pixels; give a divisor"
                )
            rows, cols = height // patch[0], width // patch[1]
            chosen = chosen.repeat(rows // cells[0], 1).repeat(cols // cells[1], 2)
        pooled = pool(s, (rows, cols))
        weight = torch.stack([pooled, pooled[partner]]).cpu().double().numpy()
        m = self.labels - 1
        out = []
        for w, shown in zip(weight, (chosen > 0, chosen < m), strict=True):
            source = plan_transport(w, shown, self.transport_cost, self.transport)
            out.append(Moves.of(source, (rows, cols), shown, s.device))
        return out[0], out[1]
