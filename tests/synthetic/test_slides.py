import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cytoray.errors import InputError
from cytoray.synthetic import NUCLEI_SCHEMA, SynthConfig, make_slide, plan_slides

CONFIG = SynthConfig(num_slides=6, held_out=2, size_px=1024, seed=3)


def _nuclei(slide) -> np.ndarray:
    """Columns x_level0, y_level0, radius_um."""
    names = ("x_level0", "y_level0", "radius_um")
    return np.stack([slide.nuclei[name].to_numpy() for name in names], axis=1)


@pytest.fixture(scope="module")
def slides():
    return [make_slide(CONFIG, plan.index) for plan in plan_slides(CONFIG)]


def test_a_slide_hangs_on_seed_and_index_alone(slides):
    again = make_slide(CONFIG, 4)
    np.testing.assert_array_equal(again.pixels, slides[4].pixels)
    assert again.nuclei.equals(slides[4].nuclei)
    other = make_slide(SynthConfig(num_slides=6, held_out=2, size_px=1024, seed=4), 4)
    assert (other.pixels != slides[4].pixels).any()


def test_shapes_and_schema(slides):
    for slide in slides:
        assert slide.pixels.shape == (1024, 1024, 3)
        assert slide.pixels.dtype == np.uint8
        assert slide.nuclei.schema.equals(NUCLEI_SCHEMA)
        assert slide.abnormal_boxes_level0.dtype == np.int32


def test_only_positives_have_abnormal_cells(slides):
    assert {slide.plan.label for slide in slides} == {0, 1}
    for slide in slides:
        flagged = int(np.sum(slide.nuclei["abnormal"].to_numpy()))
        assert len(slide.abnormal_boxes_level0) == flagged
        assert flagged >= CONFIG.min_abnormal if slide.plan.label else flagged == 0


def test_nuclei_lie_on_dark_pixels(slides):
    for slide in slides:
        grey = slide.pixels.mean(axis=2)
        glass = np.percentile(grey, 95)
        for x, y, radius_um in _nuclei(slide):
            reach = max(2, int(0.7 * radius_um / CONFIG.mpp))
            row, column = round(float(y)), round(float(x))
            rows = slice(max(0, row - reach), row + reach + 1)
            columns = slice(max(0, column - reach), column + reach + 1)
            assert np.median(grey[rows, columns]) < glass - 45


def test_abnormal_nuclei_are_larger(slides):
    abnormal = np.concatenate([s.nuclei["abnormal"].to_numpy() for s in slides])
    radius_um = np.concatenate([s.nuclei["radius_um"].to_numpy() for s in slides])
    assert radius_um[abnormal].min() >= 5.9
    assert radius_um[~abnormal].max() < 5.6


def test_witness_sets_the_share_of_abnormal_cells():
    config = SynthConfig(num_slides=1, positive_fraction=1.0, held_out=0, size_px=1536, witness=0.3)
    slide = make_slide(config, 0)
    kinds = slide.nuclei["kind"].to_pylist()
    squamous = [kind for kind in kinds if kind not in ("neutrophil", "lymphocyte")]
    assert 0.2 < squamous.count("abnormal") / len(squamous) < 0.45


def test_a_crammed_slide_is_refused():
    config = SynthConfig(num_slides=1, positive_fraction=1.0, held_out=0, size_px=512, witness=1.0,
                         cells_per_mm2=2000)  # fmt: skip
    with pytest.raises(InputError, match="raise size_px"):
        make_slide(config, 0)


def test_mean_colour_does_not_tell_the_label():
    config = SynthConfig(num_slides=32, held_out=0, size_px=768, seed=5, min_abnormal=2)
    made = [make_slide(config, index) for index in range(config.num_slides)]
    colours = np.array([slide.pixels.mean(axis=(0, 1)) for slide in made])
    labels = np.array([slide.plan.label for slide in made])
    model = make_pipeline(StandardScaler(), LogisticRegression())
    folds = StratifiedKFold(8, shuffle=True, random_state=0)
    scores = cross_val_predict(model, colours, labels, cv=folds, method="predict_proba")
    assert roc_auc_score(labels, np.asarray(scores)[:, 1]) < 0.75
