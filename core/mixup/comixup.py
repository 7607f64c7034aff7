"""Co-Mixup: a batch mixed jointly, many inputs in each output, and the outputs different (thesis ch. 4)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .grid import Grid, as_image, pool, resolve_grid
from .mixed import check_constructor, draw_rng, one_hot, regions
from .saliency import check_batch, check_saliency

THRESHOLDS = ("hard", "soft")
_PRIOR_EPS = 1e-8  # the released code's guard inside the logarithm
_OBJECT = 8  # pixels over which saliency is averaged before its maximum is looked for
_CAP = 1_000_000  # states of the largest table of a sub-problem


@dataclass(frozen=True)
class CoMixed:
    """A batch that was mixed jointly.

    Attributes:
        inputs: (B', C, H, W) or (B', C, L).
        targets: (B', K) float32, labels weighted by area.
        sources: (B', B) float32, share of each input in each output; rows sum to one.
        first, second: (B', rows, cols) int64, whose region each place shows; two different inputs are shown half
            and half.
        objective: sum over partitions of eq. 4.1 as it was minimised.
        gap: how far any output's sub-problem may be above its minimum; 0 where all were solved exactly.
    """

    inputs: Tensor
    targets: Tensor
    sources: Tensor
    first: Tensor
    second: Tensor
    objective: float
    gap: float

    def apply(self, t: Tensor) -> Tensor:
        """The same mix on anything aligned with the inputs: depth maps, segmentations, features.

        Args:
            t: (B, ..., H', W') for images, (B, ..., L') for 1-d inputs, sides that the grid divides. Integer and
                boolean tensors take the first of two halves.

        Returns:
            (B', ..., H', W').

        Raises:
            ValueError: another batch size, or sides that the grid does not divide.
        """
        line = self.inputs.ndim == 3
        if len(t) != self.sources.shape[1] or t.ndim < (2 if line else 3):
            raise ValueError(
                f"t has shape {tuple(t.shape)}; give ({self.sources.shape[1]}, ..., {'L' if line else 'H, W'}) aligned "
                "with the inputs"
            )
        image = t.unsqueeze(-2) if line else t
        rows, cols = self.first.shape[1:]
        if image.shape[-2] % rows or image.shape[-1] % cols:
            raise ValueError(f"t has sides {tuple(image.shape[-2:])}, which the grid {rows}x{cols} does not divide")
        out = mix_regions(image, self.first, self.second)
        return out.squeeze(-2) if line else out


class CoMixup:
    """Mix all inputs of a batch jointly: each output shows the most salient regions of several inputs, and no two
    outputs the same ones.

    Thesis eq. 4.1 by algorithm 3: outputs are solved in turn, each exactly, against a modular penalty for inputs that
    the others show already.

    Args:
        num_classes: K, columns of the targets.
        alpha: of the Dirichlet prior over a partition's inputs.
        beta: smoothness of the labels. gamma: weight of the compatibility term. eta: weight of the prior. All act per
            region, as in the released code.
        tau: how much the other outputs may show an input before it costs, as a share of one output's area.
        omega: weight of the distance between salient places in A = (1 - omega) I + omega A_c.
        grid: n means n x n regions (n on 1-d inputs), a pair (rows, cols).
        partition: inputs that are mixed together; the last partition may be smaller.
        outputs: made of a partition; None is as many as its inputs.
        n_iter: sweeps over the outputs.
        restarts: random starts; the one that ends with the lowest objective is taken.
        threshold: ``"hard"``, the released code: only inputs beyond tau cost, but fully; ``"soft"``, max{tau', v} of
            eq. 4.2 as printed.

    Raises:
        ValueError: an argument outside its range.

    References:
        Kim, Choo, Jeong, Song, "Co-Mixup: Saliency guided joint mixup with supermodular diversity", ICLR 2021; thesis
        chapter 4.

    Examples:
        >>> import torch
        >>> from dataopt.core.mixup import CoMixup, input_gradient, saliency
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 10))
        >>> x, y = torch.rand(8, 3, 16, 16), torch.arange(8)
        >>> m = CoMixup(num_classes=10)(x, y, saliency(input_gradient(model, x, y)))
        >>> m.inputs.shape, m.sources.sum(1).allclose(torch.ones(8))
        (torch.Size([8, 3, 16, 16]), True)
    """

    def __init__(
        self,
        num_classes: int,
        alpha: float = 2.0,
        beta: float = 0.32,
        gamma: float = 1.0,
        eta: float = 0.05,
        tau: float = 0.83,
        omega: float = 0.001,
        grid: int | Grid = 4,
        partition: int = 20,
        outputs: int | None = None,
        n_iter: int = 4,
        restarts: int = 1,
        threshold: str = "hard",
    ):
        check_constructor(num_classes, alpha)
        if alpha == 0:
            raise ValueError("alpha=0 leaves the Dirichlet prior undefined; give a positive value, 2.0 in the thesis")
        for name, value in (("beta", beta), ("gamma", gamma), ("eta", eta), ("tau", tau)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name}={value} must be finite and not negative")
        if not 0 <= omega <= 1:
            raise ValueError(f"omega={omega} must lie in [0, 1]; 0.001 in the thesis")
        for name, count in (("partition", partition), ("outputs", outputs), ("n_iter", n_iter), ("restarts", restarts)):
            if count is not None and (count < 1 or count != int(count)):
                raise ValueError(f"{name}={count} must be a whole number of at least 1")
        if threshold not in THRESHOLDS:
            raise ValueError(f"threshold={threshold!r} is unknown; choose one of {', '.join(THRESHOLDS)}")
        self.num_classes = num_classes
        self.alpha = alpha
        self.beta = beta
        self.gamma = gamma
        self.eta = eta
        self.tau = tau
        self.omega = omega
        self.grid = grid
        self.partition = partition
        self.outputs = outputs
        self.n_iter = n_iter
        self.restarts = restarts
        self.threshold = threshold

    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        s: Tensor,
        generator: torch.Generator | None = None,
        *,
        lam: Tensor | None = None,
    ) -> CoMixed:
        """Mix a batch.

        Args:
            x: (B, C, H, W) images or (B, C, L) sequences.
            y: (B,) class ids or (B, K) weights (soft or multi-hot).
            s: (B, H, W) or (B, L) saliency, non-negative; :func:`saliency` makes it.
            generator: CPU generator of every draw; the default one if None.
            lam: (B,) expected shares, which each partition scales to sum one; drawn from the prior otherwise.

        Returns:
            :class:`CoMixed`; ``inputs`` has the dtype, device and memory format of ``x``.

        Raises:
            ValueError: non-finite or badly shaped inputs, labels out of range, a grid that does not divide the inputs,
                or an omega for which A is not positive semi-definite.
        """
        check_batch(x)
        labels = one_hot(y, self.num_classes, len(x)).to(x.device)
        s = check_saliency(s, x)
        cells = resolve_grid(self.grid, tuple(x.shape[2:]))
        rng = draw_rng(generator)
        pooled = pool(s, cells).flatten(1).double().cpu().numpy()
        objects = salient_places(s)
        first, second, total, gap = [], [], 0.0, 0.0
        for start in range(0, len(x), self.partition):
            rows = slice(start, min(start + self.partition, len(x)))
            a, b, value, bound = self._partition(
                pooled[rows], objects[rows], lam if lam is None else lam[rows], cells, rng
            )
            first.append(a + start)
            second.append(b + start)
            total, gap = total + value, max(gap, bound)
        one, other = (torch.from_numpy(np.concatenate(p).reshape(-1, *cells)).to(x.device) for p in (first, second))
        sources = shares(one, other, len(x))
        out = mix_regions(as_image(x), one, other)
        if x.ndim == 3:
            out = out.squeeze(2)
        elif x.is_contiguous(memory_format=torch.channels_last):
            out = out.contiguous(memory_format=torch.channels_last)
        return CoMixed(out, sources @ labels, sources, one, other, total, gap)

    def _partition(
        self, pooled: np.ndarray, objects: np.ndarray, lam: Tensor | None, cells: Grid, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, float, float]:
        """Inputs (m', cells) of each place, the objective and the gap of the best start."""
        from .joint import sweeps  # importing numba takes half a second

        m, n = pooled.shape
        outputs = m if self.outputs is None else max(1, round(self.outputs * m / self.partition))
        share = rng.dirichlet(np.full(m, self.alpha)) if lam is None else self._given(lam)
        cost = np.ascontiguousarray((-pooled - self.eta / n * np.log(share + _PRIOR_EPS)[:, None]).T)
        compatible = compatibility(objects, self.omega)
        best = None
        for _ in range(self.restarts):
            a = rng.integers(m, size=(outputs, n))
            b = a.copy()
            value, gap = sweeps(
                cost, self.beta / n, compatible, 2 * self.gamma / n, self.tau * n, self.threshold == "hard",
                *cells, self.n_iter, self.gamma / n, _CAP, a, b,
            )  # fmt: skip
            if best is None or value < best[2]:
                best = a, b, value, gap
        assert best is not None
        return best

    def _given(self, lam: Tensor) -> np.ndarray:
        share = torch.as_tensor(lam, dtype=torch.float64).cpu().numpy()
        if share.ndim != 1 or not (np.isfinite(share) & (share >= 0)).all() or share.sum() <= 0:
            raise ValueError(f"lam={lam} must be (B,) shares of at least 0, some above 0 in each partition")
        return share / share.sum()


def salient_places(s: Tensor) -> np.ndarray:
    """(B, 2) row and column of the most salient square of 8 pixels a side (thesis section 4.4.1)."""
    height, width = s.shape[1:]
    averaged = F.avg_pool2d(s.unsqueeze(1), (min(_OBJECT, height), min(_OBJECT, width)), stride=1).squeeze(1)
    top = averaged.flatten(1).argmax(1).cpu().numpy()
    return np.stack(np.divmod(top, averaged.shape[2]), 1)


def compatibility(objects: np.ndarray, omega: float) -> np.ndarray:
    """(m, m) A = (1 - omega) I + omega A_c, A_c the L1 distances of salient places scaled to a mean of 1 / m.

    Raises:
        ValueError: omega so large that A is not positive semi-definite for these inputs.
    """
    m = len(objects)
    apart = np.abs(objects[:, None] - objects[None]).sum(-1).astype(np.float64)
    if apart.sum() > 0:
        apart *= m / apart.sum()
    if omega > 0.01:  # smaller ones never are: the least eigenvalue is at least minus the largest row sum
        least = float(np.linalg.eigvalsh(apart)[0])
        limit = 1 / (1 - least)
        if omega > limit + 1e-12:
            raise ValueError(
                f"omega={omega} makes A indefinite for these inputs, and the penalty is then not supermodular (thesis "
                f"Proposition 6); give at most {limit:.3g}"
            )
    return (1 - omega) * np.eye(m) + omega * apart


def shares(first: Tensor, second: Tensor, batch: int) -> Tensor:
    """(B', B) float32 share of each input in each output."""
    out = torch.zeros(len(first), batch, device=first.device)
    cell = torch.full_like(first.flatten(1), 1, dtype=torch.float32) / (2 * first[0].numel())
    return out.scatter_add_(1, first.flatten(1), cell).scatter_add_(1, second.flatten(1), cell)


def mix_regions(image: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """(B', ..., H, W) put together from regions of (B, ..., H, W)."""
    outputs, rows, cols = first.shape
    out = image.new_empty((outputs, *image.shape[1:]))
    source, target = regions(image, rows, cols), regions(out, rows, cols)
    r, c = torch.arange(rows, device=image.device)[:, None], torch.arange(cols, device=image.device)
    target[:] = source[first, r, c]
    if image.is_floating_point():
        half = (first != second).nonzero(as_tuple=True)
        one, other = source[first[half], half[1], half[2]], source[second[half], half[1], half[2]]
        target[half] = (one + other) / 2
    return out
