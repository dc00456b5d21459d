import cv2
import numpy as np
import pytest

from cytoray.slides.artefacts import black_border, pen_strokes, surroundings
from cytoray.slides.foreground import optical_density

FIELD = (232, 234, 238)


def picture(size: int = 120) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, 1, (size, size, 3))
    return np.clip(np.array(FIELD) + noise, 0, 255).astype(np.uint8)


def density(rgb: np.ndarray) -> np.ndarray:
    return optical_density(rgb, np.array(FIELD, float))


def test_borders_are_black_and_at_the_edge_or_large():
    rgb = picture(300)
    rgb[:, 280:] = 3
    cv2.circle(rgb, (100, 100), 40, (10, 10, 10), -1)
    cv2.circle(rgb, (200, 200), 5, (10, 10, 10), -1)  # a nucleus in ink black, 40 um
    found = black_border(rgb, 4.0)
    assert found[:, 280:].all()
    assert found[100, 100]
    assert not found[190:211, 190:211].any()


@pytest.mark.parametrize(
    ("ink", "found"),
    [
        ((20, 60, 170), True),
        ((30, 140, 60), True),
        ((30, 30, 35), True),
        ((205, 30, 45), True),
        ((150, 120, 180), False),
        ((225, 150, 120), False),
    ],
)
def test_ink_by_its_colour(ink, found):
    rgb = picture()
    rgb[40:70, 20:100] = ink
    assert pen_strokes(rgb, density(rgb), 16.0)[45:65, 25:95].all() == found
    assert not pen_strokes(rgb, density(rgb), 16.0)[:30].any()


def test_red_cells_are_no_red_ink():
    rgb = picture()
    rng = np.random.default_rng(0)
    rgb[40:70, 20:100] = np.clip(rng.normal((210, 60, 60), 12, (30, 80, 3)), 0, 255)
    assert not pen_strokes(rgb, density(rgb), 16.0).any()


def test_surroundings_are_even_wide_and_at_the_edge():
    rgb = picture()
    rgb[:45] = (165, 168, 170)
    rgb[60:100, 40:80] = (165, 168, 170)  # inside the slide: a thick even drop stays
    found = surroundings(density(rgb), 16.0)
    assert found[:45].all()
    assert not found[60:].any()
    rgb[:45:4, ::4] = (90, 70, 140)  # with nuclei in it: a sheet of cells
    assert not surroundings(density(rgb), 16.0).any()
