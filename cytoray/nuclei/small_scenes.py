"""Scenes to train the `small` detector on: cells of any stain and preparation, painted in a moment.

A pixel is one of the detector's working pixels. The scenes need not please a pathologist; they are
to show the one thing that all stains share (a nucleus is a compact body darker than all that
surrounds it, with an edge), in more colours, sizes and company than the slides of
`cytoray.synthetic` have, and next to everything that is dark and no nucleus.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

from cytoray.nuclei.small import WORK_UM
from cytoray.nuclei.small_bodies import DEBRIS, paint_nucleus, paint_red_cell
from cytoray.nuclei.small_canvas import (
    MARGIN_PX,
    MAX_RADIUS_PX,
    MIN_RADIUS_PX,
    Scene,
    dye,
    expose,
    log_uniform,
    nuclei_inside,
)
from cytoray.synthetic.textures import (
    Float,
    draw_fold,
    fill,
    polygon_outline,
    ridges,
    round_outline,
    smooth_noise,
)


def paint_scene(rng: np.random.Generator, side_px: int) -> tuple[NDArray[np.uint8], Float]:
    """Paint one field.

    Args:
        rng: the source of randomness.
        side_px: side of the field, in working pixels.

    Returns:
        pixels uint8 (side, side, 3), and nuclei float32 (N, 3): x_px, y_px, radius_px, of those
        whose centre lies in the field.
    """
    scene = Scene(rng, side_px)
    names = list(SETTINGS)
    shares = np.array([share for share, _ in SETTINGS.values()])
    SETTINGS[str(rng.choice(names, p=shares / shares.sum()))][1](scene)
    if rng.random() < 0.6:
        for _ in range(int(rng.integers(1, 7))):
            add_debris(scene)
    return expose(scene), nuclei_inside(scene)


def add_debris(scene: Scene) -> None:
    """Add one thing that is dark and no nucleus."""
    kind = str(scene.rng.choice(list(DEBRIS)))
    dose = DEBRIS[kind](scene.rng, scene.radius_px)
    nuclear = scene.rng.random() < 0.5
    colour = scene.nuclear if nuclear else scene.counterstains[0]
    level = np.float32(scene.step * scene.rng.uniform(0.4, 1.4))
    scene.add(*scene.anywhere(), dose * level, colour)


def add_cytoplasm(scene: Scene, x: float, y: float, reach_px: float, *, polygonal: bool) -> None:
    """Add the body of one cell: uneven, wrinkled, folded, with a rim; without its nucleus."""
    rng = scene.rng
    elongation = float(np.exp(abs(rng.normal(0, 0.25))))
    outline = (
        polygon_outline(rng, reach_px, elongation)
        if polygonal
        else round_outline(rng, reach_px, elongation, 0.08)
    )
    width, height = (2 * np.ceil(np.abs(outline).max(axis=0)) + 5).astype(int)
    middle = (np.array([width, height], np.float32) - 1) / 2
    mask = fill(outline + middle, height, width, rng.uniform(0.5, 2.0))
    size = (rng, height, width)
    texture = 1 + 0.25 * smooth_noise(*size, 0.7 * reach_px)
    texture += rng.uniform(0, 0.25) * smooth_noise(*size, rng.uniform(1.3, 4))
    if rng.random() < 0.4:
        texture += rng.uniform(0.1, 0.7) * ridges(smooth_noise(*size, rng.uniform(4, 10)))
    if polygonal and rng.random() < 0.5:
        fold = draw_fold(rng, height, width, reach_px, rng.uniform(0.6, 2.0))
        texture += rng.uniform(0.4, 1.5) * fold
    rim = np.clip(mask - cv2.GaussianBlur(mask, (0, 0), 1.5), 0, 1) * rng.uniform(0, 1.0)
    level = rng.uniform(0.05, 0.5) if rng.random() < 0.75 else rng.uniform(0.4, 1.1)
    dose = np.asarray((mask * np.maximum(texture, 0.1) + rim) * level, np.float32)
    counterstain = scene.counterstains[int(rng.integers(len(scene.counterstains)))]
    scene.add(x, y, dose, counterstain)


def sparse_cells(scene: Scene) -> None:
    """Squamous cells, some without a nucleus, and heaps of leucocytes."""
    rng = scene.rng
    scene.radius_px = min(scene.radius_px, 8.0 / WORK_UM)
    reach = scene.radius_px * rng.uniform(1.6, 7.0)
    room = (scene.side_px + 2 * MARGIN_PX) ** 2 / (np.pi * reach**2)
    kinds = ("plain", "plain", "vesicular")
    for _ in range(min(40, 1 + int(rng.uniform(0.1, 1.3) * room))):
        x, y = scene.anywhere()
        own = min(reach * np.exp(rng.normal(0, 0.25)), 60.0)
        add_cytoplasm(scene, x, y, own, polygonal=rng.random() < 0.6)
        for _ in range(1 if rng.random() < 0.93 else 2):
            if rng.random() < 0.9:
                away = rng.normal(0, 0.15 * own, 2)
                scene.add_nucleus(x + away[0], y + away[1], scene.draw_nucleus(1.0, kinds))
    for _ in range(int(rng.integers(0, 3))):
        add_leucocytes(scene, int(rng.integers(1, 20)))


def add_leucocytes(scene: Scene, count: int) -> None:
    """Add small dark cells in a heap; most nuclei lobed or round."""
    rng = scene.rng
    x, y = scene.anywhere()
    usual = float(rng.uniform(0.5, 1.0) * scene.radius_px)
    usual = float(np.clip(usual, 1.9 / WORK_UM, 5.0 / WORK_UM))
    spread = 1.2 * usual * np.sqrt(count) * rng.uniform(0.6, 3)
    kinds = ("plain", "plain", "bent", "lobed") if rng.random() < 0.6 else ("plain",)
    for _ in range(count):
        own_x, own_y = x + rng.normal(0, spread), y + rng.normal(0, spread)
        if rng.random() < 0.7:
            add_cytoplasm(scene, own_x, own_y, usual * rng.uniform(1.3, 1.9), polygonal=False)
        nucleus = scene.draw_nucleus(usual / scene.radius_px, kinds)
        scene.add_nucleus(own_x, own_y, nucleus)


def crowded_sheet(scene: Scene) -> None:
    """A sheet or a heap of cells whose nuclei nearly touch, in one common cytoplasm."""
    rng = scene.rng
    for _ in range(int(rng.integers(1, 4))):
        x, y = scene.anywhere()
        reach = rng.uniform(20, 90)
        if rng.random() < 0.8:
            add_cytoplasm(scene, x, y, reach, polygonal=False)
        spacing = scene.radius_px * rng.uniform(1.9, 3.5)
        tries = min(150, int(3.2 * reach**2 / spacing**2))
        kinds = ("plain", "plain", "vesicular", "oval")
        for _ in range(tries):
            away, angle = reach * np.sqrt(rng.random()), rng.uniform(0, 2 * np.pi)
            own = (x + away * np.cos(angle), y + away * np.sin(angle))
            scene.add_nucleus(*own, scene.draw_nucleus(1.0, kinds))


def blood_film(scene: Scene) -> None:
    """Red cells without nuclei, dense or sparse; white cells of any shape; platelets."""
    rng = scene.rng
    scale = log_uniform(rng, 0.8, 2.2) / WORK_UM
    red_px = 3.6 * scale
    level = rng.uniform(0.1, 0.6)
    colour = dye(rng, 0.3) * np.array([rng.uniform(0.1, 1.0), 1.1, 1.1], np.float32)
    scene.step = max(scene.step, 1.6 * level)
    bank = [paint_red_cell(rng, red_px) for _ in range(6)]
    room = (scene.side_px + 2 * MARGIN_PX) ** 2 / (np.pi * red_px**2)
    for _ in range(int(room * rng.uniform(0.02, 0.75))):
        dose = bank[int(rng.integers(len(bank)))]
        scene.add(*scene.anywhere(), dose * np.float32(level * rng.uniform(0.8, 1.2)), colour)
    if rng.random() < 0.7:  # in a film cells lie side by side: where they overlap, little adds up
        np.minimum(scene.absorbance, 1.25 * level * colour, out=scene.absorbance)
    for _ in range(int(rng.integers(0, 10))):
        x, y = scene.anywhere()
        radius = float(np.clip(scale * rng.uniform(2.8, 6.5), MIN_RADIUS_PX, MAX_RADIUS_PX))
        if rng.random() < 0.85:
            reach = radius * rng.uniform(1.15, 2.0)
            add_cytoplasm(scene, x, y, reach, polygonal=False)
        kind = str(rng.choice(["plain", "lobed", "lobed", "bent", "oval"]))
        scene.add_nucleus(x, y, paint_nucleus(rng, kind, radius, scene.edge_px))
    for _ in range(int(rng.integers(0, 8))):
        outline = round_outline(rng, rng.uniform(0.6, 1.3) * min(scale, 1.3), 1.3, 0.1) + 4
        scene.add(*scene.anywhere(), fill(outline, 9, 9) * np.float32(scene.step), scene.nuclear)


def tissue(scene: Scene) -> None:
    """Stained all over: fibres and cytoplasm everywhere, nuclei round to spindle-shaped."""
    rng, side = scene.rng, scene.side_px
    ground = 1 + 0.5 * smooth_noise(rng, side, side, rng.uniform(15, 60))
    ground += rng.uniform(0, 0.4) * smooth_noise(rng, side, side, rng.uniform(2, 5))
    if rng.random() < 0.6:
        fibres = smooth_noise(rng, side, 2 * side, rng.uniform(2, 4))
        fibres = cv2.resize(fibres, (8 * side, side))[:, :side]
        turn = cv2.getRotationMatrix2D((side / 2, side / 2), rng.uniform(0, 180), 1.0)
        fibres = cv2.warpAffine(fibres, turn, (side, side), borderMode=cv2.BORDER_REFLECT)
        ground += rng.uniform(0.1, 0.5) * fibres
    holes = smooth_noise(rng, side, side, rng.uniform(20, 60)) < rng.uniform(0.2, 2.5)
    soft = cv2.GaussianBlur(holes.astype(np.float32), (0, 0), 1.2)
    dose = np.maximum(ground, 0) * soft * rng.uniform(0.1, 0.7)
    scene.absorbance += dose[..., None].astype(np.float32) * scene.counterstains[0]
    scene.radius_px = min(scene.radius_px, 7.0 / WORK_UM)
    room = side**2 / (np.pi * scene.radius_px**2)
    kinds = [("plain", "vesicular"), ("plain", "oval", "vesicular"), ("oval", "spindle")]
    mix = kinds[int(rng.integers(3))]
    for _ in range(min(250, int(room * rng.uniform(0.05, 0.8)))):
        scene.add_nucleus(*scene.anywhere(), scene.draw_nucleus(1.0, mix))


def bare_nuclei(scene: Scene) -> None:
    """Nuclei on glass with hardly any cytoplasm, in proteinaceous film or none."""
    rng, side = scene.rng, scene.side_px
    film = np.maximum(smooth_noise(rng, side, side, rng.uniform(4, 40)), 0)
    scene.absorbance += (film * rng.uniform(0, 0.2))[..., None] * scene.counterstains[0]
    for _ in range(int(rng.integers(1, 60))):
        x, y = scene.anywhere()
        nucleus = scene.draw_nucleus(1.0, ("plain", "oval", "bent", "vesicular"))
        if scene.add_nucleus(x, y, nucleus) and rng.random() < 0.4:
            reach = nucleus.radius_px * rng.uniform(1.2, 1.8)
            add_cytoplasm(scene, x, y, reach, polygonal=False)


def nothing(scene: Scene) -> None:
    """Debris and empty cells, nothing to find."""
    rng = scene.rng
    for _ in range(int(rng.integers(0, 12))):
        add_debris(scene)
    for _ in range(int(rng.integers(0, 6))):
        reach = scene.radius_px * rng.uniform(2, 6)
        add_cytoplasm(scene, *scene.anywhere(), min(reach, 60.0), polygonal=rng.random() < 0.7)


SETTINGS: dict[str, tuple[float, Callable[[Scene], None]]] = {
    "sparse_cells": (0.32, sparse_cells),
    "crowded_sheet": (0.16, crowded_sheet),
    "blood_film": (0.2, blood_film),
    "tissue": (0.14, tissue),
    "bare_nuclei": (0.1, bare_nuclei),
    "nothing": (0.08, nothing),
}
"""What a scene may show, by name: its share, and the function that paints it."""
