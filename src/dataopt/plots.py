"""Pictures of what a mix did, what a cache kept, how samples relate, what a data set was condensed to.

The only module that imports matplotlib.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter, StrMethodFormatter

FIRST, SECOND = "#1f6fd6", "#f58a07"  # of the first and of the second input, everywhere in a picture
# Inches: the sides of a row's six panels, the gaps after them, the border and the line of titles.
_SIDES = (1.3, 1.3, 1.3, 1.3, 1.3, 1.75)
_GAP, _TITLE = 0.13, 0.4
_GAPS = (0.09, 0.28, 0.09, 0.28, 0.28, _GAP)
_CURVES = ("#8a8a8a", FIRST, "#d1342f", SECOND, "#2f8f4e")
_SHARE = LinearSegmentedColormap.from_list("share", ["#eef3fa", "#8fb8e8", FIRST, "#0c2f66"])
_CONFLICT = LinearSegmentedColormap.from_list("conflict", ["#b3261e", "#e8a29c", "#d9d9d9", "#8fb8e8", FIRST])
_CHANGE = LinearSegmentedColormap.from_list("change", [SECOND, "#fbd9ad", "#ffffff", "#b5d0f2", FIRST])
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
        panels: title to method (at most five) to points.
        x_label: below every panel.
    """
    figure = Figure(figsize=(2.9 * len(panels), 2.9), facecolor="white", layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (title, curves) in zip(axes, panels.items(), strict=True):
        for (method, (x, y)), colour, marker in zip(curves.items(), _CURVES, "^soDv", strict=False):
            ax.plot(x, y, color=colour, marker=marker, markersize=4, linewidth=1.6, label=method)
        ax.set_title(title, fontsize=11)
        ax.set_xlabel(x_label)
        if all(isinstance(value, int) for x, _ in curves.values() for value in x):
            ax.xaxis.get_major_locator().set_params(integer=True)
        _plain(ax)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 2 * len(panels)), frameon=False)
    return figure


def show_kept(lengths: np.ndarray, seen: int) -> Figure:
    """Share of the pairs that each head of each layer kept, as a heat map.

    Args:
        lengths: (L, H), pairs that stayed.
        seen: pairs that there were, the same number for every head.
    """
    layers, heads = lengths.shape
    cell = min(0.34, 9 / layers)
    height = max(cell * heads, 0.9)
    figure = Figure(figsize=(max(cell * layers + 1.9, 5), height + 1.2), facecolor="white", layout="constrained")
    ax = figure.subplots()
    share = lengths.T / seen
    shown = ax.imshow(share, vmin=0, vmax=1, cmap=_SHARE, aspect="auto", interpolation="nearest")
    ax.set_xticks(np.arange(-0.5, layers), minor=True)
    ax.set_yticks(np.arange(-0.5, heads), minor=True)
    ax.grid(which="minor", color="white", linewidth=1)
    ax.tick_params(which="both", length=0)
    ax.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    ax.set(xlim=(-0.5, layers - 0.5), ylim=(heads - 0.5, -0.5), xlabel="layer", ylabel="key head")
    ax.spines[:].set_visible(False)
    span = f"{share.min():.1%} to {share.max():.1%} a head"
    ax.set_title(f"kept: {share.mean():.1%} of {seen:,} pairs, {span}", fontsize=11, loc="left")
    figure.colorbar(shown, ax=ax, format=PercentFormatter(1), ticks=[0, 0.5, 1], pad=0.02)
    return figure


def show_sweep(ratios: Sequence[float], nbytes: Sequence[int], losses: Mapping[str, Sequence[float]]) -> Figure:
    """Quality and size over the share of pairs that stays, side by side.

    Args:
        ratios: in any order.
        nbytes: for each ratio.
        losses: what was asked for (at most three) to a negative log-likelihood per token for each ratio.
    """
    figure = Figure(figsize=(7.4, 3.1), facecolor="white", layout="constrained")
    quality, size = figure.subplots(1, 2)
    order = np.argsort(ratios)
    x = np.asarray(ratios)[order]
    for (name, y), colour, marker in zip(losses.items(), (FIRST, SECOND, "#d1342f"), "os^", strict=False):
        quality.plot(x, np.asarray(y)[order], color=colour, marker=marker, markersize=4, linewidth=1.6, label=name)
    quality.set_ylim(bottom=0)
    quality.set_title("loss, nats per token (lower is better)", fontsize=11)
    quality.legend(frameon=False)
    size.plot(x, np.asarray(nbytes)[order] / 1e6, color="#444444", marker="o", markersize=4, linewidth=1.6)
    size.set_ylim(bottom=0)
    size.set_title("stored pairs, MB", fontsize=11)
    for ax in (quality, size):
        ax.set_xlim(0, 1.03)
        ax.xaxis.set_major_formatter(PercentFormatter(1))
        ax.set_xlabel("pairs kept")
        _plain(ax)
    return figure


def show_histograms(prefill: np.ndarray, reconstruction: np.ndarray, bins: int = 50) -> Figure:
    """How much attention the pairs receive at most, while a text is read and while it is repeated (figure 8.5).

    Args:
        prefill, reconstruction: of any shape, in [0, 1]: the maximum for each pair.
    """
    figure = Figure(figsize=(5.2, 3.2), facecolor="white", layout="constrained")
    ax = figure.subplots()
    edges = np.linspace(0, 1, bins + 1)
    for values, colour, name in ((prefill, "#8a8a8a", "prefill"), (reconstruction, FIRST, "reconstruction")):
        counts = np.histogram(np.ravel(values), edges)[0]
        label = f"{name}, {np.mean(np.ravel(values) > 0.5):.1%} above 0.5"
        ax.stairs(counts, edges, fill=True, color=colour, alpha=0.35)
        ax.stairs(counts, edges, color=colour, linewidth=1.6, label=label)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))  # the default of a log axis wants fonts of its own
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set(xlim=(0, 1), xlabel="maximum attention that a pair receives", ylabel="pairs")
    ax.legend(frameon=False)
    _plain(ax)
    return figure


def show_joint(panels: Sequence[tuple[tuple[str, np.ndarray], tuple[str, np.ndarray]]], bins: int = 40) -> Figure:
    """Maximum attention of each pair under two tasks, as 2-d histograms with one scale of colours (figure 8.6).

    Args:
        panels: for each panel what is on the x and on the y axis: its name and, for each pair, a value in [0, 1]. Both
            arrays have the same number of values.
    """
    figure = Figure(figsize=(2.55 * len(panels) + 0.8, 2.95), facecolor="white", layout="compressed")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    edges = np.linspace(0, 1, bins + 1)
    shares = [
        np.histogram2d(np.ravel(x), np.ravel(y), [edges, edges])[0].T / max(np.size(x), 1) for (_, x), (_, y) in panels
    ]
    least = min(s[s > 0].min(initial=1) for s in shares)
    norm = LogNorm(least, max(max(s.max() for s in shares), 10 * least))
    for ax, ((x_name, _), (y_name, _)), share in zip(axes, panels, shares, strict=True):
        # an empty cell is no colour of the scale
        shown = ax.pcolormesh(edges, edges, np.ma.masked_equal(share, 0), norm=norm, cmap=_SHARE, rasterized=True)
        ax.plot([0, 1], [0, 1], color="#555555", linewidth=0.8, linestyle=(0, (4, 3)))
        ax.set(xlabel=x_name, ylabel=y_name, aspect="equal", xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
    bar = figure.colorbar(shown, ax=list(axes), label="share of pairs", pad=0.02, format=StrMethodFormatter("{x:g}"))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    return figure


def show_relation_map(
    mean: np.ndarray, std: np.ndarray, last: np.ndarray, title: str = "", most: float | None = None
) -> Figure:
    """One sample's relations to all others over the checkpoints of a training (thesis section 5.3.6, figure 5.1).

    Args:
        mean, std: (m,) over the checkpoints.
        last: (m,) at the last checkpoint; its colour.
        most: of the axes and colours; None is the largest magnitude there is.
    """
    figure = Figure(figsize=(4.6, 3.4), facecolor="white", layout="constrained")
    ax = figure.subplots()
    most = float(max(np.abs(mean).max(initial=0), np.abs(last).max(initial=0), 1e-12)) if most is None else most
    order = np.argsort(np.abs(last), kind="stable")  # the strong ones on top
    dots = ax.scatter(mean[order], std[order], c=last[order], cmap=_CONFLICT, vmin=-most, vmax=most, s=14, linewidths=0)
    ax.axvline(0, color="#8a8a8a", linewidth=0.8)
    ax.set(xlim=(-1.05 * most, 1.05 * most), xlabel="mean relation", ylabel="standard deviation", title=title)
    ax.set_ylim(bottom=min(0.0, -0.03 * float(np.max(std, initial=1e-12))))
    _plain(ax)
    figure.colorbar(dots, ax=ax, label="at the last checkpoint")
    return figure


def show_condensed(names: Sequence[str], stored: Sequence[np.ndarray], decoded: Sequence[np.ndarray]) -> Figure:
    """A contact sheet of a condensed data set: a row for each class, what is stored beside what it is decoded to.

    Args:
        names: of the classes.
        stored, decoded: for each class (n, C, H, W) pixels in [0, 1], C being 1 or 3; all of one size.
    """
    return _sheets(names, {"stored": _sheet(stored), "decoded": _sheet(decoded)})


def show_changes(names: Sequence[str], before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> Figure:
    """How images changed: before, after, and the difference, whose colours are blue for more and orange for less.

    Args:
        names: of the classes, a row each.
        before, after: for each class (n, C, H, W) pixels in [0, 1], C being 1 or 3; all of one size.
    """
    change = [(b - a).mean(1) for a, b in zip(before, after, strict=True)]  # over the channels
    most = max(1e-12, *(float(np.abs(c).max()) for c in change))
    coloured = [np.moveaxis(_CHANGE((c / most + 1) / 2)[..., :3], -1, 1) for c in change]
    title = f"change, up to {most:.2f}" if most >= 0.005 else "no change"
    return _sheets(names, {"before": _sheet(before), "after": _sheet(after), title: _sheet(coloured)})


def _sheets(names: Sequence[str], sheets: Mapping[str, np.ndarray]) -> Figure:
    label = 0.09 * max(map(len, names)) + 0.2
    row = 0.8 if len(names) <= 10 else 0.55
    row *= min(1.0, (15 - label) / sum(row * len(names) * s.shape[1] / s.shape[0] for s in sheets.values()))
    height = row * len(names)
    widths = [max(height * s.shape[1] / s.shape[0], 0.09 * len(title)) for title, s in sheets.items()]
    size = (sum(widths) + 0.2 * len(widths) + label, height + 0.4)
    figure = Figure(figsize=size, facecolor="white", layout="constrained")
    axes = figure.subplots(1, len(sheets), squeeze=False, width_ratios=widths)[0]
    for ax, (title, sheet) in zip(axes, sheets.items(), strict=True):
        ax.imshow(sheet, interpolation="nearest")
        ax.set_title(title, fontsize=10, loc="left")
        ax.set(xticks=[], yticks=[], anchor="W")
        ax.spines[:].set_visible(False)
    step = len(sheets[next(iter(sheets))]) / len(names)
    axes[0].set_yticks((np.arange(len(names)) + 0.5) * step - 0.5, names, fontsize=9)
    axes[0].tick_params(length=0)
    return figure


def _sheet(rows: Sequence[np.ndarray]) -> np.ndarray:
    """(h, w, 3): the images of each row beside each other, white between them."""
    height, width = rows[0].shape[2:]
    gap, columns = max(1, round(min(height, width) / 16)), max(map(len, rows))
    out = np.ones((len(rows) * (height + gap), columns * (width + gap), 3))
    for r, images in enumerate(rows):
        for c, pixels in enumerate(images):
            top, left = r * (height + gap), c * (width + gap)
            out[top : top + height, left : left + width] = np.moveaxis(pixels, 0, -1)  # grey is copied to three
    return out.clip(0, 1)


def show_labels(images: np.ndarray, titles: Sequence[str], right: np.ndarray, columns: int = 6) -> Figure:
    """Pictures with a line above each.

    Args:
        images: (n, C, H, W) pixels in [0, 1], C being 1 or 3.
        titles: n lines.
        right: (n,) bool; a green frame for True, a red one for False.
    """
    rows = max(1, -(-len(images) // columns))
    figure = Figure(figsize=(1.3 * columns, 1.55 * rows), facecolor="white", layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes[len(images) :]:
        ax.set_axis_off()
    for ax, pixels, title, good in zip(axes, images, titles, right, strict=False):
        _image(ax, pixels, "#1c7a46" if good else "#b3261e")
        ax.set(xticks=[], yticks=[])
        ax.set_title(title, fontsize=10)
    return figure


def show_reliability(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]], errors: Mapping[str, float] | None = None
) -> Figure:
    """Accuracy over confidence, one panel for each classifier (figure 4.4): above the diagonal it is under-confident.

    Args:
        curves: name to confidence, accuracy and share of the predictions, (bins,) each; NaN in an empty bin. The
            larger a bin's share, the larger its dot.
        errors: name to expected calibration error in [0, 1], for the titles.
    """
    figure = Figure(figsize=(2.5 * len(curves), 2.8), facecolor="white", layout="compressed")
    axes = figure.subplots(1, len(curves), squeeze=False, sharey=True)[0]
    for ax, (name, (confidence, accuracy, share)) in zip(axes, curves.items(), strict=True):
        full = np.isfinite(confidence)
        ax.plot([0, 1], [0, 1], color="#8a8a8a", linewidth=0.8, linestyle=(0, (4, 3)))
        ax.plot(confidence[full], accuracy[full], color=FIRST, linewidth=1.6)
        ax.scatter(confidence[full], accuracy[full], s=8 + 160 * share[full], color=FIRST, alpha=0.7, linewidths=0)
        title = f"{name}, ECE {errors[name]:.1%}" if errors else name
        ax.set(xlim=(0, 1.03), ylim=(0, 1.03), xlabel="confidence", aspect="equal")
        ax.set_title(title, fontsize=11)
        ax.set(xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
        _plain(ax)
    axes[0].set_ylabel("accuracy")
    return figure


def to_png(figure: Figure, dpi: int = 110) -> bytes:
    """The figure as a PNG file."""
    out = BytesIO()
    figure.savefig(out, format="png", dpi=dpi)
    return out.getvalue()


def _plain(ax: Axes) -> None:
    ax.grid(color="#e4e4e4", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


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
