from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cytoray.errors import InputError
from cytoray.streaming.tile_cache import TileCache, TileCacheConfig, cache_key

from .test_tiles import TIMES, make_reader, read_epoch

BIG_GB = 10.0


def config(folder: Path, *, gb: float = BIG_GB, key: str = "run") -> TileCacheConfig:
    return TileCacheConfig(max_gb=gb, key=key, folder=str(folder), keep_free_bytes=0)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*/*.arrow"))


def tile_bytes(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def same_tiles(mine: list, theirs: list) -> None:
    for left, right in zip(mine, theirs, strict=True):
        for name in left:
            if name not in (*TIMES, "cached"):
                assert left[name].tobytes() == right[name].tobytes(), name


@pytest.mark.parametrize("table", [True, False], ids=["table", "detect"])
def test_epochs_from_the_cache_are_those_from_the_slides(
    read_plan, nuclei_dir, tmp_path, table
) -> None:
    """Byte for byte: pixels, views, order, names."""
    source: dict[str, Any] = {"nuclei_dir": nuclei_dir if table else ""}
    plain = make_reader(read_plan, **source)
    wanted = [read_epoch(plain, epoch) for epoch in (0, 1)]
    reader = make_reader(read_plan, **source, cache=config(tmp_path))
    found = [read_epoch(reader, epoch) for epoch in (0, 1)]
    for epoch in (0, 1):
        same_tiles(found[epoch], wanted[epoch])
        assert {bool(c["cached"].all()) for c in found[epoch]} == {epoch == 1}
    other_process = make_reader(read_plan, **source, cache=config(tmp_path))
    other_process.slides.read = None  # type: ignore[assignment]  # no slide is opened any more
    same_tiles(read_epoch(other_process, 1), wanted[1])


def test_what_finds_no_room_is_read_from_the_slides(read_plan, nuclei_dir, tmp_path) -> None:
    wanted = read_epoch(make_reader(read_plan, nuclei_dir=nuclei_dir), 1)
    size = sum(c["pixels"].nbytes for c in wanted)
    cache = config(tmp_path, gb=0.5 * size / 1e9)
    reader = make_reader(read_plan, nuclei_dir=nuclei_dir, cache=cache)
    read_epoch(reader, 0)
    again = read_epoch(reader, 1)
    same_tiles(again, wanted)
    hits = np.concatenate([c["cached"] for c in again]).mean()
    assert 0.2 < hits < 0.6
    assert sum(path.stat().st_size for path in shards(tmp_path)) < 0.55 * size


def test_a_shard_that_is_not_whole_is_not_used(tmp_path) -> None:
    cache = TileCache(config(tmp_path))
    pixels, nuclei = tile_bytes(5), np.ones((3, 4), np.float32)
    cache.put(7, pixels, nuclei)
    found = cache.get(7)
    assert found is not None
    assert np.array_equal(found.pixels, pixels)
    assert np.array_equal(found.nuclei, nuclei)
    assert cache.get(8) is None
    [shard] = shards(tmp_path)
    whole = shard.read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 8):
        shard.write_bytes(whole[:cut])
        assert cache.get(7) is None, cut
        assert not shard.exists()


def test_a_process_killed_while_writing_leaves_no_shard(tmp_path) -> None:
    """Killed before the rename; its draft goes when the cache is next opened."""
    script = (
        "import os, signal, sys, numpy as np\n"
        "from cytoray.streaming import tile_cache as t\n"
        "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "cache = t.TileCache(t.TileCacheConfig(max_gb=1, key='run', folder=sys.argv[1],"
        " keep_free_bytes=0))\n"
        "cache.put(1, np.zeros((2, 8, 8, 3), np.uint8), np.zeros((0, 4), np.float32))\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert list(tmp_path.glob("run/*/.*.part"))
    cache = TileCache(config(tmp_path))
    assert cache.get(1) is None
    assert not list(tmp_path.glob("run/*/.*.part"))


def test_other_runs_make_room_unless_they_are_open(tmp_path) -> None:
    pixels, nuclei = tile_bytes(50), np.zeros((0, 4), np.float32)
    gb = 2.5 * pixels.nbytes / 1e9
    old, open_one = (TileCache(config(tmp_path, gb=gb, key=key)) for key in ("old", "open"))
    old.put(0, pixels, nuclei)
    open_one.put(0, pixels, nuclei)
    os.close(old._held or -1)  # as if its process had ended
    mine = TileCache(config(tmp_path, gb=gb, key="mine"))
    mine.put(0, pixels, nuclei)
    mine.put(1, pixels, nuclei)
    assert not (tmp_path / "old").exists()
    assert [mine.get(0) is not None, mine.get(1) is not None] == [True, False]
    assert open_one.get(0) is not None


def test_a_full_disk_ends_the_writing_and_nothing_else(tmp_path, monkeypatch, caplog) -> None:
    cache = TileCache(config(tmp_path))
    pixels, nuclei = tile_bytes(4), np.zeros((0, 4), np.float32)
    cache.put(0, pixels, nuclei)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pa, "OSFile", full)
    cache.put(1, pixels, nuclei)
    monkeypatch.undo()
    cache.put(2, pixels, nuclei)
    assert [cache.get(i) is not None for i in range(3)] == [True, False, False]
    assert "No space left on device" in caplog.text
    never = TileCacheConfig(max_gb=BIG_GB, key="run", folder=str(tmp_path), keep_free_bytes=1 << 60)
    careful = TileCache(never)
    careful.put(3, pixels, nuclei)
    assert careful.get(3) is None


def test_keys_and_bad_folders(tmp_path) -> None:
    assert cache_key("a", 1) == cache_key("a", 1) != cache_key("a", 2)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--cache-tiles"):
        TileCache(config(tmp_path / "file"))
