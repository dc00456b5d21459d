"""Make whole synthetic Pap slides: pixels with the exact truth of what is on them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cytoray.errors import InputError
from cytoray.synthetic.bodies import WHITE_CELLS, render_debris
from cytoray.synthetic.cells import NORMAL_SHARES, CellPatch, render_cell
from cytoray.synthetic.config import SlidePlan, SynthConfig, slide_plan
from cytoray.synthetic.scene import Scene
from cytoray.synthetic.stain import Stain, sample_stain

BANK_CELLS = 40
BANK_ABNORMAL = 14
BANK_WHITE = 14
BANK_DEBRIS = 28
NUCLEI_SCHEMA = pa.schema(
    [
        ("x_level0", pa.float32()),
        ("y_level0", pa.float32()),
        ("radius_um", pa.float32()),
        ("abnormal", pa.bool_()),
        ("kind", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class SyntheticSlide:
    """One slide and its truth.

    Attributes:
        plan: slide_id, patient, label and so on.
        pixels: uint8 (size, size, 3), level 0.
        nuclei: columns x_level0, y_level0, radius_um (float32), abnormal (bool), kind (string:
            a key of `CELL_KINDS`, or `neutrophil`, `lymphocyte`).
        abnormal_boxes_level0: int32 (N, 4), x, y, w, h of every abnormal cell; empty on a negative.
    """

    plan: SlidePlan
    pixels: NDArray[np.uint8]
    nuclei: pa.Table
    abnormal_boxes_level0: NDArray[np.int32]


def make_slide(config: SynthConfig, index: int) -> SyntheticSlide:
    """Make slide `index` of `config`; the same pixels whichever other slides are made.

    Raises:
        InputError: there is no such slide.
    """
    plan = slide_plan(config, index)
    rng = np.random.default_rng([config.seed, 2, index])
    site_rng = np.random.default_rng([config.seed, 3, int(plan.site.removeprefix("site_"))])
    stain = sample_stain(rng, site_rng)
    scene = Scene(rng, stain, config.size_px, config.mpp)
    area_mm2 = (config.size_px * config.mpp / 1000) ** 2
    num_cells = max(8, round(config.cells_per_mm2 * area_mm2 * np.exp(rng.normal(0, 0.2))))
    wanted = max(config.min_abnormal, round(config.witness * num_cells))
    num_abnormal = min(wanted, num_cells) if plan.label else 0
    add_cells(scene, rng, stain, num_cells - num_abnormal, num_abnormal)
    add_background_bodies(scene, rng, stain, num_cells)
    return SyntheticSlide(
        plan=plan,
        pixels=scene.finish(),
        nuclei=_nuclei_table(scene),
        abnormal_boxes_level0=np.array(scene.boxes, np.int32).reshape(-1, 4),
    )


def add_cells(
    scene: Scene,
    rng: np.random.Generator,
    stain: Stain,
    num_normal: int,
    num_abnormal: int,
    *,
    with_nucleus: bool = True,
) -> None:
    """Put squamous cells on the scene: every abnormal one, normal ones as room allows.

    Raises:
        InputError: the slide is too small for its abnormal cells.
    """
    shares = rng.dirichlet(np.array(list(NORMAL_SHARES.values())) * 12)
    kinds = rng.choice(list(NORMAL_SHARES), size=min(num_normal, BANK_CELLS), p=shares)
    normal = [render_cell(rng, stain, str(k), scene.mpp, with_nucleus=with_nucleus) for k in kinds]
    abnormal = [
        render_cell(rng, stain, "abnormal", scene.mpp)
        for _ in range(min(num_abnormal, BANK_ABNORMAL))
    ]
    cluster_chance = rng.uniform(0.1, 0.5)
    for place in range(num_abnormal):
        patch = abnormal[place % len(abnormal)]
        placed = any(
            scene.scatter(patch, cluster_chance=cluster_chance, inside=True) for _ in range(50)
        )
        if not placed:
            raise InputError(
                f"no room for {num_abnormal} abnormal cells on {scene.size_px} px at {scene.mpp:g} "
                "um per pixel; lower witness or cells_per_mm2, or raise size_px"
            )
    for place in range(num_normal):
        scene.scatter(normal[place % len(normal)], cluster_chance=cluster_chance)


def add_background_bodies(
    scene: Scene, rng: np.random.Generator, stain: Stain, num_cells: int
) -> None:
    """Add white blood cells (single and heaped) and debris; their number is the slide's own."""
    num_white = int(min(3 * num_cells, num_cells * np.exp(rng.normal(-0.3, 0.8))))
    bank: list[CellPatch] = []
    for _ in range(min(num_white, BANK_WHITE)):
        kind = "neutrophil" if rng.random() < 0.75 else "lymphocyte"
        bank.append(WHITE_CELLS[kind](rng, stain, scene.mpp))
    while num_white > 0:
        heap = min(num_white, int(np.ceil(rng.pareto(1.3) * 2)), 60)
        scene.clump([bank[i] for i in rng.integers(len(bank), size=heap)], 6.0 / scene.mpp)
        num_white -= heap
    num_debris = int(num_cells * rng.uniform(0.15, 0.7))
    debris = [render_debris(rng, stain, scene.mpp) for _ in range(min(num_debris, BANK_DEBRIS))]
    for place in range(num_debris):
        scene.scatter(debris[place % len(debris)], cluster_chance=0.3)


def _nuclei_table(scene: Scene) -> pa.Table:
    columns = list(zip(*scene.nuclei, strict=True)) or [(), (), (), ()]
    x_level0, y_level0, radius_px, kind = columns
    return pa.table(
        {
            "x_level0": np.asarray(x_level0, np.float32),
            "y_level0": np.asarray(y_level0, np.float32),
            "radius_um": np.asarray(radius_px, np.float32) * np.float32(scene.mpp),
            "abnormal": np.asarray([name == "abnormal" for name in kind], bool),
            "kind": pa.array(list(kind), pa.string()),
        },
        schema=NUCLEI_SCHEMA,
    )
