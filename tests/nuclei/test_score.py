from __future__ import annotations

import numpy as np
import pytest

from cytoray.nuclei import (
    DetectionScore,
    mask_centroids,
    match_points,
    pool_scores,
    score_detections,
)


def test_matching_is_one_to_one_and_nearest_first():
    truth = np.array([[0.0, 0.0], [10.0, 0.0]])
    found = np.array([[1.0, 0.0], [0.2, 0.0], [9.0, 3.0], [30.0, 0.0]])
    assert match_points(found, truth, 4.0).tolist() == [-1, 0, 1, -1]


def test_counts_and_ratios():
    truth = np.array([[0.0, 0.0], [10.0, 0.0], [20.0, 0.0], [40.0, 0.0]])
    found = np.array([[0.0, 1.0], [0.0, -1.5], [21.0, 0.0]])
    score = score_detections(found, truth, 2.0)
    assert (score.matched, score.detected, score.truth) == (2, 3, 4)
    assert score.precision == pytest.approx(2 / 3)
    assert score.recall == pytest.approx(1 / 2)
    assert score.f1 == pytest.approx(4 / 7)


def test_empty_sides():
    none, some = np.zeros((0, 2)), np.zeros((3, 2))
    assert score_detections(none, none, 5).f1 == 1
    assert score_detections(none, some, 5).recall == 0
    assert score_detections(some, none, 5).precision == 0


def test_pooling_adds_counts():
    one = DetectionScore(matched=1, detected=2, truth=3)
    pooled = pool_scores([one, one])
    assert pooled == DetectionScore(matched=2, detected=4, truth=6)
    assert pool_scores([]).f1 == 1


def test_no_distance_beyond_the_radius():
    rng = np.random.default_rng(0)
    found, truth = rng.uniform(0, 100, (80, 2)), rng.uniform(0, 100, (60, 2))
    matches = match_points(found, truth, 8.0)
    pairs = np.flatnonzero(matches >= 0)
    assert len(pairs) > 20
    assert len(set(matches[pairs].tolist())) == len(pairs)
    assert (np.hypot(*(found[pairs] - truth[matches[pairs]]).T) <= 8).all()


def test_mask_centroids_drop_specks():
    mask = np.zeros((40, 50), np.uint8)
    mask[10:15, 20:25] = 255
    mask[30:35, 5:10] = 128
    mask[2:4, 2:4] = 255
    mask[20:30, 40:45] = 100
    assert mask_centroids(mask).tolist() == [[22.0, 12.0], [7.0, 32.0]]
