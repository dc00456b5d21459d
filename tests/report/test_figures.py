import io
import math

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from cytoray.report import loss_curves, message_figure, roc_figure, series_from_events
from cytoray.report.figures import roc_curve_points
from cytoray.report.style import smooth


def pixels(png):
    assert png.startswith(b"\x89PNG")
    image = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    assert image.std() > 1, "the figure is blank"
    return image


def has_color(image, hex_color):
    rgb = [int(hex_color[i : i + 2], 16) for i in (1, 3, 5)]
    return (np.abs(image.astype(int) - rgb).max(axis=2) < 12).sum() > 50


def step_events(num_steps):
    return [
        {"event": "step", "step": s, "loss": 5 - s / 50, "metrics": {"dino_loss": 1.0}, "lr": 0.1}
        for s in range(num_steps)
    ]


def test_series_take_nested_numbers_and_the_later_of_repeats():
    events = [
        {"event": "started", "time": "now"},
        {"event": "step", "step": 2, "loss": 2.0, "metrics": {"koleo": 0.5}, "final": True},
        {"event": "step", "step": 1, "loss": 3.0},
        {"event": "step", "step": 2, "loss": 1.0},
        {"event": "probe", "step": 9, "loss": 9.0},
        {"event": "step", "step": 3, "loss": None},
    ]
    series = series_from_events(events, event="step")
    assert series.keys() == {"loss", "koleo"}
    assert series["loss"][0].tolist() == [1, 2]
    assert series["loss"][1].tolist() == [3.0, 1.0]
    assert series_from_events(events)["loss"][0].tolist() == [1, 2, 9]


def test_loss_curves_draw_each_series():
    image = pixels(loss_curves(step_events(100)))
    assert has_color(image, "#0072B2")
    assert has_color(image, "#D55E00")
    one = pixels(loss_curves(step_events(100), names=["loss"]))
    assert one.shape[1] < image.shape[1]
    assert not has_color(one, "#D55E00")


@pytest.mark.parametrize("events", [[], [{"step": 1, "loss": float("nan")}], step_events(1)])
def test_loss_curves_of_almost_nothing(events):
    pixels(loss_curves(events))


def test_figures_are_reproducible():
    assert loss_curves(step_events(60)) == loss_curves(step_events(60))


def test_smooth_is_centred_and_skips_nan():
    ramp = np.arange(50.0)
    assert smooth(ramp, 5)[2:-2] == pytest.approx(ramp[2:-2])
    gap = np.where(np.arange(50) == 20, np.nan, 3.0)
    assert smooth(gap, 5) == pytest.approx(np.full(50, 3.0))
    assert np.isnan(smooth([math.nan], 1)).all()


@pytest.mark.parametrize("seed", range(5))
def test_roc_points_give_the_auc_with_ties(seed):
    rng = np.random.default_rng(seed)
    labels = np.append(rng.integers(0, 2, 40), [0, 1])
    scores = np.round(labels * 0.5 + rng.normal(size=42), 1)
    fpr, tpr = roc_curve_points(labels, scores)
    assert np.trapezoid(tpr, fpr) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)


def test_roc_figure_has_curve_and_band():
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2
    scores = labels + rng.normal(size=40)
    image = pixels(roc_figure(labels, scores, (0.7, 0.9), groups=np.arange(40) // 4))
    assert has_color(image, "#0072B2")
    pale = (image[..., 2].astype(int) - image[..., 0] > 15) & (image[..., 0] > 200)
    assert pale.mean() > 0.02, "the confidence band is missing"


def test_roc_figure_of_one_class_says_so_and_bad_input_raises():
    pixels(roc_figure([1, 1], [0.1, 0.2]))
    with pytest.raises(ValueError, match="equally long"):
        roc_figure([0, 1], [0.1])
    with pytest.raises(ValueError, match="0 or 1"):
        roc_figure([0, 2], [0.1, 0.2])


def test_message_figure():
    pixels(message_figure("nothing to see"))
