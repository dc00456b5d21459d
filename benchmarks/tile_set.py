"""Kept tiles of an index with their nuclei in one file, to pretrain without slides and without Ray.

    python -m benchmarks.tile_set --index INDEX --out tiles.npz [--quality 95]

JPEG tiles: a file of some ten MB can be carried to a machine that has a GPU and
nothing else. What is drawn for a tile in an epoch is what the streamed pretraining draws.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from torch.utils.data import DataLoader, Dataset

from cytoray.io import atomic_path
from cytoray.nuclei import read_nuclei
from cytoray.perturb import CropPolicy, PerturbConfig, tile_rng
from cytoray.slides import parse_tile_id
from cytoray.streaming.chunk_nuclei import to_tile_frame
from cytoray.streaming.plan import plan_of_index
from cytoray.streaming.tile_pixels import ChunkTiles


@dataclass(frozen=True, kw_only=True)
class TileSet:
    """Tiles and the nuclei in them.

    Attributes:
        tile_ids: (N,) str.
        pixels: uint8 (N, S, S, 3).
        nuclei: of each tile, float32 (n, 2), x and y in tile pixels.
        mpp: um/px.
    """

    tile_ids: np.ndarray
    pixels: np.ndarray
    nuclei: list[np.ndarray]
    mpp: float

    def __len__(self) -> int:
        return len(self.pixels)


def read_index(index: Path) -> TileSet:
    """Every tile an index keeps; a tile that cannot be read is left out."""
    plan = plan_of_index(index)
    source = ChunkTiles(plan)
    tables = {}
    ids, pixels, nuclei = [], [], []
    for position in range(plan.num_chunks):
        rows = source.read(position)
        slide = int(rows["slide"][0])
        facts = source.slides.row(slide)
        _, layout = source.slides.layout(slide)
        if slide not in tables:
            tables = {slide: read_nuclei(index / "nuclei" / f"{facts['slide_id']}.parquet")}
        for name, error, tile in zip(rows["tile_id"], rows["error"], rows["pixels"], strict=True):
            if error:
                continue
            _, _, column, row, number = parse_tile_id(str(name))
            corner = layout.tile_rect_px(column, row, number)[:2]
            xy = to_tile_frame(
                tables[slide],
                mpp=plan.mpp,
                mpp_slide=(facts["mpp_x"], facts["mpp_y"]),
                tile_x_px=corner[0],
                tile_y_px=corner[1],
            )
            ids.append(str(name))
            pixels.append(tile)
            nuclei.append(xy[np.all((xy >= 0) & (xy < plan.tile_px), axis=1)])
    return TileSet(
        tile_ids=np.array(ids), pixels=np.stack(pixels), nuclei=nuclei, mpp=float(plan.mpp)
    )


def save_tiles(path: Path, tiles: TileSet, quality: int = 95) -> None:
    """Write `.npz`: JPEG bytes end to end, where each ends, and nuclei likewise."""
    coded = [simplejpeg.encode_jpeg(tile, quality) for tile in tiles.pixels]
    with atomic_path(path) as draft, Path(draft).open("wb") as file:
        np.savez(
            file,
            tile_ids=tiles.tile_ids,
            jpeg=np.frombuffer(b"".join(coded), np.uint8),
            jpeg_ends=np.cumsum([len(c) for c in coded]),
            nuclei=np.concatenate(tiles.nuclei),
            nuclei_ends=np.cumsum([len(n) for n in tiles.nuclei]),
            mpp=tiles.mpp,
        )


def load_tiles(path: Path) -> TileSet:
    """Read what `save_tiles` wrote."""
    with np.load(path, allow_pickle=False) as file:
        data = {name: file[name] for name in file.files}
    coded = np.split(data["jpeg"], data["jpeg_ends"][:-1])
    return TileSet(
        tile_ids=data["tile_ids"],
        pixels=np.stack([simplejpeg.decode_jpeg(c.tobytes()) for c in coded]),
        nuclei=np.split(data["nuclei"], data["nuclei_ends"][:-1]),
        mpp=float(data["mpp"]),
    )


class Views(Dataset):
    """(tile, epoch) -> perturbed pixels and view parameters, a pure function of the two."""

    def __init__(
        self, tiles: TileSet, policy: CropPolicy, perturb: PerturbConfig, seed: int
    ) -> None:
        self.tiles, self.policy, self.perturb, self.seed = tiles, policy, perturb, seed

    def __getitem__(self, key: tuple[int, int]) -> dict[str, np.ndarray]:
        index, epoch = key
        made = self.perturb.views(
            self.tiles.pixels[index],
            self.tiles.nuclei[index],
            self.policy,
            tile_rng(self.seed, epoch, str(self.tiles.tile_ids[index])),
            mpp=self.tiles.mpp,
        )
        return {"pixels": made.tile, "views": made.views}


def batches(
    tiles: TileSet,
    policy: CropPolicy,
    perturb: PerturbConfig,
    *,
    batch: int,
    steps: int,
    seed: int,
    workers: int = 0,
) -> Iterator[dict[str, Any]]:
    """`steps` batches; every epoch uses each tile once, in an order of its own."""
    epochs = -(-batch * steps // len(tiles))
    rng = np.random.default_rng(seed)
    order = [(int(i), epoch) for epoch in range(epochs) for i in rng.permutation(len(tiles))]
    sampler = [order[start : start + batch] for start in range(0, steps * batch, batch)]
    views = Views(tiles, policy, perturb, seed)
    yield from DataLoader(
        views,
        batch_sampler=sampler,  # type: ignore[arg-type]
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )


def main() -> None:
    """Write the file and say what is in it."""
    parser = argparse.ArgumentParser(description="Kept tiles of an index in one file.")
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quality", type=int, default=95, help="of the JPEG tiles")
    args = parser.parse_args()
    tiles = read_index(args.index)
    save_tiles(args.out, tiles, args.quality)
    size_mb = args.out.stat().st_size / 1e6
    print(f"{len(tiles)} tiles, {sum(map(len, tiles.nuclei))} nuclei, {size_mb:.1f} MB: {args.out}")


if __name__ == "__main__":
    main()
