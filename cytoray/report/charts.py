"""Small line charts as SVG inside a page: they follow the page's colours, light or dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

SIDE, LEFT, BOTTOM, TOP = 260.0, 46.0, 42.0, 26.0
_COLOURS = 6


def _x(value: float) -> float:
    return round(LEFT + value * SIDE, 2)


def _y(value: float) -> float:
    return round(TOP + (1 - value) * SIDE, 2)


def _path(xs: Sequence[float], ys: Sequence[float], kind: str) -> str:
    points = " ".join(f"{_x(x)},{_y(y)}" for x, y in zip(xs, ys, strict=True))
    return f'<polyline class="{kind}" points="{points}"/>'


def _frame(title: str, x_label: str, y_label: str, body: list[str], names: Sequence[str]) -> Markup:
    """Axes from 0 to 1 with ticks, a title, the lines, and their names below."""
    legend_height = 18 * len(names) if len(names) > 1 else 0
    width, height = LEFT + SIDE + 16, TOP + SIDE + BOTTOM + legend_height
    parts = [
        f'<svg class="chart" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{escape(title)}" xmlns="http://www.w3.org/2000/svg">',
        f'<text class="title" x="{LEFT}" y="14">{escape(title)}</text>',
        f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{SIDE}" height="{SIDE}"/>',
    ]
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts += [
            f'<line class="tick" x1="{_x(tick)}" y1="{_y(0)}" x2="{_x(tick)}" y2="{_y(1)}"/>',
            f'<line class="tick" x1="{_x(0)}" y1="{_y(tick)}" x2="{_x(1)}" y2="{_y(tick)}"/>',
            f'<text class="number" x="{_x(tick)}" y="{_y(0) + 14}" text-anchor="middle">'
            f"{tick:g}</text>",
            f'<text class="number" x="{LEFT - 6}" y="{_y(tick) + 4}" text-anchor="end">'
            f"{tick:g}</text>",
        ]
    middle_x, middle_y = LEFT + SIDE / 2, TOP + SIDE / 2
    parts += [
        f'<text class="label" x="{middle_x}" y="{_y(0) + 31}" text-anchor="middle">'
        f"{escape(x_label)}</text>",
        f'<text class="label" x="12" y="{middle_y}" text-anchor="middle" '
        f'transform="rotate(-90 12 {middle_y})">{escape(y_label)}</text>',
        *body,
    ]
    for place, name in enumerate(names if len(names) > 1 else ()):
        y = TOP + SIDE + BOTTOM + 18 * place + 6
        parts.append(
            f'<line class="line c{place % _COLOURS}" x1="{LEFT}" y1="{y - 4}" x2="{LEFT + 22}" '
            f'y2="{y - 4}"/><text class="name" x="{LEFT + 30}" y="{y}">{escape(name)}</text>'
        )
    return Markup("".join([*parts, "</svg>"]))


def curve_chart(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    diagonal: bool = False,
    levels: Mapping[str, float] | None = None,
) -> Markup:
    """One line a name between 0 and 1.

    Args:
        lines: x and y of each.
        title, x_label, y_label: texts.
        diagonal: mark chance.
        levels: a dashed level a line, e.g. what chance reaches.
    """
    body = [_path([0, 1], [0, 1], "chance")] if diagonal else []
    for place, (name, (xs, ys)) in enumerate(lines.items()):
        if levels:
            level = levels[name]
            body.append(_path([0, 1], [level, level], f"chance c{place % _COLOURS}"))
        body.append(_path(xs, ys, f"line c{place % _COLOURS}"))
    return _frame(title, x_label, y_label, body, list(lines))


def reliability_chart(lines: Mapping[str, Mapping[str, Any]]) -> Markup:
    """Predicted against observed, with intervals; on the diagonal the probabilities are honest.

    Args:
        lines: by name `predicted`, `observed`, `low`, `high` of the bins.
    """
    body = [_path([0, 1], [0, 1], "chance")]
    for place, bins in enumerate(lines.values()):
        colour = f"c{place % _COLOURS}"
        for x, low, high in zip(bins["predicted"], bins["low"], bins["high"], strict=True):
            body.append(_path([x, x], [low, high], f"whisker {colour}"))
        body.append(_path(bins["predicted"], bins["observed"], f"line {colour}"))
        body += [
            f'<circle class="dot {colour}" cx="{_x(x)}" cy="{_y(y)}" r="3"/>'
            for x, y in zip(bins["predicted"], bins["observed"], strict=True)
        ]
    return _frame("Calibration", "predicted probability", "observed share", body, list(lines))
