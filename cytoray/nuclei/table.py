"""The nuclei table: one Parquet part per slide, detected once and read in every epoch."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cytoray.errors import InputError
from cytoray.io import write_parquet_atomic

NUCLEI_COLUMNS = ("x_level0", "y_level0", "radius_um", "score")

NUCLEI_SCHEMA = pa.schema(
    [
        pa.field("slide_id", pa.string(), nullable=False),
        *(pa.field(name, pa.float32(), nullable=False) for name in NUCLEI_COLUMNS),
        pa.field("detector", pa.dictionary(pa.int32(), pa.string()), nullable=False),
    ]
)


def nuclei_table(slide_id: str, nuclei_level0: np.ndarray, detector: str) -> pa.Table:
    """Nuclei of one slide as an Arrow table of `NUCLEI_SCHEMA`.

    Args:
        slide_id: the slide.
        nuclei_level0: float (N, 4), x_level0, y_level0, radius_um, score.
        detector: name of the detector that found them.

    Raises:
        ValueError: the array has another shape.
    """
    nuclei = np.asarray(nuclei_level0, np.float32)
    if nuclei.ndim != 2 or nuclei.shape[1] != len(NUCLEI_COLUMNS):
        raise ValueError(f"nuclei must have shape (N, 4), not {nuclei.shape}")
    rows = len(nuclei)
    names = pa.DictionaryArray.from_arrays(
        pa.array(np.zeros(rows, np.int32)), pa.array([detector], pa.string())
    )
    columns = [pa.array(np.ascontiguousarray(nuclei[:, i])) for i in range(len(NUCLEI_COLUMNS))]
    slide_ids = pa.array([slide_id] * rows, pa.string())
    return pa.Table.from_arrays([slide_ids, *columns, names], schema=NUCLEI_SCHEMA)


def write_nuclei(
    path: str | os.PathLike[str],
    slide_id: str,
    nuclei_level0: np.ndarray,
    detector: str,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the part of one slide, whole or not at all; rows keep their order.

    Args:
        path: the Parquet file.
        slide_id: the slide.
        nuclei_level0: float (N, 4), x_level0, y_level0, radius_um, score.
        detector: name of the detector that found them.
        metadata: kept with the file, read back by `read_part_metadata`.
    """
    table = nuclei_table(slide_id, nuclei_level0, detector)
    write_parquet_atomic(table.replace_schema_metadata(dict(metadata or {})), path)


def read_nuclei(path: str | os.PathLike[str]) -> np.ndarray:
    """Read the nuclei of one part.

    Returns:
        float32 (N, 4): x_level0, y_level0, radius_um, score, in the order they were written.

    Raises:
        InputError: the file is missing or is no nuclei table.
    """
    try:
        # ParquetFile, not read_table: a folder called `slide_id=x` must not add a column
        with pq.ParquetFile(path) as file:
            table = file.read(columns=list(NUCLEI_COLUMNS))
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error
    missing = sorted(set(NUCLEI_COLUMNS) - set(table.column_names))
    if missing:
        raise InputError(f"{path} is no nuclei table: column {', '.join(missing)} is missing")
    columns = [table[name].to_numpy() for name in NUCLEI_COLUMNS]
    return np.column_stack(columns).astype(np.float32)


def read_part_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read what `write_nuclei` was given as `metadata`.

    Raises:
        InputError: the file is missing or cannot be read.
    """
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error
    return {key.decode(): value.decode() for key, value in metadata.items()}


def _unreadable(path: str | os.PathLike[str], error: Exception) -> InputError:
    return InputError(f"cannot read the nuclei table {path}: {error}; run `cytoray index` again")
