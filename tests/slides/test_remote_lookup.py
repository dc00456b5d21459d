"""Answers of stores to a look-up: Google's, Azure's and web servers' as they are documented."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest

from cytoray.errors import SlideError
from cytoray.slides.remote.download import checksum_problem
from cytoray.slides.remote.lookup import RemoteFile, RemoteSlide, cache_name, described

NOON = datetime(2026, 11, 2, 12, 0, 0, 250_000, tzinfo=UTC)
NOON_NS = 1_793_620_800_250_000_000
MD5 = hashlib.md5(b"x").digest()


def look(**info) -> RemoteFile:
    return described("gs://b/a.svs", "b/a.svs", "a.svs", {"size": 1, "type": "file"} | info)


@pytest.mark.parametrize(
    ("info", "modified_ns"),
    [
        ({"LastModified": NOON}, NOON_NS),
        ({"mtime": NOON.replace(tzinfo=None)}, NOON_NS),
        ({"updated": "2026-11-02T12:00:00.250Z"}, NOON_NS),
        ({"last_modified": NOON}, NOON_NS),
        ({"mtime": NOON.timestamp()}, NOON_NS),
        ({"Last-Modified": "Mon, 02 Nov 2026 12:00:00 GMT"}, NOON_NS - 250_000_000),
        ({"mtime": "some day"}, None),
        ({}, None),
    ],
)
def test_times_of_all_shapes(info, modified_ns):
    assert look(**info).modified_ns == modified_ns


def test_a_store_that_knows_only_an_etag():
    first, again, other = look(ETag='"a"'), look(etag="a"), look(ETag="b")
    assert first.modified_ns == again.modified_ns != other.modified_ns
    assert 0 <= first.modified_ns < 2**63
    assert first.etag == "a"


@pytest.mark.parametrize(
    "info",
    [
        {"md5Hash": b64encode(MD5).decode()},
        {"Content-MD5": b64encode(MD5).decode()},
        {"Digest": f"md5={b64encode(MD5).decode()}"},
        {"content_settings": {"content_md5": bytearray(MD5)}},
    ],
)
def test_md5_of_all_shapes(info, tmp_path):
    checksums = dict(look(**info).checksums)
    assert checksums == {"md5": MD5}
    (tmp_path / "x").write_bytes(b"x")
    (tmp_path / "y").write_bytes(b"y")
    assert checksum_problem(tmp_path / "x", checksums) == ""
    assert MD5.hex() in checksum_problem(tmp_path / "y", checksums)


def test_other_checksums(tmp_path):
    (tmp_path / "x").write_bytes(b"123456789")
    for digest, problem in (("cbf43926", False), ("00000000", True)):  # the check value of CRC-32
        found = checksum_problem(tmp_path / "x", {"crc32": bytes.fromhex(digest)})
        assert bool(found) == problem
    assert dict(look(Digest="sha-256=eA==,unixsum=17", crc32c="not base 64").checksums) == {
        "sha256": b"x"
    }
    assert checksum_problem(tmp_path / "x", {"unheard-of": b"x"}) == ""


def test_the_version_follows_every_file():
    one, two = look(etag="a"), look(etag="b")
    versions = {RemoteSlide("u", files).version for files in ((one,), (two,), (one, two))}
    assert len(versions | {RemoteSlide("v", (one,)).version}) == 4
    assert RemoteSlide("u", (one, two)).size_bytes == 2


def test_what_cannot_be_staged():
    for info, code in (
        ({"size": None}, "unsupported_remote"),
        ({"type": "directory"}, "not_a_slide"),
    ):
        with pytest.raises(SlideError) as caught:
            look(**info)
        assert caught.value.code == code


@pytest.mark.parametrize(
    ("url", "path", "name"),
    [
        ("s3://b/c/a b.svs", "b/c/a b.svs", "a b.svs"),
        ("s3://b/a.svs?versionId=7", "b/a.svs?versionId=7", "a.svs"),
        ("https://h/c/a%20b.svs?x=1", "https://h/c/a%20b.svs?x=1", "a b.svs"),
        ("https://h/download?id=4", "https://h/download?id=4", "download"),
        ("s3://b/.hidden.svs", "b/.hidden.svs", "hidden.svs"),
        ('s3://b/a:b"c?.svs', 'b/a:b"c?.svs', "a_b_c_.svs"),
        ("s3://b/" + "é" * 200 + ".svs", "b/" + "é" * 200 + ".svs", "é" * 50 + ".svs"),
        ("https://h/a%2F..%2Fb.svs", "https://h/a%2F..%2Fb.svs", "b.svs"),
        ("s3://b/..", "b/..", "slide"),
    ],
)
def test_names_in_the_cache(url, path, name):
    assert cache_name(url, path) == name


def test_settings_object_of_azure():
    settings = SimpleNamespace(get={"content_md5": None}.get)
    assert look(content_settings=settings).checksums == ()
