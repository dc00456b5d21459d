from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from cytoray.errors import InputError
from cytoray.mil import open_bags
from cytoray.models.encoder import load_encoder
from cytoray.slides import mask_indices, read_quarantine, read_slide_table, tile_id
from cytoray.streaming.tile_pixels import BagTiles
from cytoray.synthetic import corrupt_tile
from pipelines import embed
from pipelines.embed import index_plan

from ..conftest import MPP, TILE_PX

pytestmark = pytest.mark.ray


def kept_tiles(indexed) -> dict[str, list[str]]:
    """Tile ids of every slide by its keep masks, in the order they are read."""
    names: dict[str, list[str]] = {}
    for row in read_slide_table(indexed.out / "slides.parquet").to_pylist():
        for chunk, mask in enumerate(row["keep_masks"]):
            place = f"{chunk % row['chunk_columns']}_{chunk // row['chunk_columns']}"
            name = f"{row['slide_id']}:{MPP:g}:{TILE_PX}:{place}"
            names.setdefault(row["slide_id"], []).extend(
                tile_id(name, i) for i in mask_indices(mask).tolist()
            )
    return names


def test_a_bag_holds_every_kept_tile_at_its_place(indexed, embedded) -> None:
    store = open_bags(embedded.summary["bags"])
    expected = kept_tiles(indexed)
    assert set(store.slide_ids) == set(expected)
    for slide_id, names in expected.items():
        bag = store.read(slide_id)
        assert list(bag.tile_ids) == names
        for name, (x, y) in zip(names, bag.coordinates_level0.tolist(), strict=True):
            column, row = (int(part) for part in name.split(":")[3].split("_"))
            index = int(name.split(":")[4])
            assert x == (8 * column + index % 8) * TILE_PX
            assert y == (8 * row + index // 8) * TILE_PX
        assert bag.features.shape == (len(names), 64)
        assert (bag.meta.tile_px, bag.meta.mpp) == (TILE_PX, MPP)
        assert bag.meta.tile_size_level0 == TILE_PX  # the slides have the grid's mpp
    assert embedded.summary["num_tiles"] == sum(map(len, expected.values()))
    assert embedded.summary["num_written"] == len(expected) == 8


def test_features_are_the_encoders_own(indexed, pretrained, embedded) -> None:
    """The encoder applied here, to tiles read here."""
    encoder = load_encoder(pretrained.summary["encoder"])
    assert embedded.summary["encoder_id"] == encoder.encoder_id
    store = open_bags(embedded.summary["bags"])
    names = {slide_id: list(store.read(slide_id).tile_ids) for slide_id in store.slide_ids}
    tiles = BagTiles(index_plan(indexed.out), names)
    for slide_id in store.slide_ids[::3]:
        bag = store.read(slide_id)
        chosen = np.arange(0, len(bag), 9)
        pixels = tiles(slide_id, chosen, np.random.default_rng(0))
        with torch.inference_mode():
            features = encoder(torch.from_numpy(pixels)).numpy()
        assert np.abs(features - bag.features[chosen]).max() < 1e-2
        assert features.std(axis=0).mean() > 1e-2  # tiles differ, so agreement says something
        assert bag.meta.encoder_id == encoder.encoder_id


def test_resume_passes_over_bags_that_are_there(indexed, embedded, pretrained, tmp_path) -> None:
    """Six of eight bags are there: two are written, and they are what they were."""
    out = tmp_path / "embed"
    shutil.copytree(embedded.out, out)
    store = open_bags(embedded.summary["bags"])
    gone = [store.slide_ids[0], store.slide_ids[5]]
    for slide_id in gone:
        shutil.rmtree(out / "bags" / f"slide_id={slide_id}")
    before = {p: p.stat().st_mtime_ns for p in (out / "bags").rglob("bag.parquet")}
    config = embed.Config(
        index=indexed.out, encoder=pretrained.summary["encoder"], out=out, resume=True
    )
    assert embed.run(config)["num_written"] == 2
    assert all(path.stat().st_mtime_ns == mtime for path, mtime in before.items())
    again = open_bags(out / "bags")
    assert again.slide_ids == store.slide_ids
    for slide_id in gone:
        mine, theirs = again.read(slide_id), store.read(slide_id)
        assert mine.tile_ids == theirs.tile_ids
        assert np.allclose(mine.features, theirs.features, atol=1e-3)
    assert embed.run(config)["num_written"] == 0


def test_another_encoder_does_not_mix_into_the_bags(indexed, embedded, tmp_path) -> None:
    out = tmp_path / "embed"
    shutil.copytree(embedded.out, out)
    (out / "run.json").unlink()
    config = embed.Config(
        index=indexed.out, encoder="vit_tiny_patch16_224", pretrained=False, out=out, resume=True
    )
    with pytest.raises(InputError, match="is not a cytoray run"):
        embed.run(config)
    shutil.copyfile(embedded.out / "run.json", out / "run.json")
    with pytest.raises(InputError, match=r"encoder: .* -> \"vit_tiny_patch16_224\""):
        embed.run(config)
    (out / "config.yaml").unlink()
    with pytest.raises(InputError, match=r"holds bags of encoder .* choose another --out"):
        embed.run(config)


def test_unreadable_tiles_are_quarantined_and_left_out(
    indexed, pretrained, tmp_path, ray_cluster
) -> None:
    """Slides damaged after they were indexed: one tile of one, the whole of another."""
    import pyarrow.parquet as pq

    table = read_slide_table(indexed.out / "slides.parquet").slice(0, 3)
    paths = table.column("path").to_pylist()
    indexed_path = paths[1]
    damaged = corrupt_tile(paths[0], tmp_path / "damaged.svs", 6)
    paths[:2] = [str(damaged), str(tmp_path / "gone.svs")]
    column = table.column_names.index("path")
    pq.write_table(table.set_column(column, "path", [paths]), tmp_path / "slides.parquet")
    config = embed.Config(
        index=tmp_path, encoder=pretrained.summary["encoder"], out=tmp_path / "o", strict=True
    )
    summary = embed.run(config)
    assert summary["exit_code"] == 3
    assert summary["num_written"] == 2
    expected = kept_tiles(indexed)
    first, second, third = table.column("slide_id").to_pylist()
    store = open_bags(summary["bags"])
    assert store.slide_ids == sorted([first, third])
    rows = read_quarantine(tmp_path / "o" / "quarantine.parquet").to_pylist()
    lost = {name: [r["region"] for r in rows if r["slide_id"] == name] for name in (first, second)}
    assert 0 < len(lost[first]) <= 16
    assert sorted([*store.read(first).tile_ids, *lost[first]]) == sorted(expected[first])
    assert lost[second] == [""]
    assert any("missing_file" in r["message"] for r in rows)
    assert list(store.read(third).tile_ids) == expected[third]
    shutil.copyfile(indexed_path, tmp_path / "gone.svs")
    assert embed.run(replace(config, resume=True))["num_written"] == 1
    rows = read_quarantine(tmp_path / "o" / "quarantine.parquet").to_pylist()
    assert sorted(r["region"] for r in rows) == sorted(lost[first])
