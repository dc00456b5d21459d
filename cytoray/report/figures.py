"""Charts: training curves and ROC. Arrays and events in, PNG bytes out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from cytoray.report.style import (
    BLUE,
    HAIRLINE,
    INK,
    PALETTE,
    QUIET,
    new_figure,
    smooth,
    style_axes,
    to_png,
)

_NOT_METRICS = frozenset({"time", "step", "epoch", "rank", "world_size"})
_MAX_PANELS = 8


def series_from_events(
    events: Iterable[Mapping[str, Any]], x: str = "step", event: str | None = None
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Collect the numbers of a run's events by name.

    Args:
        events: dicts with `x`; the numbers stand beside it or in a dict `metrics`. When a step
            comes twice (a resumed run repeats some), the later one counts.
        x: the name of the horizontal value.
        event: use only events of this kind (their field `event`); None for all.

    Returns:
        name -> (x float (n,), y float (n,)) sorted by x.
    """
    values: dict[str, dict[float, float]] = {}
    for entry in events:
        if x not in entry or (event is not None and entry.get("event") != event):
            continue
        nested = entry.get("metrics")
        numbers = {**entry, **(nested if isinstance(nested, Mapping) else {})}
        for name, value in numbers.items():
            if name in _NOT_METRICS or name == x or isinstance(value, bool):
                continue
            if isinstance(value, (int, float)):
                values.setdefault(name, {})[float(entry[x])] = float(value)
    series: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, points in values.items():
        order = sorted(points)
        series[name] = (np.array(order), np.array([points[at] for at in order]))
    return series


def loss_curves(
    events: Iterable[Mapping[str, Any]],
    names: Sequence[str] | None = None,
    x: str = "step",
    event: str | None = None,
) -> bytes:
    """Small panels, one a series: values pale, their moving average strong.

    Args:
        events: see `series_from_events`.
        names: which series, in this order; None for those with "loss" in their name, the total
            (`loss`) first, then `dino`, `ibot`, `koleo` parts and the learning rate, if present.
        x: the horizontal value.
        event: use only events of this kind.

    Returns:
        PNG bytes; a figure that says so when there is nothing to draw.
    """
    series = series_from_events(events, x, event)
    chosen = list(names) if names is not None else _default_names(series)
    chosen = [name for name in chosen if name in series][:_MAX_PANELS]
    if not chosen:
        return message_figure("no losses were logged")
    columns = min(len(chosen), 3 if len(chosen) != 4 else 2)
    rows = math.ceil(len(chosen) / columns)
    figure = new_figure(min(3.6 * columns + 0.4, 11), 2.6 * rows)
    for index, name in enumerate(chosen):
        axes = figure.add_subplot(rows, columns, index + 1)
        _draw_series(axes, *series[name], PALETTE[index % len(PALETTE)])
        last_row = index >= len(chosen) - columns
        style_axes(axes, name.replace("_", " "), x if last_row else "")
    return to_png(figure)


def _default_names(series: Mapping[str, Any]) -> list[str]:
    total = [name for name in ("loss", "total_loss", "loss_total") if name in series]
    parts = [
        name
        for name in series
        if name not in total and ("loss" in name or name in ("dino", "ibot", "koleo"))
    ]
    rates = [name for name in ("lr", "learning_rate") if name in series]
    return [*total, *parts, *rates]


def _draw_series(axes: Axes, x: np.ndarray, y: np.ndarray, color: str) -> None:
    """The last smoothed value is written at its end, so that it can be read without the axis."""
    mean = smooth(y, window=len(x) // 25)
    if len(x) < 50:
        axes.plot(x, y, color=color, linewidth=1.8, marker="o", markersize=2.5)
    else:
        axes.plot(x, y, color=color, linewidth=0.8, alpha=0.35)
        axes.plot(x, mean, color=color, linewidth=1.8)
    finite = np.flatnonzero(np.isfinite(mean))
    if finite.size:
        last = finite[-1]
        axes.annotate(
            f"{mean[last]:.3g}",
            (x[last], mean[last]),
            xytext=(0, 6),
            textcoords="offset points",
            ha="right",
            fontsize=8.5,
            color=color,
            fontweight="bold",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )
    axes.margins(x=0.02, y=0.12)


def roc_curve_points(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Corners of the ROC curve, ties in one step: (false positive rate, true positive rate)."""
    order = np.argsort(-scores, kind="stable")
    labels, scores = labels[order].astype(float), scores[order]
    ends = np.flatnonzero(np.append(np.diff(scores) != 0, True))
    true_positives = np.cumsum(labels)[ends]
    false_positives = ends + 1 - true_positives
    tpr = np.concatenate([[0.0], true_positives / max(labels.sum(), 1)])
    fpr = np.concatenate([[0.0], false_positives / max(len(labels) - labels.sum(), 1)])
    return fpr, tpr


def roc_figure(
    labels: Sequence[int] | np.ndarray,
    scores: Sequence[float] | np.ndarray,
    auc_ci: tuple[float, float] | None = None,
    groups: Sequence[Any] | np.ndarray | None = None,
    unit: str = "patients",
    positive_name: str = "positive",
    num_resamples: int = 500,
    seed: int = 0,
) -> bytes:
    """ROC curve with a pointwise 95 % band, bootstrapped over groups.

    Args:
        labels: 0 or 1, (n,).
        scores: higher is more positive, (n,).
        auc_ci: the interval to print; from the evaluation, so that page and summary agree. None
            prints the one of the band's own resamples.
        groups: patient of each slide, (n,): whole patients are drawn; None draws slides.
        unit: what the groups are, in the plural.
        positive_name: what label 1 means, for the axis.
        num_resamples: bootstrap resamples of the band.
        seed: of the resampling.

    Raises:
        ValueError: lengths differ, or labels are not 0 and 1.
    """
    labels, scores = np.asarray(labels), np.asarray(scores, dtype=float)
    if labels.shape != scores.shape or not np.isin(labels, (0, 1)).all():
        raise ValueError("labels and scores must be equally long, labels 0 or 1")
    if len(np.unique(labels)) < 2:
        return message_figure("a ROC curve needs slides of both classes")
    group_ids = np.arange(len(labels)) if groups is None else np.asarray(groups)
    fpr, tpr = roc_curve_points(labels, scores)
    grid = np.linspace(0, 1, 201)
    curves, aucs = _bootstrap_curves(labels, scores, group_ids, grid, num_resamples, seed)
    auc = float(np.trapezoid(tpr, fpr))

    figure = new_figure(5.0, 4.6)
    axes = figure.add_subplot()
    if len(curves):
        low, high = np.percentile(curves, [2.5, 97.5], axis=0)
        axes.fill_between(grid, low, high, color=BLUE, alpha=0.16, linewidth=0, label="95 % band")
        auc_ci = auc_ci or (float(np.percentile(aucs, 2.5)), float(np.percentile(aucs, 97.5)))
    axes.plot([0, 1], [0, 1], color=QUIET, linewidth=1, linestyle=(0, (4, 3)), label="chance")
    axes.plot(fpr, tpr, color=BLUE, linewidth=2.2, label="held-out slides")
    style_axes(axes, "ROC", "false positive rate", f"true positive rate ({positive_name})")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    axes.grid(True, color=HAIRLINE, linewidth=0.7)
    interval = f"\n95 % CI {auc_ci[0]:.3f} to {auc_ci[1]:.3f}" if auc_ci else ""
    slides = f"{len(labels)} slides"
    slides += f" of {len(np.unique(group_ids))} {unit}" if groups is not None else ""
    text = f"AUC {auc:.3f}{interval}\n{slides}, {int(labels.sum())} of class {positive_name}"
    axes.text(0.97, 0.24, text, ha="right", va="bottom", fontsize=10, color=INK)
    axes.legend(loc="lower right", fontsize=8.5, frameon=False, labelcolor=QUIET)
    return to_png(figure)


def _bootstrap_curves(
    labels: np.ndarray,
    scores: np.ndarray,
    group_ids: np.ndarray,
    grid: np.ndarray,
    num_resamples: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """TPR on `grid` and AUC of resamples that hold both classes: (r, len(grid)) and (r,)."""
    rng = np.random.default_rng(seed)
    _, group_of = np.unique(group_ids, return_inverse=True)
    members = [np.flatnonzero(group_of == group) for group in range(group_of.max() + 1)]
    curves, aucs = [], []
    for _ in range(num_resamples):
        drawn = rng.integers(0, len(members), len(members))
        rows = np.concatenate([members[group] for group in drawn])
        if 0 < labels[rows].sum() < len(rows):
            fpr, tpr = roc_curve_points(labels[rows], scores[rows])
            curves.append(_upper_envelope(grid, fpr, tpr))
            aucs.append(np.trapezoid(tpr, fpr))
    return np.array(curves), np.array(aucs)


def _upper_envelope(grid: np.ndarray, fpr: np.ndarray, tpr: np.ndarray) -> np.ndarray:
    """TPR at each FPR of `grid`; at a vertical step, its top."""
    keep = np.append(np.diff(fpr) > 0, True)
    return np.interp(grid, fpr[keep], tpr[keep])


def message_figure(text: str) -> bytes:
    """A small figure that says why there is nothing to see."""
    figure = new_figure(5.0, 1.4)
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=11, color=QUIET)
    return to_png(figure)
