"""How good detections are: one-to-one matching with truth, precision, recall and F1."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import cv2
import numpy as np


@dataclass(frozen=True, kw_only=True)
class DetectionScore:
    """Counts of a comparison; add two to pool them.

    Attributes:
        matched: detections that are a true nucleus, one to one.
        detected: all detections.
        truth: all true nuclei.
    """

    matched: int
    detected: int
    truth: int

    @property
    def precision(self) -> float:
        """Share of the detections that are right; 1 when there is none."""
        return self.matched / self.detected if self.detected else 1.0

    @property
    def recall(self) -> float:
        """Share of the true nuclei that were found; 1 when there is none."""
        return self.matched / self.truth if self.truth else 1.0

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; 1 when there is nothing and nothing is found."""
        total = self.detected + self.truth
        return 2 * self.matched / total if total else 1.0

    def __add__(self, other: DetectionScore) -> DetectionScore:
        return DetectionScore(
            matched=self.matched + other.matched,
            detected=self.detected + other.detected,
            truth=self.truth + other.truth,
        )


def match_points(detected_xy: np.ndarray, truth_xy: np.ndarray, radius: float) -> np.ndarray:
    """Match points one to one, nearest pairs first.

    Args:
        detected_xy: float (N, 2).
        truth_xy: float (M, 2), same frame.
        radius: largest distance of a match, in the same unit.

    Returns:
        int64 (N,): index of the true point, -1 where there is none.
    """
    from scipy.spatial import KDTree  # here: it would be most of what a reader's start costs

    matches = np.full(len(detected_xy), -1, np.int64)
    if len(detected_xy) == 0 or len(truth_xy) == 0:
        return matches
    near = KDTree(detected_xy).sparse_distance_matrix(
        KDTree(truth_xy), radius, output_type="ndarray"
    )
    taken = np.zeros(len(truth_xy), bool)
    for pair in np.sort(near, order=["v", "i", "j"]):
        if matches[pair["i"]] < 0 and not taken[pair["j"]]:
            matches[pair["i"]] = pair["j"]
            taken[pair["j"]] = True
    return matches


def score_detections(
    detected_xy: np.ndarray, truth_xy: np.ndarray, radius: float
) -> DetectionScore:
    """Score the detections of one image; arguments as in `match_points`."""
    matches = match_points(detected_xy, truth_xy, radius)
    return DetectionScore(
        matched=int((matches >= 0).sum()), detected=len(detected_xy), truth=len(truth_xy)
    )


def mask_centroids(mask: np.ndarray, *, threshold: int = 127, min_area_px: int = 12) -> np.ndarray:
    """Centroids of the nuclei in a mask image.

    Args:
        mask: uint8 (h, w), bright in nuclei.
        threshold: a pixel above it is nucleus.
        min_area_px: smaller components are specks (of JPEG compression, say) and left out.

    Returns:
        float64 (N, 2): x_px, y_px of each connected component.
    """
    bright = (mask > threshold).astype(np.uint8)
    _, _, stats, centroids = cv2.connectedComponentsWithStats(bright)
    return np.asarray(centroids[1:][stats[1:, cv2.CC_STAT_AREA] >= min_area_px])


def pool_scores(scores: Iterable[DetectionScore]) -> DetectionScore:
    """Sum of the counts over images."""
    return sum(scores, start=DetectionScore(matched=0, detected=0, truth=0))
