"""Augmentation of a batch of cell images on its device. Shapes: B images of S px."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cytoray.mil.tiles import turn_and_flip

MIN_AREA, MAX_ASPECT = 0.08, 4 / 3


def nothing(images: Tensor, rng: np.random.Generator) -> Tensor:
    """The images as they are."""
    return images


def random_crops(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Random resized crops, half of them mirrored (the training views of Dausort et al.).

    A crop covers 8 to 100 % of the area with an aspect of 3/4 to 4/3, cut down to what fits.

    Args:
        images: uint8 (B, S, S, 3).
        rng: of the boxes.

    Returns:
        float (B, 3, S, S) in 0..1.
    """
    count = len(images)
    area = rng.uniform(MIN_AREA, 1.0, count)
    aspect = np.exp(rng.uniform(-np.log(MAX_ASPECT), np.log(MAX_ASPECT), count))
    width = np.minimum(np.sqrt(area * aspect), 1.0)
    height = np.minimum(np.sqrt(area / aspect), 1.0)
    x, y = (rng.uniform(size - 1.0, 1.0 - size) for size in (width, height))  # centres in -1..1
    mirrored = np.where(rng.random(count) < 0.5, -1.0, 1.0)
    theta = np.zeros((count, 2, 3), dtype=np.float32)
    theta[:, 0, 0], theta[:, 0, 2] = width * mirrored, x
    theta[:, 1, 1], theta[:, 1, 2] = height, y
    pixels = images.permute(0, 3, 1, 2).float() / 255.0
    grid = F.affine_grid(
        torch.from_numpy(theta).to(images.device), list(pixels.shape), align_corners=False
    )
    mode = {"mode": "bilinear", "padding_mode": "reflection", "align_corners": False}
    return F.grid_sample(pixels, grid, **mode)


# uint8 (B, S, S, 3) in; the same, or float (B, 3, S, S) in 0..1, out: what an `Encoder` takes.
AUGMENTATIONS: dict[str, Callable[[Tensor, np.random.Generator], Tensor]] = {
    "none": nothing,
    "turns": turn_and_flip,
    "crops": random_crops,
}
