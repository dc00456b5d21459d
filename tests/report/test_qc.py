import json
import re

import numpy as np

from cytoray.report import qc_images, write_qc

EVIL = "</script><script>alert(1)</script>"


def read_rows(out):
    """Rows in the order the page shows them, from the files it lists."""
    html = (out / "qc.html").read_text()
    meta = json.loads(re.search(r'id="meta">(.*?)</script>', html, re.S).group(1))
    rows = []
    for file in meta["files"]:
        text = (out / file["src"]).read_text()
        name, data = re.fullmatch(r'cytorayRows\("([^"]+)",(.*)\);\n', text, re.S).groups()
        part = json.loads(data)
        assert (name, len(part)) == (file["name"], file["count"])
        rows += part
    return rows


def slide(slide_id, **values):
    row = {
        "slide_id": slide_id,
        "status": "ok",
        "width_px_level0": 4096,
        "height_px_level0": 2048,
        "mpp_x": 0.25,
        "mpp_source": "file",
        "reader": "openslide",
        "foreground_share": 0.123,
        "num_tiles": 40,
        "num_nuclei": 1234,
        "keep_masks": [1, 2, 3],
    }
    return row | values


def problem(slide_id, code="decode_error", message="torn file", region=""):
    return {
        "slide_id": slide_id,
        "reason_code": code,
        "message": message,
        "region": region,
        "stage": "index",
    }


def test_quarantined_slides_come_first_with_reasons(tmp_path):
    rows = [slide("a"), slide("bad", status="quarantined"), slide("b")]
    quarantine = [problem("bad"), problem("b", region="b:0.5:224:0_0:3"), problem("b", region="t4")]
    html = write_qc(tmp_path, iter(rows), quarantine, subtitle="run 7").read_text()
    shown = read_rows(tmp_path)
    assert [row["id"] for row in shown] == ["bad", "a", "b"]
    assert shown[0]["reason"] == "torn file [decode_error]"
    assert [row["regions"] for row in shown] == [0, 0, 2]
    assert "run 7" in html
    assert re.search(r"<td>bad</td>.*decode_error.*torn file", html)
    assert re.search(r'<td>b</td><td class="number">2</td><td>decode_error 2</td>', html)


def test_rows_say_what_was_measured(tmp_path):
    write_qc(tmp_path, [slide("a", site="north")])
    (row,) = read_rows(tmp_path)
    facts = dict(row["facts"])
    assert facts == {
        "size": "4,096 x 2,048 px",
        "um per px": "0.25 (file)",
        "reader": "openslide",
        "foreground": "12.3 %",
        "tiles": "40",
        "nuclei": "1,234",
        "site": "north",
    }
    assert (row["nuclei"], row["share"], row["mpp"]) == (1234, 0.123, 0.25)
    assert "keep_masks" not in row


def test_totals_stand_at_the_top(tmp_path):
    rows = [slide(str(i)) for i in range(3)] + [
        slide("x", status="quarantined", num_tiles=None, mpp_source="manifest")
    ]
    html = write_qc(tmp_path, rows).read_text()
    for name, value in (("slides", 4), ("usable", 3), ("tiles", 120), ("nuclei", "4,936")):
        assert re.search(rf"<dt>{name}</dt><dd[^>]*>{value}</dd>", html)
    assert "file 3, manifest 1" in html


def test_thousands_of_slides_go_to_files_of_500(tmp_path):
    write_qc(tmp_path, (slide(f"s{i:04d}") for i in range(1201)))
    assert [row["id"] for row in read_rows(tmp_path)] == [f"s{i:04d}" for i in range(1201)]
    assert len(list((tmp_path / "qc").glob("rows-s*.js"))) == 3
    assert len((tmp_path / "qc.html").read_text()) < 30_000
    write_qc(tmp_path, [slide("only")])
    assert [path.name for path in (tmp_path / "qc").glob("rows-*.js")] == ["rows-s00000.js"]


def test_long_quarantine_is_cut_with_a_pointer(tmp_path):
    html = write_qc(tmp_path, [], [problem(f"s{i}") for i in range(300)]).read_text()
    assert "the first 200 of 300, all are in quarantine.parquet" in html
    assert html.count("torn file") == 200


def test_pictures_are_linked_not_inlined(tmp_path):
    thumbnail = np.full((50, 60, 3), 200, np.uint8)
    (tmp_path / "qc").mkdir()
    for kind, data in qc_images(thumbnail, np.ones((5, 6), bool), np.zeros((0, 2))).items():
        (tmp_path / "qc" / f"a #1.{kind}.jpg").write_bytes(data)
    absolute = str(tmp_path / "qc" / "other.jpg")
    rows = [slide("a #1"), slide("b", thumbnail_path=absolute, density_path="d/x.jpg"), slide("c")]
    html = write_qc(tmp_path, rows).read_text()
    first, second, third = read_rows(tmp_path)
    kinds = ("thumbnail", "foreground", "density")
    assert first["images"] == [f"qc/a%20%231.{kind}.jpg" for kind in kinds]
    assert second["images"] == ["qc/other.jpg", "", "d/x.jpg"]
    assert third["images"] == ["", "", ""]
    assert "base64" not in html
    assert 'loading = "lazy"' in html


def test_hostile_names_stay_text(tmp_path):
    row = slide(EVIL, status="quarantined", path=EVIL, site=EVIL, thumbnail_path="javascript:x()")
    html = write_qc(tmp_path, [row], [problem(EVIL, message=EVIL)], title=EVIL).read_text()
    assert "<script>alert" not in html
    assert "innerHTML" not in html
    data = (tmp_path / "qc" / "rows-q00000.js").read_text()
    assert "<" not in data
    (shown,) = read_rows(tmp_path)
    assert shown["id"] == EVIL
    assert shown["images"][0] == "javascript%3Ax%28%29"


def test_nothing_is_fetched_from_the_network(tmp_path):
    html = write_qc(tmp_path, [slide("a")]).read_text()
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest", html)
    assert "default-src 'none'" in html


def test_no_slides_at_all(tmp_path):
    write_qc(tmp_path, [])
    assert read_rows(tmp_path) == []
