import numpy as np
import pytest

from cytoray.errors import InputError
from cytoray.synthetic.cells import CELL_KINDS, CellPatch, oriented, render_cell
from cytoray.synthetic.stain import sample_stain

MPP = 0.25


@pytest.fixture(scope="module")
def stain():
    return sample_stain(np.random.default_rng(0), np.random.default_rng(1))


def _cells(stain, kind: str, count: int = 12) -> list[CellPatch]:
    rng = np.random.default_rng(5)
    return [render_cell(rng, stain, kind, MPP) for _ in range(count)]


def _nucleus_to_cell(patch: CellPatch) -> float:
    body = (patch.transmittance.min(axis=2) < 245).sum()
    return float(np.pi * patch.nuclei_px[0, 2] ** 2 / body)


@pytest.mark.parametrize("kind", list(CELL_KINDS))
def test_nucleus_has_the_radius_of_its_kind_and_is_darker_than_the_cytoplasm(stain, kind):
    low, high = CELL_KINDS[kind].nucleus_um
    for patch in _cells(stain, kind):
        (x, y, radius_px), light = patch.nuclei_px[0], patch.transmittance.mean(axis=2)
        assert low - 1e-3 <= radius_px * MPP <= high + 1e-3
        rows, columns = np.indices(light.shape)
        away = np.hypot(columns - x, rows - y)
        ring = (away > 2.2 * radius_px) & (light < 240)
        inside = light[away < 0.6 * radius_px].mean()
        assert inside < 150
        assert not ring.any() or inside < light[ring].mean() - 20


def test_abnormal_cells_have_large_nuclei_in_little_cytoplasm(stain):
    abnormal = [_nucleus_to_cell(p) for p in _cells(stain, "abnormal")]
    for kind in ("superficial", "intermediate", "reactive", "metaplastic"):
        assert np.median([_nucleus_to_cell(p) for p in _cells(stain, kind)]) < min(abnormal)


def test_without_nucleus_there_is_none(stain):
    patch = render_cell(np.random.default_rng(0), stain, "intermediate", MPP, with_nucleus=False)
    assert patch.nuclei_px.shape == (0, 3)
    assert patch.transmittance.mean(axis=2).min() > 90


def test_patch_margin_is_clear_so_that_no_seam_shows(stain):
    for patch in _cells(stain, "intermediate", 6):
        light = patch.transmittance
        edge = np.concatenate([light[0], light[-1], light[:, 0], light[:, -1]])
        assert edge.min() >= 250


@pytest.mark.parametrize("turn", range(8))
def test_oriented_moves_nucleus_and_box_with_the_pixels(stain, turn):
    patch = _cells(stain, "abnormal", 1)[0]
    turned = oriented(patch, turn)
    x, y = np.round(patch.nuclei_px[0, :2]).astype(int)
    new_x, new_y = np.round(turned.nuclei_px[0, :2]).astype(int)
    before = patch.transmittance[y - 3 : y + 4, x - 3 : x + 4].mean()
    after = turned.transmittance[new_y - 3 : new_y + 4, new_x - 3 : new_x + 4].mean()
    assert after == pytest.approx(before, abs=4)
    left, top, width, height = turned.box_px
    body = np.argwhere(turned.transmittance.min(axis=2) < 200)
    assert (body.min(axis=0) >= np.array([top, left]) - 2).all()
    assert (body.max(axis=0) <= np.array([top + height, left + width]) + 2).all()


def test_unknown_kind_lists_the_valid_ones(stain):
    with pytest.raises(InputError, match="superficial"):
        render_cell(np.random.default_rng(0), stain, "squamous", MPP)
