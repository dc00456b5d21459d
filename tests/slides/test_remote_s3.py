"""Slides on S3: a real server of its protocol, and a wire to it that can break."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest

from cytoray.errors import SlideError
from cytoray.slides import fingerprint, open_slide, read_manifest
from cytoray.slides.remote import DownloadPolicy, SlideCache, remote_slide, retry
from cytoray.slides.remote.download import stated_checksums

from .conftest import cell_picture, write_slide
from .remote_servers import Wire

pytest.importorskip("s3fs")
server = pytest.importorskip("moto.server")

QUICK = DownloadPolicy(tries=3, first_wait_s=0.01, block_bytes=64 << 10)


@pytest.fixture(scope="module")
def s3(tmp_path_factory) -> Iterator[SimpleNamespace]:
    """A store with one slide, `s3://slides/case 1/a.svs`, behind a `Wire`."""
    moto = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    wire = Wire(moto.get_host_and_port()[1])
    slide = write_slide(tmp_path_factory.mktemp("s3") / "a.svs", cell_picture(900, 700))
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith(("AWS_", "FSSPEC_"))]:
            patch.delenv(name)
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{wire.port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fs = fsspec.filesystem("s3", skip_instance_cache=True)
        type(fs).clear_instance_cache()  # one made earlier knows other credentials
        fs.mkdir("slides")
        fs.put_file(str(slide), "slides/case 1/a.svs")
        yield SimpleNamespace(fs=fs, wire=wire, slide=slide, url="s3://slides/case 1/a.svs")
        type(fs).clear_instance_cache()
    wire.stop()
    moto.stop()


@pytest.fixture
def cache(tmp_path) -> SlideCache:
    return SlideCache(tmp_path / "cache", 10**8, policy=QUICK)


@pytest.fixture(autouse=True)
def _default_cache_here(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("CYTORAY_CACHE_DIR", str(tmp_path / "default"))
    monkeypatch.setenv("CYTORAY_CACHE_GB", "0.1")
    monkeypatch.setattr(retry, "_silent_since", {})


def code_of(cache: SlideCache, url: str) -> tuple[str, str]:
    with pytest.raises(SlideError) as caught:
        cache.stage(url)
    return caught.value.code, caught.value.message


def test_a_slide_on_s3_is_read_like_a_local_one(s3):
    with open_slide(str(s3.slide)) as local, open_slide(s3.url) as remote:
        assert remote.info == local.info
        for level, (width, height) in enumerate(local.info.level_dimensions):
            ours = remote.read_level(level, 0, 0, width, height)
            np.testing.assert_array_equal(ours, local.read_level(level, 0, 0, width, height))
    before = s3.wire.bodies
    with open_slide(s3.url, reader="openslide") as remote:
        assert remote.thumbnail(200).shape == (156, 200, 3)
    assert s3.wire.bodies == before  # it was here already


def test_the_fingerprint_follows_the_object(s3):
    size_bytes, modified_ns = fingerprint(s3.url)
    assert size_bytes == s3.slide.stat().st_size
    assert abs(modified_ns / 1e9 - datetime.now(UTC).timestamp()) < 100
    assert modified_ns == int(s3.fs.info("slides/case 1/a.svs")["LastModified"].timestamp()) * 10**9
    assert fingerprint("s3://slides/none.svs") == (None, None)


def test_a_replaced_object_is_staged_anew(s3, cache):
    url = "s3://slides/changing.bin"
    s3.fs.pipe_file("slides/changing.bin", b"old " * 1000)
    with cache.stage(url) as staged:
        assert Path(staged.path).read_bytes()[:4] == b"old "
    s3.fs.pipe_file("slides/changing.bin", b"new " * 1000)
    with cache.stage(url) as staged:  # this process has looked it up and goes on with that
        assert Path(staged.path).read_bytes()[:4] == b"old "
    assert remote_slide(url, fresh=True).files[0].etag == hashlib.md5(b"new " * 1000).hexdigest()
    with cache.stage(url) as staged:
        assert Path(staged.path).read_bytes()[:4] == b"new "


def test_connections_that_break_off(s3, cache):
    """More often than s3fs itself tries, at a place that moves on."""
    s3.wire.cut_after = [30_000] * 7
    with cache.stage(s3.url) as staged:
        assert Path(staged.path).read_bytes() == s3.slide.read_bytes()
    assert s3.wire.cut_after == []


@pytest.mark.parametrize("size_bytes", [60_000, 300_000])
def test_a_flipped_bit_is_fetched_again_and_given_up_when_it_stays(s3, cache, size_bytes):
    """A body in one answer is compared by botocore, one in several answers by us."""
    url = f"s3://slides/flipped{size_bytes}.bin"
    s3.fs.pipe_file(url, bytes(size_bytes))
    s3.wire.flips = 1
    with cache.stage(url) as staged:
        assert Path(staged.path).read_bytes() == bytes(size_bytes)
    assert s3.wire.flips == 0
    s3.fs.pipe_file(url, b"1" * size_bytes)
    remote_slide(url, fresh=True)
    s3.wire.flips = 1000
    code, message = code_of(cache, url)
    s3.wire.flips = 0
    assert code == "checksum_mismatch"
    assert size_bytes == 60_000 or hashlib.md5(b"1" * size_bytes).hexdigest() in message
    assert len(list(cache.entries())) == 1  # the good one


def test_which_checksums_are_believed(s3, monkeypatch):
    """An ETag is no MD5 sum for an upload in parts, nor under a key of KMS."""

    def stated(name: str) -> dict[str, bytes]:
        return stated_checksums(remote_slide(f"s3://slides/{name}").files[0])

    s3.fs.pipe_file("slides/plain.bin", b"x" * 100)
    s3.fs.pipe_file("slides/kms.bin", b"x" * 100, ServerSideEncryption="aws:kms")
    upload = {"Bucket": "slides", "Key": "parts.bin"}
    upload["UploadId"] = s3.fs.call_s3("create_multipart_upload", **upload)["UploadId"]
    part = s3.fs.call_s3("upload_part", **upload, PartNumber=1, Body=b"x" * 100)
    parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
    s3.fs.call_s3("complete_multipart_upload", **upload, MultipartUpload=parts)
    assert stated("plain.bin")["md5"] == hashlib.md5(b"x" * 100).digest()
    assert "md5" not in stated("kms.bin")
    assert "md5" not in stated("parts.bin")
    monkeypatch.setenv("CYTORAY_ETAG_IS_MD5", "0")
    assert "md5" not in stated("plain.bin")


def test_what_is_not_there_or_not_allowed(s3, cache):
    before = s3.wire.bodies
    assert code_of(cache, "s3://slides/none.svs")[0] == "missing_file"
    assert code_of(cache, "s3://no-such-bucket/none.svs")[0] == "missing_file"
    assert code_of(cache, "s3://slides/case 1")[0] == "not_a_slide"
    s3.fs.touch("slides/empty.svs")
    assert code_of(cache, "s3://slides/empty.svs")[0] == "empty_file"
    code, message = code_of(cache, "s3://slides/one.dcm")
    assert code == "unsupported_remote"
    assert "several files" in message
    from moto.core.authorization import enable_iam_authentication

    with enable_iam_authentication():
        code, message = code_of(cache, "s3://slides/plain.svs")
    assert code == "access_denied"
    assert "AWS_ACCESS_KEY_ID" in message
    assert "hush" not in message
    assert s3.wire.bodies == before
    assert list(cache.entries()) == []


def test_the_folder_of_a_mrxs_comes_with_it(s3, cache):
    names = ["case.mrxs", "case/Slidedat.ini", "case/sub/Data0000.dat"]
    for name in (*names, "case2/Data0001.dat"):
        s3.fs.pipe_file(f"slides/m/{name}", name.encode() * 50)
    with cache.stage("s3://slides/m/case.mrxs") as staged:
        root = Path(staged.path).parent
        found = [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()]
        assert sorted(found) == sorted(names)
        for name in names:
            assert (root / name).read_bytes() == name.encode() * 50
    s3.fs.pipe_file("slides/m/alone.mrxs", b"x")
    code, message = code_of(cache, "s3://slides/m/alone.mrxs")
    assert code == "missing_file"
    assert "folder of the same name" in message


def test_a_manifest_on_s3_with_paths_beside_it(s3):
    text = "slide_id,path,mpp\na,case 1/a.svs,\nb,s3://slides/none.svs,\n"
    s3.fs.pipe_file("slides/manifest.csv", text.encode())
    rows = read_manifest("s3://slides/manifest.csv").rows
    assert rows["path"].to_pylist() == [s3.url, "s3://slides/none.svs"]
    with open_slide(rows["path"][0].as_py()) as slide:
        assert slide.info.width_px_level0 == 900


def test_a_store_that_is_down_costs_its_tries_once(s3, cache, monkeypatch):
    """Behind the first slide that got no answer the others are tried once, until it is back."""
    tries = []
    monkeypatch.setattr(retry.time, "sleep", tries.append)
    nobody = socket.create_server(("127.0.0.1", 0))  # a port of our own, closed again
    port = nobody.getsockname()[1]
    nobody.close()
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        type(s3.fs).clear_instance_cache()
        code, message = code_of(cache, "s3://slides/other.svs")
        assert (code, len(tries)) == ("download_failed", QUICK.tries - 1)
        assert "in 3 tries" in message
        tries.clear()
        for name in ("b", "c"):
            code, message = code_of(cache, f"s3://slides/{name}.svs")
            assert code == "download_failed"
            assert "1 try" in message
        assert tries == []
    type(s3.fs).clear_instance_cache()
    with cache.stage(s3.url) as staged:  # it is back
        assert Path(staged.path).stat().st_size == s3.slide.stat().st_size
    assert "s3://slides" not in retry._silent_since
