"""`cytoray index` on a manifest at S3: a real server of its protocol, and a Ray of its own."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import fsspec
import pytest

from cytoray.slides import read_quarantine, read_slide_table

from ..conftest import MPP, TILE_PX

pytestmark = pytest.mark.ray
pytest.importorskip("s3fs")
server = pytest.importorskip("moto.server")


@pytest.fixture
def s3(monkeypatch, tmp_path):
    """An empty bucket `cohort`, reached through the variables every AWS tool knows."""
    moto = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    for name in [n for n in os.environ if n.startswith(("AWS_", "FSSPEC_"))]:
        monkeypatch.delenv(name)
    host, port = moto.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("CYTORAY_CACHE_DIR", str(tmp_path / "cache"))
    fs = fsspec.filesystem("s3", skip_instance_cache=True)
    type(fs).clear_instance_cache()  # one made earlier knows other credentials
    fs.mkdir("cohort")
    yield fs
    type(fs).clear_instance_cache()
    moto.stop()


@pytest.mark.drill
def test_a_cohort_on_s3_gives_the_same_slide_table(
    s3, indexed, manifest, start_cytoray, tmp_path, monkeypatch
) -> None:
    rows = list(csv.DictReader(manifest.open()))[:3]
    for row in rows[:2]:
        s3.put_file(str(manifest.parent / row["path"]), f"cohort/{row['path']}")
    text = "\n".join(
        ",".join(row.values()) for row in [dict(zip(rows[0], rows[0], strict=True)), *rows]
    )
    s3.pipe_file("cohort/manifest.csv", text.encode())
    # The room of one slide and a half: the readers wait for each other
    largest = max((manifest.parent / row["path"]).stat().st_size for row in rows)
    monkeypatch.setenv("CYTORAY_CACHE_GB", str(1.5 * largest / 1e9))
    out = tmp_path / "out"
    job = start_cytoray(
        "index", "--manifest", "s3://cohort/manifest.csv", "--out", out,
        "--tile-px", TILE_PX, "--mpp", MPP, "--strict",
    )  # fmt: skip
    assert job.process.wait(timeout=120) == 3, job.log.read_text()
    theirs = {
        row["slide_id"]: row for row in read_slide_table(indexed.out / "slides.parquet").to_pylist()
    }
    ours = {row["slide_id"]: row for row in read_slide_table(out / "slides.parquet").to_pylist()}
    assert list(ours) == [row["slide_id"] for row in rows]
    for row in rows[:2]:
        mine, local = ours[row["slide_id"]], theirs[row["slide_id"]]
        assert mine.pop("path") == f"s3://cohort/{row['path']}"
        modified_ns = mine.pop("file_mtime_ns")
        assert modified_ns == int(s3.modified(f"cohort/{row['path']}").timestamp()) * 10**9
        assert mine == {k: v for k, v in local.items() if k in mine}
        part = Path("nuclei") / f"{row['slide_id']}.parquet"
        assert (out / part).stat().st_size > 1000
    missing = read_quarantine(out / "quarantine.parquet").to_pylist()
    assert [(q["slide_id"], q["reason_code"]) for q in missing] == [
        (rows[2]["slide_id"], "missing_file")
    ]
    assert ours[rows[2]["slide_id"]]["status"] == "missing_file"
