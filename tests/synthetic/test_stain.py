import numpy as np

from cytoray.synthetic.stain import CYTOPLASM_DYES, DYES, sample_stain


def _stain(slide: int, site: int = 0):
    return sample_stain(np.random.default_rng([7, slide]), np.random.default_rng([8, site]))


def test_stain_has_every_dye_and_shares_that_sum_to_one():
    stain = _stain(0)
    assert set(stain.absorbance) == set(DYES)
    assert stain.cytoplasm_shares.shape == (len(CYTOPLASM_DYES),)
    assert np.isclose(stain.cytoplasm_shares.sum(), 1)


def test_slides_differ_more_than_sites():
    slides = np.log([list(_stain(i).absorbance.values()) for i in range(200)])
    sites = np.log([list(_stain(0, i).absorbance.values()) for i in range(200)])
    assert slides.std(axis=0).mean() > 1.5 * sites.std(axis=0).mean() > 0


def test_background_is_pale():
    for i in range(20):
        assert (_stain(i).background_rgb >= 195).all()
