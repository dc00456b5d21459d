"""Bodies of the training scenes: nuclei of many shapes, red cells, and dark things of no interest.

Lengths are working pixels (`small.WORK_UM`). A dose is float32 (h, w), about 1 where a body is
stained as usual.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from cytoray.errors import choose
from cytoray.synthetic.textures import Float, fill, round_outline, smooth_noise


@dataclass(frozen=True, kw_only=True)
class Nucleus:
    """One nucleus, ready to be put on a scene.

    Attributes:
        mask: float32 (h, w), 0 to 1, both sides odd.
        dose: float32 (h, w), mask with chromatin.
        offset_px: centre of mass against the middle of the mask, x and y.
        radius_px: of the disc of the same area.
    """

    mask: Float
    dose: Float
    offset_px: tuple[float, float]
    radius_px: float


def paint_nucleus(rng: np.random.Generator, kind: str, radius_px: float, edge_px: float) -> Nucleus:
    """Paint a nucleus.

    Args:
        rng: the source of randomness.
        kind: a key of `NUCLEI`.
        radius_px: radius of the disc of the same area, about.
        edge_px: blur of its edge, Gaussian sigma.
    """
    shape = NUCLEI[choose("kind of nucleus", kind, NUCLEI)](rng, radius_px)
    if rng.random() < 0.07:
        edge_px += 0.15 * radius_px  # out of focus
    mask = _blurred(shape, edge_px)
    height, width = mask.shape
    grain = max(rng.uniform(0.12, 0.5) * radius_px, 1.3)
    chromatin = 1 + rng.uniform(0, 0.35) * smooth_noise(rng, height, width, grain)
    inner = cv2.GaussianBlur(shape, (0, 0), max(0.35 * radius_px, 0.7))
    hollow = rng.uniform(0.3, 0.7) if kind == "vesicular" else rng.uniform(0, 0.2)
    dose = mask * np.maximum(chromatin - hollow * inner**2, 0.3)
    if kind in ("vesicular", "plain") and radius_px > 3.5 and rng.random() < 0.3:
        spot = fill(round_outline(rng, 0.22 * radius_px, 1.2, 0.05) + _middle(mask), height, width)
        shift = rng.uniform(-0.35, 0.35, 2) * radius_px
        dose = dose + 0.6 * np.roll(spot, shift.round().astype(int), axis=(0, 1)) * mask
    moments = cv2.moments(mask)
    area = max(moments["m00"], 1e-3)
    middle = _middle(mask)
    return Nucleus(
        mask=mask,
        dose=np.asarray(dose / max(float((dose * mask).sum() / area), 1e-3), np.float32),
        offset_px=(moments["m10"] / area - middle[0], moments["m01"] / area - middle[1]),
        radius_px=float(np.sqrt(area / np.pi)),
    )


def _blurred(shape: np.ndarray, sigma_px: float) -> Float:
    return np.asarray(cv2.GaussianBlur(shape, (0, 0), sigma_px), np.float32)


def _middle(mask: Float) -> Float:
    return np.asarray((np.array(mask.shape[::-1]) - 1) / 2, np.float32)


def _side(reach_px: float) -> int:
    return 2 * int(np.ceil(reach_px + 3)) + 1


def _ellipse(elongation: float, roughness: float) -> Callable[[np.random.Generator, float], Float]:
    def shape(rng: np.random.Generator, radius_px: float) -> Float:
        longer = float(1 + abs(rng.normal(0, elongation)))
        outline = round_outline(rng, radius_px, min(longer, 5.0), roughness * rng.random())
        side = _side(float(np.abs(outline).max()))
        return fill(outline + np.float32((side - 1) / 2), side, side, 0.4)

    return shape


def _lobed(rng: np.random.Generator, radius_px: float) -> Float:
    """Two to five lobes close together, mostly joined: a neutrophil or an eosinophil."""
    count = int(rng.choice([2, 3, 4, 5], p=[0.3, 0.4, 0.2, 0.1]))
    lobe_px = radius_px / np.sqrt(count) * rng.uniform(0.95, 1.15)
    side = _side(2.2 * radius_px)
    middle = np.full(2, (side - 1) / 2, np.float32)
    turn, arc = rng.uniform(0, 2 * np.pi), rng.uniform(1.0, 2.0) * np.pi
    out_px = rng.uniform(0.75, 1.05) * radius_px * (0.75 if count == 2 else 0.8)
    places = []
    mask = np.zeros((side, side), np.float32)
    for lobe in range(count):
        angle = turn + (2 * np.pi if count == 2 else arc) * lobe / count + rng.normal(0, 0.15)
        place = middle + out_px * np.array([np.cos(angle), np.sin(angle)], np.float32)
        outline = round_outline(rng, lobe_px * np.exp(rng.normal(0, 0.12)), rng.uniform(1, 1.5), 0)
        mask = np.maximum(mask, fill(outline + place, side, side, 0.4))
        places.append(place)
    if count > 3 or rng.random() < 0.8:
        joint = np.zeros((side, side), np.uint8)
        line = np.rint(np.array(places) * 16).astype(np.int32)
        thickness = max(1, round(0.5 * lobe_px))
        cv2.polylines(joint, [line], False, 255, thickness, cv2.LINE_AA, shift=4)
        mask = np.maximum(mask, joint.astype(np.float32) / 255)
    return _recentred(np.asarray(mask, np.float32))


def _bent(rng: np.random.Generator, radius_px: float) -> Float:
    """A kidney or a horseshoe: a monocyte or a band cell."""
    side = _side(2.0 * radius_px)
    middle = (side - 1) / 2
    bend_px = rng.uniform(0.6, 1.1) * radius_px
    span = rng.uniform(70, 230)
    thickness = max(2, round(np.pi * radius_px**2 / (bend_px * np.radians(span) + radius_px)))
    canvas = np.zeros((side, side), np.uint8)
    centre = (round(middle * 16), round(middle * 16))
    axes = (round(bend_px * 16), round(bend_px * 16))
    turn = rng.uniform(0, 360)
    thickness = min(thickness, int(1.3 * radius_px) + 1)
    cv2.ellipse(canvas, centre, axes, turn, 0, span, 255, thickness, cv2.LINE_AA, shift=4)
    return _recentred(canvas.astype(np.float32) / np.float32(255))


def _recentred(mask: Float) -> Float:
    """Shift a shape by whole pixels so that its centre of mass is in the middle."""
    moments = cv2.moments(mask)
    middle = _middle(mask)
    shift_x = round(middle[0] - moments["m10"] / moments["m00"])
    shift_y = round(middle[1] - moments["m01"] / moments["m00"])
    return np.asarray(np.roll(mask, (shift_y, shift_x), axis=(0, 1)), np.float32)


NUCLEI: dict[str, Callable[[np.random.Generator, float], Float]] = {
    "plain": _ellipse(0.2, 0.08),
    "vesicular": _ellipse(0.25, 0.06),
    "oval": _ellipse(0.7, 0.1),
    "spindle": _ellipse(1.8, 0.1),
    "lobed": _lobed,
    "bent": _bent,
}


def paint_red_cell(rng: np.random.Generator, radius_px: float) -> Float:
    """Dose of a red cell: a disc, paler in its middle or not, without a nucleus."""
    outline = round_outline(rng, radius_px * rng.uniform(0.85, 1.1), rng.uniform(1, 1.3), 0.05)
    side = _side(float(np.abs(outline).max()))
    mask = fill(outline + np.float32((side - 1) / 2), side, side, rng.uniform(0.4, 0.9))
    inner = cv2.GaussianBlur(mask, (0, 0), 0.35 * radius_px)
    return np.asarray(mask * (1.15 - rng.uniform(0, 0.8) * inner**2), np.float32)


def _smudge(rng: np.random.Generator, radius_px: float) -> Float:
    """A dark blot that fades at its margin."""
    reach = rng.uniform(0.8, 2.5) * radius_px
    outline = round_outline(rng, reach, rng.uniform(1, 2), 0.15)
    side = _side(2.2 * float(np.abs(outline).max()))
    mask = fill(outline + np.float32((side - 1) / 2), side, side)
    return _blurred(mask, rng.uniform(0.4, 0.7) * reach)


def _specks(rng: np.random.Generator, radius_px: float) -> Float:
    """Dots well below the size of a nucleus: bacteria, granules, dust."""
    side = 2 * int(rng.integers(5, 25)) + 1
    canvas = np.zeros((side, side), np.uint8)
    for x, y in rng.normal(side / 2, side / 6, (int(rng.integers(1, 40)), 2)):
        centre = (round(float(x) * 16), round(float(y) * 16))
        size = round(float(rng.uniform(0.3, 1.0)) * 16)
        cv2.circle(canvas, centre, size, int(rng.integers(80, 255)), -1, cv2.LINE_AA, shift=4)
    return _blurred(canvas.astype(np.float32) / 255, 0.5)


def _fibre(rng: np.random.Generator, radius_px: float) -> Float:
    """A long bent thread."""
    side = 2 * int(rng.integers(20, 80)) + 1
    canvas = np.zeros((side, side), np.uint8)
    heading = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, 0.2, 24))
    steps = np.stack([np.cos(heading), np.sin(heading)], axis=1) * side / 18
    points = np.cumsum(steps, axis=0)
    points = points - points.mean(axis=0) + side / 2
    line = np.rint(points * 16).astype(np.int32)
    thickness = int(rng.integers(1, 6))
    cv2.polylines(canvas, [line], False, 255, thickness, cv2.LINE_AA, shift=4)
    return _blurred(canvas.astype(np.float32) / 255, rng.uniform(0.4, 1.5))


def _bubble(rng: np.random.Generator, radius_px: float) -> Float:
    """A ring of dark edge around clear air."""
    reach = rng.uniform(4, 45)
    side = _side(reach + 4)
    middle = (side - 1) / 2
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) - np.float32(middle)
    width = rng.uniform(0.6, 0.08 * reach + 1)
    return np.exp(-(((np.hypot(x, y) - reach) / width) ** 2)).astype(np.float32)


def _mucus(rng: np.random.Generator, radius_px: float) -> Float:
    """A torn pale shred."""
    outline = round_outline(rng, rng.uniform(5, 35), rng.uniform(1.2, 3), 0.2)
    side = _side(float(np.abs(outline).max()))
    mask = fill(outline + np.float32((side - 1) / 2), side, side, 2.0)
    torn = np.clip(0.4 + 0.6 * smooth_noise(rng, side, side, rng.uniform(2, 8)), 0, 1.5)
    return np.asarray(mask * torn * np.float32(0.6), np.float32)


def _pen(rng: np.random.Generator, radius_px: float) -> Float:
    """A broad stroke of a marker, or the edge of a coverslip: dark, wide, straight."""
    side = 181
    canvas = np.zeros((side, side), np.uint8)
    angle, middle = rng.uniform(0, np.pi), side / 2
    along = np.array([np.cos(angle), np.sin(angle)]) * side
    ends = [tuple(np.rint(middle + sign * along).astype(int).tolist()) for sign in (-1, 1)]
    cv2.line(canvas, ends[0], ends[1], 255, int(rng.integers(3, 60)), cv2.LINE_AA)
    soft = _blurred(canvas.astype(np.float32) / 255, rng.uniform(0.6, 3))
    return soft * np.float32(rng.uniform(0.5, 2.0))


def _crystal(rng: np.random.Generator, radius_px: float) -> Float:
    """A small splinter with corners, or a needle."""
    side = 41
    corners = rng.uniform(-1, 1, (3, 2)) * (rng.uniform(2, 14), rng.uniform(0.4, 1.4))
    angle = rng.uniform(0, np.pi)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    outline = corners @ turn + (side - 1) / 2
    return fill(outline.astype(np.float32), side, side, 0.4) * np.float32(rng.uniform(0.5, 2.0))


DEBRIS: dict[str, Callable[[np.random.Generator, float], Float]] = {
    "smudge": _smudge,
    "specks": _specks,
    "fibre": _fibre,
    "bubble": _bubble,
    "mucus": _mucus,
    "pen": _pen,
    "crystal": _crystal,
}
"""Dark things that are no nuclei, by name: usual radius of a nucleus to dose."""
