"""The same jobs on slides with real pixels, in the folder named by CYTORAY_REAL_DATA."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from cytoray.indexing import part_path
from cytoray.mil import open_bags
from cytoray.nuclei import read_nuclei
from cytoray.slides import read_quarantine, read_slide_table
from cytoray.training import CropConfig
from pipelines import embed, index, pretrain

from ..conftest import tiny_ssl

pytestmark = [pytest.mark.ray, pytest.mark.real_data, pytest.mark.slow]
TILE_PX = 224


@pytest.fixture(scope="module")
def real_data() -> Path:
    folder = os.environ.get("CYTORAY_REAL_DATA")
    if not folder:
        pytest.skip("CYTORAY_REAL_DATA is not set")
    return Path(folder)


@pytest.fixture(scope="module")
def cytology_index(ray_cluster, real_data, tmp_path_factory) -> Path:
    """Three mosaics of single cells and one of liquid-based fields, tiles at 0.5 um/px."""
    folder = tmp_path_factory.mktemp("real")
    table = pyarrow.csv.read_csv(real_data / "slides" / "manifest.csv").slice(0, 3).to_pylist()
    names = [Path(row["path"]).name for row in table] + ["lbc_fields_dev.svs"]
    lines = [f"{name.split('.')[0]},{real_data / 'slides' / name}" for name in names]
    manifest = folder / "manifest.csv"
    manifest.write_text("\n".join(["slide_id,path", *lines, ""]))
    config = index.Config(manifest=manifest, out=folder / "index", tile_px=TILE_PX, mpp=0.5)
    assert index.run(config)["num_slides"] == 4
    return folder / "index"


def test_real_slides_are_indexed(cytology_index) -> None:
    rows = read_slide_table(cytology_index / "slides.parquet").to_pylist()
    assert read_quarantine(cytology_index / "quarantine.parquet").num_rows == 0
    assert {row["vendor"] for row in rows} == {"aperio", "generic-tiff"}
    for row in rows:
        assert (row["status"], row["mpp_source"]) == ("ok", "file")
        assert row["mpp_x"] == pytest.approx(0.25, rel=1e-3)
        assert 0.05 < row["foreground_share"] < 0.95
        nuclei = read_nuclei(part_path(cytology_index, row["slide_id"]))
        assert 50 < len(nuclei) == row["num_nuclei"] < 20_000
        size = [row["width_px_level0"], row["height_px_level0"]]
        assert (nuclei[:, :2] < size).all()
        assert 1.5 < np.median(nuclei[:, 2]) < 12  # um


def test_a_few_steps_and_bags_of_real_slides(cytology_index, tracking_uri, tmp_path) -> None:
    config = pretrain.Config(
        index=cytology_index,
        out=tmp_path / "run",
        ssl=tiny_ssl(total_steps=4, crops=CropConfig(global_px=96, local_px=48, num_local=2)),
        shuffle_chunks=4,
        log_every=1,
        tracking_uri=tracking_uri,
    )
    trained = pretrain.run(config)
    assert (trained["steps"], trained["num_quarantined_tiles"]) == (4, 0)
    assert math.isfinite(trained["loss"])
    done = embed.run(
        embed.Config(index=cytology_index, encoder=trained["encoder"], out=tmp_path / "embed")
    )
    assert (done["num_written"], done["num_quarantined"]) == (4, 0)
    store = open_bags(done["bags"])
    for row in read_slide_table(cytology_index / "slides.parquet").to_pylist():
        bag = store.read(row["slide_id"])
        assert len(bag) == row["num_tiles"]
        assert np.isfinite(bag.features).all()
        assert bag.features.std(axis=0).max() > 0
        assert bag.meta.tile_size_level0 == pytest.approx(2 * TILE_PX, rel=1e-3)


@pytest.mark.parametrize("given_mpp", ["", "0.25"])
def test_scanner_files_with_and_without_a_stated_scale(
    ray_cluster, real_data, tmp_path, given_mpp: str
) -> None:
    """One states 0.499 um/px; the other states nothing and waits for the manifest to."""
    files = sorted((real_data / "slides_histology").glob("*.svs"))
    stated, silent = sorted(files, key=lambda path: "tcga" in path.name.lower())
    manifest = tmp_path / "manifest.csv"
    manifest.write_text(f"slide_id,path,mpp\nstated,{stated},\nsilent,{silent},{given_mpp}\n")
    config = index.Config(
        manifest=manifest, out=tmp_path / "o", tile_px=TILE_PX, mpp=1.0, detector="none"
    )
    summary = index.run(config)
    rows = {r["slide_id"]: r for r in read_slide_table(tmp_path / "o/slides.parquet").to_pylist()}
    assert (rows["stated"]["status"], rows["stated"]["mpp_source"]) == ("ok", "file")
    assert rows["stated"]["mpp_x"] == pytest.approx(0.499)
    assert rows["stated"]["num_tiles"] > 4
    if given_mpp:
        assert (rows["silent"]["status"], rows["silent"]["mpp_source"]) == ("ok", "manifest")
        assert rows["silent"]["reader"] == "openslide"
        assert rows["silent"]["num_tiles"] > 4
        assert summary["num_quarantined"] == 0
    else:
        faults = pq.read_table(tmp_path / "o" / "quarantine.parquet").to_pylist()
        assert [(f["slide_id"], f["reason_code"]) for f in faults] == [("silent", "mpp_missing")]
        assert "manifest" in faults[0]["message"]
