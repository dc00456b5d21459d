"""The node's cache: bound, locks between processes, kills, and servers that fail."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest

from cytoray.errors import InputError, SlideError
from cytoray.slides import SLIDE_SCHEMA, Grid, fingerprint, inspect_slide, open_slide
from cytoray.slides.remote import (
    DownloadPolicy,
    SlideCache,
    default_cache,
    remote_slide,
    stage,
)
from cytoray.streaming.plan import make_plan
from cytoray.streaming.tile_pixels import OpenSlides

from .conftest import cell_picture, write_slide
from .remote_servers import WebStore

QUICK = DownloadPolicy(tries=3, first_wait_s=0.01, block_bytes=32 << 10)
BODY = np.random.default_rng(0).bytes(300_000)
STAGE = """
import sys, time
from cytoray.slides.remote import DownloadPolicy, SlideCache
policy = DownloadPolicy(block_bytes=32 << 10)
staged = SlideCache(sys.argv[1], int(sys.argv[2]), policy=policy).stage(sys.argv[3])
print(staged.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def web() -> Iterator[WebStore]:
    store = WebStore({"/a.bin": BODY})
    yield store
    store.stop()


@pytest.fixture
def memory() -> Iterator[Callable[[str, int], str]]:
    """memory("a", 100): the URL of an object of 100 bytes."""
    fs = fsspec.filesystem("memory")

    def put(name: str, size_bytes: int) -> str:
        fs.pipe_file(f"/slides/{name}", name[:1].encode() * size_bytes)
        return f"memory://slides/{name}"

    yield put
    fs.rm("/slides", recursive=True)


@pytest.fixture
def in_process(tmp_path) -> Iterator[Callable[..., subprocess.Popen]]:
    """in_process(url, max_bytes): a process that stages a slide and holds it till it is killed."""
    started = []

    def start(url: str, max_bytes: int = 10**8) -> subprocess.Popen:
        command = [sys.executable, "-c", STAGE, str(tmp_path), str(max_bytes), url]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def content(cache: SlideCache, url: str) -> bytes:
    with cache.stage(url) as staged:
        return Path(staged.path).read_bytes()


def error_of(cache: SlideCache, url: str) -> SlideError:
    with pytest.raises(SlideError) as caught:
        cache.stage(url)
    return caught.value


def names(cache: SlideCache) -> set[str]:
    return {path.name for entry in cache.entries() for path in entry.folder.iterdir()}


def test_the_least_recently_used_goes_first(tmp_path, memory):
    cache = SlideCache(tmp_path, 250)
    urls = [memory(name, 100) for name in "abcd"]
    for url in (urls[0], urls[1], urls[0], urls[2]):
        assert content(cache, url) == url[-1].encode() * 100
        assert sum(entry.size_bytes for entry in cache.entries()) <= 250
    assert names(cache) == {"a", "c"}
    assert content(cache, urls[3]) == b"d" * 100
    assert names(cache) == {"c", "d"}
    assert not list(tmp_path.glob(".trash-*"))


def test_an_open_slide_is_never_removed(tmp_path, memory):
    cache = SlideCache(tmp_path, 250)
    urls = [memory(name, 100) for name in "abc"]
    first, second = cache.stage(urls[0]), cache.stage(urls[1])
    error = error_of(cache, urls[2])  # at once, for this process holds what it would wait for
    assert error.code == "cache_busy"
    assert "CYTORAY_CACHE_GB" in error.message
    assert Path(first.path).read_bytes() == b"a" * 100
    first.release()
    first.release()
    assert cache.held == 1
    assert content(cache, urls[2]) == b"c" * 100
    assert names(cache) == {"b", "c"}
    del second  # a reader that was dropped without being closed lets go too
    assert cache.held == 0


def test_a_slide_larger_than_the_cache(tmp_path, memory):
    error = error_of(SlideCache(tmp_path, 2 * 10**6), memory("large.svs", 3 * 10**6))
    assert error.code == "cache_too_small"
    for part in ("0.003 GB", "0.002 GB", "CYTORAY_CACHE_GB", str(tmp_path)):
        assert part in error.message
    assert list(SlideCache(tmp_path, 1).entries()) == []


def test_a_full_disk_leaves_nothing_behind(tmp_path, memory):
    """The partial file is a link to a device that is always full."""
    cache = SlideCache(tmp_path, 10**6)
    slide = remote_slide(memory("full.svs", 1000))
    folder = tmp_path / f"{slide.version}-1000"
    folder.mkdir()
    (folder / "full.svs.part").symlink_to("/dev/full")
    error = error_of(cache, slide.url)
    assert error.code == "disk_full"
    assert "CYTORAY_CACHE_DIR" in error.message
    assert list(cache.entries()) == []
    free_bytes = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    slide = replace(slide, files=(replace(slide.files[0], size_bytes=2 * free_bytes),))
    with pytest.raises(SlideError, match="disk_full"):
        SlideCache(tmp_path, 4 * free_bytes)._stage(slide)


def test_a_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="CYTORAY_CACHE_DIR"):
        SlideCache(tmp_path / "file" / "cache", 100)


def test_the_default_cache_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("CYTORAY_CACHE_DIR", str(tmp_path / "c"))
    monkeypatch.setenv("CYTORAY_CACHE_GB", "1.5")
    assert default_cache().folder == tmp_path / "c"
    assert default_cache().max_bytes == 1_500_000_000
    assert default_cache() is default_cache()
    monkeypatch.setenv("CYTORAY_CACHE_GB", "")
    free_bytes = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    expected = min(100 * 10**9, free_bytes / 2)
    assert default_cache().max_bytes == pytest.approx(expected, rel=0.05)
    for bad in ("much", "-1", "0", "nan", "inf"):
        monkeypatch.setenv("CYTORAY_CACHE_GB", bad)
        with pytest.raises(InputError, match="CYTORAY_CACHE_GB must be"):
            default_cache()


def test_two_processes_at_once_download_once(tmp_path, web, in_process):
    web.pace_s = 0.02
    processes = [in_process(web.url("/a.bin")) for _ in range(2)]
    paths = {process.stdout.readline().strip() for process in processes}
    assert len(paths) == 1
    assert Path(paths.pop()).read_bytes() == BODY
    assert sorted(begin for _, begin in web.gets if begin == 0) == [0]
    assert len({begin for _, begin in web.gets}) == len(web.gets)


def test_a_slide_open_in_another_process_stays(tmp_path, memory, web, in_process):
    process = in_process(web.url("/a.bin"), 350_000)
    path = Path(process.stdout.readline().strip())
    cache = SlideCache(tmp_path, 350_000, wait_s=0.3)
    assert error_of(cache, memory("b", 100_000)).code == "cache_busy"  # after waiting
    assert path.read_bytes() == BODY
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert content(cache, memory("b", 100_000)) == b"b" * 100_000
    assert not path.exists()


def test_a_killed_download_is_resumed(tmp_path, web, in_process):
    web.pace_s = 0.05
    process = in_process(web.url("/a.bin"))
    end = time.monotonic() + 30
    while not any(p.stat().st_size > 50_000 for p in tmp_path.glob("*/a.bin.part")):
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    have = next(tmp_path.glob("*/a.bin.part")).stat().st_size
    web.pace_s = 0.0
    web.gets.clear()
    assert content(SlideCache(tmp_path, 10**6, policy=QUICK), web.url("/a.bin")) == BODY
    assert min(begin for _, begin in web.gets) == have > 50_000


@pytest.mark.parametrize("ranges", [True, False])
def test_web_servers_with_ranges_and_without(tmp_path, ranges):
    """A slide, its name with a space, read through either; cut connections are taken up again."""
    path = write_slide(tmp_path / "my slide.svs", cell_picture(900, 700))
    data = path.read_bytes()
    store = WebStore({"/d/my slide.svs": data, "/d/a.bin": BODY}, ranges=ranges)
    url = store.url("/d/my%20slide.svs?download=1")
    cache = SlideCache(tmp_path / "cache", 10**8, policy=QUICK)
    store.cut_after = [20_000, 40_000]
    store.statuses = [503, 429]
    with cache.stage(url) as staged:
        assert Path(staged.path).name == "my slide.svs"
        assert Path(staged.path).read_bytes() == data
    assert store.cut_after == []
    begins = [begin for _, begin in store.gets]
    assert (max(begins) > 0) == ranges
    assert content(cache, store.url("/d/a.bin")) == BODY
    store.stop()


def test_a_server_that_always_fails_is_given_up(tmp_path, web):
    cache = SlideCache(tmp_path, 10**6, policy=QUICK)
    web.cut_after = [0] * 100
    error = error_of(cache, web.url("/a.bin?token=hush"))
    assert error.code == "download_failed"
    assert "in 3 tries" in error.message
    assert "hush" not in error.message
    web.cut_after = []
    web.statuses = [500] * 100
    error = error_of(cache, web.url("/b.bin"))
    assert error.code == "download_failed"
    assert "500" in error.message
    web.statuses = [403] * 2
    assert error_of(cache, web.url("/b.bin")).code == "access_denied"
    assert error_of(cache, web.url("/b.bin")).code == "missing_file"
    assert fingerprint(web.url("/b.bin")) == (None, None)
    assert fingerprint(web.url("/a.bin")) == (300_000, 1_793_613_600_000_000_000)


def test_checksums_of_a_web_server(tmp_path, web):
    cache = SlideCache(tmp_path, 10**6, policy=QUICK)
    right, wrong = (b64encode(hashlib.md5(data).digest()).decode() for data in (BODY, b"x"))
    web.files["/b.bin"] = BODY
    web.headers = {"/a.bin": {"Content-MD5": right}, "/b.bin": {"Digest": f"md5={wrong}"}}
    assert content(cache, web.url("/a.bin")) == BODY
    web.gets.clear()
    error = error_of(cache, web.url("/b.bin"))
    assert error.code == "checksum_mismatch"
    assert [begin for _, begin in web.gets].count(0) == QUICK.checksum_tries
    assert names(cache) == {"a.bin"}


def test_a_file_replaced_while_it_is_downloaded(tmp_path, web):
    new = BODY[::-1]

    def replace_it(path: str) -> None:
        if web.gets and web.files["/a.bin"] == BODY:
            web.files["/a.bin"] = new
            web.modified = "Tue, 03 Nov 2026 10:00:00 GMT"

    web.on_get = replace_it
    cache = SlideCache(tmp_path, 10**6, policy=QUICK)
    assert content(cache, web.url("/a.bin")) == new
    assert len(list(cache.entries())) == 1


def test_a_file_replaced_by_a_shorter_one_after_it_was_looked_up(tmp_path, web):
    url = web.url("/a.bin")
    first = remote_slide(url)
    web.files["/a.bin"] = BODY[:100_000]
    web.modified = "Tue, 03 Nov 2026 10:00:00 GMT"
    assert remote_slide(url) == first  # remembered
    cache = SlideCache(tmp_path, 10**6, policy=QUICK)
    assert content(cache, url) == BODY[:100_000]
    assert fingerprint(url)[0] == 100_000


def test_what_the_web_cannot_give(tmp_path, web):
    web.files |= {"/a.mrxs": b"x", "/a.vms": b"x"}
    cache = SlideCache(tmp_path, 10**6, policy=QUICK)
    for name, words in (("a.mrxs", "http cannot list folders"), ("a.vms", "several files")):
        error = error_of(cache, web.url(f"/{name}"))
        assert error.code == "unsupported_remote"
        assert words in error.message


def test_readers_with_a_small_cache_do_not_wait_for_themselves(tmp_path, web, monkeypatch):
    """Four slides are kept open where there is room; here there is room for one."""
    slides = [write_slide(tmp_path / f"{i}.svs", cell_picture(600, 600, i)) for i in range(3)]
    rows = [inspect_slide({"slide_id": s.stem, "path": str(s)}, Grid(tile_px=64))[0]
            for s in slides]  # fmt: skip
    plan = make_plan(pa.Table.from_pylist(rows, SLIDE_SCHEMA), tile_px=64, mpp=0.5)
    local = [OpenSlides(plan).read(i, (0, 0)).pixels for i in range(3)]
    web.files |= {f"/{s.name}": s.read_bytes() for s in slides}
    rows = [row | {"path": web.url(f"/{row['slide_id']}.svs")} for row in rows]
    plan = make_plan(pa.Table.from_pylist(rows, SLIDE_SCHEMA), tile_px=64, mpp=0.5)
    largest = max(s.stat().st_size for s in slides)
    monkeypatch.setenv("CYTORAY_CACHE_DIR", str(tmp_path / "c"))
    monkeypatch.setenv("CYTORAY_CACHE_GB", str(1.5 * largest / 1e9))
    remote = OpenSlides(plan)
    for i in (0, 1, 2, 0):
        assert np.array_equal(remote.read(i, (0, 0)).pixels, local[i])
    monkeypatch.setenv("CYTORAY_CACHE_GB", str(10 * largest / 1e9))
    monkeypatch.setenv("CYTORAY_CACHE_DIR", str(tmp_path / "d"))
    remote = OpenSlides(plan)
    for i in (0, 1, 2, 0):
        assert np.array_equal(remote.read(i, (0, 0)).pixels, local[i])
    assert default_cache().held == 3


def test_open_slide_names_the_url_and_lets_go(tmp_path, web, monkeypatch):
    monkeypatch.setenv("CYTORAY_CACHE_DIR", str(tmp_path / "c"))
    monkeypatch.setenv("CYTORAY_CACHE_GB", "0.01")
    with pytest.raises(SlideError) as caught:
        open_slide(web.url("/a.bin?sig=hush"))
    assert caught.value.code == "not_a_slide"
    assert web.url("/a.bin?sig=***") in caught.value.message
    assert str(tmp_path) not in caught.value.message
    assert default_cache().held == 0
    path = write_slide(tmp_path / "a.svs", cell_picture(300, 300), levels=1)
    with open_slide(f"file://{path}") as slide, open_slide(str(path)) as local:
        assert slide.info == local.info
    assert names(default_cache()) == {"a.bin"}  # file:// is not copied
    with stage(str(path)):
        assert default_cache().held == 0
    with stage(web.url("/a.bin?sig=hush")):
        assert default_cache().held == 1
    with pytest.raises(InputError, match="the protocol htps://"):
        open_slide("htps://h/a.svs")
