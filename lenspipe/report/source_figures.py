"""Figures of the source prior."""

from __future__ import annotations

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from lenspipe.report.figures import INK, MAPS, RESIDUAL_SPAN, STYLE, TRUTH, blank
from lenspipe.source.validation import SIGMA

COLOURS = {"decoder": TRUTH, "source": INK}
NAMES = {"decoder": "decoder alone", "source": "source prior"}
LABELS = {
    "galaxy": "galaxy",
    "encoder": "encoded and\ndecoded",
    "clean": "without noise",
    "decoder": "best fit of\nthe decoder",
    "source": "best fit of\nthe prior",
}


def reconstructions(pictures: xr.Dataset) -> Figure:
    """Test galaxies and what the source makes of them, each above what it leaves (as fig. 2 of the paper)."""
    rows: list[tuple[str, str | None]] = [("galaxy", None)]
    rows += [("encoder", "galaxy")] if "encoder" in pictures else []
    rows += [("clean", None)] + [(name, "clean") for name in ("decoder", "source") if name in pictures]
    lines = [line for name, of in rows for line in ([(name, None)] if of is None else [(name, None), (name, of)])]
    count = pictures.sizes["galaxy"]
    figure = blank(10, 10 / max(count, 5) * len(lines))
    with rc_context(STYLE):
        axes = figure.subplots(len(lines), count, squeeze=False)
        for panels, (name, of) in zip(axes, lines, strict=True):
            images = pictures[name].to_numpy()
            for panel, index in zip(panels, range(count), strict=True):
                if of is None:
                    light = _light(panel, images[index])
                else:
                    left = _left(panel, (pictures[of].to_numpy()[index] - images[index]) / SIGMA)
            panels[0].set_ylabel(LABELS[name] if of is None else "residual", fontsize=8)
        figure.colorbar(
            light, ax=axes[: len(lines) // 2].ravel().tolist(), label="flux / peak", fraction=0.02, pad=0.01
        )
        label = f"residual [{SIGMA:g} of the peak]"
        figure.colorbar(left, ax=axes[len(lines) // 2 :].ravel().tolist(), label=label, fraction=0.02, pad=0.01)
    return figure


def rotations(pictures: xr.Dataset) -> Figure:
    """One galaxy turned, its reconstructions, and those turned back (paper, fig. 3)."""
    angles = pictures.sizes["angle"]
    kinds = {"turned": "turned", "model": "recon-\nstructed", "turned_back": "turned\nback"}
    figure = blank(10, 10 / max(angles, 5) * (len(kinds) + 1))
    with rc_context(STYLE):
        axes = figure.subplots(len(kinds) + 1, angles, squeeze=False)
        for panels, (kind, label) in zip(axes, kinds.items(), strict=False):
            for panel, image in zip(panels, pictures[kind].to_numpy()[0], strict=True):
                light = _light(panel, image)
            panels[0].set_ylabel(label, fontsize=8)
        back = pictures["turned_back"].to_numpy()[0]
        for panel, image in zip(axes[-1], back, strict=True):
            left = _left(panel, (image - back[0]) / SIGMA)
        axes[-1, 0].set_ylabel("change", fontsize=8)
        for index, panel in enumerate(axes[0]):
            panel.set_title(f"{360 * index / angles:.0f}°", fontsize=8, pad=2)
        figure.colorbar(light, ax=axes[:3].ravel().tolist(), label="flux / peak", fraction=0.02, pad=0.01)
        figure.colorbar(left, ax=axes[3].tolist(), label=f"[{SIGMA:g} peak]", fraction=0.02, pad=0.01)
    return figure


def curves(noise: pd.DataFrame, power: pd.DataFrame, latents: pd.DataFrame | None) -> Figure:
    """chi^2 per pixel against S/N, power against spatial frequency, and the use of each latent."""
    panels = 2 if latents is None else 3
    figure = blank(10, 3)
    with rc_context(STYLE):
        axes = figure.subplots(1, panels)
        _signal_to_noise(axes[0], noise)
        _power(axes[1], power)
        if latents is not None:
            _latents(axes[2], latents)
        for panel in axes:
            panel.spines[["top", "right"]].set_visible(False)
    return figure


def _signal_to_noise(axes: Axes, table: pd.DataFrame) -> None:
    table = table.sort_values("noise_sd")
    signal = 1 / table["noise_sd"]
    for name in [name for name in NAMES if name in table]:
        axes.fill_between(signal, table[f"{name}_low"], table[f"{name}_high"], color=COLOURS[name], alpha=0.15, lw=0)
        axes.plot(signal, table[name], color=COLOURS[name], marker=".", label=NAMES[name])
    axes.axhline(1, color="0.5", lw=0.8, ls=":")
    axes.set(xscale="log", yscale="log", xlabel="peak S/N of a pixel", ylabel=r"$\chi^2$ per pixel")
    axes.legend(loc="upper left")


def _power(axes: Axes, table: pd.DataFrame) -> None:
    for name in [name for name in NAMES if name in table]:
        axes.plot(table["frequency"], table[name], color=COLOURS[name], label=NAMES[name])
    axes.axhline(1, color="0.5", lw=0.8, ls=":")
    axes.set(ylim=(0, 1.3), xlabel="cycles per width of the image", ylabel="power, fit / galaxy")


def _latents(axes: Axes, table: pd.DataFrame) -> None:
    use = np.sort(table["kl"].to_numpy())[::-1]
    axes.bar(range(len(use)), use, color=INK, width=0.8)
    axes.set(xlabel="latent, by use", ylabel=r"KL from $N(0, 1)$ [nat]")


def _light(panel: Axes, image: np.ndarray) -> AxesImage:
    panel.set(xticks=[], yticks=[])
    return panel.imshow(image, origin="lower", cmap=MAPS["light"], vmin=0, vmax=1)


def _left(panel: Axes, residual: np.ndarray) -> AxesImage:
    panel.set(xticks=[], yticks=[])
    return panel.imshow(residual, origin="lower", cmap=MAPS["residual"], vmin=-RESIDUAL_SPAN, vmax=RESIDUAL_SPAN)
