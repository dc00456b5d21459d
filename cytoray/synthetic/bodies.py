"""Render what lies between squamous cells: white blood cells (nuclei) and debris (no nuclei)."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from cytoray.errors import choose
from cytoray.synthetic.cells import CellPatch, cell_focus_um, mask_box, to_transmittance
from cytoray.synthetic.stain import Stain
from cytoray.synthetic.textures import Float, fill, round_outline, smooth_noise


def render_neutrophil(rng: np.random.Generator, stain: Stain, mpp: float) -> CellPatch:
    """Render a neutrophil: two to four dark joined lobes in a little pale cytoplasm.

    It counts as one nucleus, placed at the centre of mass of the lobes.
    """
    reach_px = rng.uniform(5.0, 6.2) / mpp
    side_px = int(np.ceil(2 * reach_px + 4 / mpp))
    lobes = np.zeros((side_px, side_px), np.float32)
    count = int(rng.integers(2, 5))
    turn = rng.uniform(0, 2 * np.pi)
    for lobe in range(count):
        angle = turn + 2 * np.pi * lobe / count + rng.normal(0, 0.25)
        away_px = rng.uniform(1.4, 2.0) / mpp
        middle = np.array([np.cos(angle), np.sin(angle)]) * away_px + (side_px - 1) / 2
        outline = round_outline(rng, rng.uniform(1.7, 2.2) / mpp, rng.uniform(1, 1.4), 0.05)
        lobes = np.maximum(lobes, fill(outline + middle.astype(np.float32), side_px, side_px, 0.6))
    return _leucocyte(rng, stain, mpp, "neutrophil", lobes, reach_px)


def render_lymphocyte(rng: np.random.Generator, stain: Stain, mpp: float) -> CellPatch:
    """Render a lymphocyte: a small round dark nucleus with hardly any cytoplasm."""
    radius_px = rng.uniform(2.8, 3.6) / mpp
    side_px = int(np.ceil(2 * radius_px + 6 / mpp))
    outline = round_outline(rng, radius_px, rng.uniform(1, 1.15), 0.03)
    mask = fill(outline + np.float32((side_px - 1) / 2), side_px, side_px, 0.6)
    return _leucocyte(rng, stain, mpp, "lymphocyte", mask, radius_px + rng.uniform(0.4, 1.2) / mpp)


def _leucocyte(
    rng: np.random.Generator,
    stain: Stain,
    mpp: float,
    kind: str,
    nucleus: Float,
    reach_px: float,
) -> CellPatch:
    side_px = nucleus.shape[0]
    outline = round_outline(rng, reach_px, rng.uniform(1, 1.2), 0.07) + np.float32(
        (side_px - 1) / 2
    )
    body = np.maximum(fill(outline, side_px, side_px), nucleus)
    texture = 1 + 0.35 * smooth_noise(rng, side_px, side_px, max(0.8 / mpp, 1.2))
    cytoplasm = body * np.maximum(texture, 0.2) * rng.uniform(0.25, 0.8)
    clumps = 1 + 0.18 * smooth_noise(rng, side_px, side_px, max(0.9 / mpp, 1.2))
    dose = nucleus * np.maximum(clumps, 0.4) * rng.uniform(1.5, 2.4)
    absorbance = cytoplasm[..., None] * stain.absorbance["lavender"]
    absorbance = absorbance + dose[..., None] * stain.absorbance["haematoxylin"]
    moments = cv2.moments(nucleus)
    radius_px = np.sqrt(moments["m00"] / np.pi)
    centre = (moments["m10"] / moments["m00"], moments["m01"] / moments["m00"])
    return CellPatch(
        transmittance=to_transmittance(absorbance, cell_focus_um(rng, stain) / mpp),
        nuclei_px=np.array([[*centre, radius_px]], np.float32),
        kind=kind,
        reach_px=reach_px,
        box_px=mask_box(body),
    )


def render_debris(rng: np.random.Generator, stain: Stain, mpp: float) -> CellPatch:
    """Render debris: mucus wisps, specks, red cells or smudges. It never holds a nucleus."""
    form = str(rng.choice(sorted(DEBRIS_FORMS), p=[0.15, 0.15, 0.35, 0.35]))
    absorbance, reach_px = DEBRIS_FORMS[choose("debris form", form, DEBRIS_FORMS)](rng, stain, mpp)
    return CellPatch(
        transmittance=to_transmittance(absorbance, cell_focus_um(rng, stain) / mpp),
        nuclei_px=np.zeros((0, 3), np.float32),
        kind="debris",
        reach_px=reach_px,
        box_px=mask_box(absorbance.max(axis=2) / max(float(absorbance.max()), 1e-3)),
    )


def _red_cell(rng: np.random.Generator, stain: Stain, mpp: float) -> tuple[Float, float]:
    reach_px = rng.uniform(3.2, 3.9) / mpp
    mask = _blob(rng, reach_px, 1.1, 0.03, mpp)
    hollow = cv2.GaussianBlur(mask, (0, 0), 0.4 * reach_px)
    dose = mask * (1.25 - 0.5 * hollow) * rng.uniform(0.5, 1.1)
    colour = 0.6 * stain.absorbance["eosin"] + 0.5 * stain.absorbance["orange_g"]
    return np.asarray(dose[..., None] * colour, np.float32), reach_px


def _smudge(rng: np.random.Generator, stain: Stain, mpp: float) -> tuple[Float, float]:
    """A large dark featureless blot, as dark as an abnormal nucleus but fading at its margin."""
    reach_px = rng.uniform(4.5, 8.5) / mpp
    mask = _blob(rng, reach_px, rng.uniform(1.1, 1.9), 0.12, mpp)
    mask = cv2.GaussianBlur(mask, (0, 0), rng.uniform(0.06, 0.3) * reach_px)
    eosin, blue = stain.absorbance["eosin"], stain.absorbance["haematoxylin"]
    share = rng.uniform(0.3, 1.0)
    dose = mask * rng.uniform(1.0, 2.6)
    colour = share * blue + (1 - share) * 2.0 * eosin
    return np.asarray(dose[..., None] * colour, np.float32), reach_px


def _specks(rng: np.random.Generator, stain: Stain, mpp: float) -> tuple[Float, float]:
    """A loose cloud of dots well below a micrometre or two: bacteria, granules, dust."""
    reach_px = rng.uniform(4, 14) / mpp
    side_px = int(np.ceil(2 * reach_px)) + 6
    canvas = np.zeros((side_px, side_px), np.uint8)
    for x, y in rng.normal(side_px / 2, 0.25 * reach_px, (int(rng.integers(1, 30)), 2)):
        radius_px = max(0.6, rng.gamma(2.0, 0.15) / mpp)
        centre = (round(float(x) * 16), round(float(y) * 16))
        shade = int(rng.integers(60, 255))
        cv2.circle(canvas, centre, round(radius_px * 16), shade, -1, cv2.LINE_AA, shift=4)
    canvas = cv2.GaussianBlur(canvas, (0, 0), 0.7)
    dose = canvas.astype(np.float32) / 255 * np.float32(rng.uniform(0.4, 1.6))
    return np.asarray(dose[..., None] * stain.absorbance["haematoxylin"], np.float32), reach_px


def _wisp(rng: np.random.Generator, stain: Stain, mpp: float) -> tuple[Float, float]:
    """A pale torn shred of mucus or cytoplasm with ragged holes."""
    reach_px = rng.uniform(3, 16) / mpp
    mask = _blob(rng, reach_px, rng.uniform(1.2, 3.0), 0.15, mpp)
    height_px, width_px = mask.shape
    coarse = smooth_noise(rng, height_px, width_px, 2.2 / mpp)
    fine = smooth_noise(rng, height_px, width_px, max(0.7 / mpp, 1.2))
    torn = np.clip(rng.uniform(0.2, 0.8) + 0.6 * coarse + rng.uniform(0.1, 0.5) * fine, 0, 1.6)
    soft = cv2.GaussianBlur(mask, (0, 0), 0.18 * reach_px)
    dose = soft * torn * rng.uniform(0.3, 1.1)
    return np.asarray(dose[..., None] * stain.absorbance["lavender"], np.float32), reach_px


def _blob(
    rng: np.random.Generator, reach_px: float, elongation: float, roughness: float, mpp: float
) -> Float:
    outline = round_outline(rng, reach_px, elongation, roughness)
    half = np.abs(outline).max(axis=0) + max(3.0 / mpp, 0.6 * reach_px)
    width_px, height_px = (2 * np.ceil(half)).astype(int)
    centre = (np.array([width_px, height_px], np.float32) - 1) / 2
    return fill(outline + centre, height_px, width_px)


DebrisForm = Callable[[np.random.Generator, Stain, float], tuple[Float, float]]
DEBRIS_FORMS: dict[str, DebrisForm] = {
    "red_cell": _red_cell,
    "smudge": _smudge,
    "specks": _specks,
    "wisp": _wisp,
}
WHITE_CELLS: dict[str, Callable[[np.random.Generator, Stain, float], CellPatch]] = {
    "neutrophil": render_neutrophil,
    "lymphocyte": render_lymphocyte,
}
