"""An index and bags as the jobs would leave them, made of numbers: no slide behind them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cytoray.mil import Bag, BagMeta, write_bag
from cytoray.slides import SLIDE_SCHEMA
from cytoray.slides.slide_table import write_slide_table


def make_index(folder: Path, rows: list[dict[str, Any]], columns: dict[str, pa.DataType]) -> Path:
    """A slide table of usable slides of four tiles; `rows` say what differs."""
    schema = pa.schema([*SLIDE_SCHEMA, *(pa.field(n, kind) for n, kind in columns.items())])
    plain = {
        "width_px_level0": 128,
        "height_px_level0": 128,
        "mpp_x": 0.5,
        "mpp_y": 0.5,
        "mpp_source": "file",
        "reader": "openslide",
        "grid_mpp": 0.5,
        "grid_tile_px": 64,
        "chunk_columns": 1,
        "chunk_rows": 1,
        "keep_masks": [15],
        "num_tiles": 4,
        "status": "ok",
    }
    table = [plain | {"path": f"/gone/{row['slide_id']}.svs"} | row for row in rows]
    write_slide_table(table, folder / "slides.parquet", schema)
    return folder


def make_bags(
    folder: Path,
    labels: dict[str, int],
    *,
    width: int = 16,
    size: tuple[int, int] = (8, 24),
    signal: float = 2.0,
    encoder_id: str = "made",
    tile_px: int = 64,
    seed: int = 0,
) -> Path:
    """A bag a slide; those of label 1 have a few instances moved along the first axis."""
    rng = np.random.default_rng(seed)
    for slide_id, label in labels.items():
        count = int(rng.integers(*size))
        features = rng.normal(size=(count, width)).astype(np.float32)
        features[: max(1, count // 4), 0] += signal * label
        place = np.stack([np.arange(count) % 8, np.arange(count) // 8], axis=1) * tile_px
        meta = BagMeta(
            slide_id=slide_id,
            tile_px=tile_px,
            mpp=0.5,
            tile_size_level0=float(tile_px),
            encoder_id=encoder_id,
            encoder_name=encoder_id,
        )
        names = tuple(f"{slide_id}:0.5:{tile_px}:0_0:{i % 4}" for i in range(count))
        write_bag(folder, Bag(features, place.astype(np.float32), meta, names))
    return folder


def make_study(
    folder: Path, num_slides: int = 40, *, split: bool = False, signal: float = 2.0, **options: Any
) -> tuple[Path, Path]:
    """Index and bags of `num_slides` slides, two a patient, with the binary column `label`."""
    rows, labels = [], {}
    for i in range(num_slides):
        slide_id, label = f"s{i:03d}", (i // 2) % 2
        part = ("train", "train", "val", "test")[(i // 4) % 4] if split else None
        rows.append({"slide_id": slide_id, "patient_id": f"p{i // 2}", "split": part,
                     "label": label})  # fmt: skip
        labels[slide_id] = label
    index = make_index(folder / "index", rows, {"label": pa.int64()})
    return index, make_bags(folder / "bags", labels, signal=signal, **options)
