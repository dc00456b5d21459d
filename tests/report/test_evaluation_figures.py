from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from cytoray.report.evaluation_figures import (
    attention_figure,
    confusion_figure,
    embedding_figure,
    few_shot_figure,
    interval_figure,
    picture_grid,
)
from cytoray.report.evaluation_page import interval_text
from cytoray.report.finetune_page import seed_text, worst_mistakes


def ink(png: bytes) -> float:
    """Share of pixels that are not white."""
    return float((np.asarray(Image.open(io.BytesIO(png)).convert("L")) < 250).mean())


def test_curves_and_intervals() -> None:
    one = {"a": [(5, 0.4, 0.3, 0.5), (20, 0.6, 0.5, 0.7)]}
    two = one | {"b": [(5, 0.5, np.nan, np.nan)]}
    assert ink(few_shot_figure(two, chance=0.2)) > 0.02
    assert few_shot_figure(two) != few_shot_figure(one)
    assert ink(few_shot_figure({})) > 0
    short = interval_figure([("x", 0.5, 0.4, 0.6)], "accuracy")
    assert ink(short) > 0.01
    assert interval_figure([], "accuracy").startswith(b"\x89PNG")


def test_confusion_shades_by_the_share_of_the_true_class() -> None:
    sure = confusion_figure(np.array([[50, 0], [0, 1]]), ["a", "b"])
    torn = confusion_figure(np.array([[25, 25], [1, 1]]), ["a", "b"])

    def darkest(png: bytes) -> float:
        grey = np.asarray(Image.open(io.BytesIO(png)).convert("L"), dtype=float)
        return float((grey < 90).mean())

    assert darkest(sure) > darkest(torn) + 0.05


def test_pictures_maps_and_attention() -> None:
    images = [np.full((16, 16, 3), value, np.uint8) for value in (10, 100, 200)]
    assert ink(picture_grid(images, ["a", "b", "c"], columns=2)) > 0.3
    assert ink(picture_grid([], [])) > 0
    points = np.random.default_rng(0).normal(size=(30, 2))
    assert ink(embedding_figure({"e": points}, np.arange(30) % 3, ["a", "b", "c"])) > 0.005
    assert embedding_figure({}, np.arange(0), []).startswith(b"\x89PNG")
    maps = np.random.default_rng(0).random((3, 4, 4))
    with_one = attention_figure(images, {"e": maps}, ["a", "b", "c"])
    assert ink(with_one) > 0.3
    assert ink(attention_figure([], {}, [])) > 0


def test_mistakes_are_the_surest_wrong_answers() -> None:
    answers = {
        "labels": np.array([0, 1, 0, 1]),
        "probabilities": np.array([[0.4, 0.6], [0.9, 0.1], [1.0, 0.0], [0.3, 0.7]]),
    }
    found = worst_mistakes(answers, ["no", "yes"])
    assert found == [
        (1, "yes\ncalled no\nprobability 0.90"),
        (0, "no\ncalled yes\nprobability 0.60"),
    ]
    assert worst_mistakes(answers, ["no", "yes"], count=1) == found[:1]


def test_seed_text() -> None:
    row = {"accuracy": 0.8, "accuracy_seed_high": 0.85}
    assert seed_text(row) == "0.800 \N{PLUS-MINUS SIGN} 0.050"
    assert seed_text(row | {"accuracy_seed_high": None}) == "0.800"


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((0.8, 0.7, 0.9), "0.800 (0.700 to 0.900)"),
        ((0.8, None, None), "0.800"),
        ((None, None, None), "undefined"),
    ],
)
def test_interval_text(values, text: str) -> None:
    assert interval_text(*values) == text
