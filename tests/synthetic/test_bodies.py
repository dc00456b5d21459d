import numpy as np
import pytest

from cytoray.synthetic.bodies import (
    DEBRIS_FORMS,
    render_debris,
    render_lymphocyte,
    render_neutrophil,
)
from cytoray.synthetic.stain import sample_stain

MPP = 0.25
STAIN = sample_stain(np.random.default_rng(0), np.random.default_rng(1))


@pytest.mark.parametrize("render", [render_neutrophil, render_lymphocyte])
def test_white_cells_have_one_small_dark_nucleus(render):
    rng = np.random.default_rng(2)
    for _ in range(20):
        patch = render(rng, STAIN, MPP)
        x, y, radius_px = patch.nuclei_px[0]
        assert patch.nuclei_px.shape == (1, 3)
        assert 2.2 < radius_px * MPP < 4.2
        column, row, reach = round(float(x)), round(float(y)), round(float(radius_px))
        around = patch.transmittance[
            row - reach : row + reach + 1, column - reach : column + reach + 1
        ]
        assert np.percentile(around.mean(axis=2), 25) < 150


def test_debris_has_no_nucleus_and_comes_in_every_form():
    rng = np.random.default_rng(3)
    patches = [render_debris(rng, STAIN, MPP) for _ in range(40)]
    assert all(len(patch.nuclei_px) == 0 and patch.kind == "debris" for patch in patches)
    assert len({patch.transmittance.shape for patch in patches}) > 20
    assert any(patch.transmittance.mean(axis=2).min() < 110 for patch in patches)


@pytest.mark.parametrize("form", list(DEBRIS_FORMS))
def test_every_debris_form_absorbs_light(form):
    absorbance, reach_px = DEBRIS_FORMS[form](np.random.default_rng(4), STAIN, MPP)
    assert absorbance.dtype == np.float32
    assert absorbance.max() > 0.03
    assert reach_px > 0
