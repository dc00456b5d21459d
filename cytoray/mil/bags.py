"""The bag on disk: one Parquet file a slide, features and level-0 coordinates side by side.

A dataset is a folder `bags/` with `slide_id=<id>/bag.parquet` (the id percent-encoded). Columns:

- `feature` fixed_size_list<halffloat>[D]: the encoder's output for the tile.
- `x_level0`, `y_level0` float32: the tile's top-left corner in level-0 pixels.
- `tile_id` string.

The slide and how its tiles were made stand in the file's metadata, as JSON under `cytoray_bag`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from urllib.parse import quote, unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cytoray.errors import InputError, raise_problems
from cytoray.io import write_parquet_atomic

METADATA_KEY = b"cytoray_bag"
FILE_NAME = "bag.parquet"


@dataclass(frozen=True, kw_only=True)
class BagMeta:
    """How a bag was made.

    Attributes:
        slide_id: the slide.
        tile_px: tile side in pixels at `mpp`.
        mpp: um per pixel of the tiles.
        tile_size_level0: tile side in level-0 pixels.
        encoder_id: hash that tells one encoder's weights from another's.
        encoder_name: for people.
    """

    slide_id: str
    tile_px: int
    mpp: float
    tile_size_level0: float
    encoder_id: str
    encoder_name: str = ""


@dataclass(frozen=True)
class Bag:
    """One slide's instances.

    Attributes:
        features: (N, D) float16 or float32.
        coordinates_level0: (N, 2) float32, x and y of each tile's top-left corner.
        meta: how the bag was made.
        tile_ids: N tile ids, or empty.
    """

    features: np.ndarray
    coordinates_level0: np.ndarray
    meta: BagMeta
    tile_ids: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return self.features.shape[0]


@dataclass(frozen=True)
class BagInfo:
    """What a bag's footer says, without reading its features."""

    meta: BagMeta
    num_instances: int
    width: int
    path: Path


def _problems_of(bag: Bag) -> list[str]:
    name, problems = bag.meta.slide_id, []
    if bag.features.ndim != 2:
        return [f"bag {name}: features have shape {bag.features.shape}, expected (N, D)"]
    num_instances = bag.features.shape[0]
    if num_instances == 0:
        problems.append(f"bag {name}: it has no instance")
    if bag.coordinates_level0.shape != (num_instances, 2):
        shape = bag.coordinates_level0.shape
        problems.append(f"bag {name}: coordinates {shape}, expected ({num_instances}, 2)")
    if bag.tile_ids and len(bag.tile_ids) != num_instances:
        problems.append(f"bag {name}: {len(bag.tile_ids)} tile ids, expected {num_instances}")
    bad = ~np.isfinite(bag.features).all(axis=1)
    if bad.any():
        problems.append(
            f"bag {name}: features of {int(bad.sum())} instances are NaN or infinite "
            f"(first: {int(bad.argmax())}); embed the slide again"
        )
    return problems


def bag_path(folder: str | Path, slide_id: str) -> Path:
    """Where the bag of `slide_id` stands inside a dataset folder."""
    return Path(folder) / f"slide_id={quote(slide_id, safe='')}" / FILE_NAME


def write_bag(folder: str | Path, bag: Bag) -> Path:
    """Write `bag` into the dataset `folder`, atomically; an older bag of the slide is replaced.

    Features are stored as float16.

    Returns:
        The file written.

    Raises:
        InputError: no instance, NaN (or beyond float16), or shapes that do not fit.
    """
    with np.errstate(over="ignore"):
        half = np.ascontiguousarray(bag.features, dtype=np.float16)
    raise_problems(
        "this bag cannot be written:",
        _problems_of(Bag(half, bag.coordinates_level0, bag.meta, bag.tile_ids)),
    )
    num_instances, width = half.shape
    coordinates = np.asarray(bag.coordinates_level0, dtype=np.float32)
    tile_ids = bag.tile_ids or ("",) * num_instances
    features = pa.FixedSizeListArray.from_arrays(pa.array(half.reshape(-1)), width)
    table = pa.table(
        {
            "feature": features,
            "x_level0": pa.array(coordinates[:, 0].copy()),
            "y_level0": pa.array(coordinates[:, 1].copy()),
            "tile_id": pa.array(tile_ids, pa.string()),
        }
    ).replace_schema_metadata({METADATA_KEY: json.dumps(asdict(bag.meta)).encode()})
    path = bag_path(folder, bag.meta.slide_id)
    write_parquet_atomic(table, path)
    return path


def read_info(path: str | Path) -> BagInfo:
    """Read a bag's footer: meta, number of instances, width.

    Raises:
        InputError: not a bag, or no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no bag at {path}")
    try:
        with pq.ParquetFile(path) as file:
            schema, num_rows = file.schema_arrow, file.metadata.num_rows
        known = {entry.name for entry in fields(BagMeta)}
        values = json.loads((schema.metadata or {})[METADATA_KEY])
        meta = BagMeta(**{key: value for key, value in values.items() if key in known})
        width = schema.field("feature").type.list_size
    except (pa.ArrowException, KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"{path} is not a bag ({type(error).__name__}: {error}); write bags with `embed`"
        ) from error
    return BagInfo(meta, num_rows, width, path)


def read_bag(path: str | Path, *, dtype: type[np.floating] = np.float32) -> Bag:
    """Read and check one bag file.

    Args:
        path: the file.
        dtype: of the features returned, float32 or float16.

    Raises:
        InputError: not a bag, no instance, or NaN; the bag is named.
    """
    info = read_info(path)
    with pq.ParquetFile(info.path) as file:
        table = file.read().combine_chunks()
    flat = np.zeros(0, np.float16)
    if info.num_instances:
        column = table.column("feature").chunk(0)
        flat = column.flatten().to_numpy(zero_copy_only=False)
    features = flat.reshape(-1, info.width).astype(dtype, copy=False)
    coordinates = [table.column(name).to_numpy() for name in ("x_level0", "y_level0")]
    bag = Bag(
        features,
        np.stack(coordinates, axis=1).astype(np.float32),
        info.meta,
        tuple(table.column("tile_id").to_pylist()),
    )
    raise_problems(f"{info.path} cannot be used:", _problems_of(bag))
    return bag


class BagStore:
    """The bags of a dataset folder, read one at a time when asked for.

    Args:
        folder: the dataset folder.
        paths: bag file by slide id.
    """

    def __init__(self, folder: Path, paths: dict[str, Path]) -> None:
        self.folder = folder
        self._paths = paths

    @property
    def slide_ids(self) -> list[str]:
        """Slide ids, sorted."""
        return sorted(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def __contains__(self, slide_id: object) -> bool:
        return slide_id in self._paths

    def __iter__(self) -> Iterator[Bag]:
        return (self.read(slide_id) for slide_id in self.slide_ids)

    def path(self, slide_id: str) -> Path:
        """The bag file of a slide.

        Raises:
            InputError: the dataset has no bag of that slide.
        """
        if slide_id not in self._paths:
            raise InputError(
                f"no bag for slide {slide_id!r} in {self.folder} ({len(self)} bags); "
                "embed the slide first, or correct the id"
            )
        return self._paths[slide_id]

    def info(self, slide_id: str) -> BagInfo:
        """A bag's footer, without its features."""
        return read_info(self.path(slide_id))

    def read(self, slide_id: str, *, dtype: type[np.floating] = np.float32) -> Bag:
        """Read and check one bag; see `read_bag`."""
        return read_bag(self.path(slide_id), dtype=dtype)

    def check(self, slide_ids: Iterable[str] | None = None) -> BagInfo:
        """Check the footers of bags (default: all): same encoder, width and tiles, none empty.

        Features are not read; NaN is caught when a bag is.

        Returns:
            The first bag's footer, which holds for all where encoder and tiles are concerned.

        Raises:
            InputError: all problems at once, each naming its bag.
        """
        chosen = self.slide_ids if slide_ids is None else list(slide_ids)
        if not chosen:
            raise InputError(f"no bag chosen out of the {len(self)} in {self.folder}")
        missing = [name for name in chosen if name not in self._paths]
        problems = [f"no bag for slide {name!r} in {self.folder}" for name in missing]
        raise_problems("some slides have no bag; embed them, or correct the ids:", problems)
        with ThreadPoolExecutor(max_workers=8) as pool:
            infos = list(pool.map(self.info, chosen))
        raise_problems(f"the bags of {self.folder} cannot be used together:", _mismatches(infos))
        return infos[0]


def _mismatches(infos: list[BagInfo]) -> list[str]:
    """Everything that keeps these bags from being used together, against the first of them."""
    first, problems = infos[0], []
    for info in infos:
        name = info.meta.slide_id
        if bag_path(info.path.parent.parent, name) != info.path:
            problems.append(f"bag {name}: it stands in the wrong folder, {info.path.parent.name}")
        if info.num_instances == 0:
            problems.append(f"bag {name}: it has no instance")
        if info.width != first.width:
            problems.append(
                f"bag {name}: width {info.width}, bag {first.meta.slide_id} has {first.width}"
            )
        for what in ("encoder_id", "tile_px", "mpp"):
            mine, theirs = getattr(info.meta, what), getattr(first.meta, what)
            if mine != theirs:
                problems.append(
                    f"bag {name}: {what} {mine!r}, bag {first.meta.slide_id} has {theirs!r}; "
                    "embed both with the same settings"
                )
    return problems


def open_bags(folder: str | Path, *, check: bool = True) -> BagStore:
    """Open a dataset of bags.

    Args:
        folder: holds `slide_id=<id>/bag.parquet`.
        check: check all footers now (one small read a bag); see `BagStore.check`.

    Raises:
        InputError: no such folder, no bag in it, or bags that do not go together.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"no folder of bags at {folder}; make one with `embed`")
    paths = {
        unquote(path.parent.name.removeprefix("slide_id=")): path
        for path in sorted(folder.glob(f"slide_id=*/{FILE_NAME}"))
    }
    if not paths:
        raise InputError(f"{folder} holds no bag (slide_id=<id>/{FILE_NAME}); fill it with `embed`")
    store = BagStore(folder, paths)
    if check:
        store.check()
    return store
