import cv2
import numpy as np
import pytest

from cytoray.slides.thin_lines import thin_lines

MPP = 4.0


def lines_of(mask: np.ndarray, density: np.ndarray | None = None) -> np.ndarray:
    density = mask.astype(np.float32) * np.float32(0.3) if density is None else density
    return thin_lines(mask > 0, density, MPP)


@pytest.mark.parametrize(("radius", "width"), [(40, 3), (120, 5), (300, 9), (340, 40)])
def test_a_circle_is_found_whole(radius, width):
    mask = np.zeros((800, 800), np.uint8)
    cv2.circle(mask, (395, 402), radius, 1, width)
    found = lines_of(mask)
    assert found[mask > 0].mean() > 0.98
    assert found.sum() < 3.2 * mask.sum()


@pytest.mark.parametrize(
    "ends", [((50, 0), (120, 799)), ((0, 300), (799, 300)), ((0, 0), (799, 799))]
)
def test_a_straight_line_is_found(ends):
    mask = np.zeros((800, 800), np.uint8)
    cv2.line(mask, ends[0], ends[1], 1, 5)
    assert lines_of(mask)[mask > 0].mean() > 0.97
    assert lines_of(mask).sum() < 3.2 * mask.sum()


def test_short_lines_discs_and_sheets_are_none():
    mask = np.zeros((800, 800), np.uint8)
    cv2.line(mask, (50, 50), (50, 150), 1, 5)  # under half a millimetre
    cv2.circle(mask, (300, 300), 100, 1, -1)
    cv2.circle(mask, (600, 200), 14, 1, 3)  # a ring as small as a cell
    cv2.rectangle(mask, (100, 600), (700, 760), 1, -1)
    assert not lines_of(mask).any()


def test_an_uneven_band_is_none():
    mask = np.zeros((400, 800), np.uint8)
    cv2.line(mask, (0, 200), (799, 220), 1, 8)
    density = mask.astype(np.float32) * 0.2
    density[:, ::12] *= 4
    density[:, 1::12] *= 4
    assert lines_of(mask).any()
    assert not lines_of(mask, density).any()


def test_a_line_inside_a_crowd_is_none():
    mask = np.zeros((800, 800), np.uint8)
    cv2.line(mask, (0, 400), (799, 410), 1, 5)
    rng = np.random.default_rng(0)
    for x, y in rng.uniform((0, 360), (800, 450), (900, 2)).astype(int).tolist():
        cv2.circle(mask, (x, y), 4, 1, -1)
    assert lines_of(mask).mean() < 0.01


def test_small_pictures():
    for shape in [(3, 3), (40, 9), (1, 100)]:
        assert not lines_of(np.ones(shape, np.uint8)).any()
