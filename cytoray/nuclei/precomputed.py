"""Nuclei a user already has: centroids of each slide from CSV, GeoJSON or Parquet files.

Two frames: `level0` is pixels of the slide's finest level, `um` is micrometres from its corner.
Positions in this package are array indices (0, 0 is the centre of the first pixel), as detectors
and `regionprops` give them. QuPath and GeoJSON count from the edge of the image, where that centre
is 0.5, 0.5; half a pixel is taken off theirs, and off every length in um.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from cytoray.errors import InputError, SlideError, raise_problems
from cytoray.nuclei.centroid_files import SUFFIXES, FoundNuclei, read_centroids

FRAMES = ("level0", "um")
# A nucleus cut by the slide's border may have its centre outside; more of them is a wrong frame.
MAX_OUTSIDE_SHARE = 0.01
# Nuclei are foreground; where fewer of them lie on it, they lie in the wrong place.
MIN_FOREGROUND_SHARE = 0.6
# Between the nuclei of intermediate (35 um2) and parabasal cells (50 um2).
DEFAULT_RADIUS_UM = 3.7


class PrecomputedNuclei:
    """Nuclei of slides from a folder of files called `<slide_id>` and one of `SUFFIXES`.

    Args:
        folder: where the files are.
        frame: of files that do not state theirs, `level0` or `um`; see `centroid_files`.
        radius_um: of nuclei whose size is not stated.

    Raises:
        InputError: there is no such folder, or another value is wrong.
    """

    name = "precomputed"

    def __init__(
        self,
        folder: str | os.PathLike[str] = "",
        frame: str = "level0",
        radius_um: float = DEFAULT_RADIUS_UM,
    ) -> None:
        self.folder = Path(folder).expanduser()
        problems = []
        if not os.fspath(folder) or not self.folder.is_dir():
            problems.append(
                f"there is no folder {os.fspath(folder)!r}; give the folder of the files "
                "<slide_id>.csv, .geojson or .parquet"
            )
        if frame not in FRAMES:
            problems.append(f"unknown frame {frame!r}; valid: {', '.join(FRAMES)}")
        if not radius_um > 0:
            problems.append(f"radius_um must be above 0, not {radius_um}")
        raise_problems("the precomputed nuclei cannot be used:", problems)
        self.frame = frame
        self.radius_um = radius_um

    def __call__(self, pixels: np.ndarray, mpp: float) -> np.ndarray:
        """Refused: these nuclei belong to slides.

        Raises:
            InputError: always.
        """
        raise InputError(
            "precomputed nuclei belong to whole slides and cannot be found in pixels; run "
            "`cytoray index` with them, later jobs take them from the index's nuclei table"
        )

    def find(self, slide_id: str) -> Path:
        """The slide's file.

        Raises:
            SlideError: `nuclei_missing`, or `nuclei_unreadable` where there are several.
        """
        tried = [self.folder / f"{slide_id}{suffix}" for suffix in SUFFIXES]
        there = [path for path in tried if path.is_file()]
        if not there:
            raise SlideError(
                "nuclei_missing",
                f"no nuclei of slide {slide_id!r}: there is none of {', '.join(map(str, tried))}; "
                "export them under one of these names, or leave the slide out of the manifest",
            )
        if len(there) > 1:
            raise SlideError(
                "nuclei_unreadable",
                f"slide {slide_id!r} has several files of nuclei ({', '.join(map(str, there))}); "
                "keep one",
            )
        return there[0]

    def nuclei_of(
        self,
        slide_id: str,
        mpp_x: float,
        mpp_y: float,
        width_px_level0: int,
        height_px_level0: int,
    ) -> np.ndarray:
        """Nuclei of a slide.

        Args:
            slide_id: names the file.
            mpp_x, mpp_y: um per level-0 pixel.
            width_px_level0, height_px_level0: size of the slide.

        Returns:
            float32 (N, 4): x_level0, y_level0 (array indices), radius_um, score. The few whose
            centre lies outside the slide are left out.

        Raises:
            SlideError: `nuclei_missing`, `nuclei_unreadable`, or `nuclei_outside` when more than
                1 % lie outside the slide.
        """
        path = self.find(slide_id)
        found = read_centroids(path)
        size = (width_px_level0, height_px_level0)
        nuclei = found.at_level0(self.frame, mpp_x, mpp_y, self.radius_um)
        inside = _inside(nuclei, size)
        if (~inside).sum() > MAX_OUTSIDE_SHARE * len(nuclei):
            raise SlideError("nuclei_outside", self._outside(path, found, size, (mpp_x, mpp_y)))
        return nuclei[inside].astype(np.float32)

    def _outside(
        self, path: Path, found: FoundNuclei, size: tuple[int, int], mpp: tuple[float, float]
    ) -> str:
        """What lies where, and how to mend it."""
        frame = found.frame or self.frame
        other = FRAMES[1 - FRAMES.index(frame)]
        nuclei = found.at_level0(frame, *mpp, self.radius_um)
        outside = ~_inside(nuclei, size)
        fits = _inside(found.at_level0(other, *mpp, self.radius_um), size).mean()
        if not found.frame and fits >= 1 - MAX_OUTSIDE_SHARE:
            mend = f"in the frame {other!r} they fit: choose that"
        else:
            mend = (
                "export them in pixels of this slide's finest level, or in micrometres (frame "
                "'um'), and see that the slide's um per pixel is right"
            )
        (low_x, low_y), (high_x, high_y) = nuclei[:, :2].min(axis=0), nuclei[:, :2].max(axis=0)
        return (
            f"{int(outside.sum()):,} of {len(nuclei):,} nuclei of {path} lie outside the slide of "
            f"{size[0]} x {size[1]} px: in the frame {frame!r}, x runs from {low_x:.0f} to "
            f"{high_x:.0f} and y from {low_y:.0f} to {high_y:.0f} px; {mend}"
        )


def check_on_foreground(
    nuclei_level0: np.ndarray, mask: np.ndarray, width_px_level0: int, height_px_level0: int
) -> None:
    """Refuse nuclei that do not lie where the slide's cells are: the frame or scale is wrong.

    Micrometres read as pixels stay inside the slide; only its foreground gives them away.

    Args:
        nuclei_level0: float (N, 4), x_level0, y_level0 first, all inside the slide.
        mask: bool (h, w), the foreground of the whole slide at any scale.
        width_px_level0, height_px_level0: size of the slide.

    Raises:
        SlideError: `nuclei_outside` when fewer than 60 % lie on foreground.
    """
    if not len(nuclei_level0):
        return
    height, width = mask.shape
    scale = np.array([width / width_px_level0, height / height_px_level0])
    column, row = np.floor((nuclei_level0[:, :2] + 0.5) * scale).astype(int).T
    share = float(mask[row.clip(0, height - 1), column.clip(0, width - 1)].mean())
    if share < MIN_FOREGROUND_SHARE:
        raise SlideError(
            "nuclei_outside",
            f"only {share:.0%} of the {len(nuclei_level0):,} nuclei lie where the slide has cells "
            f"({mask.mean():.0%} of its area); see that they belong to this slide, and that their "
            "frame ('level0' or 'um') and the slide's um per pixel are right",
        )


def _inside(nuclei: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """bool (N,): the centre lies on a pixel, whose edges are half a pixel from its index."""
    return np.all((nuclei[:, :2] >= -0.5) & (nuclei[:, :2] < np.array(size) - 0.5), axis=1)
