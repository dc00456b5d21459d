from __future__ import annotations

import gzip
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cytoray.errors import InputError, SlideError
from cytoray.nuclei import build_detector, check_on_foreground, write_nuclei

MPP = (0.25, 0.25)
SIZE = (1000, 800)


def nuclei_of(folder, slide_id="s", mpp=MPP, size=SIZE, **options):
    detector = build_detector("precomputed", folder=folder, **options)
    found = detector.nuclei_of(slide_id, *mpp, *size)  # type: ignore[attr-defined]
    assert found.dtype == np.float32
    assert found.shape[1:] == (4,)
    return found


def refused(folder, **options) -> SlideError:
    with pytest.raises(SlideError) as caught:
        nuclei_of(folder, **options)
    return caught.value


def square(x, y, side):
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]


def feature(shape, coordinates, kind=None, **more):
    properties = {"objectType": kind} if kind else {}
    properties |= more.pop("properties", {})
    geometry = {"type": shape, "coordinates": coordinates}
    return {"type": "Feature", "geometry": geometry, "properties": properties, **more}


def write_geojson(folder, *features, name="s.geojson", bare=False):
    content = list(features) if bare else {"type": "FeatureCollection", "features": features}
    (folder / name).write_text(json.dumps(content))
    return folder


# The same nucleus, at array index (100, 40) of the finest level, in each way it may be written.
TABLES = {
    "ours": ("x_level0,y_level0", "100,40", "level0"),
    "index": ("x,y", "100,40", "level0"),
    "spaced and capital": (" X , Y ", " 100 , 40 ", "level0"),
    "regionprops": ("centroid_y,centroid_x", "40,100", "level0"),
    "um": ("x,y", "25.125,10.125", "um"),
    "um in the name": ("x_um,y_um", "25.125,10.125", "level0"),
    "QuPath um": ("Image,Centroid X µm,Centroid Y µm", "a b.svs,25.125,10.125", "level0"),
    "QuPath um, Greek": ("Centroid X μm\tCentroid Y μm", "25.125\t10.125", "level0"),
    "QuPath px": ("Centroid X px;Centroid Y px", "100.5;40.5", "um"),
    "the name that says most wins": ("x,y,x_level0,y_level0", "1,1,100,40", "um"),
}


@pytest.mark.parametrize("name", sorted(TABLES))
def test_every_way_to_write_a_position_means_the_same_pixel(name, tmp_path):
    header, row, frame = TABLES[name]
    (tmp_path / "s.csv").write_text(f"{header}\n{row}\n", encoding="utf-8")
    [nucleus] = nuclei_of(tmp_path, frame=frame, radius_um=5)
    assert nucleus.tolist() == pytest.approx([100, 40, 5, 1])


def test_um_follow_both_scales_of_a_slide_with_oblong_pixels(tmp_path):
    (tmp_path / "s.csv").write_text("x_um,y_um\n25,20\n")
    write_geojson(tmp_path, feature("Polygon", [square(0, 0, 10)]), name="t.geojson")
    [nucleus] = nuclei_of(tmp_path, mpp=(0.25, 0.5))
    assert nucleus[:2].tolist() == pytest.approx([99.5, 39.5])
    [box] = nuclei_of(tmp_path, "t", mpp=(0.25, 0.5))
    assert box[2] == pytest.approx(math.sqrt(100 * 0.25 * 0.5 / math.pi))


def test_size_and_score_come_from_columns_and_defaults_fill_the_gaps(tmp_path):
    rows = ["x,y,radius_um,area_um2,score", "10,10,3,100,0.5", "20,10,,50.265,", "30,10,,,0.25"]
    (tmp_path / "s.csv").write_text("\n".join(rows))
    found = nuclei_of(tmp_path, radius_um=4.5)
    assert found[:, 2].tolist() == pytest.approx([3, 4, 4.5], abs=1e-3)
    assert found[:, 3].tolist() == [0.5, 1, 0.25]
    head = "Centroid X px,Centroid Y px,Nucleus: Area µm^2,Detection probability"
    (tmp_path / "q.csv").write_text(f"{head}\n5,5,50.265,0.75\n", encoding="latin-1")
    assert nuclei_of(tmp_path, "q")[0].tolist() == pytest.approx([4.5, 4.5, 4, 0.75], abs=1e-3)


def test_our_own_nuclei_table_comes_back_unchanged(tmp_path, rng):
    nuclei = rng.uniform(1, 700, (50, 4)).astype(np.float32)
    write_nuclei(tmp_path / "s.parquet", "s", nuclei, "classical")
    assert np.array_equal(nuclei_of(tmp_path, frame="um"), nuclei)


def test_a_parquet_of_whole_numbers_and_double_precision(tmp_path):
    pq.write_table(
        pa.table({"x": [7, 8], "y": [1.5, 2.5], "extra": ["a", "b"]}), tmp_path / "s.parquet"
    )
    assert nuclei_of(tmp_path)[:, :2].tolist() == [[7, 1.5], [8, 2.5]]


@pytest.mark.parametrize("suffix", [".csv.gz", ".geojson.gz", ".json", ".json.gz"])
def test_compressed_files_and_json(suffix, tmp_path):
    content = json.dumps(feature("Point", [100.5, 40.5])) if "json" in suffix else "x,y\n100,40\n"
    opener = gzip.open if suffix.endswith(".gz") else open
    with opener(tmp_path / f"a.b{suffix}", "wt") as stream:
        stream.write(content)
    assert nuclei_of(tmp_path, "a.b")[0, :2].tolist() == [100, 40]


def test_a_polygon_gives_its_centroid_and_the_radius_of_its_area(tmp_path):
    triangle = [[10, 10], [40, 10], [10, 40]]  # left open
    holed = [square(100, 100, 20), square(100, 100, 10)]
    write_geojson(tmp_path, feature("Polygon", [triangle]), feature("Polygon", holed))
    found = nuclei_of(tmp_path)
    assert found[0].tolist() == pytest.approx([19.5, 19.5, 0.25 * math.sqrt(450 / math.pi), 1])
    centre = (400 * 110 - 100 * 105) / 300 - 0.5
    assert found[1].tolist() == pytest.approx(
        [centre, centre, 0.25 * math.sqrt(300 / math.pi), 1], rel=1e-6
    )


def test_a_finely_drawn_circle_far_out_is_found_to_a_hundredth_of_a_pixel(tmp_path):
    angles = np.linspace(0, 2 * np.pi, 64)
    ring = np.column_stack([90_000 + 16 * np.cos(angles), 70_000 + 16 * np.sin(angles)])
    write_geojson(tmp_path, feature("Polygon", [ring.tolist()], "detection"))
    [nucleus] = nuclei_of(tmp_path, size=(100_000, 80_000))
    assert nucleus[:2].tolist() == pytest.approx([89_999.5, 69_999.5], abs=0.01)
    assert nucleus[2] == pytest.approx(4, rel=0.01)


def test_outlines_without_area_give_their_mean_and_the_default_size(tmp_path):
    line = [[10, 10], [30, 10], [20, 10]]
    bow_tie = [[0, 0], [10, 10], [10, 0], [0, 10.001]]
    write_geojson(tmp_path, feature("Polygon", [line]), feature("Polygon", [bow_tie]))
    found = nuclei_of(tmp_path, radius_um=3)
    assert found[0].tolist() == pytest.approx([19.5, 9.5, 3, 1])
    assert (np.abs(found[1, :2] - 4.5) <= 5.01).all()


def test_a_qupath_cell_is_its_nucleus_and_annotations_beside_cells_are_regions(tmp_path):
    nucleus = {"type": "Polygon", "coordinates": [square(20, 20, 4)]}
    measured = {"measurements": {"Detection probability": 0.5}}
    old = {"measurements": [{"name": "Detection probability", "value": 0.25}]}
    write_geojson(
        tmp_path,
        feature("Polygon", [square(0, 0, 700)], "annotation"),
        feature("Polygon", [square(10, 10, 40)], "cell", nucleusGeometry=nucleus),
        feature("Polygon", [square(100, 100, 40)], "cell", properties=measured),
        feature("MultiPolygon", [[square(200, 200, 4)], [square(204, 200, 4)]], "detection"),
        feature("Polygon", [square(300, 300, 4)], id="PathDetectionObject", properties=old),
        feature("Polygon", [square(0, 0, 64)], "tile"),
    )
    found = nuclei_of(tmp_path, radius_um=3)
    assert found[:, :2].tolist() == [[21.5, 21.5], [119.5, 119.5], [203.5, 201.5], [301.5, 301.5]]
    sizes = [16 / math.pi, 9 / 0.25**2, 32 / math.pi, 16 / math.pi]
    assert (found[:, 2] ** 2 / 0.25**2).tolist() == pytest.approx(sizes, rel=1e-5)
    assert found[:, 3].tolist() == [1, 0.5, 1, 0.25]


def test_features_of_a_class_as_cellvit_writes_them_are_taken_apart(tmp_path):
    polygons = [[square(10 * i, 50, 4)] for i in range(1, 4)]
    write_geojson(
        tmp_path,
        feature("MultiPolygon", polygons, "annotation"),
        feature("MultiPoint", [[400.5, 50.5], [500.5, 50.5]], "annotation"),
        feature("Point", [600.5, 50.5]),
        bare=True,
    )
    found = nuclei_of(tmp_path)
    assert found[:, 0].tolist() == [11.5, 21.5, 31.5, 400, 500, 600]


def test_no_nuclei_at_all_is_an_answer(tmp_path):
    (tmp_path / "a.csv").write_text("x,y\n")
    write_geojson(tmp_path, name="b.geojson")
    assert len(nuclei_of(tmp_path, "a")) == len(nuclei_of(tmp_path, "b")) == 0


def test_nuclei_outside_are_refused_with_the_figures(tmp_path, rng):
    xy = rng.uniform(0, 1, (500, 2)) * SIZE * 4
    (tmp_path / "s.csv").write_text("x,y\n" + "".join(f"{x},{y}\n" for x, y in xy))
    error = refused(tmp_path)
    outside = int(((xy[:, 0] >= 999.5) | (xy[:, 1] >= 799.5)).sum())
    assert error.code == "nuclei_outside"
    assert f"{outside} of 500 nuclei of {tmp_path}/s.csv lie outside the slide of 1000 x 800" in (
        error.message
    )
    assert f"to {xy[:, 0].max():.0f}" in error.message
    assert "'level0'" in error.message
    assert "finest level" in error.message
    um = refused(tmp_path, frame="um", mpp=(0.01, 0.01))
    assert "'um'" in um.message


def test_a_frame_that_would_fit_is_named(tmp_path, rng):
    xy = rng.uniform(0, 1, (500, 2)) * SIZE
    (tmp_path / "s.csv").write_text("x,y\n" + "".join(f"{x},{y}\n" for x, y in xy - 0.5))
    assert "in the frame 'level0' they fit" in refused(tmp_path, frame="um").message
    (tmp_path / "s.csv").write_text("x_um,y_um\n" + "".join(f"{x},{y}\n" for x, y in xy))
    assert "they fit" not in refused(tmp_path).message  # the column's name has said


def test_one_nucleus_in_a_hundred_may_lie_outside_and_is_left_out(tmp_path):
    rows = [f"{5 * i},5" for i in range(199)]
    (tmp_path / "s.csv").write_text("\n".join(["x,y", *rows, "-3,5", ""]))
    assert len(nuclei_of(tmp_path)) == 199
    (tmp_path / "s.csv").write_text("\n".join(["x,y", *rows[:150], "-3,5", "5,801", ""]))
    assert refused(tmp_path).code == "nuclei_outside"
    borders = "-0.5,-0.5\n999.4,799.4\n"
    (tmp_path / "s.csv").write_text("x,y\n" + borders)
    assert len(nuclei_of(tmp_path)) == 2


BAD_TABLES = {
    "nothing": ("", "none of its 0 columns"),
    "other columns": ("a,b\n1,2\n", "x_level0 and y_level0"),
    "half a pair": ("x_level0,y\n1,2\n", "none of its 2 columns"),
    "no number": ("x,y\n1,1\n\n2,DOE\n3,\nnan,3\n5,5\n", "3 of 5 .* no position .lines 4, 5, 6"),
    "no size": ("x,y,radius_um\n1,1,2\n1,1,0\n1,1,-2\n", "2 of 3 .* not above 0 .lines 3, 4"),
    "no area": ("x,y,area_um2\n1,1,-9\n", "not above 0 .line 2"),
    "ragged": ("x,y\n1,1\n\n1,2,DOE\n", "fields than the header: line 4"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(BAD_TABLES))
def test_bad_tables_are_refused_with_the_lines(name, tmp_path):
    text, message = BAD_TABLES[name]
    (tmp_path / "s.csv").write_text(text)
    error = refused(tmp_path)
    assert error.code == "nuclei_unreadable"
    assert str(tmp_path / "s.csv") in error.message
    with pytest.raises(SlideError, match=message):
        raise error
    assert "DOE" not in error.message  # a file's own text may name a patient


BAD_JSON = {
    "cut": ('{"type": "FeatureCollection", "features": [', "not JSON .line 1, column"),
    "other": ('{"cells": []}', "neither a GeoJSON"),
    "line": (json.dumps(feature("LineString", [[0, 0], [1, 1]])), "feature 1 is a LineString"),
    "no geometry": ('[{"type": "Feature"}]', "feature 1 has no usable geometry"),
    "empty": (json.dumps(feature("Polygon", [[]])), "feature 1 has no usable"),
    "text": (json.dumps(feature("Polygon", [[["DOE", 1], [2, 2]]])), "feature 1 has no usable"),
    "short": (json.dumps(feature("Polygon", [[[1], [2]]])), "feature 1 has no usable"),
    "text point": (json.dumps(feature("Point", ["DOE", 1])), "feature 1 has no usable"),
    "nan": ('[{"type":"Feature","geometry":{"type":"Point","coordinates":[NaN,1]}}]', "feature 1"),
}


@pytest.mark.parametrize("name", sorted(BAD_JSON))
def test_bad_geojson_is_refused_with_the_feature(name, tmp_path):
    text, message = BAD_JSON[name]
    (tmp_path / "s.geojson").write_text(text)
    error = refused(tmp_path)
    assert error.code == "nuclei_unreadable"
    with pytest.raises(SlideError, match=message):
        raise error
    assert "DOE" not in error.message


@pytest.mark.parametrize("name", ["s.parquet", "s.geojson", "s.csv.gz", "s.json.gz"])
def test_files_that_are_something_else_are_refused(name, tmp_path):
    (tmp_path / name).write_bytes(b"\x00\xff DOE no such thing \xfe" * 99)
    error = refused(tmp_path)
    assert error.code == "nuclei_unreadable"
    assert "DOE" not in error.message


def test_a_missing_file_names_what_was_tried(tmp_path):
    error = refused(tmp_path)
    assert error.code == "nuclei_missing"
    for suffix in (".csv", ".csv.gz", ".geojson", ".parquet"):
        assert f"{tmp_path}/s{suffix}" in error.message


def test_two_files_of_a_slide_are_refused(tmp_path):
    write_geojson(tmp_path)
    (tmp_path / "s.csv").write_text("x,y\n")
    error = refused(tmp_path)
    assert error.code == "nuclei_unreadable"
    assert "s.csv" in error.message
    assert "s.geojson" in error.message


def test_wrong_options_are_all_named(tmp_path):
    with pytest.raises(InputError) as caught:
        build_detector("precomputed", folder=tmp_path / "no", frame="mm", radius_um=0)
    assert len(caught.value.problems) == 3
    with pytest.raises(InputError, match="no folder ''"):
        build_detector("precomputed")
    with pytest.raises(InputError, match="cannot be found in pixels"):
        build_detector("precomputed", folder=tmp_path)(np.zeros((9, 9, 3), np.uint8), 0.5)


def test_nuclei_off_the_foreground_are_refused():
    mask = np.zeros((40, 50), bool)
    mask[20:30, 30:40] = True
    on = np.array([[310, 210, 4, 1], [399.4, 299.4, 4, 1], [299.5, 199.5, 4, 1]], np.float32)
    off = np.array([[0, 0, 4, 1], [400, 210, 4, 1]], np.float32)
    check_on_foreground(np.concatenate([on, off]), mask, 500, 400)
    check_on_foreground(np.zeros((0, 4)), mask, 500, 400)
    with pytest.raises(SlideError, match=r"only 33% of the 3 nuclei .*5% of its area") as caught:
        check_on_foreground(np.concatenate([on[:1], off]), mask, 500, 400)
    assert caught.value.code == "nuclei_outside"
