"""What a tile costs on one CPU core: perturbation, drawing of views, rendering of views.

    python -m benchmarks.perturb

Rendering is measured beside torchvision's usual pipeline (PIL, one view at a time), with the same
number and sizes of views. The last line is JSON.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from cytoray.perturb import CROP_POLICIES, CropPolicy, perturb, sample_views, tile_rng
from cytoray.ssl.augment import render_crops

NUM_NUCLEI = 8


def best_seconds(call: Callable[[], object], repeats: int, rounds: int = 7) -> float:
    """Seconds of one call, the best of `rounds` means over `repeats` calls."""
    means = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        means.append((time.perf_counter() - start) / repeats)
    return min(means)


def random_tiles(num_tiles: int, tile_px: int) -> np.ndarray:
    """Smooth coloured noise, uint8 (B, S, S, 3): JPEG-like content without a file."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (num_tiles, tile_px, tile_px, 3), dtype=np.uint8)
    return np.stack([cv2.GaussianBlur(tile, (0, 0), 2) for tile in noise])


def measure_tile_work(tile_px: int, radius_px: float) -> dict[str, float]:
    """Microseconds per tile of the work done on CPU actors."""
    rng = tile_rng(0, 0, "benchmark")
    tile = random_tiles(1, tile_px)[0]
    nuclei = rng.uniform(0, tile_px, (NUM_NUCLEI, 2))
    policy = CROP_POLICIES["dinov2"]
    calls = {
        "tile_rng": lambda: tile_rng(0, 0, "slide:0.5:224:3_4:17"),
        "perturb": lambda: perturb(tile, nuclei, radius_px, rng),
        "sample_views": lambda: sample_views(nuclei, tile_px, policy, rng),
    }
    return {f"{k}_us": round(1e6 * best_seconds(call, 50), 1) for k, call in calls.items()}


def measure_rendering(
    policy: CropPolicy, num_tiles: int, tile_px: int, sizes_px: tuple[int, int]
) -> float:
    """Crops per second of `render_crops`."""
    rng = tile_rng(0, 0, "benchmark")
    tiles = torch.from_numpy(random_tiles(num_tiles, tile_px))
    nuclei = rng.uniform(0, tile_px, (NUM_NUCLEI, 2))
    rows = np.stack([sample_views(nuclei, tile_px, policy, rng) for _ in range(num_tiles)])
    params = torch.from_numpy(rows)
    seconds = best_seconds(lambda: render_crops(tiles, params, policy, *sizes_px), 1)
    return num_tiles * policy.num_views / seconds


def torchvision_view(scale: tuple[float, float], out_px: int, blur_prob: float) -> v2.Compose:
    """DINOv2's usual view, from PIL to a normalised tensor."""
    jitter = v2.ColorJitter(0.4, 0.4, 0.2, 0.1)
    return v2.Compose(
        [
            v2.RandomResizedCrop(out_px, scale),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([jitter], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(9, (0.1, 2.0))], p=blur_prob),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )


def measure_torchvision(
    policy: CropPolicy, num_tiles: int, tile_px: int, sizes_px: tuple[int, int]
) -> float:
    """Crops per second of the torchvision pipeline with as many views."""
    images = [Image.fromarray(tile) for tile in random_tiles(num_tiles, tile_px)]
    views = [torchvision_view(policy.global_scale, sizes_px[0], 0.55)] * policy.num_global
    views += [torchvision_view(policy.local_scale, sizes_px[1], 0.5)] * policy.num_local
    seconds = best_seconds(lambda: [view(image) for image in images for view in views], 1, 3)
    return num_tiles * policy.num_views / seconds


def main() -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    result: dict[str, float] = {}
    for tile_px, radius_px in ((128, 12.5), (224, 25.0), (256, 50.0)):
        for name, value in measure_tile_work(tile_px, radius_px).items():
            result[f"{name}_{tile_px}px"] = value
            print(f"{name:>16} at {tile_px} px: {value:8.1f}")
    small = replace(CROP_POLICIES["dinov2"], num_local=4)
    cases = {
        "small_128_to_96_48": (small, 16, 128, (96, 48)),
        "full_224_to_224_96": (CROP_POLICIES["dinov2"], 4, 224, (224, 96)),
    }
    for name, case in cases.items():
        ours, reference = measure_rendering(*case), measure_torchvision(*case)
        result[f"render_{name}_crops_s"] = round(ours)
        result[f"torchvision_{name}_crops_s"] = round(reference)
        print(f"{name}: {ours:.0f} crops/s; torchvision, one view at a time: {reference:.0f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
