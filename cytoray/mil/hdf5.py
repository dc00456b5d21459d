"""Bags from and to the HDF5 layout of CLAM and TRIDENT users; see `cytoray.mil.feature_files`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from urllib.parse import quote

import h5py
import numpy as np

from cytoray.errors import InputError, raise_problems
from cytoray.io import atomic_path
from cytoray.mil.bags import Bag, BagStore, open_bags, write_bag
from cytoray.mil.feature_files import TileFacts, read_feature_file

SUFFIXES = (".h5", ".hdf5", ".pt")


def import_hdf5(
    source: str | Path | Iterable[str | Path],
    folder: str | Path,
    facts: TileFacts | None = None,
    *,
    slide_ids: Collection[str] | None = None,
) -> BagStore:
    """Import feature files into a dataset of bags.

    Args:
        source: a folder of `.h5`, `.hdf5` or `.pt` files (also CLAM's, with `h5_files` or
            `pt_files` in it), or the files themselves.
        folder: the dataset to write into; bags of the same slides are replaced.
        facts: what the files do not say; it wins over what they say.
        slide_ids: the slides that are known, e.g. those of the manifest; others are refused.

    Returns:
        The dataset, with all its bags.

    Raises:
        InputError: files that are not feature files, empty bags, NaN, different widths, unknown
            slides, or unknown tile size or mpp. Every such bag is named; the good ones are
            imported.
    """
    files = _files_of(source)
    known = None if slide_ids is None else set(slide_ids)
    written, first, problems = 0, None, []
    for path in files:
        try:
            bag = read_feature_file(path, facts)
            name, width = bag.meta.slide_id, bag.features.shape[1]
            first = first or (name, width)
            if known is not None and name not in known:
                raise InputError(f"bag {name}: no such slide is known ({path})")
            if width != first[1]:
                raise InputError(f"bag {name}: width {width}, bag {first[0]} has {first[1]}")
            write_bag(folder, bag)
            written += 1
        except InputError as error:
            problems += error.problems or [str(error)]
    raise_problems(f"{written} of {len(files)} files were imported, these were not:", problems)
    return open_bags(folder)


def _files_of(source: str | Path | Iterable[str | Path]) -> list[Path]:
    """The feature files of a folder, or those given; HDF5 is preferred to `.pt` of the same slide.

    Raises:
        InputError: no such folder or file, none of the right kind, or two files of one slide.
    """
    if not isinstance(source, (str, Path)):
        files = [Path(path) for path in source]
        raise_problems(
            "these files cannot be imported:",
            [f"no file at {path}" for path in files if not path.is_file()],
        )
    else:
        root = Path(source)
        files = _listed(root)
    if not files:
        raise InputError(f"no {', '.join(SUFFIXES)} file to import in {source}")
    stems = [path.stem for path in files]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    raise_problems(
        "some slides have several files; give one of each:", [f"bag {name}" for name in twice]
    )
    return files


def _listed(root: Path) -> list[Path]:
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise InputError(f"no folder of feature files at {root}")
    for folder in (root, root / "h5_files", root / "pt_files"):
        found = sorted(p for p in folder.glob("*") if p.suffix in SUFFIXES)
        if found:
            hdf5 = {path.stem for path in found if path.suffix != ".pt"}
            return [path for path in found if path.suffix != ".pt" or path.stem not in hdf5]
    return []


def export_hdf5(
    store: BagStore, folder: str | Path, slide_ids: Sequence[str] | None = None
) -> list[Path]:
    """Write bags as one HDF5 file a slide, for tools that read CLAM's or TRIDENT's layout.

    `features` (N, D) float32 and `coords` (N, 2) int64, rounded to whole level-0 pixels; each
    file appears whole or not at all.

    Args:
        store: the dataset.
        folder: made if missing; a file is named after its slide (percent-encoded).
        slide_ids: default: all.

    Returns:
        The files, in the order of the slides.

    Raises:
        InputError: a slide without a bag, or a bag that cannot be read; it is named.
    """
    chosen = store.slide_ids if slide_ids is None else list(slide_ids)
    missing = [f"no bag for slide {name!r}" for name in chosen if name not in store]
    raise_problems("some slides have no bag; embed them, or correct the ids:", missing)
    return [_export(store.read(name), Path(folder)) for name in chosen]


def _export(bag: Bag, folder: Path) -> Path:
    meta = bag.meta
    path = folder / f"{quote(meta.slide_id, safe=' ')}.h5"
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        file.create_dataset("features", data=bag.features.astype(np.float32))
        corners = np.nan_to_num(bag.coordinates_level0, nan=-1.0).round().astype(np.int64)
        coords = file.create_dataset("coords", data=corners)
        coords.attrs.update(
            {
                "name": meta.slide_id,
                "patch_size": meta.tile_px,
                "patch_size_level0": meta.tile_size_level0,
                "target_magnification": 10.0 / meta.mpp,
                "overlap": 0,
            }
        )
        file.attrs.update(
            {
                "slide_id": meta.slide_id,
                "mpp": meta.mpp,
                "encoder_id": meta.encoder_id,
                "encoder_name": meta.encoder_name,
            }
        )
    return path
