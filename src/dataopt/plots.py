"""Pictures of what a mix did. The only module that imports matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure

FIRST, SECOND = "#1f6fd6", "#f58a07"  # of the first and of the second input, everywhere in a picture
# Inches: the sides of a row's six panels, the gaps after them, the border and the line of titles.
_SIDES = (1.3, 1.3, 1.3, 1.3, 1.3, 1.75)
_GAP, _TITLE = 0.13, 0.4
_GAPS = (0.09, 0.28, 0.09, 0.28, 0.28, _GAP)
_CURVES = ("#8a8a8a", FIRST, "#d1342f")
_HEAT = LinearSegmentedColormap.from_list("heat", ["#ffd21f", "#ff5a1f", "#c00020"])


def show_mixes(
    first: np.ndarray,
    second: np.ndarray,
    first_saliency: np.ndarray,
    second_saliency: np.ndarray,
    mask: np.ndarray,
    mix: np.ndarray,
) -> Figure:
    """One row for each pair: both inputs, their saliency, the mask, the mix.

    Args:
        first, second, mix: (n, C, H, W) pixels in [0, 1], C being 1 or 3.
        first_saliency, second_saliency: (n, h, w), non-negative, of any scale; h and w may be coarser.
        mask: (n, H, W), share of the first input.

    Returns:
        A figure; :func:`to_png` makes the bytes of a file.
    """
    n = len(first)
    row = _SIDES[-1] + _GAP
    left = np.cumsum([_GAP, *(side + gap for side, gap in zip(_SIDES, _GAPS, strict=True))])
    width, height = float(left[-1]), n * row + _TITLE
    figure = Figure(figsize=(width, height), facecolor="white")

    def panel(i: int, column: int) -> Axes:
        side = _SIDES[column]
        bottom = height - _TITLE - i * row - (_SIDES[-1] + side) / 2  # centred in its row
        ax = figure.add_axes((left[column] / width, bottom / height, side / width, side / height))
        ax.set(xticks=[], yticks=[])
        return ax

    for start, side, title in zip(
        left, _SIDES, ("first", "saliency", "second", "saliency", "mask", "mix"), strict=False
    ):
        x = (start + side / 2) / width
        figure.text(x, 1 - _TITLE / 2 / height, title, ha="center", va="center", fontsize=12, color="#333333")
    for i in range(n):
        for column, pixels, heat, colour in ((0, first, first_saliency, FIRST), (2, second, second_saliency, SECOND)):
            _image(panel(i, column), pixels[i], colour)
            over = panel(i, column + 1)
            _image(over, pixels[i], colour, faint=True)
            _heat(over, heat[i], pixels.shape[2:])
        colours = _two_colours(mask[i])
        ax = panel(i, 4)
        ax.imshow(colours, interpolation="nearest")
        _frame(ax, "#555555", 0.8)
        ax = panel(i, 5)
        _image(ax, mix[i], "#555555", width=0.8)
        ax.imshow(colours, alpha=0.25, interpolation="nearest")
    return figure


Curve = tuple[Sequence[float], Sequence[float]]  # x and y of its points


def show_curves(panels: Mapping[str, Mapping[str, Curve]], x_label: str) -> Figure:
    """Panels side by side, each with one curve per method, in the same colours.

    Args:
        panels: title to method (at most three) to points.
        x_label: below every panel.
    """
    figure = Figure(figsize=(2.9 * len(panels), 2.9), facecolor="white", layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (title, curves) in zip(axes, panels.items(), strict=True):
        for (method, (x, y)), colour, marker in zip(curves.items(), _CURVES, "^so", strict=False):
            ax.plot(x, y, color=colour, marker=marker, markersize=4, linewidth=1.6, label=method)
        ax.set_title(title, fontsize=11)
        ax.set_xlabel(x_label)
        ax.grid(color="#e4e4e4", linewidth=0.7)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def to_png(figure: Figure, dpi: int = 110) -> bytes:
    """The figure as a PNG file."""
    out = BytesIO()
    figure.savefig(out, format="png", dpi=dpi)
    return out.getvalue()


def _image(ax: Axes, pixels: np.ndarray, colour: str, faint: bool = False, width: float = 3.0) -> None:
    shown = np.moveaxis(pixels, 0, -1).clip(0, 1)
    if len(pixels) == 1:
        shown = 1 - np.repeat(shown, 3, -1)  # ink on paper
    if faint:
        shown = 0.5 + 0.5 * shown
    ax.imshow(shown, interpolation="nearest")
    _frame(ax, colour, width)


def _heat(ax: Axes, saliency: np.ndarray, size: tuple[int, ...]) -> None:
    strength = (saliency - saliency.min()) / max(np.ptp(saliency), 1e-12)
    extent = (-0.5, size[1] - 0.5, size[0] - 0.5, -0.5)
    ax.imshow(_HEAT(strength), alpha=0.85 * strength**0.7, interpolation="bicubic", extent=extent)


def _frame(ax: Axes, colour: str, width: float) -> None:
    for spine in ax.spines.values():
        spine.set(color=colour, linewidth=width)


def _two_colours(mask: np.ndarray) -> np.ndarray:
    share = mask[..., None]
    return share * np.array(to_rgb(FIRST)) + (1 - share) * np.array(to_rgb(SECOND))
