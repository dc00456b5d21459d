from pathlib import Path

import cv2
import numpy as np
import psutil
import pyarrow as pa
import pytest
import tifffile

from cytoray.errors import SlideError
from cytoray.slides.chunks import read_chunk
from cytoray.slides.grid import Grid
from cytoray.slides.mpp import ResolvedMpp
from cytoray.slides.reader import open_slide
from cytoray.slides.readers_ome import ome_mpp
from cytoray.slides.z_stack import StackReader, count_ndpi_planes, open_row, open_stack
from cytoray.streaming.plan import ReadPlan, make_plan
from cytoray.streaming.tile_pixels import BagTiles, ChunkTiles, OpenSlides
from cytoray.synthetic import SynthConfig, make_slide

from .conftest import damage_tile, write_slide

SIDE = 1024
GRID = Grid(tile_px=64, mpp=0.25)  # a chunk is 512 px: one quadrant of the slide
SCALE = ResolvedMpp(mpp_x=0.25, mpp_y=0.25, source="file")
# Plane in focus of every quadrant, row by row; the others are blurred more the further they are.
SHARP = (0, 2, 1, 2)


@pytest.fixture(scope="module")
def planes() -> list[np.ndarray]:
    """Three planes, uint8 (1024, 1024, 3), each sharp in other quadrants."""
    slide = make_slide(SynthConfig(num_slides=1, held_out=0, size_px=SIDE, cells_per_mm2=900), 0)
    made = []
    for z in range(3):
        plane = np.empty_like(slide.pixels)
        for index, sharp in enumerate(SHARP):
            y, x = np.array(divmod(index, 2)) * SIDE // 2
            part = slide.pixels[y : y + SIDE // 2, x : x + SIDE // 2]
            if z != sharp:
                part = cv2.GaussianBlur(part, (0, 0), 0.8 * abs(z - sharp) / 0.25)
            plane[y : y + SIDE // 2, x : x + SIDE // 2] = part
        made.append(plane)
    return made


@pytest.fixture
def files(planes, tmp_path) -> list[str]:
    return [
        str(write_slide(tmp_path / f"z{z}.tiff", plane, levels=2)) for z, plane in enumerate(planes)
    ]


def chunk_pixels(path: str, place, halo_px: int, grid: Grid = GRID, **options) -> np.ndarray:
    with open_slide(path, **options) as slide:
        return read_chunk(slide, SCALE, grid, *place, halo_px=halo_px).pixels


@pytest.mark.parametrize("halo_px", [0, 32])
@pytest.mark.parametrize("reader", ["tiff", "openslide"])
def test_every_chunk_takes_its_sharpest_plane(files, halo_px, reader):
    with open_stack(files, reader=reader) as stack:
        assert isinstance(stack, StackReader)
        assert stack.info.reader == reader
        assert "3 focal planes" in stack.info.reader_reason
        for index, sharp in enumerate(SHARP):
            place = (index % 2, index // 2)
            chunk = read_chunk(stack, SCALE, GRID, *place, halo_px=halo_px)
            assert chunk.z_index == sharp
            alone = chunk_pixels(files[sharp], place, halo_px, reader=reader)
            np.testing.assert_array_equal(chunk.pixels, alone)


def test_at_another_mpp_and_from_a_level(files):
    grid = Grid(tile_px=32, mpp=0.5)
    with open_stack(files) as stack:
        for index, sharp in enumerate(SHARP):
            place = (index % 2, index // 2)
            chunk = read_chunk(stack, SCALE, grid, *place, halo_px=16)
            assert chunk.z_index == sharp
            np.testing.assert_array_equal(chunk.pixels, chunk_pixels(files[sharp], place, 16, grid))


def test_a_plane_can_be_asked_for(files):
    with open_stack(files) as stack:
        chunk = read_chunk(stack, SCALE, GRID, 0, 0, z_index=1)
        assert chunk.z_index == 1
        np.testing.assert_array_equal(chunk.pixels, chunk_pixels(files[1], (0, 0), 0))


def test_equal_planes_give_the_middle_one(planes, tmp_path):
    path = str(write_slide(tmp_path / "a.tiff", planes[0]))
    empty = str(write_slide(tmp_path / "empty.tiff", np.full_like(planes[0], 235)))
    for paths in ([path] * 3, [empty] * 3):
        with open_stack(paths) as stack:
            assert read_chunk(stack, SCALE, GRID, 0, 0).z_index == 1
    with open_stack([path] * 3, middle=0) as stack:
        assert read_chunk(stack, SCALE, GRID, 0, 0).z_index == 0


def test_overview_and_thumbnail_are_the_middle_planes(files):
    with open_stack(files) as stack, open_slide(files[1]) as middle:
        np.testing.assert_array_equal(stack.thumbnail(100), middle.thumbnail(100))
        np.testing.assert_array_equal(
            stack.read_reduced(0, 0, 0, SIDE, SIDE, 16),
            middle.read_reduced(0, 0, 0, SIDE, SIDE, 16),
        )
    row = {"path": files[0], "z_paths": files}
    with open_row(row) as stack, open_slide(files[0]) as first:
        np.testing.assert_array_equal(stack.thumbnail(100), first.thumbnail(100))


def test_damage_in_one_plane_is_filled_from_another(files):
    for page in (0, 1):  # both levels, so that the choice cannot see it either
        damage_tile(Path(files[0]), 0, page=page)
    with open_stack(files, reader="tiff") as stack:
        chosen = read_chunk(stack, SCALE, GRID, 0, 0)
        assert chosen.z_index == 1  # plane 0, the sharpest, cannot be judged
        chunk = read_chunk(stack, SCALE, GRID, 0, 0, z_index=0)
        assert chunk.bad_tiles == {}
        whole = stack.read_level(0, 0, 0, SIDE, SIDE)
    assert chunk.z_index == 0
    neighbour = chunk_pixels(files[1], (0, 0), 0)
    np.testing.assert_array_equal(chunk.pixels[:256, :256], neighbour[:256, :256])
    with open_slide(files[0], reader="tiff") as slide:
        own = slide.read_level(0, 256, 0, 256, 512)
    np.testing.assert_array_equal(chunk.pixels[:, 256:], own)
    with open_slide(files[1]) as middle:
        np.testing.assert_array_equal(whole, middle.read_level(0, 0, 0, SIDE, SIDE))


def test_damage_in_all_planes_is_an_error_and_never_white(files):
    for path in files:
        for page in (0, 1):
            damage_tile(Path(path), 0, page=page)
    with open_stack(files, reader="tiff") as stack:
        chunk = read_chunk(stack, SCALE, GRID, 0, 0)
        assert set(chunk.bad_tiles) == {row * 8 + column for row in range(4) for column in range(4)}
        assert not chunk.pixels[:256, :256].any()
        with pytest.raises(SlideError, match="every focal plane") as caught:
            stack.read_level(0, 0, 0, 100, 100)
    assert caught.value.code == "decode_error"


def test_planes_of_other_geometry_are_refused(planes, tmp_path):
    first = str(write_slide(tmp_path / "a.tiff", planes[0]))
    smaller = str(write_slide(tmp_path / "b.tiff", planes[1][:1000]))
    coarser = str(write_slide(tmp_path / "c.tiff", planes[1], mpp=0.5))
    for other in (smaller, coarser):
        with pytest.raises(SlideError, match="focal plane 1 has") as caught:
            open_stack([first, other])
        assert caught.value.code == "z_mismatch"
    with pytest.raises(SlideError) as caught:
        open_stack([first, str(tmp_path / "none.tiff")])
    assert caught.value.code == "missing_file"


def test_all_planes_have_one_reader(planes, tmp_path):
    fast = str(write_slide(tmp_path / "a.tiff", planes[0]))
    slow = str(
        write_slide(tmp_path / "b.tiff", planes[1], compression="deflate", photometric="rgb")
    )
    with open_stack([fast, slow]) as stack:
        assert isinstance(stack, StackReader)
        assert {plane.info.reader for plane in stack.planes} == {"openslide"}
        assert "not JPEG" in stack.info.reader_reason
        assert stack.info.mpp_x == pytest.approx(0.25)


def test_no_file_stays_open(files):
    with open_stack(files) as stack:
        stack.thumbnail(64)
        assert len(open_files(files)) == 3
    assert open_files(files) == []
    with pytest.raises(SlideError):
        open_stack([*files, files[0] + ".none"])
    assert open_files(files) == []


def open_files(paths: list[str]) -> list[str]:
    return [f.path for f in psutil.Process().open_files() if f.path in paths]


def write_ome(path: Path, planes: list[np.ndarray], compression: str | None) -> str:
    """An OME-TIFF with a Z axis and two levels."""
    stack = np.stack(planes)
    half = np.stack(
        [cv2.resize(p, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA) for p in planes]
    )
    options = {"tile": (256, 256), "photometric": "rgb", "compression": compression}
    size = {"PhysicalSizeX": 250, "PhysicalSizeXUnit": "nm"}
    size |= {"PhysicalSizeY": 0.25, "PhysicalSizeYUnit": "µm"}
    with tifffile.TiffWriter(path, ome=True) as writer:
        writer.write(stack, subifds=1, metadata={"axes": "ZYXS", **size}, **options)
        writer.write(half, subfiletype=1, **options)
    return str(path)


@pytest.mark.parametrize("compression", ["jpeg", "deflate", None])
def test_planes_of_an_ome_tiff(planes, tmp_path, compression):
    path = write_ome(tmp_path / "a.ome.tiff", planes, compression)
    with open_stack([path]) as stack:
        assert isinstance(stack, StackReader)
        assert stack.info.reader == "ome"
        assert stack.info.level_dimensions == ((1024, 1024), (512, 512))
        assert stack.info.mpp_x == pytest.approx(0.25)
        assert stack.middle == 1
        for index, sharp in enumerate(SHARP):
            chunk = read_chunk(stack, SCALE, GRID, index % 2, index // 2)
            assert chunk.z_index == sharp
        expected = tifffile.imread(path, key=2)
        np.testing.assert_array_equal(stack.planes[2].read_level(0, 100, 200, 700, 500),
                                      expected[200:700, 100:800])  # fmt: skip
        assert len(open_files([path])) == 3
    assert open_files([path]) == []
    with open_stack([path], reader="ome", verify=False) as stack:
        assert isinstance(stack, StackReader)


def test_a_damaged_plane_of_an_ome_tiff(planes, tmp_path):
    path = write_ome(tmp_path / "a.ome.tiff", planes, "jpeg")
    damage_tile(Path(path), 0, page=0)
    with open_stack([path]) as stack:
        assert isinstance(stack, StackReader)
        with pytest.raises(SlideError) as caught:
            stack.planes[0].read_level(0, 0, 0, 10, 10)
        assert caught.value.code == "decode_error"
        assert read_chunk(stack, SCALE, GRID, 0, 0, z_index=0).bad_tiles == {}


def test_ome_tiff_without_readable_planes_says_so(planes, tmp_path):
    grey = np.stack([cv2.cvtColor(p, cv2.COLOR_RGB2GRAY) for p in planes])
    path = tmp_path / "grey.ome.tiff"
    tifffile.imwrite(path, grey, ome=True, metadata={"axes": "ZYX"}, photometric="minisblack")
    with open_stack([str(path)]) as slide:
        assert not isinstance(slide, StackReader)
        assert "focal planes cannot be read" in slide.info.reader_reason
    with pytest.raises(SlideError, match="ZYX") as caught:
        open_stack([str(path)], reader="ome")
    assert caught.value.code == "reader_unfit"


def test_a_plain_slide_is_itself(make_slide):
    with open_stack([str(make_slide())]) as slide:
        assert not isinstance(slide, StackReader)
        assert slide.info.reader == "tiff"
        assert read_chunk(slide, SCALE, GRID, 0, 0).z_index == 0


def test_ome_units():
    def xml(x: str) -> str:
        return f'<OME xmlns="o"><Image><Pixels {x} PhysicalSizeY="0.5"/></Image></OME>'

    assert ome_mpp(xml('PhysicalSizeX="0.25"')) == (0.25, 0.5)
    assert ome_mpp(xml('PhysicalSizeX="1" PhysicalSizeXUnit="pixel"')) == (None, None)
    assert ome_mpp("no xml") == (None, None)


def test_ndpi_planes_are_counted(tmp_path):
    path = tmp_path / "ndpi.tiff"  # with its own suffix it would need NDPI's own offsets
    with tifffile.TiffWriter(path) as writer:
        for magnification, depth in [(20.0, 0), (20.0, 100), (5.0, 0), (5.0, 100), (-1.0, 7)]:
            tags = [(65421, "f", 1, magnification, True), (65424, "i", 1, depth, True)]
            writer.write(np.zeros((16, 16, 3), np.uint8), extratags=tags, metadata=None)
    assert count_ndpi_planes(str(path)) == 2
    assert count_ndpi_planes(str(tmp_path / "none.ndpi")) == 0


def stack_plan(files: list[str], z_planes: list[int] | None) -> ReadPlan:
    """A slide table of one stack as the index writes it."""
    full = 2**64 - 1
    row = {
        "slide_id": "s", "path": files[1], "status": "ok", "mpp_x": 0.25, "mpp_y": 0.25,
        "mpp_source": "file", "reader": "tiff", "width_px_level0": SIDE, "height_px_level0": SIDE,
        "keep_masks": [full] * 4, "z_paths": files, "z_planes": z_planes,
    }  # fmt: skip
    schema = pa.schema([("keep_masks", pa.list_(pa.uint64())), ("z_planes", pa.list_(pa.uint8()))])
    fields = {name: schema.field(name).type for name in schema.names}
    columns = {name: pa.array([value], fields.get(name)) for name, value in row.items()}
    return make_plan(pa.table(columns), tile_px=64, mpp=0.25)


@pytest.mark.parametrize("z_planes", [None, list(SHARP), [1, 1, 0, 0]])
def test_streams_read_the_planes_of_the_slide_table(files, z_planes):
    plan = stack_plan(files, z_planes)
    expected = [chunk_pixels(files[z], (i % 2, i // 2), 0) for i, z in enumerate(z_planes or SHARP)]
    tiles, slides = ChunkTiles(plan), OpenSlides(plan)
    for index in range(4):
        got = tiles.read(index)
        assert set(got["error"].tolist()) == {""}
        side = expected[index].reshape(8, 64, 8, 64, 3).swapaxes(1, 2).reshape(64, 64, 64, 3)
        np.testing.assert_array_equal(got["pixels"], side)
        halo = slides.read(0, (index % 2, index // 2), halo_px=32)
        np.testing.assert_array_equal(halo.tiles(range(64)), side)
    name = got["tile_id"][9]
    bag = BagTiles(plan, {"s": [name]})
    one = bag("s", np.array([0]), np.random.default_rng(0))
    np.testing.assert_array_equal(one[0], got["pixels"][9])
