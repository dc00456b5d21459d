"""The look every figure shares: colours that colour-blind readers tell apart, and PNG output."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

# Okabe and Ito's palette, darkest first; yellow is left out, it vanishes on white.
BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"
ORANGE, PURPLE, SKY = "#E69F00", "#CC79A7", "#56B4E9"
PALETTE = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY)
INK, QUIET, HAIRLINE = "#1f2933", "#5f6b76", "#d5dbe1"

DPI = 144


def new_figure(width_in: float, height_in: float) -> Figure:
    """An empty white figure with its own canvas; touches no global state, so threads are fine."""
    layout = ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.05)
    figure = Figure(figsize=(width_in, height_in), dpi=DPI, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    return figure


def style_axes(axes: Axes, title: str = "", x_label: str = "", y_label: str = "") -> None:
    """Left title, quiet spines, light horizontal grid, readable sizes."""
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK)
    axes.set_xlabel(x_label, fontsize=9, color=QUIET)
    axes.set_ylabel(y_label, fontsize=9, color=QUIET)
    axes.tick_params(labelsize=8.5, colors=QUIET, length=3)
    axes.grid(True, axis="y", color=HAIRLINE, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(HAIRLINE)


def show_image(axes: Axes, image: np.ndarray, title: str = "", color: str = INK) -> None:
    """Show pixels without ticks in a hairline frame."""
    axes.imshow(image, interpolation="lanczos" if min(image.shape[:2]) > 64 else "nearest")
    bare_axes(axes, title, color)


def bare_axes(axes: Axes, title: str = "", color: str = INK) -> None:
    """Remove ticks, keep a hairline frame, set a small title."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(HAIRLINE)
    if title:
        axes.set_title(title, fontsize=9, color=color, pad=4)


def to_png(figure: Figure) -> bytes:
    """Render to PNG bytes, without the software version and date, so that a re-run is identical."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def smooth(values: Sequence[float] | np.ndarray, window: int) -> np.ndarray:
    """Centred moving average over `window` values (fewer at the ends), NaNs left out."""
    values = np.asarray(values, dtype=float)
    known = np.isfinite(values)
    kernel = np.ones(min(window | 1, len(values)))
    total = np.convolve(np.where(known, values, 0.0), kernel, mode="same")
    count = np.convolve(known.astype(float), kernel, mode="same")
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0.5)
