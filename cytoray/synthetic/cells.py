"""Render single squamous cells in Papanicolaou colours: normal kinds and abnormal ones.

Sizes are micrometres until `mpp` turns them into pixels. A rendered cell is a patch of transmitted
light that is multiplied onto the slide, with its nucleus known exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from cytoray.errors import choose
from cytoray.synthetic.stain import CYTOPLASM_DYES, Stain
from cytoray.synthetic.textures import (
    Float,
    centre_distance,
    draw_fold,
    fill,
    fold_over,
    polygon_outline,
    ridges,
    round_outline,
    smooth_noise,
)


@dataclass(frozen=True, kw_only=True)
class CellPatch:
    """One rendered body, ready to be multiplied onto a slide.

    Attributes:
        transmittance: uint8 (h, w, 3), light let through; 255 is clear.
        nuclei_px: float32 (N, 3), x, y, radius of each nucleus in pixels of the patch.
        kind: a key of `CELL_KINDS`, or `neutrophil`, `lymphocyte`, `debris`.
        reach_px: radius of the whole body, about.
        box_px: x, y, width, height of the body in the patch.
    """

    transmittance: NDArray[np.uint8]
    nuclei_px: Float
    kind: str
    reach_px: float
    box_px: tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class CellKind:
    """Ranges (low, high) that a kind of squamous cell is drawn from.

    Attributes:
        nucleus_um: radius of the circle of the same area as the nucleus.
        cytoplasm_um: cytoplasm radius; None where it goes by the nucleus.
        cytoplasm_to_nucleus: cytoplasm radius over nucleus radius, where `cytoplasm_um` is None.
        polygonal: a flat polygon with folds rather than a dense round cell.
        cytoplasm_dose: stain in the cytoplasm.
        nucleus_dose: haematoxylin in the nucleus.
        chromatin_grain_um: size of the chromatin clumps.
        chromatin_contrast: their relative strength.
        roughness: bumps of the nuclear outline.
    """

    nucleus_um: tuple[float, float]
    polygonal: bool
    cytoplasm_dose: tuple[float, float]
    nucleus_dose: tuple[float, float]
    chromatin_grain_um: float
    chromatin_contrast: float
    roughness: float
    cytoplasm_um: tuple[float, float] | None = None
    cytoplasm_to_nucleus: tuple[float, float] = (2.0, 3.0)


CELL_KINDS: dict[str, CellKind] = {
    "superficial": CellKind(
        cytoplasm_um=(22, 30), nucleus_um=(3.0, 3.5), polygonal=True, cytoplasm_dose=(0.35, 0.85),
        nucleus_dose=(1.5, 2.3), chromatin_grain_um=0.8, chromatin_contrast=0.06, roughness=0.03,
    ),
    "intermediate": CellKind(
        cytoplasm_um=(20, 29), nucleus_um=(3.5, 4.8), polygonal=True, cytoplasm_dose=(0.3, 0.75),
        nucleus_dose=(0.85, 1.5), chromatin_grain_um=0.7, chromatin_contrast=0.17, roughness=0.025,
    ),
    "reactive": CellKind(
        cytoplasm_um=(16, 25), nucleus_um=(4.5, 5.5), polygonal=True, cytoplasm_dose=(0.4, 0.9),
        nucleus_dose=(0.75, 1.25), chromatin_grain_um=0.8, chromatin_contrast=0.18, roughness=0.03,
    ),
    "metaplastic": CellKind(
        cytoplasm_um=(8.5, 13), nucleus_um=(3.8, 4.8), polygonal=False, cytoplasm_dose=(0.8, 1.5),
        nucleus_dose=(1.1, 2.0), chromatin_grain_um=0.8, chromatin_contrast=0.16, roughness=0.025,
    ),
    "abnormal": CellKind(
        cytoplasm_to_nucleus=(1.3, 2.1), nucleus_um=(6.0, 8.8), polygonal=False,
        cytoplasm_dose=(0.5, 1.4), nucleus_dose=(1.2, 2.0), chromatin_grain_um=1.15,
        chromatin_contrast=0.27, roughness=0.1,
    ),
}  # fmt: skip
NORMAL_SHARES = {"superficial": 0.28, "intermediate": 0.5, "reactive": 0.06, "metaplastic": 0.16}
MARGIN_UM = 2.5


def render_cell(
    rng: np.random.Generator, stain: Stain, kind: str, mpp: float, *, with_nucleus: bool = True
) -> CellPatch:
    """Render one squamous cell.

    Args:
        rng: the source of randomness.
        stain: the slide's staining.
        kind: a key of `CELL_KINDS`.
        mpp: um per pixel to render at.
        with_nucleus: False leaves an empty (anucleate) cell.

    Raises:
        InputError: `kind` is unknown.
    """
    spec = CELL_KINDS[choose("cell kind", kind, CELL_KINDS)]
    nucleus_px = rng.uniform(*spec.nucleus_um) / mpp
    if spec.cytoplasm_um is None:
        reach_px = rng.uniform(*spec.cytoplasm_to_nucleus) * nucleus_px
    else:
        reach_px = rng.uniform(*spec.cytoplasm_um) / mpp
    layers = _layers(rng, spec, reach_px, mpp)
    density = _cytoplasm_density(rng, layers, spec, reach_px, mpp)
    absorbance = _cytoplasm_colour(rng, stain, kind, density, reach_px)
    nuclei = np.zeros((0, 3), np.float32)
    if with_nucleus:
        dose, nucleus = _nucleus(rng, spec, layers, reach_px, nucleus_px, mpp)
        absorbance += dose[..., None] * stain.absorbance["haematoxylin"]
        nuclei = nucleus[None]
    return CellPatch(
        transmittance=to_transmittance(absorbance, cell_focus_um(rng, stain) / mpp),
        nuclei_px=nuclei,
        kind=kind,
        reach_px=reach_px,
        box_px=mask_box(layers),
    )


def cell_focus_um(rng: np.random.Generator, stain: Stain) -> float:
    """Blur (Gaussian sigma) of one body: the slide's own, now and then off the focal plane."""
    sharp = stain.focus_um * rng.uniform(0.8, 1.3)
    return float(sharp + (rng.uniform(0.3, 0.8) if rng.random() < 0.08 else 0.0))


def to_transmittance(absorbance: NDArray[np.floating], blur_px: float) -> NDArray[np.uint8]:
    """Turn absorbance (h, w, 3) into blurred 8-bit transmittance."""
    light = cv2.exp(-np.maximum(absorbance, 0).astype(np.float32)) * np.float32(255)
    light = cv2.GaussianBlur(light, (0, 0), max(blur_px, 0.3), borderType=cv2.BORDER_REPLICATE)
    return np.asarray(np.round(light), np.uint8)


def mask_box(mask: Float) -> tuple[int, int, int, int]:
    """Return x, y, width, height of the part of `mask` above one half."""
    x, y, width, height = cv2.boundingRect((mask > 0.5).astype(np.uint8))
    return int(x), int(y), int(width), int(height)


def oriented(patch: CellPatch, turn: int) -> CellPatch:
    """Return the patch in one of its 8 orientations: `turn` 0 to 3 quarter turns, +4 mirrored."""
    light, nuclei = patch.transmittance, patch.nuclei_px.copy()
    x, y, width, height = patch.box_px
    if turn >= 4:
        light = light[:, ::-1]
        nuclei[:, 0] = light.shape[1] - 1 - nuclei[:, 0]
        x = light.shape[1] - x - width
    for _ in range(turn % 4):
        last = light.shape[1] - 1
        light = np.rot90(light)
        nuclei[:, 0], nuclei[:, 1] = nuclei[:, 1].copy(), last - nuclei[:, 0]
        x, y, width, height = y, last + 1 - x - width, height, width
    light = np.ascontiguousarray(light)
    return replace(patch, transmittance=light, nuclei_px=nuclei, box_px=(x, y, width, height))


def _layers(rng: np.random.Generator, spec: CellKind, reach_px: float, mpp: float) -> Float:
    """Number of cytoplasm layers (h, w): 0 outside, 1 inside, 2 where a margin is folded over."""
    elongation = float(np.exp(abs(rng.normal(0, 0.22))))
    if spec.polygonal:
        outline = polygon_outline(rng, reach_px, elongation)
    else:
        outline = round_outline(rng, reach_px, elongation, 0.05)
    half = np.abs(outline).max(axis=0) + MARGIN_UM / mpp
    width_px, height_px = (2 * np.ceil(half)).astype(int)
    outline = outline + (np.array([width_px, height_px], np.float32) - 1) / 2
    mask = fill(outline, height_px, width_px)
    if spec.polygonal and rng.random() < 0.3:
        return fold_over(rng, mask, reach_px)
    return mask


def _cytoplasm_density(
    rng: np.random.Generator, layers: Float, spec: CellKind, reach_px: float, mpp: float
) -> Float:
    """Stain dose of the cytoplasm (h, w): layers, uneven thickness, wrinkles, granules, folds."""
    height_px, width_px = layers.shape
    size = (rng, height_px, width_px)
    thickness = (
        1 + 0.2 * smooth_noise(*size, 0.7 * reach_px) + 0.15 * smooth_noise(*size, 2.2 / mpp)
    )
    grain = smooth_noise(*size, max(0.55 / mpp, 1.3))
    thickness += rng.uniform(0.08, 0.25) * grain
    thickness += rng.uniform(0.0, 0.5) * np.clip(np.abs(grain) - 1.6, 0, 1)
    centre = np.clip(1 - centre_distance(height_px, width_px) / reach_px, 0, 1)
    thickness += rng.uniform(-0.1, 0.5) * centre
    if spec.polygonal:
        where = np.clip(0.45 + 0.5 * smooth_noise(*size, 0.5 * reach_px), 0, 1)
        wrinkles = ridges(smooth_noise(*size, rng.uniform(2.0, 4.5) / mpp))
        thickness += rng.uniform(0.2, 0.8) * where * wrinkles
        for _ in range(int(rng.integers(0, 4))):
            crease = draw_fold(rng, height_px, width_px, reach_px, rng.uniform(0.4, 1.2) / mpp)
            thickness += rng.uniform(0.3, 1.0) * crease
    inner = cv2.GaussianBlur(layers, (0, 0), 1.0 / mpp)
    rim = np.clip(layers - inner, 0, 1) * rng.uniform(0.1, 0.9)
    density = (layers * np.maximum(thickness, 0.15) + rim) * rng.uniform(*spec.cytoplasm_dose)
    return np.asarray(density, np.float32)


def _cytoplasm_colour(
    rng: np.random.Generator, stain: Stain, kind: str, density: Float, reach_px: float
) -> Float:
    """Absorbance (h, w, 3): a main dye fading into a second one across the cell."""
    shares = stain.cytoplasm_shares.copy()
    if kind == "superficial":
        shares = shares * (0.6, 0.5, 2.5, 2.0)
    elif kind != "intermediate":
        shares = shares * (1.2, 1.5, 0.5, 0.6)
    name = str(rng.choice(CYTOPLASM_DYES, p=shares / shares.sum()))
    first, second = stain.absorbance[name], 0.8 * stain.absorbance["lavender"]
    if rng.random() < 0.12:
        second = stain.absorbance[str(rng.choice(CYTOPLASM_DYES))]
    height_px, width_px = density.shape
    reach = rng.uniform(0.0, 0.55)
    blend = np.clip(reach + 0.4 * smooth_noise(rng, height_px, width_px, 0.9 * reach_px), 0, 1)
    colour = first + blend[..., None] * (second - first)
    return np.asarray(density[..., None] * colour, np.float32)


def _nucleus(
    rng: np.random.Generator,
    spec: CellKind,
    layers: Float,
    reach_px: float,
    radius_px: float,
    mpp: float,
) -> tuple[Float, Float]:
    """Haematoxylin dose (h, w) of one nucleus near the middle, and its (x, y, radius) in pixels."""
    height_px, width_px = layers.shape
    slack_px = max(0.0, 0.30 * (reach_px - radius_px))
    middle = (np.array([width_px, height_px]) - 1) / 2 + rng.uniform(-1, 1, 2) * slack_px
    elongation = float(1 + abs(rng.normal(0, 0.28)))
    outline = round_outline(rng, radius_px, min(elongation, 1.8), spec.roughness)
    area_px = float(cv2.contourArea(outline))
    outline = outline * np.float32(radius_px / np.sqrt(area_px / np.pi))
    mask = fill(outline + middle.astype(np.float32), height_px, width_px, 0.6)
    size = (rng, height_px, width_px)
    grain_px = max(spec.chromatin_grain_um / mpp, 1.2)
    chromatin = smooth_noise(*size, grain_px) + 0.5 * smooth_noise(*size, 2.2 * grain_px)
    membrane = np.clip(mask - cv2.GaussianBlur(mask, (0, 0), 0.5 / mpp), 0, 1)
    dose = np.maximum(1 + spec.chromatin_contrast * chromatin, 0.45) + 0.7 * membrane
    dose = mask * dose * rng.uniform(*spec.nucleus_dose)
    moments = cv2.moments(mask)
    x_px, y_px = moments["m10"] / moments["m00"], moments["m01"] / moments["m00"]
    nucleus = np.array([x_px, y_px, radius_px], np.float32)
    return np.asarray(dose, np.float32), nucleus
