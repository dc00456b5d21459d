import gc
import json
import re

import numpy as np
import pytest

from cytoray.report import qc_images, write_qc
from cytoray.report.qc_rows import without_paths

EVIL = "</script><script>alert(1)</script>"


def read_meta(out):
    html = (out / "qc.html").read_text()
    return json.loads(re.search(r'id="meta">(.*?)</script>', html, re.S).group(1))


def read_files(out, kind):
    """What the numbered files of a kind hold, in order."""
    prefix = read_meta(out)["prefix"]
    paths = sorted(out.glob(f"{prefix}-{kind}-*.js"))
    found = []
    for number, path in enumerate(paths):
        got = re.fullmatch(r'cytorayQc\("([^"]+)",(\d+),(.*)\);\n', path.read_text(), re.S)
        assert (got.group(1), int(got.group(2))) == (kind, number)
        found.append(json.loads(got.group(3)))
    return found


def read_rows(out):
    """Every slide as the page gets it: index entry and words together, categories as text."""
    categories = read_meta(out)["categories"]
    index = [
        {name: values[i] for name, values in columns.items()}
        for columns in read_files(out, "index")
        for i in range(len(columns["id"]))
    ]
    words = [row for part in read_files(out, "rows") for row in part]
    assert len(index) == len(words) == read_meta(out)["slides"]
    coded = [{name: values[row[name]] for name, values in categories.items()} for row in index]
    return [row | names | said for row, names, said in zip(index, coded, words, strict=True)]


def slide(slide_id, **values):
    row = {
        "slide_id": slide_id,
        "patient_id": "SECRET-PATIENT",
        "path": "/data/SECRET folder/a.svs",
        "status": "ok",
        "width_px_level0": 4096,
        "height_px_level0": 2048,
        "mpp_x": 0.25,
        "mpp_source": "file",
        "reader": "openslide",
        "reader_reason": "the only one for this format",
        "foreground_share": 0.12345678,
        "num_tiles": 40,
        "num_nuclei": 1234,
        "keep_masks": [1, 2, 3],
    }
    return row | values


def problem(slide_id, code="decode_error", message="torn file", region="", **values):
    row = {
        "slide_id": slide_id,
        "reason_code": code,
        "message": message,
        "region": region,
        "stage": "index",
    }
    return row | values


def test_every_slide_has_its_outcome_and_reason(tmp_path):
    rows = [
        slide("a"),
        slide("bad", status="quarantined"),
        slide("b"),
        slide("coded", status="no_nuclei", num_tiles=None, num_nuclei=None),
    ]
    quarantine = [problem("bad"), problem("b", region="b:0.5:224:0_0:3"), problem("b", region="t4")]
    html = write_qc(tmp_path, iter(rows), iter(quarantine), subtitle="run 7").read_text()
    shown = {row["id"]: row for row in read_rows(tmp_path)}
    assert [row["reason"] for row in shown.values()] == ["", "decode_error", "", "no_nuclei"]
    assert shown["bad"]["problems"] == [["decode_error", "torn file", "index"]]
    assert [row["regions"] for row in shown["b"]["problems"]] == []
    assert "run 7" in html
    assert '<a href="#reason=no_nuclei"' in html
    assert "torn file" in html


def test_regions_are_counted_and_the_first_named(tmp_path):
    quarantine = [problem("a", region=f"a:{i}") for i in range(30)]
    write_qc(tmp_path, [slide("a"), slide("b")], quarantine)
    meta = read_files(tmp_path, "index")[0]
    first, second = read_rows(tmp_path)
    assert meta["regions"] == [30, 0]
    assert [region[0] for region in first["regions"]] == [f"a:{i}" for i in range(20)]
    assert first["warnings"] == ["30 regions left out"]
    assert second["regions"] == []


def test_rows_say_what_was_measured(tmp_path):
    focus = {"focus_median": 0.71234567, "out_of_focus_share": 0.3}
    row = slide("a", site="north", split="train", grade=3, objective_power=40.0, **focus)
    write_qc(tmp_path, [row], labels=["grade", "patient_id"])
    (row,) = read_rows(tmp_path)
    assert dict(row["facts"]) == {
        "size": "4,096 x 2,048 px",
        "objective": "40x",
        "reader": "openslide: the only one for this format",
        "site": "north",
        "split": "train",
        "grade": "3",
    }
    expected = {"tiles": 40, "nuclei": 1234, "nuclei_per_tile": 30.85, "mpp": 0.25}
    expected |= {"foreground": 0.1235, "focus": 0.7123, "blurred": 0.3, "mpp_source": "file"}
    assert {name: row[name] for name in expected} == expected
    assert row["warnings"] == ["30% of tiles out of focus"]
    assert (row["grade"], row["split"]) == ("3", "train")
    assert "keep_masks" not in row


def test_the_worst_have_most_trouble(tmp_path):
    rows = [
        slide("fine"),
        slide("blurred", out_of_focus_share=0.9),
        slide("hazy", out_of_focus_share=0.1),
        slide("small", num_tiles=4),
        slide("gone", status="missing_file", num_tiles=None, num_nuclei=None),
        slide("torn"),
        slide("unsure", mpp_source="estimated", num_nuclei=3),
    ]
    write_qc(tmp_path, rows, [problem("torn", region=f"r{i}") for i in range(40)])
    shown = sorted(read_rows(tmp_path), key=lambda row: -row["trouble"])
    names = [row["id"] for row in shown]
    assert names == ["gone", "blurred", "torn", "unsure", "small", "hazy", "fine"]
    warned = {row["id"]: row["warnings"] for row in shown}
    assert warned["unsure"] == ["few nuclei, 0.075 a tile", "um per px is estimated"]
    assert warned["small"] == ["only 4 tiles"]
    assert warned["hazy"] == warned["fine"] == warned["gone"] == []


def test_totals_stand_at_the_top(tmp_path):
    rows = [slide(str(i), out_of_focus_share=0.5 * (i == 0)) for i in range(3)]
    rows += [slide(n, status="no_nuclei", num_tiles=None, mpp_source="manifest") for n in "xy"]
    rows += [slide("z", status="missing_file", num_tiles=None, mpp_source=None)]
    html = write_qc(tmp_path, rows).read_text()
    totals = {"slides": 6, "usable": 3, "quarantined": 3, "usable, worth a look": 1}
    totals |= {"tiles": 120, "tiles out of focus": "16.7 %"}
    for name, value in totals.items():
        assert re.search(rf"<dt>{name}</dt><dd[^>]*>{value}</dd>", html), name
    assert "file 3, manifest 2" in html
    assert re.findall(r'href="#reason=(\w+)"', html) == ["no_nuclei", "missing_file"]
    assert "width:50.0%" in html


def test_thousands_of_slides_go_to_small_files(tmp_path, monkeypatch):
    monkeypatch.setattr("cytoray.report.qc.INDEX_ROWS_PER_FILE", 500)
    write_qc(tmp_path, (slide(f"s{i:04d}", site=f"site {i % 7}") for i in range(1201)))
    rows = read_rows(tmp_path)
    assert [row["id"] for row in rows] == [f"s{i:04d}" for i in range(1201)]
    assert [row["site"] for row in rows[:8]] == [f"site {i % 7}" for i in range(8)]
    assert [len(part) for part in read_files(tmp_path, "rows")] == [100] * 12 + [1]
    assert [len(part["id"]) for part in read_files(tmp_path, "index")] == [500, 500, 201]
    assert len((tmp_path / "qc.html").read_text()) < 40_000


def test_a_new_page_takes_the_old_files_away(tmp_path):
    write_qc(tmp_path, (slide(f"s{i}") for i in range(250)))
    before = set((tmp_path / "qc").glob("*.js"))
    (tmp_path / "qc" / "only.thumbnail.jpg").write_bytes(b"x")
    write_qc(tmp_path, [slide("only")])
    after = set((tmp_path / "qc").glob("*.js"))
    assert len(before) == 5
    assert len(after) == 3
    assert not before & after
    assert [row["id"] for row in read_rows(tmp_path)] == ["only"]
    assert (tmp_path / "qc" / "only.thumbnail.jpg").exists()


def test_the_writer_holds_one_file_of_rows(tmp_path, monkeypatch):
    """What is alive does not grow with the slides that were written."""
    monkeypatch.setattr("cytoray.report.qc.INDEX_ROWS_PER_FILE", 200)
    alive, marks = [], {"trouble", "problems"}

    def rows():
        for i in range(1000):
            if i % 250 == 249:
                gc.collect()
                held = [o for o in gc.get_objects() if type(o) is dict and marks & o.keys()]
                alive.append(len(held))
            yield slide(f"s{i}")

    write_qc(tmp_path, rows())
    assert len(alive) == 4
    assert max(alive) < 310  # entries of one index file, words of one file, one row


def test_menus_offer_what_has_several_values(tmp_path):
    rows = [slide(str(i), split="train", site=f"s{i % 3}", grade=i) for i in range(80)]
    html = write_qc(tmp_path, rows, labels=["grade"]).read_text()
    assert re.findall(r'data-category="(\w+)"', html) == ["site"]


def test_pictures_are_linked_not_inlined(tmp_path):
    thumbnail = np.full((50, 60, 3), 200, np.uint8)
    (tmp_path / "qc").mkdir()
    focus = np.ones((5, 6))
    mask = np.ones((5, 6), bool)
    for kind, data in qc_images(thumbnail, mask, np.zeros((0, 2)), focus=focus).items():
        (tmp_path / "qc" / f"a #1.{kind}.jpg").write_bytes(data)
    absolute = str(tmp_path / "qc" / "other.jpg")
    rows = [slide("a #1"), slide("b", thumbnail_path=absolute, density_path="d/x.jpg"), slide("c")]
    html = write_qc(tmp_path, rows).read_text()
    first, second, third = read_rows(tmp_path)
    kinds = ("thumbnail", "foreground", "density", "focus")
    assert first["images"] == {kind: f"qc/a%20%231.{kind}.jpg" for kind in kinds}
    assert second["images"] == {"thumbnail": "qc/other.jpg", "density": "d/x.jpg"}
    assert third["images"] == {}
    assert "base64" not in html


def all_text(out):
    return "".join(
        path.read_text() for path in [out / "qc.html", *sorted((out / "qc").glob("*.js"))]
    )


def test_hostile_names_stay_text(tmp_path):
    row = slide(EVIL, status="quarantined", site=EVIL, split=EVIL, reader=EVIL, vendor=EVIL)
    row |= {"thumbnail_path": "javascript:x()", EVIL: EVIL, "objective_power": None}
    quarantine = [problem(EVIL, code=EVIL, message=EVIL), problem(EVIL, region=EVIL)]
    write_qc(tmp_path, [row, slide("b", site="<b>")], quarantine, EVIL, EVIL, [EVIL])
    html = (tmp_path / "qc.html").read_text()
    assert "<script>alert" not in html
    assert "innerHTML" not in all_text(tmp_path)
    for path in (tmp_path / "qc").glob("*-[ir]*-0*.js"):
        assert "<" not in path.read_text()
    shown, _ = read_rows(tmp_path)
    assert shown["id"] == EVIL
    assert shown["images"]["thumbnail"] == "javascript%3Ax%28%29"


def test_no_patient_and_no_local_path_reaches_the_page(tmp_path):
    torn = "/data/SECRET folder/a.svs cannot be decoded: /var/SECRET/part 7"
    rows = [slide("a", reader_reason="/mnt/SECRET/x.tif is not tiled"), slide("b", status="torn")]
    quarantine = [
        problem("b", message=torn, path="/data/SECRET folder/a.svs"),
        problem("a", message=torn, path="/data/SECRET folder/a.svs", region="a:1"),
    ]
    labels = ["patient_id", "path"]
    write_qc(tmp_path, rows, quarantine, subtitle="/home/SECRET/cohort.csv", labels=labels)
    text = all_text(tmp_path)
    assert "SECRET" not in text
    assert str(tmp_path) not in text
    assert "cohort.csv" in text
    assert "[path] cannot be decoded" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no file at /data/x/a.svs; check", "no file at [path]; check"),
        (r"C:\slides\a.svs has zero bytes", "[path] has zero bytes"),
        (r"\\server\share\a.svs is lost", "[path] is lost"),
        ("cannot get s3://bucket/a.svs", "cannot get [path]"),
        ("um/px disagree (file 0.25 / manifest 0.5)", None),
        ("1024x1024 px, 3/4 of it and/or more", None),
    ],
)
def test_paths_are_taken_out_of_messages(text, expected):
    assert without_paths(text) == (expected or text)


def test_nothing_is_fetched_from_the_network(tmp_path):
    html = write_qc(tmp_path, [slide("a")]).read_text()
    script = next((tmp_path / "qc").glob("*-page.js")).read_text()
    svg = "http://www.w3.org/2000/svg"
    found = re.findall(r"https?://[^\"'\s]*|@import|url\(|fetch\(|XMLHttpRequest", html + script)
    assert set(found) == {svg}
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html).group(1)
    assert "default-src 'none'" in policy
    assert "script-src 'self' file:;" in policy  # no script inside the page can run
    assert len(re.findall(r"<script", html)) == 2


def test_no_slides_at_all(tmp_path):
    write_qc(tmp_path, [])
    assert read_rows(tmp_path) == []
