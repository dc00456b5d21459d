"""Nuclei: detectors, the nuclei table, where nuclei lie, and how well they were found."""

from cytoray.nuclei.cellpose import CellposeDetector, find_weights, masks_to_nuclei
from cytoray.nuclei.classical import ClassicalConfig, ClassicalDetector, detect_nuclei
from cytoray.nuclei.detectors import DETECTORS, Detector, NoDetector, build_detector
from cytoray.nuclei.places import assign_to_tiles, nuclei_in_rectangle, sort_nuclei
from cytoray.nuclei.precomputed import PrecomputedNuclei, check_on_foreground
from cytoray.nuclei.score import (
    DetectionScore,
    mask_centroids,
    match_points,
    pool_scores,
    score_detections,
)
from cytoray.nuclei.small import SmallConfig, SmallDetector
from cytoray.nuclei.stain import black_border, nuclear_density
from cytoray.nuclei.table import (
    NUCLEI_COLUMNS,
    NUCLEI_SCHEMA,
    nuclei_table,
    read_nuclei,
    read_part_metadata,
    write_nuclei,
)

__all__ = [
    "DETECTORS",
    "NUCLEI_COLUMNS",
    "NUCLEI_SCHEMA",
    "CellposeDetector",
    "ClassicalConfig",
    "ClassicalDetector",
    "DetectionScore",
    "Detector",
    "NoDetector",
    "PrecomputedNuclei",
    "SmallConfig",
    "SmallDetector",
    "assign_to_tiles",
    "black_border",
    "build_detector",
    "check_on_foreground",
    "detect_nuclei",
    "find_weights",
    "mask_centroids",
    "masks_to_nuclei",
    "match_points",
    "nuclear_density",
    "nuclei_in_rectangle",
    "nuclei_table",
    "pool_scores",
    "read_nuclei",
    "read_part_metadata",
    "score_detections",
    "sort_nuclei",
    "write_nuclei",
]
