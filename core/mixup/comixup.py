"""Co-Mixup: a batch mixed jointly, many inputs in each output, and the outputs different (thesis ch. 4)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import check_choice, check_numbers, check_strings, check_tensors
from .grid import Grid, as_image, pool, resolve_grid
from .mixed import check_constructor, draw_rng, one_hot, regions
from .saliency import check_batch, check_saliency

THRESHOLDS = ("hard", "soft")
_PRIOR_EPS = 1e-8  # the released code's guard inside the logarithm
_OBJECT = 8  # pixels over which saliency is averaged before its maximum is looked for
_CAP = 200_000  # states of the largest table of a sub-problem; on 4 x 4 none was seen to need more


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
        check_tensors(t=t)
        if t.ndim < (2 if line else 3) or len(t) != self.sources.shape[1] or not t.numel():
            raise ValueError(
                f"t has the shape {tuple(t.shape)}; give ({self.sources.shape[1]}, ..., {'L' if line else 'H, W'}) "
                "aligned with the inputs"
            )
        image = t.unsqueeze(-2) if line else t
        rows, cols = self.first.shape[1:]
        if image.shape[-2] % rows or image.shape[-1] % cols:
            raise ValueError(
                f"t has sides {tuple(image.shape[-2:])}, which the grid {rows}x{cols} does not divide; resize it"
            )
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
        omega: weight of the distance between salient places in A = (1 - omega) I + omega A_c; up to 2 / (partition + 2)
            A is positive semi-definite whatever the inputs.
        grid: n means n x n regions (n on 1-d inputs), a pair (rows, cols).
        partition: inputs that are mixed together; the last partition may be smaller.
        outputs: made of a whole partition, a smaller one makes its share of them; None is as many as inputs.
        n_iter: sweeps over the outputs.
        restarts: random starts; the one that ends with the lowest objective is taken.
        threshold: ``"hard"``, the released code: only inputs beyond tau cost, but fully; ``"soft"``, max{tau', v} of
            eq. 4.2 as printed.

    From the released code, where eq. 4.1 leaves it open or differs: L is 2, and the half labels are those of the two or
    three inputs that an output shows most, from its second sweep on, each preferred by 5e-4; a half next to one of its
    inputs costs beta / 4; the prior is that of the one-hot labels; before the last sweep, outputs that show the same
    inputs are charged for one of them each.

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
        check_numbers(alpha=alpha)
        check_strings(threshold=threshold)
        check_numbers(beta=beta, gamma=gamma, eta=eta, tau=tau, omega=omega)
        if not 0 < alpha < math.inf:
            raise ValueError(
                f"alpha={alpha} leaves the Dirichlet prior undefined; give a positive number, 2.0 in the thesis"
            )
        check_constructor(num_classes, alpha)
        for name, value in (("beta", beta), ("gamma", gamma), ("eta", eta), ("tau", tau)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value} must be finite and not negative")
        if not 0 <= omega <= 1:
            raise ValueError(f"omega={omega} must lie in [0, 1]; 0.001 in the thesis")
        for name, count in (("partition", partition), ("outputs", outputs), ("n_iter", n_iter), ("restarts", restarts)):
            if not (name == "outputs" and count is None) and (not isinstance(count, int | np.integer) or count < 1):
                raise ValueError(f"{name}={count} must be a whole number of at least 1")
        check_choice(THRESHOLDS, threshold=threshold)
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
                shares of another shape, or an omega for which A is not positive semi-definite.
        """
        check_batch(x)
        labels = one_hot(y, self.num_classes, len(x)).to(x.device)
        s = check_saliency(s, x)
        cells = resolve_grid(self.grid, tuple(x.shape[2:]))
        given = lam if lam is None else _shares_given(lam, len(x))
        starts = range(0, len(x), self.partition)
        # one generator each, so that restarts in one partition leave the others' draws alone
        rngs = draw_rng(generator).spawn(len(starts))
        pooled = pool(s, cells).flatten(1).cpu().double().numpy()
        objects = salient_places(s)
        first, second, total, gap = [], [], 0.0, 0.0
        for start, rng in zip(starts, rngs, strict=True):
            rows = slice(start, start + self.partition)
            a, b, value, bound = self._partition(
                pooled[rows], objects[rows], given if given is None else given[rows], cells, rng
            )
            first.append(a + start)
            second.append(b + start)
            total, gap = total + value, max(gap, bound)
        one, other = (torch.from_numpy(np.concatenate(p).reshape(-1, *cells)).to(x.device) for p in (first, second))
        sources = shares(one, other, len(x))
        with torch.autocast(x.device.type, enabled=False):  # which would round the targets
            targets = sources @ labels
        out = mix_regions(as_image(x), one, other)
        if x.ndim == 3:
            out = out.squeeze(2)
        elif x.is_contiguous(memory_format=torch.channels_last):
            out = out.contiguous(memory_format=torch.channels_last)
        return CoMixed(out, targets, sources, one, other, total, gap)

    def _partition(
        self, pooled: np.ndarray, objects: np.ndarray, given: np.ndarray | None, cells: Grid, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, float, float]:
        """Inputs (m', cells) of each place, the objective and the gap of the best start."""
        from .joint import sweeps  # importing numba takes half a second

        m, n = pooled.shape
        outputs = m if self.outputs is None else max(1, round(self.outputs * m / self.partition))
        share = rng.dirichlet(np.full(m, self.alpha)) if given is None else given
        if not share.sum() > 0:
            raise ValueError("lam is 0 for all inputs of a partition; give some of them a share above 0")
        share = share / share.sum()
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


def _shares_given(lam: Tensor, batch: int) -> np.ndarray:
    try:
        share = torch.as_tensor(lam, dtype=torch.float64).detach().cpu().numpy()
    except (TypeError, ValueError, RuntimeError) as e:
        raise TypeError(f"lam={lam!r:.80} must be a ({batch},) tensor of shares of at least 0") from e
    if share.shape != (batch,) or not (np.isfinite(share) & (share >= 0)).all():
        raise ValueError(f"lam has the shape {share.shape}; give ({batch},) finite shares of at least 0")
    return share


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
    if omega * apart.sum(1).max() > 1 - omega:  # else no eigenvalue is below 0, by Gershgorin
        limit = 1 / (1 - float(np.linalg.eigvalsh(apart)[0]))
        if omega > limit + 1e-12:
            raise ValueError(
                f"omega={omega} makes A indefinite for these inputs, and the penalty is then not supermodular (thesis "
                f"Proposition 6); give at most {math.floor(1000 * limit) / 1000}, or 2 / (partition + 2) for any inputs"
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
