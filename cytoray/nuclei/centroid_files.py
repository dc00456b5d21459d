"""Reading centroids of nuclei from a table (CSV, Parquet) or a GeoJSON file.

Tables have a header; CSV may be separated by commas, semicolons or tabs. The first of these pairs
of columns that is there is taken, whatever the case:

| columns                               | frame           | position 0 is                      |
|---------------------------------------|-----------------|------------------------------------|
| x_level0, y_level0                    | level0          | the centre of the first pixel      |
| Centroid X µm, Centroid Y µm (QuPath) | um              | the edge of the image              |
| Centroid X px, Centroid Y px (QuPath) | level0          | the edge of the image              |
| x_um, y_um                            | um              | the edge of the image              |
| centroid_x, centroid_y                | as the user says | the first pixel's centre (um: edge) |
| x, y                                  | as the user says | the first pixel's centre (um: edge) |

The size is `radius_um`, or the radius of the disc of `area_um2` (QuPath: `Nucleus: Area µm^2`,
`Area µm^2`); the score is `score` or `probability` (QuPath: `Detection probability`). Positions in
GeoJSON count from the edge of the image; see `cytoray.nuclei.geojson`.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet as pq

from cytoray.errors import SlideError
from cytoray.nuclei.geojson import NucleiFileError, compact, nuclei_of_geojson
from cytoray.text_table import name_lines

# Arrow makes its compute functions at import, where a type checker cannot see them.
pc: Any = pyarrow.compute

SUFFIXES = (".parquet", ".csv", ".csv.gz", ".geojson", ".geojson.gz", ".json", ".json.gz")

# x, y, frame (empty: as the user says), whether 0 is the edge of the image
_POSITIONS = (
    ("x_level0", "y_level0", "level0", False),
    ("centroid x um", "centroid y um", "um", True),
    ("centroid x px", "centroid y px", "level0", True),
    ("x_um", "y_um", "um", True),
    ("centroid_x", "centroid_y", "", False),
    ("x", "y", "", False),
)
_OPTIONAL = {
    "radius_um": ("radius_um",),
    "area_um2": ("area_um2", "nucleus: area um^2", "area um^2"),
    "score": ("score", "probability", "detection probability"),
}


@dataclass(frozen=True, kw_only=True)
class FoundNuclei:
    """Nuclei as a file has them; all arrays are float64 (N,) but `entry`.

    Attributes:
        x, y: positions.
        frame: `level0`, `um`, or empty where the file does not say.
        from_edge: 0 is the edge of the image, not the centre of its first pixel.
        radius_um: NaN where unknown.
        area: in the square of the unit of x and y; NaN where unknown.
        score: NaN where unknown.
        entry: int64 (N,), number of the line, row or feature, for messages.
    """

    x: np.ndarray
    y: np.ndarray
    frame: str
    from_edge: bool
    radius_um: np.ndarray
    area: np.ndarray
    score: np.ndarray
    entry: np.ndarray

    def at_level0(self, frame: str, mpp_x: float, mpp_y: float, radius_um: float) -> np.ndarray:
        """float64 (N, 4): x_level0, y_level0, radius_um, score.

        Args:
            frame: of files that do not say.
            mpp_x, mpp_y: um per level-0 pixel.
            radius_um: of nuclei without a size.
        """
        in_um = (self.frame or frame) == "um"
        unit_x, unit_y = (mpp_x, mpp_y) if in_um else (1.0, 1.0)
        half = 0.5 if self.from_edge or in_um else 0.0
        area_um2 = self.area * (mpp_x / unit_x) * (mpp_y / unit_y)
        radius = np.where(np.isnan(self.radius_um), np.sqrt(area_um2 / np.pi), self.radius_um)
        radius = np.where(np.isnan(radius), radius_um, radius)
        score = np.where(np.isnan(self.score), 1.0, self.score)
        return np.column_stack([self.x / unit_x - half, self.y / unit_y - half, radius, score])


def read_centroids(path: str | os.PathLike[str]) -> FoundNuclei:
    """Read one file of nuclei, whatever its kind.

    Raises:
        SlideError: `nuclei_unreadable`, with the lines, rows or features at fault.
    """
    path = Path(path)
    try:
        if path.name.endswith(".parquet"):
            found, entry = _read_parquet(path), "row"
        elif path.name.endswith((".csv", ".csv.gz")):
            found, entry = _read_csv(path), "line"
        else:
            found, entry = _read_geojson(path), "feature"
    except (OSError, EOFError, ValueError, pa.ArrowException) as error:
        # Parsers quote from the file, where the name of an image may be a patient's.
        reason = str(error) if isinstance(error, NucleiFileError) else type(error).__name__
        raise SlideError(
            "nuclei_unreadable", f"the nuclei in {path} cannot be read: {reason}"
        ) from error
    _check_values(path, found, entry)
    return found


def _check_values(path: Path, found: FoundNuclei, entry: str) -> None:
    checks = {
        "no position": ~(np.isfinite(found.x) & np.isfinite(found.y)),
        "a size that is not above 0": (found.radius_um <= 0) | np.isinf(found.radius_um),
    }
    for what, bad in checks.items():
        if bad.any():
            raise SlideError(
                "nuclei_unreadable",
                f"{int(bad.sum()):,} of {len(bad):,} nuclei in {path} have {what} "
                f"({name_lines(found.entry[bad].tolist(), entry)}); mend or remove them",
            )


def _read_geojson(path: Path) -> FoundNuclei:
    with _open(path) as stream:
        try:
            content = json.load(stream, object_hook=compact)
        except json.JSONDecodeError as error:
            where = f"line {error.lineno}, column {error.colno}"
            raise NucleiFileError(f"it is not JSON ({where})") from error
    columns = nuclei_of_geojson(content)
    unknown = np.full(len(columns["x"]), np.nan)
    return FoundNuclei(**columns, frame="", from_edge=True, radius_um=unknown)


def _read_parquet(path: Path) -> FoundNuclei:
    # ParquetFile, not read_table: a folder called `slide_id=x` must not add a column
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        places, frame, from_edge = _choose_columns(names)
        table = file.read(columns=[names[i] for i in places.values()])
    columns = {key: table[names[i]] for key, i in places.items()}
    return _from_columns(columns, frame, from_edge, np.arange(1, table.num_rows + 1))


def _read_csv(path: Path) -> FoundNuclei:
    header, delimiter, encoding = _csv_header(path)
    places, frame, from_edge = _choose_columns(header)
    ragged: list[int] = []

    def note(row: pyarrow.csv.InvalidRow) -> str:
        ragged.append(row.number or 1)
        return "skip"

    # Columns are known by their place, since names may repeat; values are parsed later, so that a
    # bad one is reported with its line.
    wanted = [str(i) for i in places.values()]
    table = pyarrow.csv.read_csv(
        str(path),
        read_options=pyarrow.csv.ReadOptions(
            use_threads=False,
            skip_rows=1,
            column_names=[str(i) for i in range(len(header))],
            encoding=encoding,
        ),
        parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, invalid_row_handler=note),
        convert_options=pyarrow.csv.ConvertOptions(
            include_columns=wanted, column_types=dict.fromkeys(wanted, pa.string())
        ),
    )
    if ragged:
        lines = _line_numbers(path)
        at_fault = [int(lines[number - 1]) for number in ragged]
        raise NucleiFileError(f"more or fewer fields than the header: {name_lines(at_fault)}")
    columns = {key: table[str(i)] for key, i in places.items()}
    return _from_columns(columns, frame, from_edge, _line_numbers(path)[1 : table.num_rows + 1])


def _csv_header(path: Path) -> tuple[list[str], str, str]:
    """Names of the columns, the delimiter, and the encoding."""
    with _open(path) as stream:
        line = stream.readline(1 << 20)
    try:
        text, encoding = line.decode("utf-8-sig"), "utf8"
    except UnicodeDecodeError:  # written on Windows
        text, encoding = line.decode("latin-1"), "latin1"
    delimiter = max(",;\t", key=text.count)
    return next(csv.reader([text.rstrip("\r\n")], delimiter=delimiter), []), delimiter, encoding


def _line_numbers(path: Path) -> np.ndarray:
    """int64: the lines the header and the rows stand in; Arrow passes over empty lines."""
    with _open(path) as stream:
        lines = [n for n, line in enumerate(stream, 1) if line.strip(b"\r\n")]
    return np.array(lines, np.int64)


def _choose_columns(names: list[str]) -> tuple[dict[str, int], str, bool]:
    """Places of the columns to read by what they hold; the frame; whether 0 is the edge."""
    # Lower case turns the micro sign into the Greek letter
    plain = [name.strip().casefold().replace("\N{GREEK SMALL LETTER MU}", "u") for name in names]
    pair = next((p for p in _POSITIONS if p[0] in plain and p[1] in plain), None)
    if pair is None:
        known = ", ".join(f"{x} and {y}" for x, y, *_ in _POSITIONS)
        raise NucleiFileError(f"none of its {len(names)} columns are {known} (um: also µm)")
    x, y, frame, from_edge = pair
    places = {"x": plain.index(x), "y": plain.index(y)}
    for key, aliases in _OPTIONAL.items():
        there = [name for name in aliases if name in plain]
        if there:
            places[key] = plain.index(there[0])
    return places, frame, from_edge


def _from_columns(
    columns: dict[str, Any], frame: str, from_edge: bool, entry: np.ndarray
) -> FoundNuclei:
    values = {name: _numbers(column) for name, column in columns.items()}
    unknown = np.full(len(entry), np.nan)
    radius, area = values.get("radius_um", unknown), values.get("area_um2", unknown)
    # An area below 0 keeps its sign, to be refused
    from_area = np.sign(area) * np.sqrt(np.abs(area) / np.pi)
    return FoundNuclei(
        x=values["x"],
        y=values["y"],
        frame=frame,
        from_edge=from_edge,
        radius_um=np.where(np.isnan(radius), from_area, radius),
        area=unknown,
        score=values.get("score", unknown),
        entry=entry,
    )


def _numbers(column: Any) -> np.ndarray:
    """float64 (N,); NaN where there is no number."""
    column = column.combine_chunks()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = pc.utf8_trim_whitespace(column)
    try:
        return column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return np.array([_number(value) for value in column.to_pylist()], np.float64)


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return np.nan


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")
