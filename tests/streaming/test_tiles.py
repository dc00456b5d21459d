from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cytoray.nuclei import write_nuclei
from cytoray.perturb import CROP_POLICIES, NUM_VIEW_PARAMS, VIEW_COLUMN, PerturbConfig
from cytoray.streaming import ChunkOrder
from cytoray.streaming.plan import ReadPlan
from cytoray.streaming.tile_pixels import ChunkTiles
from cytoray.streaming.tiles import TileReader, TileReaderConfig
from cytoray.synthetic import corrupt_tile

from ..conftest import MPP, TILE_PX
from .test_tile_pixels import with_path

POLICY = replace(CROP_POLICIES["dinov2"], num_global=2, num_local=3)
TIMES = ("read_s", "detect_s", "perturb_s")


def make_reader(plan: ReadPlan, *, seed: int = 0, **changes) -> TileReader:
    order = ChunkOrder(num_chunks=plan.num_chunks, seed=seed, shuffle_chunks=4)
    return TileReader(plan, order, TileReaderConfig(seed=seed, policy=POLICY, **changes))


def read_epoch(reader: TileReader, epoch: int = 0) -> list[dict[str, np.ndarray]]:
    chunks = reader.plan.num_chunks
    return [reader.read(i) for i in range(epoch * chunks, (epoch + 1) * chunks)]


def joined(chunks: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """One epoch, sorted by tile id."""
    columns = {name: np.concatenate([c[name] for c in chunks]) for name in chunks[0]}
    order = np.argsort(columns["tile_id"])
    return {name: values[order] for name, values in columns.items()}


@pytest.fixture(scope="module")
def detected(read_plan) -> list[dict[str, np.ndarray]]:
    """An epoch with nuclei detected on the fly."""
    return read_epoch(make_reader(read_plan))


def test_columns(read_plan, detected) -> None:
    for chunk in detected:
        n = len(chunk["tile_id"])
        assert chunk["pixels"].shape == (n, TILE_PX, TILE_PX, 3)
        assert chunk["pixels"].dtype == np.uint8
        assert chunk["views"].shape == (n, 5, NUM_VIEW_PARAMS)
        assert chunk["views"].dtype == np.float32
        assert np.isfinite(chunk["views"]).all()
        assert all((chunk[name] >= 0).all() and len(chunk[name]) == n for name in TIMES)


def test_every_tile_once_an_epoch_and_as_many_as_planned(
    read_plan, plan_tile_ids, detected
) -> None:
    order = ChunkOrder(num_chunks=read_plan.num_chunks, seed=0, shuffle_chunks=4)
    for epoch in (0, 1):
        chunks = detected if epoch == 0 else read_epoch(make_reader(read_plan), epoch)
        assert joined(chunks)["tile_id"].tolist() == plan_tile_ids
        positions = np.arange(read_plan.num_chunks) + epoch * read_plan.num_chunks
        planned = [read_plan.tiles_in_chunk(c) for c in order.chunks(positions)[1].tolist()]
        assert [len(c["tile_id"]) for c in chunks] == planned


def test_table_and_detection_give_the_same_tiles_and_views(read_plan, nuclei_dir, detected) -> None:
    """`--nuclei table` and `--nuclei detect` are the same run."""
    from_table = read_epoch(make_reader(read_plan, nuclei_dir=nuclei_dir))
    assert sum(int(c["num_nuclei"].sum()) for c in from_table) > 50
    for mine, theirs in zip(from_table, detected, strict=True):
        for name in mine:
            if name not in TIMES:
                assert np.array_equal(mine[name], theirs[name]), name


def test_the_table_is_used_when_there_is_one(read_plan, tmp_path) -> None:
    """Nuclei come from the files: with other files there are other nuclei."""
    for slide_id in read_plan.slides.column("slide_id").to_pylist():
        one = np.array([[100, 100, 3, 1]], np.float32)
        write_nuclei(tmp_path / f"{slide_id}.parquet", slide_id, one, "by hand")
    epoch = joined(read_epoch(make_reader(read_plan, nuclei_dir=str(tmp_path))))
    assert epoch["num_nuclei"].sum() <= 3
    assert set(epoch["num_nuclei"].tolist()) <= {0, 1}


def test_nuclei_are_where_the_pixels_are_dark(read_plan, nuclei_dir) -> None:
    """Crops centred without jitter show dark middles: frames of slide, chunk and tile agree."""
    policy = replace(POLICY, jitter=0.0, num_local=1, local_scale=(0.05, 0.05))
    order = ChunkOrder(num_chunks=read_plan.num_chunks, seed=0)
    config = TileReaderConfig(
        seed=0, policy=policy, perturb=PerturbConfig(shuffle=False), nuclei_dir=nuclei_dir
    )
    epoch = joined(read_epoch(TileReader(read_plan, order, config)))
    columns = [VIEW_COLUMN["center_x_px"], VIEW_COLUMN["center_y_px"]]
    darker = []
    for i, (x, y) in enumerate(epoch["views"][:, -1, columns].round().astype(int)):
        if epoch["num_nuclei"][i] and min(x, y) >= 12 and max(x, y) < TILE_PX - 12:
            around = epoch["pixels"][i].mean(axis=2)[y - 12 : y + 13, x - 12 : x + 13]
            rim = np.concatenate([around[0], around[-1], around[:, 0], around[:, -1]])
            darker.append(around[11:14, 11:14].mean() < rim.mean() - 20)
    assert len(darker) > 20
    assert np.mean(darker) > 0.9


def test_a_position_read_alone_is_the_same(read_plan, detected) -> None:
    """By a fresh reader, in another order: nothing hangs on what was read before."""
    for position in (7, 2):
        again = make_reader(read_plan).read(position)
        for name in again:
            if name not in TIMES:
                assert np.array_equal(again[name], detected[position][name]), name


def test_epochs_and_seeds_differ(read_plan, detected) -> None:
    first = joined(detected)
    second = joined(read_epoch(make_reader(read_plan), 1))
    other = joined(read_epoch(make_reader(read_plan, seed=1)))
    for changed in (second, other):
        assert (changed["views"] != first["views"]).any(axis=(1, 2)).all()
        busy = first["num_nuclei"] > 0
        assert (changed["pixels"] != first["pixels"]).any(axis=(1, 2, 3))[busy].mean() > 0.9


def test_perturbation_scrambles_tiles_with_nuclei_alone(read_plan, detected) -> None:
    plain = ChunkTiles(read_plan)
    original = joined([plain.read(i) for i in range(read_plan.num_chunks)])
    epoch = joined(detected)
    changed = (epoch["pixels"] != original["pixels"]).any(axis=(1, 2, 3))
    busy = epoch["num_nuclei"] > 0
    assert not changed[~busy].any()
    assert changed[busy].mean() > 0.9
    for off in (PerturbConfig(enabled=False), PerturbConfig(shuffle=False)):
        left_alone = joined(read_epoch(make_reader(read_plan, perturb=off)))
        assert np.array_equal(left_alone["pixels"], original["pixels"])


def test_without_perturbation_crops_lie_anywhere_and_nothing_is_detected(
    read_plan, nuclei_dir, detected
) -> None:
    """Plain DINOv2, iBOT, ...: the same crops whether the nuclei are known or not."""
    plain = PerturbConfig(enabled=False)
    blind = joined(read_epoch(make_reader(read_plan, perturb=plain)))
    assert set(blind["num_nuclei"].tolist()) == {-1}
    knowing = joined(read_epoch(make_reader(read_plan, perturb=plain, nuclei_dir=nuclei_dir)))
    centred = joined(detected)
    assert np.array_equal(knowing["num_nuclei"], centred["num_nuclei"])
    assert np.array_equal(knowing["views"], blind["views"])
    busy = centred["num_nuclei"] > 0
    assert (centred["views"] != blind["views"]).any(axis=(1, 2))[busy].all()


def test_a_lost_slide_keeps_its_rows_with_the_reason(read_plan, detected, tmp_path) -> None:
    epoch = joined(read_epoch(make_reader(with_path(read_plan, 0, tmp_path / "gone.svs"))))
    good = joined(detected)
    assert epoch["tile_id"].tolist() == good["tile_id"].tolist()
    slide_id = read_plan.slides.column("slide_id")[0].as_py()
    lost = np.array([name.startswith(f"{slide_id}:{MPP:g}:") for name in epoch["tile_id"].tolist()])
    assert all("missing_file" in e for e in epoch["error"][lost].tolist())
    assert set(epoch["error"][~lost].tolist()) == {""}
    assert not epoch["pixels"][lost].any()
    assert np.array_equal(epoch["pixels"][~lost], good["pixels"][~lost])


def test_a_damaged_spot_is_an_error_of_its_tiles_alone(read_plan, tmp_path) -> None:
    source = Path(read_plan.slides.column("path")[0].as_py())
    damaged = with_path(read_plan, 0, corrupt_tile(source, tmp_path / source.name, 5))
    errors = joined(read_epoch(make_reader(damaged)))["error"]
    assert 0 < (errors != "").sum() <= 16  # a JPEG tile of 256 px holds 4 x 4 tiles


def test_pixels_are_put_where_they_are_wanted(read_plan) -> None:
    reader = make_reader(read_plan)
    room = np.full((reader.num_tiles(2) + 1, *reader.read(2)["pixels"].shape[1:]), 7, np.uint8)
    columns = reader.read(2, room[1:])
    assert columns["pixels"].base is room
    assert np.array_equal(room[1:], make_reader(read_plan).read(2)["pixels"])
    assert (room[0] == 7).all()
