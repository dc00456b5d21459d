"""Thin dark lines that are no cells: edges of wells and coverslips, rims of air bubbles, fibres.

An edge or a rim is an arc of one circle, an even band over a millimetre and more, with little at
its sides; cells in a row are not. Only the band is marked, so that cells on both sides stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np

# At (um per pixel): lines up to this wide (um), and at least this long (um) unless closed.
SCALES = ((8.0, 90.0, 800.0), (32.0, 400.0, 3000.0))
# A closed rim narrower than a quarter of its radius is a bubble's from this radius on.
MIN_BUBBLE_RADIUS_UM = 90.0
MAX_RIM_OF_RADIUS = 0.25
MIN_CLOSED = 0.75
# Foreground beside a line, as a share; beside a row of cells in a group there is more.
MAX_FLANK_SHARE = 0.4
MIN_COVER = 0.85
# Ink and glass edges are even along their length; cells in a row have nuclei and necks. Shares of
# the median density: between its quartiles, and from it to the darkest twelfth.
MAX_SPREAD = 0.3
MAX_RISE = 1.0
FIBRE_WIDTH_UM = 34.0
MIN_FIBRE_UM = 500.0

MAX_PARTS = 150
ARCS_PER_PART = 4
MIN_PIECE = 0.4
TRIES = 64
MAX_POINTS = 600
ON_ARC_PX = 1.5
STRAIGHT_RADIUS_PX = 1e6


@dataclass(frozen=True, kw_only=True)
class Arc:
    """A band along a circle, in pixels; angles in radians, end > start."""

    x: float
    y: float
    radius: float
    start: float
    end: float
    half_width: float


@dataclass(frozen=True)
class _Picture:
    """A mask, uint8 0 or 1, and the density at the same scale."""

    mask: np.ndarray
    density: np.ndarray


def thin_lines(mask: np.ndarray, density: np.ndarray, mpp: float) -> np.ndarray:
    """Bands of foreground that are arcs or fibres.

    Args:
        mask: bool (h, w), foreground.
        density: float32 (h, w), see `optical_density`.
        mpp: um per pixel.

    Returns:
        bool (h, w).
    """
    found = np.zeros(mask.shape, np.uint8)
    rest = mask.astype(np.uint8)
    for step_um, widest_um, shortest_um in SCALES:
        factor = max(1, round(step_um / mpp))
        if min(mask.shape) < 4 * factor:
            continue
        step_um = mpp * factor
        small = _reduced(rest, factor)
        shape = (small.shape[1], small.shape[0])
        picture = _Picture(small, cv2.resize(density, shape, interpolation=cv2.INTER_AREA))
        drawn = _arcs_drawn(picture, widest_um / step_um, shortest_um / step_um, step_um)
        if drawn.any():
            size = (small.shape[1] * factor, small.shape[0] * factor)
            whole = cv2.resize(drawn, size, interpolation=cv2.INTER_NEAREST)
            height, width = mask.shape
            found = np.bitwise_or(found, np.asarray(whole)[:height, :width])
            rest = np.bitwise_and(rest, 1 - found)
    return (found | _fibres(rest, density, mpp)).astype(bool)


def _reduced(mask: np.ndarray, factor: int) -> np.ndarray:
    """A mask of 0 and 1 over factor x factor pixels: 1 where four tenths are."""
    height, width = (-(-side // factor) for side in mask.shape)
    padded = cv2.copyMakeBorder(
        mask * np.uint8(250),
        0,
        height * factor - mask.shape[0],
        0,
        width * factor - mask.shape[1],
        cv2.BORDER_REPLICATE,
    )
    mean = cv2.resize(padded, (width, height), interpolation=cv2.INTER_AREA)
    return (mean >= 100).astype(np.uint8)


def _arcs_drawn(picture: _Picture, widest: float, shortest: float, step_um: float) -> np.ndarray:
    """All arcs of a picture, drawn; uint8 0 or 1. Lengths in pixels."""
    small = picture.mask
    side = int(widest) | 1
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    thin = cv2.subtract(small, cv2.morphologyEx(small, cv2.MORPH_OPEN, kernel))
    depth = cv2.distanceTransform(thin, cv2.DIST_L2, 3)
    drawn = np.zeros_like(small)
    least_extent = min(shortest * 0.6, 2 * MIN_BUBBLE_RADIUS_UM / step_um)
    for points, depths in _parts(thin, depth, least_extent):
        for arc in _arcs(points, depths, picture, shortest, MIN_BUBBLE_RADIUS_UM / step_um):
            _draw(drawn, arc)
    return drawn


def _parts(
    thin: np.ndarray, depth: np.ndarray, least_extent: float
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Middle lines of the largest connected parts: points (n, 2) as x, y and their depths (n,)."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(thin, connectivity=8)
    extent = np.maximum(stats[:, cv2.CC_STAT_WIDTH], stats[:, cv2.CC_STAT_HEIGHT])
    extent[0] = 0
    large = np.flatnonzero(extent >= least_extent)
    large = large[np.argsort(-extent[large], kind="stable")][:MAX_PARTS]
    ridge = (depth >= cv2.dilate(depth, np.ones((3, 3), np.uint8)) - 1e-3) & (thin > 0)
    for label in large.tolist():
        left, top, width, height = stats[label, :4].tolist()
        window = (slice(top, top + height), slice(left, left + width))
        ys, xs = np.nonzero(ridge[window] & (labels[window] == label))
        points = np.stack([xs + left, ys + top], axis=1).astype(np.float64)
        yield points, depth[window][ys, xs].astype(np.float64)


def _arcs(
    points: np.ndarray, depths: np.ndarray, picture: _Picture, shortest: float, bubble: float
) -> Iterator[Arc]:
    """The arcs on the middle line of one part, the best supported first."""
    rng = np.random.default_rng(0)
    for _ in range(ARCS_PER_PART):
        if len(points) < 12:
            return
        circle = _best_circle(points, rng)
        if circle is None:
            return
        near = _on(points, circle, ON_ARC_PX)
        least = shortest
        for arc in _covered_arcs(points[near], depths[near], circle):
            if not _is_line(arc, picture, least, bubble):
                break
            yield arc
            least = shortest * MIN_PIECE  # the rest of a line that is interrupted
        points, depths = points[~near], depths[~near]


def _best_circle(points: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    """The circle (x, y, radius) that most points lie on, by trial; None when there is none."""
    some = points
    if len(points) > MAX_POINTS:
        some = points[np.linspace(0, len(points) - 1, MAX_POINTS).astype(int)]
    triples = some[rng.integers(len(some), size=(TRIES, 3))]
    circles = _through(triples)
    if len(circles) == 0:
        return None
    away = np.hypot(some[None, :, 0] - circles[:, None, 0], some[None, :, 1] - circles[:, None, 1])
    votes = (np.abs(away - circles[:, 2:3]) <= ON_ARC_PX).sum(axis=1)
    circle = circles[int(np.argmax(votes))]
    for _ in range(2):
        near = points[_on(points, circle, 2 * ON_ARC_PX)]
        if len(near) < 8:
            return None
        fits = [circle, _straight(near), *_fit(near)]
        circle = max(fits, key=lambda fit: int(_on(points, fit, ON_ARC_PX).sum()))
    return circle


def _on(points: np.ndarray, circle: np.ndarray, within_px: float) -> np.ndarray:
    """Which points (n, 2) lie on a circle; bool (n,)."""
    return np.abs(np.hypot(*(points - circle[:2]).T) - circle[2]) <= within_px


def _through(triples: np.ndarray) -> np.ndarray:
    """Circles (n, 3) through three points each, (m, 3, 2); straight ones have huge radii."""
    a, b, c = triples[:, 0], triples[:, 1], triples[:, 2]
    ab, ac = b - a, c - a
    cross = 2 * (ab[:, 0] * ac[:, 1] - ab[:, 1] * ac[:, 0])
    usable = (np.abs(ab).sum(1) > 8) & (np.abs(ac).sum(1) > 8) & (np.abs(b - c).sum(1) > 8)
    cross = np.where(np.abs(cross) < 1e-2, 1e-2, cross)
    ab2, ac2 = (ab**2).sum(1), (ac**2).sum(1)
    ux = (ac[:, 1] * ab2 - ab[:, 1] * ac2) / cross
    uy = (ab[:, 0] * ac2 - ac[:, 0] * ab2) / cross
    circles = np.stack([a[:, 0] + ux, a[:, 1] + uy, np.hypot(ux, uy)], axis=1)
    return circles[usable]


def _fit(points: np.ndarray) -> list[np.ndarray]:
    """The least-squares circle (Kasa), none when the points are too straight to tell."""
    centre = points.mean(axis=0)
    local = points - centre
    system = np.concatenate([2 * local, np.ones((len(local), 1))], axis=1)
    solution, _, rank, _ = np.linalg.lstsq(system, (local**2).sum(axis=1), rcond=1e-10)
    squared = solution[2] + solution[0] ** 2 + solution[1] ** 2
    if rank < 3 or squared <= 0:
        return []
    return [np.array([solution[0] + centre[0], solution[1] + centre[1], np.sqrt(squared)])]


def _straight(points: np.ndarray) -> np.ndarray:
    """The straight line through points, as a circle of a huge radius."""
    centre = points.mean(axis=0)
    _, vectors = np.linalg.eigh(np.cov((points - centre).T))
    return np.array([*(centre + vectors[:, 0] * STRAIGHT_RADIUS_PX), STRAIGHT_RADIUS_PX])


def _covered_arcs(points: np.ndarray, depths: np.ndarray, circle: np.ndarray) -> list[Arc]:
    """Stretches of a circle that points cover with gaps of 8 pixels at most, longest first."""
    if len(points) < 12:
        return []
    x, y, radius = circle.tolist()
    half_width = float(np.percentile(depths, 80))
    angles = np.sort(np.arctan2(points[:, 1] - y, points[:, 0] - x))
    ahead = np.diff(angles, append=angles[0] + 2 * np.pi)
    breaks = np.flatnonzero(ahead * radius > 8)
    if len(breaks) == 0:
        spans = [(angles[0], angles[0] + 2 * np.pi)]
    else:
        starts = angles[(breaks + 1) % len(angles)]
        ends = angles[np.roll(breaks, -1)]
        spans = [(a, b if b >= a else b + 2 * np.pi) for a, b in zip(starts, ends, strict=True)]
    arcs = [
        Arc(x=x, y=y, radius=radius, start=float(start), end=float(end), half_width=half_width)
        for start, end in spans
    ]
    return sorted(arcs, key=lambda arc: arc.start - arc.end)


def _is_line(arc: Arc, picture: _Picture, shortest: float, bubble: float) -> bool:
    """Whether an arc is long or closed, covered, even, and has little beside it."""
    length = arc.radius * (arc.end - arc.start)
    closed = (
        arc.end - arc.start >= 2 * np.pi * MIN_CLOSED
        and arc.radius >= bubble
        and 2 * arc.half_width <= MAX_RIM_OF_RADIUS * arc.radius
    )
    if not closed and length < shortest:
        return False
    if _along(picture.mask, arc, 0.0).mean() < MIN_COVER:
        return False
    # The darkest of three parallels: the middle of a line lies between the pixels.
    lines = [_along(picture.density, arc, offset) for offset in (-1.0, 0.0, 1.0)]
    if not _is_even(np.max(lines, axis=0)):
        return False
    beside = [
        _along(picture.mask, arc, side * (arc.half_width + away)).mean()
        for side in (-1, 1)
        for away in (2.5, 4.5)
    ]
    return max(beside) <= MAX_FLANK_SHARE


def _is_even(values: np.ndarray) -> bool:
    """Whether densities along a line are those of ink or glass, not of nuclei and cytoplasm."""
    low, middle, high, highest = np.percentile(values, [25, 50, 75, 92])
    return high - low <= MAX_SPREAD * middle and highest - middle <= MAX_RISE * middle


def _along(picture: np.ndarray, arc: Arc, offset: float) -> np.ndarray:
    """Pixels along a parallel of the arc, 0 off the picture; float64 (n,)."""
    count = max(16, min(4000, int(arc.radius * (arc.end - arc.start))))
    angles = np.linspace(arc.start, arc.end, count)
    xs = np.rint(arc.x + (arc.radius + offset) * np.cos(angles)).astype(np.int64)
    ys = np.rint(arc.y + (arc.radius + offset) * np.sin(angles)).astype(np.int64)
    inside = (xs >= 0) & (ys >= 0) & (xs < picture.shape[1]) & (ys < picture.shape[0])
    found = np.zeros(count)
    found[inside] = picture[ys[inside], xs[inside]]
    return found


def _draw(picture: np.ndarray, arc: Arc) -> None:
    count = max(16, int(arc.radius * (arc.end - arc.start) / 2))
    angles = np.linspace(arc.start, arc.end, count)
    line = np.stack(
        [arc.x + arc.radius * np.cos(angles), arc.y + arc.radius * np.sin(angles)], axis=1
    )
    thickness = int(np.ceil(2 * arc.half_width))
    cv2.polylines(picture, [np.rint(line).astype(np.int32)], False, 1, thickness)


def _fibres(mask: np.ndarray, density: np.ndarray, mpp: float) -> np.ndarray:
    """Isolated thin threads of an even width, however they wind; bool mask to uint8 0 or 1."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    extent = np.maximum(stats[:, cv2.CC_STAT_WIDTH], stats[:, cv2.CC_STAT_HEIGHT]) * mpp
    extent[0] = 0
    drawn = np.zeros_like(mask)
    for label in np.flatnonzero(extent >= MIN_FIBRE_UM / 2).tolist():
        left, top, width, height, area = stats[label].tolist()
        if area * mpp > FIBRE_WIDTH_UM * 4 * (width + height):
            continue
        window = (slice(top, top + height), slice(left, left + width))
        part = np.pad((labels[window] == label).astype(np.uint8), 1)
        if _is_fibre(part, np.pad(density[window], 1), mpp):
            drawn[window] |= part[1:-1, 1:-1]
    return drawn


def _is_fibre(part: np.ndarray, density: np.ndarray, mpp: float) -> bool:
    """Whether a connected part, uint8 0 or 1 with a margin, is one long thread.

    A thread has hardly a hole, and nearly everywhere the same width and density.
    """
    outlines, _ = cv2.findContours(part, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    length = sum(cv2.arcLength(outline, True) for outline in outlines) / 2
    if length * mpp < MIN_FIBRE_UM or part.sum() / length * mpp > FIBRE_WIDTH_UM:
        return False
    if len(outlines) - 1 > length * mpp / 1000:
        return False
    depth = cv2.distanceTransform(part, cv2.DIST_L2, 5)
    middle = (depth >= cv2.dilate(depth, np.ones((3, 3), np.uint8)) - 1e-3) & (part > 0)
    usual = float(np.median(depth[middle]))
    odd = (depth[middle] < 0.6 * usual) | (depth[middle] > 1.6 * usual)
    return float(odd.mean()) <= 0.1 and _is_even(density[depth >= 0.7 * usual])
