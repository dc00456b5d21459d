"""Cellpose-SAM as a nuclei detector (Pachitariu et al. 2025), with weights that are already here.

Weights are never downloaded behind the user's back: a hundred actors would each fetch a gigabyte.
"""

from __future__ import annotations

import os
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np

from cytoray.errors import InputError, raise_problems

DEFAULT_WEIGHTS = "cpsam_v2"
_MODELS_VARIABLE = "CELLPOSE_LOCAL_MODELS_PATH"  # Cellpose's own variable for the same folder


def find_weights(weights: str | os.PathLike[str] = "") -> Path:
    """Locate a Cellpose 4 weights file.

    Args:
        weights: a file; or the name of one in Cellpose's models folder; empty for `cpsam_v2`.

    Raises:
        InputError: there is no such file; says how to get it and where to put it.
    """
    wanted = os.fspath(weights) or DEFAULT_WEIGHTS
    folder = Path(os.environ.get(_MODELS_VARIABLE) or Path.home() / ".cellpose" / "models")
    for path in (Path(wanted).expanduser(), folder / wanted):
        if path.is_file():
            return path
    raise InputError(
        f"the cellpose nuclei detector has no weights: neither {wanted} nor {folder / wanted} is a "
        f"file. Download '{DEFAULT_WEIGHTS}' (about 1.2 GB) from "
        "https://huggingface.co/mouseland/cellpose-sam, then either put it in "
        f"{folder} (or the folder that {_MODELS_VARIABLE} names) under that name, or give its path "
        "as the detector option `weights`; on a cluster, every node needs the file. "
        "The detector 'classical' needs no weights"
    )


def masks_to_nuclei(masks: np.ndarray, confidence: np.ndarray, mpp: float) -> np.ndarray:
    """Turn a label image into nuclei.

    Args:
        masks: int (h, w), 0 for background, one label per nucleus.
        confidence: float (h, w), a nucleus scores its mean.
        mpp: um per pixel.

    Returns:
        float32 (N, 4) in the order of the labels: centroid x_px, y_px, radius_um of the disc of the
        same area, score.
    """
    row, column = np.nonzero(masks)
    label = masks[row, column]
    area = np.bincount(label)
    present = np.flatnonzero(area)
    if len(present) == 0:
        return np.zeros((0, 4), np.float32)
    sums = [np.bincount(label, values) for values in (column, row, confidence[row, column])]
    x, y, score = (total[present] / area[present] for total in sums)
    radius_um = np.sqrt(area[present] / np.pi) * mpp
    return np.column_stack([x, y, radius_um, score]).astype(np.float32)


class CellposeDetector:
    """Cellpose 4 (Cellpose-SAM) as a detector; the network is loaded by the constructor.

    Args:
        weights: see `find_weights`.
        device: torch device; empty for CUDA if there is one, else the CPU (some 100 times slower).
        nucleus_um: usual diameter of a nucleus; images are scaled so that it becomes 30 px, the
            size the network was trained on.
        flow_threshold: Cellpose's; larger keeps less regular masks.
        cellprob_threshold: Cellpose's; smaller finds more and larger nuclei.
        batch_size: patches of 256 px per forward pass.

    Raises:
        InputError: no weights, or a value that is out of range.
    """

    name = "cellpose"

    def __init__(
        self,
        *,
        weights: str | os.PathLike[str] = "",
        device: str = "",
        nucleus_um: float = 8.0,
        flow_threshold: float = 0.4,
        cellprob_threshold: float = 0.0,
        batch_size: int = 8,
    ) -> None:
        problems = []
        if nucleus_um <= 0:
            problems.append(f"nucleus_um must be above 0, not {nucleus_um}")
        if batch_size < 1:
            problems.append(f"batch_size must be at least 1, not {batch_size}")
        raise_problems("the cellpose nuclei detector cannot run:", problems)
        self.nucleus_um = nucleus_um
        self.options: dict[str, Any] = {
            "flow_threshold": flow_threshold,
            "cellprob_threshold": cellprob_threshold,
            "batch_size": batch_size,
        }
        self.model = _load_model(find_weights(weights), device)

    def __call__(self, pixels: np.ndarray, mpp: float) -> np.ndarray:
        """Nuclei of uint8 (h, w, 3): float32 (N, 4), x_px, y_px, radius_um, score (0 to 1)."""
        masks, flows, _ = self.model.eval(
            pixels, diameter=self.nucleus_um / mpp, channel_axis=-1, **self.options
        )
        probability = 1 / (1 + np.exp(-np.asarray(flows[2], np.float32)))
        return masks_to_nuclei(np.asarray(masks), probability, mpp)


def _load_model(weights: Path, device: str) -> Any:
    import torch

    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        # Looked at first: building the network takes seconds, and Cellpose would do it in vain
        names = torch.load(weights, map_location="cpu", mmap=True, weights_only=True)
        if not any(str(name).endswith("W2") for name in names):
            raise ValueError("it holds no Cellpose 4 network")
        from cellpose import models

        return models.CellposeModel(
            pretrained_model=os.fspath(weights),
            device=chosen,
            use_bfloat16=chosen.type == "cuda",
        )
    except (ValueError, RuntimeError, KeyError, EOFError, OSError, UnpicklingError) as error:
        raise InputError(
            f"{weights} could not be loaded as Cellpose 4 weights ({error}); "
            f"give the file {DEFAULT_WEIGHTS!r} or one trained with Cellpose 4"
        ) from error
