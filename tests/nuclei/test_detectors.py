from __future__ import annotations

import numpy as np
import pytest

from cytoray.errors import InputError
from cytoray.nuclei import DETECTORS, build_detector, detect_nuclei


def test_classical_by_name_is_the_function(field):
    pixels = field(100, 0.5).disc(40, 50, 4).pixels()
    detect = build_detector("classical")
    assert detect.name == "classical"
    assert np.array_equal(detect(pixels, 0.5), detect_nuclei(pixels, 0.5))


def test_options_reach_the_detector(field):
    pixels = field(100, 0.5).disc(40, 50, 4).pixels()
    assert len(build_detector("classical", min_score=0.99)(pixels, 0.5)) == 0


def test_none_finds_nothing():
    detect = build_detector("none")
    found = detect(np.zeros((64, 64, 3), np.uint8), 0.5)
    assert detect.name == "none"
    assert found.shape == (0, 4)
    assert found.dtype == np.float32


def test_unknown_name_lists_the_known():
    with pytest.raises(InputError, match="cellpose, classical, none"):
        build_detector("magic")


@pytest.mark.parametrize("name", sorted(DETECTORS))
def test_unknown_option_is_refused(name):
    with pytest.raises(InputError, match=f"'{name}' has no option 'flavour'"):
        build_detector(name, flavour=1)
