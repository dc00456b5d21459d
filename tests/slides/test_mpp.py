from __future__ import annotations

import cv2
import numpy as np
import pytest
import tifffile

from cytoray.errors import InputError, SlideError
from cytoray.indexing import IndexSettings, SlideIndexer, part_path
from cytoray.nuclei import read_nuclei
from cytoray.slides import Grid, open_slide, read_chunk
from cytoray.slides.mpp import magnification_to_mpp, resolve_mpp
from cytoray.slides.readers_base import SlideInfo

OBLONG = (0.25, 0.34)


def info(mpp_x=None, mpp_y=None, objective=None):
    return SlideInfo(
        width_px_level0=100,
        height_px_level0=100,
        level_dimensions=((100, 100),),
        level_downsamples=(1.0,),
        mpp_x=mpp_x,
        mpp_y=mpp_y,
        objective_power=objective,
        vendor="test",
        reader="image",
        reader_reason="",
    )


@pytest.mark.parametrize(
    ("slide", "manifest", "estimated", "expected"),
    [
        (info(0.25, 0.25, 40.0), None, None, (0.25, 0.25, "file")),
        (info(0.25, 0.252, 40.0), 0.24, None, (0.24, 0.24, "manifest")),
        (info(objective=20.0), None, None, (0.5, 0.5, "objective")),
        (info(), 0.3, None, (0.3, 0.3, "manifest")),
        (info(0.2, 0.21), float("nan"), None, (0.2, 0.21, "file")),
        (info(), None, 0.4, (0.4, 0.4, "estimated")),
        (info(objective=20.0), None, 0.3, (0.5, 0.5, "objective")),
        (info(0.25, 0.25), None, 0.9, (0.25, 0.25, "file")),  # an estimate is rough
        (info(0.25, 0.25), 0.26, 0.07, (0.26, 0.26, "manifest")),
    ],
)
def test_sources_in_turn(slide, manifest, estimated, expected):
    resolved = resolve_mpp(slide, manifest, estimated=estimated)
    assert (resolved.mpp_x, resolved.mpp_y, resolved.source) == expected


@pytest.mark.parametrize(
    ("slide", "manifest"),
    [
        (info(0.25, 0.25, 20.0), None),
        (info(0.25, 0.25), 0.5),
        (info(0.25, 0.5), 0.25),
        (info(0.25, 0.5), None),
    ],
)
def test_contradictions_are_refused_unless_the_manifest_is_trusted(slide, manifest):
    with pytest.raises(SlideError) as caught:
        resolve_mpp(slide, manifest)
    assert caught.value.code == "mpp_contradiction"
    if manifest is not None:
        resolved = resolve_mpp(slide, manifest, trust_manifest_mpp=True)
        assert (resolved.mpp_x, resolved.mpp_y) == (manifest, manifest)


@pytest.mark.parametrize(
    ("slide", "manifest", "sources"),
    [
        (info(2.5, 2.5), None, "file 2.5, estimated 0.3"),
        (info(), 2.5, "manifest 2.5, estimated 0.3"),
        (info(2.5, 2.5), 2.4, "manifest 2.4, file 2.5, estimated 0.3"),
        (info(0.25, 0.25, 40.0), 2.5, "manifest 2.5, file 0.25, objective 0.25, estimated 0.3"),
        (info(2.5, 3.4), None, "file 2.5 x 3.4, estimated 0.3"),
        (info(objective=400.0), None, "objective 0.025, estimated 0.3"),
    ],
)
def test_an_error_by_ten_contradicts_the_estimate(slide, manifest, sources):
    with pytest.raises(SlideError) as caught:
        resolve_mpp(slide, manifest, estimated=0.3)
    assert caught.value.code == "mpp_contradiction"
    assert f"({sources})" in caught.value.message
    if manifest is not None:
        trusted = resolve_mpp(slide, manifest, trust_manifest_mpp=True, estimated=0.3)
        assert trusted.source == "manifest"


def test_missing_says_what_to_do():
    with pytest.raises(SlideError, match="`mpp` column") as caught:
        resolve_mpp(info(), None, trust_manifest_mpp=True)
    assert caught.value.code == "mpp_missing"


def test_the_manifests_number_is_the_mean_of_oblong_sides_unless_it_is_trusted():
    slide = info(*OBLONG)
    resolved = resolve_mpp(slide, 0.3)
    assert resolved.mpp_x * resolved.mpp_y == pytest.approx(0.3**2)
    assert resolved.mpp_y / resolved.mpp_x == pytest.approx(OBLONG[1] / OBLONG[0])
    trusted = resolve_mpp(slide, 0.3, trust_manifest_mpp=True)
    assert (trusted.mpp_x, trusted.mpp_y) == (0.3, 0.3)


def test_magnification_by_convention():
    assert [magnification_to_mpp(power) for power in (20, 40, 10)] == [0.5, 0.25, 1.0]
    for wrong in (0, -20, float("nan")):
        with pytest.raises(InputError, match="above 0"):
            magnification_to_mpp(wrong)


@pytest.fixture(scope="module")
def oblong_slide(tmp_path_factory):
    """(path, centres in um): round nuclei on round cells, photographed with oblong pixels."""
    rng = np.random.default_rng(0)
    size = (1600, 1200)
    centres = np.array([(x, y) for y in range(50, 380, 90) for x in range(50, 370, 90)], float)
    centres += rng.uniform(-15, 15, centres.shape)
    picture = np.full((size[1], size[0], 3), (236, 234, 238), np.uint8)
    for radius_um, colour in ((22, (205, 190, 215)), (4.5, (90, 65, 140))):
        for centre in centres:
            place = [round((um / mpp - 0.5) * 256) for um, mpp in zip(centre, OBLONG, strict=True)]
            axes = [round(radius_um / mpp * 256) for mpp in OBLONG]
            cv2.ellipse(picture, place, axes, 0, 0, 360, colour, -1, cv2.LINE_AA, shift=8)
    noisy = cv2.GaussianBlur(picture, (0, 0), 1) + rng.normal(0, 1, picture.shape)
    path = tmp_path_factory.mktemp("oblong") / "oblong.tiff"
    tifffile.imwrite(
        path,
        noisy.clip(0, 255).astype(np.uint8),
        tile=(256, 256),
        photometric="rgb",
        compression="jpeg",
        compressionargs={"level": 95},
        resolution=(1e4 / OBLONG[0], 1e4 / OBLONG[1]),
        resolutionunit="CENTIMETER",
        metadata=None,
    )
    return path, centres


def nucleus_boxes(pixels):
    """(N, 2) width and height of the dark blobs wholly inside the picture."""
    dark = (pixels[..., 1] < 128).astype(np.uint8)
    _, _, stats, _ = cv2.connectedComponentsWithStats(dark)
    left, top, width, height, area = stats[1:].T
    inside = (left > 0) & (top > 0) & (left + width < dark.shape[1]) & (area > 20)
    inside &= top + height < dark.shape[0]
    return np.column_stack([width, height])[inside]


@pytest.mark.parametrize("reader", ["auto", "openslide", "tiff", "image"])
@pytest.mark.parametrize("mpp", [0.25, 0.5, 1.0])
def test_round_stays_round_in_a_chunk(oblong_slide, reader, mpp):
    path, _ = oblong_slide
    with open_slide(str(path), reader=reader) as slide:
        assert (slide.info.mpp_x, slide.info.mpp_y) == pytest.approx(OBLONG, rel=1e-4)
        chunk = read_chunk(
            slide, resolve_mpp(slide.info), Grid(tile_px=round(32 / mpp), mpp=mpp), 0, 0
        )
    boxes = nucleus_boxes(chunk.pixels)
    assert len(boxes) >= 4
    assert np.abs(boxes[:, 0] - boxes[:, 1]).max() <= 1
    assert np.abs(boxes - 9 / mpp).max() <= 2  # 9 um across


def test_round_stays_round_from_file_to_nuclei_table(oblong_slide, tmp_path):
    path, centres = oblong_slide
    settings = IndexSettings(grid=Grid(tile_px=64, mpp=0.5))
    indexed = SlideIndexer(settings, tmp_path)({"slide_id": "s", "path": str(path), "mpp": None})
    row = indexed.row
    assert indexed.ok
    assert (row["mpp_x"], row["mpp_y"]) == pytest.approx(OBLONG, rel=1e-4)
    assert row["mpp_source"] == "file"
    assert row["chunk_columns"] * row["chunk_rows"] == 2 * 2  # 12 x 12 tiles of 32 um
    nuclei = read_nuclei(part_path(tmp_path, "s"))
    found_um = (nuclei[:, :2] + 0.5) * OBLONG
    away_um = np.linalg.norm(found_um[:, None] - centres, axis=2)
    assert len(nuclei) == len(centres)
    assert away_um.min(axis=0).max() < 1.0
    assert np.abs(nuclei[:, 2] - 4.5).max() < 0.8
