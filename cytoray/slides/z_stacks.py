"""Planes of z-stacks: rows of a manifest with one slide_id and several z become one row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from cytoray.slides.manifest_source import SHOWN_PER_CHECK
from cytoray.spool import BATCH_ROWS, take_rows

# Arrow makes its compute functions at import, where a type checker cannot see them.
pc: Any = pyarrow.compute

STACK_COLUMNS = {"z_paths": pa.list_(pa.string()), "z_values": pa.list_(pa.int64())}
# What a slide has once, whatever the number of its planes; label columns besides.
_ONE_A_SLIDE = ("patient_id", "site", "mpp", "split")


@dataclass(frozen=True)
class Stacks:
    """The slides of a manifest, each with the rows of its planes.

    Attributes:
        order: int64, rows of all slides; those of a slide are together, ascending in z.
        starts: int64 (num_slides + 1,), where each slide begins in `order`; slides stand in the
            order of their first rows.
        chosen: int64 (num_slides,), the row a slide is read from: the plane nearest to z = 0, the
            lower of two.
    """

    order: np.ndarray
    starts: np.ndarray
    chosen: np.ndarray

    @property
    def any(self) -> bool:
        """Whether some slide has several planes."""
        return len(self.starts) - 1 < len(self.order)


def find_stacks(
    rows: pa.Table, slides: np.ndarray, where: Callable[..., str]
) -> tuple[Stacks, list[str]]:
    """Group the rows of each slide.

    Args:
        rows: with `slide_id` and `z`.
        slides: int64 (N,), number of each row's slide in order of first occurrence, -1: no id.
        where: says where rows stand in the file: `lines 7, 9`.

    Returns:
        The stacks, and a problem for each slide id that occurs again without being a plane.
    """
    column = rows["z"]
    has_z = column.is_valid().to_numpy()
    z = pc.fill_null(column, 0).to_numpy()
    order = np.lexsort((z, slides))
    order = order[slides[order] >= 0]
    mine = slides[order]
    again = mine[1:] == mine[:-1]
    starts = np.flatnonzero(np.concatenate([[True], ~again])) if len(order) else np.zeros(0, int)
    starts = np.append(starts, len(order))
    alike = again & (~has_z[order[1:]] | ~has_z[order[:-1]] | (z[order[1:]] == z[order[:-1]]))
    repeated = np.unique(mine[1:][alike])
    nearest = np.lexsort((z, np.abs(z), slides))
    nearest = nearest[slides[nearest] >= 0]
    stacks = Stacks(order, starts, nearest[starts[:-1]])
    hint = "; planes of a z-stack have a whole number each in column `z`" if has_z.any() else ""
    return stacks, _repeats(rows, stacks, repeated, where, hint)


def _repeats(
    rows: pa.Table, stacks: Stacks, repeated: np.ndarray, where: Callable[..., str], hint: str
) -> list[str]:
    problems = []
    for slide in repeated[:SHOWN_PER_CHECK].tolist():
        members = np.sort(stacks.order[stacks.starts[slide] : stacks.starts[slide + 1]])
        slide_id = rows["slide_id"][int(members[0])].as_py()
        shown = where(*members.tolist())
        problems.append(f"slide_id {slide_id!r} occurs {len(members)} times ({shown}){hint}")
    if len(repeated) > SHOWN_PER_CHECK:
        problems.append(f"... and {len(repeated) - SHOWN_PER_CHECK} more repeated slide_ids")
    return problems


def plane_problems(
    rows: pa.Table, stacks: Stacks, labels: Sequence[str], where: Callable[..., str]
) -> list[str]:
    """Planes of a slide that disagree on what the slide has once.

    Args:
        rows: the manifest's rows.
        stacks: of these rows.
        labels: label columns.
        where: says where rows stand in the file: `lines 7, 9`.
    """
    names = [*_ONE_A_SLIDE, *labels]
    sizes = np.diff(stacks.starts)
    first = np.repeat(stacks.order[stacks.starts[:-1]], sizes)
    later = np.flatnonzero(first != stacks.order)
    shown: list[str] = []
    count = 0
    for low in range(0, len(later), BATCH_ROWS):
        here = later[low : low + BATCH_ROWS]
        pair = first[here], stacks.order[here]
        one, other = (take_rows(rows.select(["slide_id", *names]), r) for r in pair)
        for name in names:
            same = pc.equal(one[name], other[name])
            same = pc.fill_null(same, pc.and_(one[name].is_null(), other[name].is_null()))
            for i in pc.indices_nonzero(pc.invert(same)).to_pylist():
                count += 1
                if len(shown) < SHOWN_PER_CHECK:
                    shown.append(
                        f"{where(*sorted(int(p[i]) for p in pair))}: planes of slide "
                        f"{one['slide_id'][i].as_py()!r} disagree on `{name}`"
                    )
    if count > len(shown):
        shown.append(f"... and {count - len(shown)} more planes that disagree")
    return shown


def stacked_rows(
    rows: pa.Table, stacks: Stacks, batch_rows: int = BATCH_ROWS
) -> Iterator[pa.Table]:
    """One row a slide, in batches: that of the chosen plane, with `z_paths` and `z_values`.

    Both are ascending in z, and null for a slide of one row.
    """
    paths_and_z = rows.select(["path", "z"])
    for low in range(0, len(stacks.chosen), batch_rows):
        high = min(low + batch_rows, len(stacks.chosen))
        batch = take_rows(rows, stacks.chosen[low:high])
        begin, end = stacks.starts[low], stacks.starts[high]
        planes = take_rows(paths_and_z, stacks.order[begin:end]).combine_chunks()
        offsets = pa.array(stacks.starts[low : high + 1] - begin, pa.int32())
        plain = pa.array(np.diff(stacks.starts[low : high + 1]) == 1)
        for name, source in (("z_paths", "path"), ("z_values", "z")):
            lists = pa.ListArray.from_arrays(offsets, planes[source].chunk(0), mask=plain)
            batch = batch.append_column(name, lists)
        yield batch
