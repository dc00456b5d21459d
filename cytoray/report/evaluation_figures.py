"""Charts of classifiers and encoders: curves over shots, confusion, mistakes, maps, attention."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from cytoray.report.figures import message_figure
from cytoray.report.style import (
    HAIRLINE,
    INK,
    PALETTE,
    QUIET,
    VERMILION,
    bare_axes,
    new_figure,
    show_image,
    style_axes,
    to_png,
)

Point = tuple[float, float, float, float]
MARKERS = "osD^vP"


def few_shot_figure(
    series: Mapping[str, Sequence[Point]], y_label: str = "accuracy", chance: float | None = None
) -> bytes:
    """A curve for each way over the number of training images, with its interval.

    Args:
        series: name -> (images, mean, low, high) of each point; NaN bounds are not drawn.
        y_label: the metric.
        chance: drawn as a dashed line.

    Returns:
        PNG bytes; a figure that says so when there is nothing to draw.
    """
    drawn = {name: sorted(points) for name, points in series.items() if points}
    if not drawn:
        return message_figure("no few-shot trials were run")
    figure = new_figure(8.2, 4.4)
    axes = figure.add_subplot()
    for index, (name, points) in enumerate(drawn.items()):
        color = PALETTE[index % len(PALETTE)]
        style = "-" if index < len(PALETTE) else "--"
        x, mean, low, high = (np.array(column) for column in zip(*points, strict=True))
        axes.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
        marker = MARKERS[index % len(MARKERS)]
        axes.plot(x, mean, style, color=color, marker=marker, markersize=4, label=name)
    ticks = sorted({point[0] for points in drawn.values() for point in points})
    if ticks[-1] / ticks[0] > 3:
        axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    if chance is not None:
        axes.axhline(chance, color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
        axes.text(ticks[0], chance, " chance", va="bottom", fontsize=8.5, color=QUIET)
    style_axes(axes, "", "training images", y_label)
    axes.legend(
        fontsize=8.5, frameon=False, labelcolor=QUIET, loc="upper left", bbox_to_anchor=(1.0, 1.0)
    )
    return to_png(figure)


def interval_figure(rows: Sequence[tuple[str, float, float, float]], x_label: str) -> bytes:
    """One line a way: its value as a dot, its interval as a bar.

    Args:
        rows: (name, value, low, high).
        x_label: the metric.
    """
    if not rows:
        return message_figure("nothing was evaluated")
    figure = new_figure(8.2, 0.6 + 0.3 * len(rows))
    axes = figure.add_subplot()
    for place, (_, value, low, high) in enumerate(rows):
        y = len(rows) - 1 - place
        axes.plot([low, high], [y, y], color=PALETTE[0], linewidth=2, alpha=0.5)
        axes.plot([value], [y], "o", color=PALETTE[0], markersize=5)
        axes.annotate(
            f"{value:.3f}", (value, y), xytext=(0, 5), textcoords="offset points", ha="center",
            fontsize=8, color=INK,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [row[0] for row in reversed(rows)])
    axes.set_ylim(-0.6, len(rows) - 0.2)
    style_axes(axes, "", x_label)
    axes.grid(True, axis="x", color=HAIRLINE, linewidth=0.7)
    return to_png(figure)


def confusion_figure(counts: np.ndarray, classes: Sequence[str]) -> bytes:
    """Confusion matrix: counts, shaded by the share of the true class.

    Args:
        counts: int (C, C); rows are true classes, columns called ones.
        classes: C names.
    """
    counts = np.asarray(counts)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 1.8 + 0.62 * len(classes)
    figure = new_figure(side + 0.8, side)
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row in range(len(classes)):
        for column in range(len(classes)):
            dark = shares[row, column] > 0.55
            axes.text(
                column, row, f"{counts[row, column]}", ha="center", va="center", fontsize=8.5,
                color="white" if dark else INK,
            )  # fmt: skip
    names = [name if len(name) <= 24 else f"{name[:22]}..." for name in classes]
    axes.set_xticks(range(len(classes)), names, rotation=40, ha="right")
    axes.set_yticks(range(len(classes)), names)
    style_axes(axes, "", "called", "true")
    axes.grid(False)
    return to_png(figure)


def picture_grid(
    images: Sequence[np.ndarray], titles: Sequence[str], columns: int = 6, color: str = VERMILION
) -> bytes:
    """Images with a line or two above each.

    Args:
        images: uint8 (S, S, 3).
        titles: of each.
        columns: in a row.
        color: of the titles.
    """
    if not len(images):
        return message_figure("none")
    rows = math.ceil(len(images) / columns)
    figure = new_figure(min(len(images), columns) * 1.75, rows * 2.15)
    for place, (image, title) in enumerate(zip(images, titles, strict=True)):
        axes = figure.add_subplot(rows, min(len(images), columns), place + 1)
        show_image(axes, np.asarray(image))
        axes.set_title(title, fontsize=7.5, color=color, pad=3)
    return to_png(figure)


def embedding_figure(
    maps: Mapping[str, np.ndarray], labels: np.ndarray, classes: Sequence[str]
) -> bytes:
    """Features in two dimensions, a panel for each encoder, coloured by class.

    Args:
        maps: name -> (M, 2).
        labels: int (M,), index into `classes`.
        classes: names.
    """
    if not maps:
        return message_figure("no embedding map was asked for")
    columns = min(3, len(maps))
    rows = math.ceil(len(maps) / columns)
    figure = new_figure(3.6 * columns + 1.2, 3.4 * rows)
    axes = None
    for place, (name, xy) in enumerate(maps.items()):
        axes = figure.add_subplot(rows, columns, place + 1)
        for index, label in enumerate(classes):
            mine = labels == index
            axes.scatter(
                *xy[mine].T, s=7, linewidths=0, alpha=0.75, label=label,
                color=PALETTE[index % len(PALETTE)], marker=MARKERS[index // len(PALETTE) % 6],
            )  # fmt: skip
        bare_axes(axes, name)
    assert axes is not None
    handles, names = axes.get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside right upper", fontsize=8, frameon=False, markerscale=2
    )
    return to_png(figure)


def attention_figure(
    images: Sequence[np.ndarray], attention: Mapping[str, np.ndarray], titles: Sequence[str]
) -> bytes:
    """Images in the first row, and where each encoder looks in them below.

    Args:
        images: K of uint8 (S, S, 3).
        attention: encoder -> float (K, h, w), >= 0.
        titles: of the images.
    """
    if not attention or not len(images):
        return message_figure("no encoder here has attention to show")
    rows, columns = 1 + len(attention), len(images)
    figure = new_figure(1.7 * columns + 0.6, 1.85 * rows)
    for column, (image, title) in enumerate(zip(images, titles, strict=True)):
        axes = figure.add_subplot(rows, columns, column + 1)
        show_image(axes, np.asarray(image))
        axes.set_title(title, fontsize=7.5, color=QUIET, pad=3)
    for row, (name, maps) in enumerate(attention.items(), 1):
        for column, image in enumerate(images):
            axes = figure.add_subplot(rows, columns, row * columns + column + 1)
            height, width = image.shape[:2]
            axes.imshow(np.asarray(image).mean(axis=2), cmap="gray", extent=(0, width, height, 0))
            axes.imshow(
                maps[column], cmap="magma", alpha=0.6, interpolation="bicubic",
                extent=(0, width, height, 0),
            )  # fmt: skip
            bare_axes(axes)
            if column == 0:
                axes.set_ylabel(name[-22:], fontsize=7.5, color=INK)
    return to_png(figure)
