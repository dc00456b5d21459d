"""Pictures of slides and tiles: nuclei, foreground, density, views, attention. PNG bytes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import EllipseCollection, PatchCollection
from matplotlib.colors import Normalize
from matplotlib.patches import Polygon, Rectangle
from PIL import Image

from cytoray.perturb import VIEW_COLUMN
from cytoray.report.slide_images import blend_density, check_rgb, fade_background, resize_mask
from cytoray.report.style import (
    BLUE,
    INK,
    ORANGE,
    QUIET,
    VERMILION,
    bare_axes,
    new_figure,
    show_image,
    to_png,
)

_MAX_OVERLAY_PX = 1400
_ATTENTION_CMAP = "viridis"


def nuclei_overlay(
    image: np.ndarray,
    nuclei: np.ndarray,
    mpp: float,
    truth_xy_px: np.ndarray | None = None,
    title: str = "",
) -> bytes:
    """Circles of detected nuclei on an image, crosses where the truth says one is.

    Args:
        image: uint8 (h, w, 3).
        nuclei: float (n, 4): x_px, y_px, radius_um, score in the image's own pixels.
        mpp: um per pixel of the image.
        truth_xy_px: float (m, 2), or None.
        title: written above.
    """
    image = check_rgb("image", image)
    figure, axes = _image_figure(image, title)
    nuclei = np.asarray(nuclei, dtype=float).reshape(-1, 4)
    _draw_circles(axes, nuclei[:, :2], nuclei[:, 2] / mpp, VERMILION)
    axes.set_xlabel(f"{len(nuclei)} nuclei detected", fontsize=9, color=VERMILION, loc="left")
    if truth_xy_px is not None:
        truth = np.asarray(truth_xy_px, dtype=float).reshape(-1, 2)
        axes.plot(truth[:, 0], truth[:, 1], "+", color=BLUE, markersize=5, markeredgewidth=1)
        axes.text(1, -0.01, f"{len(truth)} true (+)", transform=axes.transAxes, color=BLUE)
        axes.texts[-1].set(ha="right", va="top", fontsize=9)
    return to_png(figure)


def foreground_overlay(thumbnail: np.ndarray, mask: np.ndarray, title: str = "") -> bytes:
    """A thumbnail whose background is faded, the foreground outlined.

    Args:
        thumbnail: uint8 (h, w, 3).
        mask: bool, True is foreground; any size of the same shape, scaled to the thumbnail.
        title: written above.
    """
    thumbnail = check_rgb("thumbnail", thumbnail)
    mask = resize_mask(mask, thumbnail.shape[:2])
    figure, axes = _image_figure(fade_background(thumbnail, mask), title)
    share = 100 * float(mask.mean())
    axes.set_xlabel(f"{share:.1f} % foreground", fontsize=9, color=QUIET, loc="left")
    return to_png(figure)


def nuclei_density(thumbnail: np.ndarray, nuclei_xy_thumb: np.ndarray, title: str = "") -> bytes:
    """How nuclei are spread over a slide, as colour on its pale grey thumbnail.

    Args:
        thumbnail: uint8 (h, w, 3).
        nuclei_xy_thumb: float (n, 2) in thumbnail pixels.
        title: written above.
    """
    thumbnail = check_rgb("thumbnail", thumbnail)
    xy = np.asarray(nuclei_xy_thumb, dtype=float).reshape(-1, 2)
    figure, axes = _image_figure(blend_density(thumbnail, xy), title)
    axes.set_xlabel(f"{len(xy):,} nuclei", fontsize=9, color=QUIET, loc="left")
    return to_png(figure)


def view_grid(rows: Sequence[Mapping[str, Any]], max_local: int = 4) -> bytes:
    """One line a tile: original with its nuclei, perturbed, global crops, local crops.

    Args:
        rows: dicts with `original` and `perturbed` uint8 (S, S, 3), `nuclei_xy_px` float (n, 2),
            optional `radius_px` (n,) and `retained` bool (n,), `global_views` and `local_views`
            (sequences of uint8 (s, s, 3)), optional `outlines` float (k, 4, 2), the corners of
            the crops in tile pixels, the global ones first; see `crop_outlines`.
        max_local: local crops shown.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("view_grid needs at least one tile")
    num_global = max(len(row["global_views"]) for row in rows)
    num_local = min(max(len(row["local_views"]) for row in rows), max_local)
    columns = 2 + num_global + num_local
    figure = new_figure(1.55 * columns, 1.55 * len(rows) + 0.35)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for line, row in enumerate(rows):
        for axes in grid[line]:
            axes.set_axis_off()
        _draw_original(grid[line, 0], row, "original" if line == 0 else "")
        _draw_perturbed(grid[line, 1], row, num_local, "as trained on" if line == 0 else "")
        for start, name, color, most in (
            (2, "global", BLUE, num_global),
            (2 + num_global, "local", ORANGE, num_local),
        ):
            for index, view in enumerate(list(row[f"{name}_views"])[:most]):
                axes = grid[line, start + index]
                axes.set_axis_on()
                title = f"{name} {index + 1}" if line == 0 else ""
                show_image(axes, check_rgb(f"{name} view", view), title, color)
    return to_png(figure)


def _draw_original(axes: Axes, row: Mapping[str, Any], title: str) -> None:
    """Retained nuclei in blue, those the perturbation took away in vermilion."""
    axes.set_axis_on()
    show_image(axes, check_rgb("original", row["original"]), title)
    xy = np.asarray(row["nuclei_xy_px"], dtype=float).reshape(-1, 2)
    radius_px = np.broadcast_to(np.asarray(row.get("radius_px", 8.0), dtype=float), len(xy))
    retained = np.asarray(row.get("retained", np.ones(len(xy))), dtype=bool)
    _draw_circles(axes, xy[retained], radius_px[retained], BLUE)
    _draw_circles(axes, xy[~retained], radius_px[~retained], VERMILION)


def _draw_perturbed(axes: Axes, row: Mapping[str, Any], num_local: int, title: str) -> None:
    axes.set_axis_on()
    show_image(axes, check_rgb("perturbed", row["perturbed"]), title)
    outlines = np.asarray(row.get("outlines", ()), dtype=float).reshape(-1, 4, 2)
    num_global = len(row["global_views"])
    for index, corners in enumerate(outlines[: num_global + num_local]):
        color = BLUE if index < num_global else ORANGE
        axes.add_patch(Polygon(corners, closed=True, fill=False, edgecolor=color, linewidth=1))
    axes.set(xlim=(-0.5, row["perturbed"].shape[1] - 0.5))
    axes.set(ylim=(row["perturbed"].shape[0] - 0.5, -0.5))


def crop_outlines(view_params: np.ndarray) -> np.ndarray:
    """Corners of the crop windows in tile pixels, float (V, 4, 2), for `view_grid`.

    Args:
        view_params: float (V, NUM_VIEW_PARAMS), from `cytoray.perturb.sample_views`.
    """
    params = np.asarray(view_params, dtype=float)
    column = {name: params[:, index] for name, index in VIEW_COLUMN.items()}
    half = np.stack([column["width_px"], column["height_px"]], axis=1)[:, None] / 2
    offset = half * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    angle = np.deg2rad(column["angle_deg"])[:, None]
    x = np.cos(angle) * offset[..., 0] - np.sin(angle) * offset[..., 1]
    y = np.sin(angle) * offset[..., 0] + np.cos(angle) * offset[..., 1]
    centre = np.stack([column["center_x_px"], column["center_y_px"]], axis=1)[:, None]
    return centre + np.stack([x, y], axis=-1)


def views_to_uint8(
    views: np.ndarray, mean: Sequence[float], std: Sequence[float]
) -> list[np.ndarray]:
    """Undo the normalisation of rendered views: float (V, 3, s, s) to V uint8 (s, s, 3)."""
    pixels = np.moveaxis(np.asarray(views, dtype=np.float32), 1, -1)
    pixels = pixels * np.asarray(std, np.float32) + np.asarray(mean, np.float32)
    return list(np.clip(np.rint(pixels * 255), 0, 255).astype(np.uint8))


def attention_map(
    thumbnail: np.ndarray,
    xy_level0: np.ndarray,
    attention: np.ndarray,
    tile_level0_px: float,
    slide_size_level0_px: tuple[float, float],
    top_tiles: Sequence[np.ndarray] = (),
    top_indices: Sequence[int] = (),
    title: str = "",
) -> bytes:
    """Attention over a slide, and the tiles the head looked at most.

    Colour is the rank of a tile's weight, so that one very high weight does not blacken the rest;
    the weights themselves stand above the tiles, relative to uniform attention (1x).

    Args:
        thumbnail: uint8 (h, w, 3) of the whole slide.
        xy_level0: float (n, 2), top-left corners of the tiles at level 0.
        attention: float (n,), weights of the bag, any scale above zero.
        tile_level0_px: side of a tile at level 0.
        slide_size_level0_px: (width, height) at level 0.
        top_tiles: uint8 (s, s, 3) crops to show, most attended first (up to 9).
        top_indices: row of each of them in `xy_level0`.
        title: written above.
    """
    thumbnail = check_rgb("thumbnail", thumbnail)
    weights = np.asarray(attention, dtype=float).reshape(-1)
    scale = thumbnail.shape[1] / slide_size_level0_px[0]
    corners = np.asarray(xy_level0, dtype=float).reshape(-1, 2) * scale
    side = tile_level0_px * scale
    ranks = np.argsort(np.argsort(weights)) / max(len(weights) - 1, 1)
    relative = weights / weights.mean() if len(weights) and weights.mean() > 0 else weights

    top = list(zip(top_tiles, top_indices, strict=True))[:9]
    figure = new_figure(10.5 if top else 6.2, 5.2)
    halves = figure.add_gridspec(1, 2 if top else 1, width_ratios=[1.15, 1] if top else None)
    left = figure.add_subfigure(halves[0])
    axes = left.add_subplot()
    show_image(axes, _pale_grey(thumbnail), title)
    tiles = PatchCollection(
        [Rectangle((x, y), side, side) for x, y in corners],
        cmap=_ATTENTION_CMAP,
        norm=Normalize(0, 1),
        alpha=0.62,
        linewidths=0,
    )
    tiles.set_array(ranks)
    axes.add_collection(tiles)
    for number, (_, index) in enumerate(top, 1):
        x, y = corners[index]
        axes.add_patch(Rectangle((x, y), side, side, fill=False, edgecolor=VERMILION, linewidth=1))
        badge = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.8}
        label = axes.text(x + side, y, str(number), fontsize=7.5, color=VERMILION, bbox=badge)
        label.set(fontweight="bold", va="center", ha="center")
    bar = left.colorbar(
        ScalarMappable(Normalize(0, 100), _ATTENTION_CMAP), ax=axes, shrink=0.6, pad=0.02
    )
    bar.set_label("attention, percentile of the slide's tiles", fontsize=8.5, color=QUIET)
    bar.ax.tick_params(labelsize=8, colors=QUIET)
    bar.outline.set_visible(False)
    if top:
        columns = 2 if len(top) <= 4 else 3
        rows = int(np.ceil(len(top) / columns))
        cells = figure.add_subfigure(halves[1]).subplots(rows, columns, squeeze=False)
        for cell in cells.flat:
            cell.set_axis_off()
        for number, (cell, (tile, index)) in enumerate(zip(cells.flat, top, strict=False), 1):
            cell.set_axis_on()
            show_image(cell, check_rgb("top tile", tile), f"{number}   {relative[index]:.1f}x")
    return to_png(figure)


def _image_figure(image: np.ndarray, title: str) -> tuple[Any, Axes]:
    """A figure about the shape of `image`, which is shown at most 1400 pixels wide."""
    height, width = image.shape[:2]
    width_in = 6.5 if width >= height else max(6.5 * width / height, 3.0)
    figure = new_figure(width_in, width_in * height / width + (0.5 if title else 0.28))
    axes = figure.add_subplot()
    shrink = max(width, height) / _MAX_OVERLAY_PX
    shown = image
    if shrink > 1:
        size = (round(width / shrink), round(height / shrink))
        shown = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))
    axes.imshow(shown, extent=(0, width, height, 0), interpolation="antialiased")
    bare_axes(axes, title, INK)
    return figure, axes


def _draw_circles(axes: Axes, xy_px: np.ndarray, radius_px: np.ndarray, color: str) -> None:
    if len(xy_px):
        diameters = 2 * np.asarray(radius_px, dtype=float)
        circles = EllipseCollection(
            diameters,
            diameters,
            np.zeros(len(xy_px)),
            offsets=xy_px,
            offset_transform=axes.transData,
            units="xy",
            facecolors="none",
            edgecolors=color,
            linewidths=1.5,
        )
        axes.add_collection(circles)


def _pale_grey(rgb: np.ndarray) -> np.ndarray:
    """A light grey copy on which colours stand out: uint8 (h, w, 3)."""
    grey = np.asarray(Image.fromarray(rgb).convert("L"), dtype=np.float32)
    return np.repeat((128 + grey / 2).astype(np.uint8)[..., None], 3, axis=2)
