from __future__ import annotations

import pytest

from cytoray.planning import DeviceRate, SlideMeasure, Work, cache_line, forecast, parse_nodes

NODES = parse_nodes("4x16cpu@0.5,1x40cpu+8xH100@20")  # 104 CPUs, 22 an hour
SLIDE = SlideMeasure(
    slide_id="a", file_bytes=10, tiles=1000, chunks=50, nuclei=4000, slide_bytes=1e6,
    chunk_bytes=2e8, slide_s=30.0, read_s=2.0, detect_s=5.0, perturb_s=1.0,
)  # fmt: skip
GIVEN = DeviceRate(tiles_per_s=500.0, source="given", what="as given")


def test_indexing_is_cpu_seconds_over_cpus() -> None:
    found = forecast([SLIDE] * 4, Work(job="index", num_slides=1000, tile_px=224), NODES, None)
    assert found.tiles.value == 1_000_000
    assert found.nuclei.value == 4_000_000
    assert found.hours.value == pytest.approx(1000 * (30 + 2 + 5) / 104 / 3600)
    assert found.cost.value == pytest.approx(found.hours.value * 22)
    assert found.bytes_read.value == pytest.approx(1000 * (1e6 + 2e8))
    assert (found.bottleneck, found.reader_cpus, found.cores_to_feed_gpus) == ("CPU", 104, None)
    assert [s.name for s in found.stages] == ["slide", "read", "detect", "together"]
    assert found.hours.low == pytest.approx(found.hours.value)  # slides all alike


def test_training_goes_at_the_pace_of_the_slower_side() -> None:
    """8 ms of CPU a tile: 96 reading CPUs make 12,000 tiles/s; 8 GPUs take 4,000, then 40,000."""
    work = Work(job="pretrain", num_slides=1000, tile_px=224, epochs=2.0, shuffle_chunks=16)
    slow = forecast([SLIDE] * 4, work, NODES, GIVEN)
    assert slow.tiles_processed.value == 2_000_000
    assert slow.stages[-1].tiles_per_s_core == pytest.approx(125)
    assert slow.reader_cpus == 96
    assert slow.cores_to_feed_gpus == pytest.approx(4000 / 125)
    assert slow.bottleneck == "GPU"
    assert slow.hours.value == pytest.approx(2_000_000 / 4000 / 3600)
    fast = DeviceRate(tiles_per_s=5000.0, source="given", what="as given")
    starved = forecast([SLIDE] * 4, work, NODES, fast)
    assert starved.bottleneck == "CPU"
    assert starved.hours.value == pytest.approx(2_000_000 / 12_000 / 3600)
    assert starved.cost.value == pytest.approx(2_000_000 / 12_000 / 3600 * 22)
    assert starved.bytes_read.value == pytest.approx(2 * 1000 * 2e8)
    chunk = 20 * 3 * 224**2
    plan = 1000 * 300 + 12 * 50_000
    assert starved.object_store_bytes == pytest.approx(
        plan + (2 * 96 + 2 * 16) * chunk + 4 * 256 * 3 * 224**2
    )


def test_steps_and_what_the_index_knows_overrule_the_sample() -> None:
    work = Work(
        job="pretrain", num_slides=1000, tile_px=224, steps=100, batch_size=512, has_nuclei=True,
        known_tiles=777, known_nuclei=5, known_quarantined=0.25,
    )  # fmt: skip
    found = forecast([SLIDE, SLIDE], work, NODES, GIVEN)
    assert found.tiles_processed.value == 51_200
    assert (found.tiles.value, found.tiles.low, found.nuclei.value) == (777, 777, 5)
    assert found.quarantined.value == found.quarantined.high == 0.25
    assert [s.name for s in found.stages] == ["read", "perturb", "together"]
    assert found.stages[-1].ms_per_tile == pytest.approx(3.0)


def test_refused_slides_count_for_nothing_but_are_slides() -> None:
    bad = SlideMeasure(slide_id="b", reason="empty_file", message="zero bytes")
    work = Work(job="embed", num_slides=100, tile_px=224)
    found = forecast([SLIDE, bad, SLIDE, bad], work, NODES, GIVEN)
    assert found.tiles.value == 50_000
    assert found.quarantined.value == 0.5
    assert found.stages[-1].ms_per_tile == pytest.approx(2.0)
    assert found.tiles.low is not None
    assert found.tiles.low < 50_000
    assert not found.is_bound


def test_a_bound_is_called_one() -> None:
    bound = DeviceRate(tiles_per_s=500.0, source="bound", what="a bound")
    work = Work(job="embed", num_slides=100, tile_px=224)
    assert forecast([SLIDE, SLIDE], work, NODES, bound).is_bound


def test_remote_slides_that_do_not_fit_a_nodes_cache_are_said_to_be_fetched_again() -> None:
    fits = cache_line(5e9, 10**10, "pretrain")
    assert "5.0 GB of remote slides, 10.0 GB on a node" in fits
    assert "once" in fits
    assert "CYTORAY_CACHE_GB" in cache_line(2e10, 10**10, "pretrain")
    for job in ("index", "embed"):
        assert "again" not in cache_line(2e10, 10**10, job)
