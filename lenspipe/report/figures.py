"""Figures of the report. Each takes plain arrays and returns a figure that no window and no global state knows of."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import corner
import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import AsinhNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from scipy.stats import rankdata

DPI = 96
MAPS = {"light": "magma", "residual": "RdBu_r", "spread": "viridis"}
MASKED = "0.75"  # grey of pixels without a value
FAINT = 5.0  # sigma up to which an image is drawn on a linear scale, where it has cores far brighter
STEEP = 20.0  # so many times that
RESIDUAL_SPAN = 5.0  # sigma at the ends of the residuals' colour scale
STATUS_COLOURS = {"ok": "#1f6f8b", "flagged": "#c9730a", "failed": "#a8323e"}
STATUS_MARKERS = {"ok": "o", "flagged": "s", "failed": "x"}
TRUTH = "#c9730a"
INK = "#1f6f8b"
CHAINS = ("#1f6f8b", "#c9730a", "#5b8c3e", "#8a4f9e", "#a8323e", "#6b7280", "#b59a00", "#2f4b7c")
SYMBOLS = {
    "theta_E": r'$\theta_\mathrm{E}$ ["]',
    "gamma": r"$\gamma$",
    "q": r"$q$",
    "phi": r"$\phi$ [rad]",
    "e1": r"$e_1$",
    "e2": r"$e_2$",
    "center_x": r'$x_\mathrm{lens}$ ["]',
    "center_y": r'$y_\mathrm{lens}$ ["]',
    "gamma1": r"$\gamma_1$",
    "gamma2": r"$\gamma_2$",
}
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "axes.linewidth": 0.7,
    "axes.edgecolor": "#4b5563",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}

Extent = tuple[float, float, float, float]


def embedded(figure: Figure) -> str:
    """The figure as a PNG in a data URI."""
    stream = io.BytesIO()
    with rc_context(STYLE):
        figure.savefig(stream, format="png", dpi=DPI)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def blank(width: float, height: float, layout: Literal["constrained", "none"] = "constrained") -> Figure:
    """An empty figure [inch] in the report's style."""
    with rc_context(STYLE):
        return Figure(figsize=(width, height), layout=None if layout == "none" else layout)


def galaxy_strip(images: NDArray, labels: Sequence[str] = (), columns: int = 8) -> Figure:
    """Galaxy images [galaxy, y, x] of peak 1, in rows, each with its label where there are any."""
    rows = -(-len(images) // columns)
    figure = blank(10, rows * (1.42 if labels else 1.28))
    with rc_context(STYLE):
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for panel in axes:
            panel.set_axis_off()
        for index, image in enumerate(images):
            axes[index].imshow(image, origin="lower", cmap=MAPS["light"], vmin=0, vmax=1)
            if labels:
                axes[index].set_title(labels[index], fontsize=8, pad=2)
        shown = axes[0].images[0]
        figure.colorbar(shown, ax=axes.tolist(), label="flux / peak", fraction=0.02, pad=0.01)
    return figure


def training_curve(epochs: NDArray, train: NDArray, validation: NDArray) -> Figure:
    """ELBO per image [nat] against the epoch; the best validation ELBO is marked.

    The first epochs of a long training are far below the rest; the axis leaves them out.
    """
    figure = blank(7.2, 3)
    with rc_context(STYLE):
        axes = figure.subplots()
        axes.plot(epochs, train, color="#9ca3af", marker=".", ms=4, lw=1.2, label="training")
        axes.plot(epochs, validation, color=INK, marker=".", ms=4, lw=1.4, label="validation")
        best = int(np.argmax(validation))
        axes.axvline(epochs[best], color=TRUTH, lw=0.8, ls=":")
        axes.plot(epochs[best], validation[best], "o", mfc="none", mec=TRUTH, ms=9, label=f"best, epoch {epochs[best]}")
        top, bottom = max(train.max(), validation.max()), min(train.min(), validation.min())
        if len(epochs) >= 10:
            bottom = min(np.percentile(train, 15), np.percentile(validation, 15))
        margin = 0.08 * (top - bottom) or 1.0
        axes.set(xlabel="epoch", ylabel="ELBO per image [nat]", ylim=(bottom - margin, top + margin))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="lower right")
        _open_frame(axes)
    return figure


def recovery(
    truths: Mapping[str, NDArray], medians: Mapping[str, NDArray], errors: Mapping[str, NDArray], status: Sequence[str]
) -> Figure:
    """Recovered minus true value against the true one, for each parameter; errors: [2, lens], below and above."""
    figure = blank(10, 3.4)
    states = np.asarray(status)
    with rc_context(STYLE):
        for axes, (name, truth) in zip(figure.subplots(1, len(truths), squeeze=False)[0], truths.items(), strict=True):
            place = truth + side_steps(truth)
            axes.axhline(0, color="#4b5563", lw=0.8)
            for state in [s for s in STATUS_COLOURS if (states == s).any()]:
                rows = states == state
                axes.errorbar(
                    place[rows], (medians[name] - truth)[rows], errors[name][:, rows], label=state, ls="", capsize=0,
                    marker=STATUS_MARKERS[state], ms=4.5, elinewidth=1, color=STATUS_COLOURS[state],
                )  # fmt: skip
            axes.set(xlabel=f"true {SYMBOLS[name]}", ylabel=f"recovered − true {SYMBOLS[name]}")
            axes.legend(loc="best")
            _open_frame(axes)
    return figure


def side_steps(truth: NDArray) -> NDArray:
    """Small offsets that set lenses with the same true value beside one another."""
    unit = 0.015 * (np.ptp(truth) or 1.0)
    steps = np.zeros(len(truth))
    for value in np.unique(truth):
        same = np.flatnonzero(truth == value)
        steps[same] = unit * (np.arange(len(same)) - (len(same) - 1) / 2)
    return steps


def image_plane(
    image: NDArray, model: NDArray, noise: NDArray, usable: NDArray, pixel_scale: float, curve: NDArray
) -> Figure:
    """Observed image, model and residual [sigma], all [y, x], on axes in arcsec; masked pixels are grey.

    Where the core of a lens galaxy is far brighter than the noise, brightness is by its inverse hyperbolic sine.
    curve: critical curve [point, 2] ["], NaN where it is not known.
    """
    data = np.where(usable, image, np.nan)
    residual = np.where(usable, (image - model) / noise, np.nan)
    top = float(max(np.nanpercentile(data, 99.9), model.max()))
    bottom = float(min(np.nanpercentile(data, 1), 0.0))
    extent = image_extent(image, pixel_scale)
    faint = FAINT * float(np.median(noise[usable])) if usable.any() else math.inf
    linear = faint if top > STEEP * faint else math.inf
    figure, panels, bars = three_panels(("observed", "model (posterior mean)", "observed − model"))
    with rc_context(STYLE):
        for panel, picture in zip(panels, (data, model), strict=False):
            shown = _image(panel, picture, extent, "light", bottom, top, linear)
        _curve(panels[1], curve)
        figure.colorbar(shown, cax=bars[0], label="flux [image units]")
        figure.colorbar(_residual_image(panels[2], residual, extent), cax=bars[1], label=r"residual [$\sigma$]")
    return figure


def arcs_plane(
    image: NDArray,
    light: NDArray,
    model: NDArray,
    first_light: NDArray,
    arcs: NDArray,
    usable: NDArray,
    noise: NDArray,
    pixel_scale: float,
    curve: NDArray,
) -> Figure:
    """Observed image and model without the lens galaxy's light, and what the first look at the image left [sigma].

    All [y, x]; light, model: at the MAP; arcs: outlined in the third panel, which is left out where there was no first
    look. Masked pixels are grey.
    """
    data, arc_model = np.where(usable, image - light, np.nan), model - light
    top = float(max(np.percentile(arc_model[usable], 99.8), 3 * np.median(noise[usable])))
    extent = image_extent(image, pixel_scale)
    titles = ("observed − lens light (MAP)", "lensed source (MAP)", "first look, arcs outlined")
    figure, panels, bars = three_panels(titles)
    with rc_context(STYLE):
        for panel, picture in zip(panels, (data, arc_model), strict=False):
            shown = _image(panel, picture, extent, "light", -0.2 * top, top)
            _curve(panel, curve)
        figure.colorbar(shown, cax=bars[0], label="flux [image units]", extend="both")
        if not first_light.any():
            panels[2].set_visible(False)
            bars[1].set_visible(False)
            return figure
        left = np.where(usable, (image - first_light) / noise, np.nan)
        first = _residual_image(panels[2], left, extent)
        if arcs.any():
            panels[2].contour(arcs, [0.5], colors=TRUTH, linewidths=0.8, extent=extent, origin="lower")
        figure.colorbar(first, cax=bars[1], label=r"observed − light [$\sigma$]")
    return figure


def image_extent(image: NDArray, pixel_scale: float) -> Extent:
    """Left, right, bottom and top ["] of an image [y, x] with its middle at zero."""
    half_y, half_x = (0.5 * n * pixel_scale for n in image.shape)
    return (-half_x, half_x, -half_y, half_y)


def _curve(axes: Axes, curve: NDArray) -> None:
    """A closed curve [point, 2] ["]; nothing where it is not known."""
    if np.isfinite(curve).all():
        axes.plot(*np.concatenate([curve, curve[:1]]).T, color="w", lw=0.8, ls="--", scalex=False, scaley=False)


def source_plane(
    mean: NDArray,
    spread: NDArray,
    extent: Extent,
    other: NDArray,
    other_extent: Extent,
    other_title: str,
    caustic: NDArray,
) -> Figure:
    """Posterior mean of the source, another picture of it (the truth or the MAP), and the relative spread.

    mean, spread, other: [row, column], in image units; extents: left, right, bottom, top ["]; caustic: [point, 2] ["].
    The spread is shown where the mean is above 5 % of its peak.
    """
    top = float(max(mean.max(), other.max())) or 1.0
    bright = mean > 0.05 * mean.max()
    ratio = np.where(bright, spread / np.where(bright, mean, 1.0), np.nan)
    most = float(np.nanpercentile(ratio, 98)) if bright.any() else 1.0
    figure, panels, bars = three_panels(("source (posterior mean)", other_title, "relative spread of the source"))
    with rc_context(STYLE):
        _image(panels[0], mean, extent, "light", 0.0, top)
        light = _image(panels[1], other, other_extent, "light", 0.0, top)
        share = _image(panels[2], ratio, extent, "spread", 0.0, most or 1.0)
        figure.colorbar(light, cax=bars[0], label="flux [image units]")
        figure.colorbar(share, cax=bars[1], label="standard deviation / mean", extend="max")
        frame = union(extent, other_extent)
        for panel in panels:
            panel.set(xlim=frame[:2], ylim=frame[2:], facecolor="0.93")
        _curve(panels[0], caustic)
    return figure


def three_panels(titles: Sequence[str]) -> tuple[Figure, list[Axes], list[Axes]]:
    """Three square panels with axes in arcsec, and places of two colour bars: right of the second and of the third."""
    width, height, side = 9.6, 2.95, 2.3
    figure = blank(width, height, layout="none")

    def place(left: float, across: float) -> Axes:
        return figure.add_axes((left / width, 0.42 / height, across / width, side / height))

    with rc_context(STYLE):
        panels = [place(left, side) for left in (0.62, 3.1, 6.55)]
        bars = [place(left, 0.09) for left in (5.48, 8.93)]
        for panel, title in zip(panels, titles, strict=True):
            panel.set_title(title)
            panel.set_xlabel('x ["]', labelpad=1)
            panel.yaxis.set_tick_params(labelleft=panel is panels[0])
            panel.xaxis.set_major_locator(MaxNLocator(5))
            panel.yaxis.set_major_locator(MaxNLocator(5))
        panels[0].set_ylabel('y ["]', labelpad=1)
    return figure, panels, bars


def union(first: Extent, second: Extent) -> Extent:
    """The least square frame about two extents."""
    left, right = min(first[0], second[0]), max(first[1], second[1])
    bottom, top = min(first[2], second[2]), max(first[3], second[3])
    x, y, half = (left + right) / 2, (bottom + top) / 2, max(right - left, top - bottom) / 2
    return (x - half, x + half, y - half, y + half)


def corner_plot(draws: Mapping[str, NDArray], truths: Mapping[str, float]) -> Figure | None:
    """Marginals of the parameters that move, draws [chain, draw] each, and the truth; None where none moves.

    The axes reach to the truth.
    """
    moving = {name: values.ravel().astype(float) for name, values in draws.items() if np.ptp(values) > 0}
    if not moving:
        return None
    figure = blank(4.9, 4.9, layout="none")
    spans = [_span(values, truths.get(name)) for name, values in moving.items()]
    with rc_context(STYLE):
        corner.corner(
            np.stack(list(moving.values()), axis=1), fig=figure, bins=25, range=spans, color=INK, smooth=0.8,
            labels=[SYMBOLS.get(name, name) for name in moving], label_kwargs={"fontsize": 9},
            truths=[truths.get(name) for name in moving], truth_color=TRUTH, max_n_ticks=4, labelpad=0.1,
            levels=(0.393, 0.865), plot_density=False, fill_contours=True, data_kwargs={"alpha": 0.15, "ms": 1.5},
        )  # fmt: skip
        figure.subplots_adjust(left=0.17, bottom=0.17, right=0.985, top=0.985)
    return figure


def chains_plot(draws: Mapping[str, NDArray]) -> Figure:
    """Traces and ranks of each parameter, draws [chain, draw] each, two parameters side by side."""
    rows = -(-len(draws) // 2)
    height = 1.25 * rows + 0.65
    figure = blank(10, height, layout="none")
    with rc_context(STYLE | {"xtick.labelsize": 7, "ytick.labelsize": 7, "axes.titlesize": 8.5}):
        axes = figure.subplots(rows, 4, squeeze=False)
        figure.subplots_adjust(0.065, 0.4 / height, 0.99, 1 - 0.25 / height, wspace=0.3, hspace=0.28)
        panels = axes.reshape(-1, 2)
        for (trace, ranks), (name, values) in zip(panels, draws.items(), strict=False):
            for chain, line in enumerate(values):
                trace.plot(line, lw=0.5, alpha=0.8, color=CHAINS[chain % len(CHAINS)])
            trace.set_ylabel(SYMBOLS.get(name, name), fontsize=8.5, labelpad=2)
            trace.margins(x=0)
            _rank_panel(ranks, values)
        for panel, title in zip(axes[0], ("trace", "ranks") * 2, strict=True):
            panel.set_title(title)
        for panel in panels[len(draws) :].ravel():
            panel.set_visible(False)
        for column, text in enumerate(("draw", "rank among all draws") * 2):
            axes[-1, column].set_xlabel(text, fontsize=7.5)
    return figure


def rank_counts(values: NDArray, bins: int) -> NDArray:
    """How many draws of each chain fall in each bin of the rank among all draws; values: [chain, draw]."""
    ranks = rankdata(values).reshape(values.shape)
    edges = np.linspace(0.5, values.size + 0.5, bins + 1)
    return np.stack([np.histogram(chain, edges)[0] for chain in ranks])


def rank_bins(draws: int) -> int:
    """Number of bins of a rank plot: about fifteen draws of a chain in each."""
    return int(np.clip(draws // 15, 4, 20))


def _rank_panel(axes: Axes, values: NDArray) -> None:
    """Ranks of each chain as steps; the grey band holds 95 % of the bins of independent draws."""
    chains, draws = values.shape
    bins = rank_bins(draws)
    expected = draws / bins
    scatter = np.sqrt(expected * (1 - 1 / bins) * (1 - 1 / chains))
    axes.axhspan(max(expected - 1.96 * scatter, 0), expected + 1.96 * scatter, color="0.9", lw=0)
    axes.axhline(expected, color="0.6", lw=0.6)
    edges = np.linspace(0, values.size, bins + 1)
    for chain, counts in enumerate(rank_counts(values, bins)):
        axes.stairs(counts, edges, color=CHAINS[chain % len(CHAINS)], lw=0.9, baseline=None)
    axes.set(xlim=(0, values.size), ylim=(0, None))


def _span(values: NDArray, truth: float | None) -> tuple[float, float]:
    ends = [*np.percentile(values, [0.2, 99.8]), *([] if truth is None else [truth])]
    margin = 0.05 * (max(ends) - min(ends)) or 1e-3
    return float(min(ends) - margin), float(max(ends) + margin)


def _image(
    axes: Axes, picture: NDArray, extent: Extent | None, kind: str, bottom: float, top: float, linear: float = math.inf
) -> AxesImage:
    """A picture; its scale is linear up to `linear` and goes by the logarithm beyond."""
    axes.set_facecolor(MASKED)
    norm = Normalize(bottom, top) if top < linear else AsinhNorm(linear, bottom, top)
    return axes.imshow(picture, origin="lower", extent=extent, cmap=MAPS[kind], norm=norm)


def _residual_image(axes: Axes, residual: NDArray, extent: Extent | None) -> AxesImage:
    return _image(axes, residual, extent, "residual", -RESIDUAL_SPAN, RESIDUAL_SPAN)


def _open_frame(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.93", lw=0.6)
    axes.set_axisbelow(True)
