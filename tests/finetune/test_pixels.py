from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from cytoray.errors import InputError, SlideError
from cytoray.finetune import cached_pixels, read_cells, read_image
from cytoray.finetune.cells import split_cells
from cytoray.finetune.data import prepare_cells, split_counts


@pytest.fixture
def picture(tmp_path):
    """40 px wide, 20 high: left half red, right half blue."""
    pixels = np.zeros((20, 40, 3), dtype=np.uint8)
    pixels[:, :20, 0] = 255
    pixels[:, 20:, 2] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_fits(picture) -> None:
    red, blue = [255, 0, 0], [0, 0, 255]
    squashed = read_image(picture, 8, "squash")
    assert squashed.shape == (8, 8, 3)
    assert (squashed[:, 0] == red).all()
    assert (squashed[:, 7] == blue).all()
    middle = read_image(picture, 20, "crop")
    np.testing.assert_array_equal(middle, np.asarray(Image.open(picture))[:, 10:30])
    padded = read_image(picture, 40, "pad")
    np.testing.assert_array_equal(padded[10:30], np.asarray(Image.open(picture)))
    assert (padded[0, 0] == red).all()
    assert (padded[-1, -1] == blue).all()


def test_grey_and_transparent_images_become_rgb(tmp_path) -> None:
    Image.fromarray(np.full((4, 4), 7, np.uint8)).save(tmp_path / "grey.png")
    Image.fromarray(np.full((4, 4, 4), 9, np.uint8), "RGBA").save(tmp_path / "alpha.png")
    assert (read_image(tmp_path / "grey.png", 4) == 7).all()
    assert read_image(tmp_path / "alpha.png", 4).shape == (4, 4, 3)


def test_what_cannot_be_read_says_why(picture, tmp_path) -> None:
    with pytest.raises(SlideError, match="missing_file"):
        read_image(tmp_path / "gone.png", 8)
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:70])
    with pytest.raises(SlideError, match="decode_error"):
        read_image(tmp_path / "cut.png", 8)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(SlideError, match="decode_error"):
        read_image(tmp_path / "text.png", 8)


def test_pixels_are_decoded_once_and_again_when_a_file_changes(picture, tmp_path) -> None:
    paths, folder = [str(picture)] * 2, tmp_path / "cache"
    first = cached_pixels(paths, 8, folder)
    assert first.open().shape == (2, 8, 8, 3)
    written = first.path.stat().st_mtime_ns
    again = cached_pixels(paths, 8, folder)
    assert (again, again.path.stat().st_mtime_ns) == (first, written)
    assert cached_pixels(paths, 8, folder, fit="crop").path != first.path
    os.utime(picture, ns=(1, 1))
    assert cached_pixels(paths, 8, folder).path != first.path
    with pytest.raises(InputError, match="unknown fit 'zoom'; valid: crop, pad, squash"):
        cached_pixels(paths, 8, folder, fit="zoom")


def test_bad_images_are_left_out_and_the_rest_keep_their_pixels(labelled_cells, tmp_path) -> None:
    cells = read_cells(labelled_cells)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"nothing")
    paths = list(cells.paths)
    paths[3], paths[50] = str(broken), str(tmp_path / "gone.png")
    whole, _ = prepare_cells(cells, [16], tmp_path / "whole")
    data, bad = prepare_cells(replace(cells, paths=tuple(paths)), [16, 24, 16], tmp_path / "cache")
    assert [(row, code) for row, code, _ in bad] == [(3, "decode_error"), (50, "missing_file")]
    assert len(data.cells) == len(data.images(24)) == 88
    assert data.cells.names == tuple(n for i, n in enumerate(cells.names) if i not in (3, 50))
    index = np.array([2, 3, 87])
    expected = whole.images(16)[np.array([2, 4, 89])]
    np.testing.assert_array_equal(data.images(16)[index], expected)
    counts = split_counts(data.cells, split_cells(data.cells))
    assert [row["train"] + row["val"] + row["test"] for row in counts] == [29, 29, 30]


def test_a_class_or_everything_unreadable_is_an_error(labelled_cells) -> None:
    cells = read_cells(labelled_cells)
    with pytest.raises(InputError, match="class 'pale'"):
        cells.without(range(30, 60))
    with pytest.raises(InputError, match="not one of the 90 images"):
        cells.without(range(90))
