"""Feature files of other tools: the HDF5 layout of CLAM and TRIDENT users, and `.pt` tensors.

One file a slide, named after it. Datasets: `features` (N, D) or (1, N, D) floating point, `coords`
(N, 2) or (1, N, 2), x and y of each tile's top-left corner in level-0 pixels. How the tiles were
made stands in the attributes of the file, of `coords` or of `features`; of these are read

- `patch_size` (or `tile_px`): tile side in pixels at the embedded magnification;
- `patch_size_level0` (or `tile_size_level0`): tile side in level-0 pixels;
- `mpp`, or `target_magnification` (10 / magnification um per pixel);
- `encoder_id`, `encoder_name`, `slide_id`: what `export_hdf5` adds.

A `.pt` file holds the features as a tensor, or a dict of `features` and `coords`; without `coords`
they are taken from the HDF5 file of the same name beside it or in `../h5_files`, else are NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from urllib.parse import unquote

import h5py
import numpy as np
import torch

from cytoray.errors import InputError, raise_problems
from cytoray.mil.bags import Bag, BagMeta

ALIASES = {
    "tile_px": ("tile_px", "patch_size"),
    "tile_size_level0": ("tile_size_level0", "patch_size_level0"),
    "mpp": ("mpp",),
    "encoder_id": ("encoder_id",),
    "encoder_name": ("encoder_name", "encoder"),
    "slide_id": ("slide_id",),
}


@dataclass(frozen=True, kw_only=True)
class TileFacts:
    """How imported tiles were made, where the files do not say it; None leaves it to the files.

    Attributes:
        tile_px: tile side in pixels at `mpp`.
        mpp: um per pixel of the tiles.
        tile_size_level0: tile side in level-0 pixels.
        encoder_name: for people.
        encoder_id: tells one encoder from another; default `imported:<encoder_name>`.
    """

    tile_px: int | None = None
    mpp: float | None = None
    tile_size_level0: float | None = None
    encoder_name: str | None = None
    encoder_id: str | None = None


def read_feature_file(path: str | Path, facts: TileFacts | None = None) -> Bag:
    """Read one `.h5`, `.hdf5` or `.pt` file as a bag; features keep their precision.

    Raises:
        InputError: not a feature file, wrong shapes, or unknown tile size or mpp; names the bag.
    """
    path, facts = Path(path), facts or TileFacts()
    name = unquote(path.stem)
    try:
        if path.suffix == ".pt":
            features, coordinates, attributes = _read_pt(path)
        else:
            features, coordinates, attributes = _read_h5(path)
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, EOFError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"bag {name}: {path} is no feature file ({type(error).__name__}: {reason})"
        ) from error
    features, coordinates = _unbatched(features), _unbatched(coordinates)
    problems = _shape_problems(name, features, coordinates)
    raise_problems(f"{path} cannot be imported:", problems)
    meta = _meta_of(name, attributes, facts)
    return Bag(features, coordinates.astype(np.float32), meta)


def _read_h5(path: Path) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    with h5py.File(path, "r") as file:
        missing = [name for name in ("features", "coords") if name not in file]
        if missing:
            held = ", ".join(file) or "nothing"
            raise KeyError(f"no dataset {' and '.join(missing)}; it holds {held}")
        features, coords = file["features"], file["coords"]
        attributes = {**features.attrs, **coords.attrs, **file.attrs}
        return features[()], coords[()], attributes  # type: ignore[index]


def _read_pt(path: Path) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:
        raise ValueError("it holds more than plain tensors, and is not loaded") from None
    coordinates, attributes = None, {}
    if isinstance(content, dict):
        coordinates = content.get("coords")
        attributes = {k: v for k, v in content.items() if not isinstance(v, torch.Tensor)}
        content = content["features"]
    features = _to_numpy(content)
    if coordinates is not None:
        return features, _to_numpy(coordinates), attributes
    for folder in (path.parent, path.parent.parent / "h5_files"):
        beside = folder / f"{path.stem}.h5"
        if beside.is_file():
            _, coordinates, more = _read_h5(beside)
            return features, coordinates, attributes | more
    return features, np.full((features.shape[-2], 2), np.nan, np.float32), attributes


def _to_numpy(value: Any) -> np.ndarray:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"expected a tensor of features, found {type(value).__name__}")
    plain = value.float() if value.dtype == torch.bfloat16 else value
    return plain.numpy()


def _unbatched(array: np.ndarray) -> np.ndarray:
    """(1, N, K) to (N, K); other shapes as they are."""
    return array[0] if array.ndim == 3 and array.shape[0] == 1 else array


def _shape_problems(name: str, features: np.ndarray, coordinates: np.ndarray) -> list[str]:
    problems = []
    if features.ndim != 2 or not np.issubdtype(features.dtype, np.floating):
        problems.append(
            f"bag {name}: features are {features.dtype} of shape {features.shape}, expected "
            "floating point (N, D) or (1, N, D)"
        )
    elif features.shape[0] == 0:
        problems.append(f"bag {name}: it has no instance")
    if not problems and coordinates.shape != (features.shape[0], 2):
        problems.append(
            f"bag {name}: coords have shape {coordinates.shape}, expected ({features.shape[0]}, 2)"
        )
    return problems


def _meta_of(name: str, attributes: dict[str, Any], facts: TileFacts) -> BagMeta:
    """How the tiles were made: `facts` first, then the file's attributes."""
    said: dict[str, Any] = {
        key: attributes[alias]
        for key, aliases in ALIASES.items()
        for alias in reversed(aliases)  # the first alias wins
        if alias in attributes
    }
    if "mpp" not in said and "target_magnification" in attributes:
        magnification = attributes["target_magnification"]
        said["mpp"] = 10.0 / _number(name, "target_magnification", magnification)
    for key in ("tile_px", "mpp", "tile_size_level0", "encoder_name", "encoder_id"):
        value = getattr(facts, key)
        if value is not None:
            said[key] = value
    problems = [
        f"bag {name}: the file does not say {key}; give it: --facts.{key.replace('_', '-')} "
        f"or TileFacts({key}=...)"
        for key in ("tile_px", "mpp", "tile_size_level0")
        if key not in said
    ]
    raise_problems(f"bag {name} cannot be imported:", problems)
    encoder_name = _text(said.get("encoder_name", ""))
    return BagMeta(
        slide_id=_text(said.get("slide_id", name)),
        tile_px=round(_number(name, "tile_px", said["tile_px"])),
        mpp=_number(name, "mpp", said["mpp"]),
        tile_size_level0=_number(name, "tile_size_level0", said["tile_size_level0"]),
        encoder_id=_text(said.get("encoder_id") or f"imported:{encoder_name}"),
        encoder_name=encoder_name,
    )


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _number(name: str, what: str, value: Any) -> float:
    """One positive number from an attribute, which may be text or an array of one.

    Raises:
        InputError: it is none; names the bag.
    """
    try:
        number = float(np.asarray(value).reshape(-1)[0])
    except (ValueError, TypeError, IndexError):
        number = float("nan")
    if not number > 0 or not np.isfinite(number):
        raise InputError(f"bag {name}: {what} is {value!r}; give it as TileFacts({what}=...)")
    return number
