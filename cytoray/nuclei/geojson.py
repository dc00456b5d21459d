"""Nuclei in GeoJSON, as QuPath and CellViT export them: polygons and points become centroids.

A polygon gives its area-weighted centroid and its area, holes taken out. Which features count, and
how often:

- Where a file has QuPath cells or detections, these alone are nuclei; annotations beside them
  outline regions. A cell's `nucleusGeometry` is preferred; without it the cell's outline gives the
  place but not the size.
- A cell or a detection is one nucleus whatever its parts. In other features each polygon of a
  MultiPolygon is a nucleus (CellViT writes all nuclei of a class as one), as is each point of a
  MultiPoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# QuPath before 0.4 named the kind of an object in `id`.
_OLD_KINDS = {
    "PathCellObject": "cell",
    "PathDetectionObject": "detection",
    "PathTileObject": "tile",
    "PathAnnotationObject": "annotation",
}
_OBJECTS = ("cell", "detection")
_NOT_NUCLEI = ("tile", "tma_core", "root")
_BLOCK = 10_000  # rings computed at once, to bound memory
_SCORES = ("score", "probability", "detection probability")


class NucleiFileError(ValueError):
    """A file of nuclei cannot be used; the message says why without quoting from the file."""


@dataclass
class Outlines:
    """Nuclei gathered from features; entry i of every list is nucleus i.

    Attributes:
        x, y: of points; NaN for polygons.
        score: NaN where not stated.
        sized: whether the area is the nucleus's.
        feature: 1-based number of the feature in the file.
        rings: float64 (V, 2) vertices of each ring; with its nucleus in `owners` and, in `signs`,
            -1 for a hole.
    """

    x: list[float] = field(default_factory=list)
    y: list[float] = field(default_factory=list)
    score: list[float] = field(default_factory=list)
    sized: list[bool] = field(default_factory=list)
    feature: list[int] = field(default_factory=list)
    rings: list[np.ndarray] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    signs: list[float] = field(default_factory=list)

    def add(
        self,
        feature: int,
        score: float,
        *,
        point: Any = (np.nan, np.nan),
        polygons: Iterable[Any] = (),
        sized: bool = True,
    ) -> None:
        """Add one nucleus: a point, or polygons, each an outer ring followed by its holes."""
        for polygon in polygons:
            for number, ring in enumerate(polygon):
                self.rings.append(_ring(ring))
                self.owners.append(len(self.x))
                self.signs.append(-1.0 if number else 1.0)
        self.x.append(float(point[0]))
        self.y.append(float(point[1]))
        self.score.append(score)
        self.sized.append(sized)
        self.feature.append(feature)


def compact(value: dict[str, Any]) -> dict[str, Any]:
    """`object_hook` for `json.load`: outlines become arrays at once, at an eighth of the memory."""
    if value.get("type") == "Polygon" and isinstance(value.get("coordinates"), list):
        # What is no outline is refused later, where its feature is known
        with suppress(ValueError, TypeError, IndexError):
            value["coordinates"] = [_ring(ring) for ring in value["coordinates"]]
    return value


def _ring(points: Any) -> np.ndarray:
    """float64 (V, 2), V at least 1."""
    return np.asarray(points, np.float64).reshape(len(points), -1)[:, [0, 1]]


def nuclei_of_geojson(content: Any) -> dict[str, np.ndarray]:
    """Nuclei of a parsed GeoJSON file.

    Args:
        content: a FeatureCollection, a Feature, or a list of features.

    Returns:
        `x`, `y` float64 (N,) in the file's own unit, 0 being the edge of the image; `area` float64
        (N,) in its square, NaN where unknown; `score` float64 (N,), NaN where unknown; `entry`
        int64 (N,), the 1-based number of the feature.

    Raises:
        NucleiFileError: it is something else, or a feature cannot be read.
    """
    features = _features(content)
    kinds = [_kind(feature) for feature in features]
    objects_only = any(kind in _OBJECTS for kind in kinds)
    outlines = Outlines()
    for number, (feature, kind) in enumerate(zip(features, kinds, strict=True), 1):
        if kind in _OBJECTS if objects_only else kind not in _NOT_NUCLEI:
            try:
                _add(outlines, feature, kind, number)
            except NucleiFileError:
                raise
            except (TypeError, KeyError, IndexError, AttributeError, ValueError) as error:
                raise NucleiFileError(
                    f"feature {number} has no usable geometry or score"
                ) from error
    x, y, area = _centroids(outlines)
    return {
        "x": x,
        "y": y,
        "area": np.where(outlines.sized, area, np.nan),
        "score": np.array(outlines.score, np.float64),
        "entry": np.array(outlines.feature, np.int64),
    }


def _features(content: Any) -> list[Mapping[str, Any]]:
    kind = content.get("type") if isinstance(content, Mapping) else None
    if kind == "FeatureCollection":
        content = content.get("features")
    elif kind == "Feature":
        content = [content]
    if not isinstance(content, list) or not all(isinstance(f, Mapping) for f in content):
        raise NucleiFileError("it is neither a GeoJSON FeatureCollection nor a list of features")
    return content


def _properties(feature: Mapping[str, Any]) -> Mapping[str, Any]:
    found = feature.get("properties")
    return found if isinstance(found, Mapping) else {}


def _kind(feature: Mapping[str, Any]) -> str:
    properties = _properties(feature)
    stated = properties.get("objectType") or properties.get("object_type")
    return str(stated).lower() if stated else _OLD_KINDS.get(str(feature.get("id")), "")


def _score(feature: Mapping[str, Any]) -> float:
    """The score among a feature's properties or QuPath measurements; NaN without."""
    properties = _properties(feature)
    measured = properties.get("measurements") or {}
    if isinstance(measured, list):  # before 0.4
        measured = {entry.get("name"): entry.get("value") for entry in measured}
    named = {str(name).lower(): value for name, value in {**measured, **properties}.items()}
    found = next((named[name] for name in _SCORES if named.get(name) is not None), np.nan)
    return float(found)


def _add(outlines: Outlines, feature: Mapping[str, Any], kind: str, number: int) -> None:
    nucleus = feature.get("nucleusGeometry") or _properties(feature).get("nucleusGeometry")
    geometry = nucleus or feature["geometry"]
    shape, coordinates = geometry["type"], geometry["coordinates"]
    score = _score(feature)
    sized = kind != "cell" or bool(nucleus)
    if shape == "Point":
        outlines.add(number, score, point=coordinates)
    elif shape == "MultiPoint":
        for point in coordinates:
            outlines.add(number, score, point=point)
    elif shape == "Polygon" or (shape == "MultiPolygon" and kind in _OBJECTS):
        polygons = [coordinates] if shape == "Polygon" else coordinates
        outlines.add(number, score, polygons=polygons, sized=sized)
    elif shape == "MultiPolygon":
        for polygon in coordinates:
            outlines.add(number, score, polygons=[polygon], sized=sized)
    else:
        raise NucleiFileError(
            f"feature {number} is a {shape}; points and polygons (one or several) are read"
        )


def _centroids(outlines: Outlines) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, y, area, each float64 (N,); the area is NaN for points and for outlines without any."""
    x, y = np.array(outlines.x, np.float64), np.array(outlines.y, np.float64)
    if not outlines.rings:
        return x, y, np.full(len(x), np.nan)
    lengths = np.array([len(ring) for ring in outlines.rings])
    blocks = [
        ring_centroids(np.concatenate(outlines.rings[i : i + _BLOCK]), lengths[i : i + _BLOCK])
        for i in range(0, len(lengths), _BLOCK)
    ]
    ring_xy, ring_area = (np.concatenate(column) for column in zip(*blocks, strict=True))
    owners, count = np.array(outlines.owners), len(x)
    signed = np.array(outlines.signs) * ring_area
    area = np.bincount(owners, signed, count)
    # A line has no area: the mean of its vertices has to do
    flat = area <= 0
    weight = np.where(flat[owners], lengths, signed)
    total = np.bincount(owners, weight, count)
    polygon = total != 0
    for values, column in ((x, 0), (y, 1)):
        sums = np.bincount(owners, weight * ring_xy[:, column], count)
        values[polygon] = sums[polygon] / total[polygon]
    return x, y, np.where(flat, np.nan, area)


def ring_centroids(vertices: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centroid and area of many rings at once (the shoelace formula).

    Args:
        vertices: float64 (V, 2), ring after ring; whether the first is repeated does not matter.
        lengths: int (R,), vertices of each ring, at least 1.

    Returns:
        float64 (R, 2) and float64 (R,). A ring without area has the mean of its vertices; the
        centroid never leaves the ring's bounding box, even where the ring crosses itself.
    """
    starts = np.cumsum(lengths) - lengths
    origin = vertices[starts]
    local = vertices - np.repeat(origin, lengths, axis=0)  # keeps the products small and exact
    following = np.arange(1, len(vertices) + 1)
    following[starts + lengths - 1] = starts
    ahead = local[following]
    cross = local[:, 0] * ahead[:, 1] - ahead[:, 0] * local[:, 1]
    twice_area = np.add.reduceat(cross, starts)
    moments = np.add.reduceat((local + ahead) * cross[:, None], starts, axis=0)
    means = np.add.reduceat(local, starts, axis=0) / lengths[:, None]
    low = np.minimum.reduceat(local, starts, axis=0)
    high = np.maximum.reduceat(local, starts, axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        centroids = moments / (3 * twice_area[:, None])
    centroids = np.where(np.isfinite(centroids), np.clip(centroids, low, high), means)
    return centroids + origin, np.abs(twice_area) / 2
