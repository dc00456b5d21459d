import numpy as np
import pytest

from cytoray.synthetic.cells import render_cell
from cytoray.synthetic.scene import Scene
from cytoray.synthetic.stain import sample_stain

MPP = 0.25
STAIN = sample_stain(np.random.default_rng(0), np.random.default_rng(1))


def _scene(seed: int = 0, size_px: int = 700) -> Scene:
    return Scene(np.random.default_rng(seed), STAIN, size_px, MPP)


def test_glass_is_pale_uneven_and_noisy():
    pixels = _scene().finish().astype(int)
    assert pixels.min() > 180
    assert 0.5 < np.diff(pixels, axis=0).std() < 4


def test_nuclei_do_not_overlap_and_lie_inside():
    scene, rng = _scene(), np.random.default_rng(1)
    for _ in range(40):
        scene.scatter(render_cell(rng, STAIN, "intermediate", MPP), cluster_chance=0.5)
    rows = np.array([row[:3] for row in scene.nuclei])
    assert len(rows) > 10
    assert (rows[:, :2] >= 0).all()
    assert (rows[:, :2] < 700).all()
    gap = np.hypot(*(rows[:, None, :2] - rows[None, :, :2]).T)
    gap -= rows[:, None, 2] + rows[None, :, 2]
    assert (gap[~np.eye(len(rows), dtype=bool)] > 0).all()


def test_abnormal_boxes_hold_their_cell_and_stay_inside():
    scene, rng = _scene(), np.random.default_rng(2)
    for _ in range(4):
        patch = render_cell(rng, STAIN, "abnormal", MPP)
        assert scene.scatter(patch, cluster_chance=0.3, inside=True)
    assert len(scene.boxes) == 4
    for (x, y, width, height), nucleus in zip(scene.boxes, scene.nuclei, strict=True):
        assert x >= 0
        assert y >= 0
        assert x + width <= 700
        assert y + height <= 700
        assert x < nucleus[0] < x + width
        assert y < nucleus[1] < y + height


def test_scatter_says_when_there_is_no_room():
    scene, rng = _scene(size_px=100), np.random.default_rng(3)
    patch = render_cell(rng, STAIN, "intermediate", MPP)
    assert not scene.scatter(patch, cluster_chance=0.0, inside=True)
    assert scene.nuclei == []


@pytest.mark.parametrize("count", [1, 20])
def test_clump_heaps_bodies_within_reach(count):
    scene, rng = _scene(), np.random.default_rng(4)
    patches = [render_cell(rng, STAIN, "metaplastic", MPP) for _ in range(count)]
    scene.clump(patches, 24.0)
    places = np.array([row[:2] for row in scene.nuclei])
    assert 0 < len(places) <= count
    assert np.ptp(places, axis=0).max() < 24.0 * np.sqrt(count) * 4
