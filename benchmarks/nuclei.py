"""How well and how fast a nuclei detector finds the nuclei of labelled images.

    python -m benchmarks.nuclei --images DIR --masks DIR

`--masks` holds one image per image, of the same stem, white (above 127) in nuclei. Detections are
matched one to one with the centroids of the white components. Speed is measured on one core, on a
2048 px chunk at 0.5 um/px put together from the images. `--detector all` compares those that need
nothing else, side by side. `--looks` scores the images in other looks too (grey, less stain,
Giemsa, H&E, dark, blurred, noisy, coarser, finer; see `nuclei_looks`). The last line is JSON: of
the detector, or of the one with the best F1 and under `compared` of each.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch

from benchmarks.nuclei_looks import LOOKS
from cytoray.errors import InputError
from cytoray.nuclei import (
    DETECTORS,
    DetectionScore,
    Detector,
    build_detector,
    mask_centroids,
    pool_scores,
    score_detections,
)

SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp"}
CHUNK_PX, CHUNK_MPP, TILE_PX = 2048, 0.5, 256
COMPARED = ("classical", "small")


def read_image(path: Path) -> np.ndarray:
    """Read an image file as uint8 (h, w, 3), RGB."""
    pixels = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if pixels is None:
        raise InputError(f"{path} cannot be read as an image")
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), np.uint8)


def find_pairs(images: Path, masks: Path) -> list[tuple[Path, Path]]:
    """Image and mask files of the same stem.

    Raises:
        InputError: a folder is missing, there is no image, or images have no mask.
    """
    for folder in (images, masks):
        if not folder.is_dir():
            raise InputError(f"{folder} is no folder")
    by_stem = {path.stem: path for path in masks.iterdir() if path.suffix.lower() in SUFFIXES}
    found = sorted(path for path in images.iterdir() if path.suffix.lower() in SUFFIXES)
    missing = [f"{path.name} has no mask in {masks}" for path in found if path.stem not in by_stem]
    if missing or not found:
        raise InputError(f"cannot score the images of {images}", missing or ["there is no image"])
    return [(path, by_stem[path.stem]) for path in found]


def score_folder(
    detect: Detector,
    pairs: Sequence[tuple[Path, Path]],
    mpp: float,
    radius_px: float,
    look: str = "as it is",
) -> list[DetectionScore]:
    """Score of every image in one of `LOOKS`."""
    scores = []
    change, scale = LOOKS[look]
    for image, mask_path in pairs:
        found = detect(change(read_image(image)), mpp / scale)
        truth = mask_centroids(read_image(mask_path)[..., 0])
        found_xy = (found[:, :2] + 0.5) / scale - 0.5
        scores.append(score_detections(found_xy, truth, radius_px))
    return scores


def speed_chunk(images: Sequence[np.ndarray]) -> np.ndarray:
    """A 2048 px chunk, taken as 0.5 um/px, tiled from up to 16 of `images`."""
    cells = [cv2.resize(image, (512, 512), interpolation=cv2.INTER_AREA) for image in images[:16]]
    side = CHUNK_PX // 512
    rows = [
        np.hstack([cells[(side * r + c) % len(cells)] for c in range(side)]) for r in range(side)
    ]
    return np.vstack(rows)


def tiles_per_second(
    detectors: Sequence[Detector], chunk: np.ndarray, repeats: int = 3
) -> list[float]:
    """256 px tiles a second of each detector on `chunk`, by CPU time, in turn; best of some."""
    seconds: list[list[float]] = [[] for _ in detectors]
    for _ in range(repeats):
        for detect, spent in zip(detectors, seconds, strict=True):
            start = time.process_time()
            detect(chunk, CHUNK_MPP)
            spent.append(time.process_time() - start)
    return [(CHUNK_PX / TILE_PX) ** 2 / min(spent) for spent in seconds]


def report(named: Sequence[tuple[str, DetectionScore]]) -> None:
    """Print a table, a line per name."""
    print(f"{'image':20s} {'nuclei':>7s} {'found':>7s} {'P':>6s} {'R':>6s} {'F1':>6s}")
    for name, score in named:
        print(
            f"{name:20s} {score.truth:7d} {score.detected:7d} "
            f"{score.precision:6.3f} {score.recall:6.3f} {score.f1:6.3f}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.nuclei", description=__doc__)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--masks", type=Path, required=True)
    parser.add_argument("--mpp", type=float, default=0.6, help="um per pixel of the images")
    parser.add_argument("--radius-px", type=float, default=10.0, help="largest distance of a match")
    names = f"{', '.join(DETECTORS)}; all: {' and '.join(COMPARED)}"
    parser.add_argument("--detector", default="classical", help=names)
    parser.add_argument("--per-image", action="store_true", help="one line per image")
    parser.add_argument("--looks", action="store_true", help="score other looks of them too")
    options = parser.parse_args(arguments)
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    try:
        wanted = COMPARED if options.detector == "all" else (options.detector,)
        detectors = [build_detector(name) for name in wanted]
        pairs = find_pairs(options.images, options.masks)
        looks = LOOKS if options.looks else ("as it is",)
        scores = [
            {look: score_folder(d, pairs, options.mpp, options.radius_px, look) for look in looks}
            for d in detectors
        ]
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    chunk = speed_chunk([read_image(image) for image, _ in pairs[:16]])
    speeds = tiles_per_second(detectors, chunk)
    results = []
    for name, by_look, speed in zip(wanted, scores, speeds, strict=True):
        per_image = by_look["as it is"]
        pooled = pool_scores(per_image)
        images = [image.name for image, _ in pairs] if options.per_image else []
        others = {look: pool_scores(found) for look, found in by_look.items() if options.looks}
        total = (f"{name}, {len(pairs)}", pooled)
        report([*zip(images, per_image, strict=False), *others.items(), total])
        results.append(
            {
                "detector": name,
                "f1": round(pooled.f1, 4),
                "precision": round(pooled.precision, 4),
                "recall": round(pooled.recall, 4),
                "images": len(pairs),
                "nuclei": pooled.truth,
                "mpp": options.mpp,
                "radius_px": options.radius_px,
                "tiles_per_s_core": round(speed, 1),
                **(
                    {"f1_by_look": {k: round(v.f1, 4) for k, v in others.items()}} if others else {}
                ),
            }
        )
    best = max(results, key=lambda result: result["f1"])
    print(json.dumps(best if len(results) == 1 else {**best, "compared": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
