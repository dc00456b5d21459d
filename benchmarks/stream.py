"""Tiles from slides into the training loop: our stream against a plain torch DataLoader.

    python -m benchmarks.stream [--index DIR | --slides DIR] [--detect] [--rounds 2]
        [--seconds 6] [--workers 2] [--only feed wait cache scaling] [--batch 32]

feed: both ways read the same chunks of the same slides, take nuclei from the table (`--detect`:
find them on the fly), perturb and draw views, with as many processes, and copy every batch to the
device: ours through Ray Data and the dealer into a Ray Train worker, the other as an
IterableDataset of which every worker takes every other chunk. The clock runs in mid-stream, when as
much is read ahead at its end as at its start. wait: the share of a step that a small real
pretraining (ViT-tiny, 96 px crops) waits for input. cache: our stream with `--cache-tiles`, from
the second epoch on. scaling: a pretraining (ViT-tiny, 2 x 224 and 8 x 96 px crops, so that reading
is light beside training) with two workers against one, one thread each, `--batch` tiles a worker,
in the last 16 of 64 steps: before, a process still takes new memory, as oneDNN keeps a kernel for
every number of masked patches. Workers exchange 47 MB of gradients a step whatever the batch, so
small batches scale worse.

Without a folder, slides are generated. The last line is JSON: vs_dataloader, the median ratio of
the rounds (above 1, ours is faster); wait_share; tiles_per_s; cache_gain, the speed with the cache
over that without; scaling_efficiency; null for what was not measured; cpus.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import ray
import ray.train
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from cytoray.distributed.cluster import Shared, connect, share_cpus
from cytoray.distributed.dealer import start_dealer
from cytoray.distributed.tile_stream import TileStream
from cytoray.models.transfer import to_device
from cytoray.perturb import CROP_POLICIES
from cytoray.runs import read_events
from cytoray.streaming import ChunkOrder, StreamPosition
from cytoray.streaming.plan import ReadPlan, plan_of_index
from cytoray.streaming.tile_cache import TileCacheConfig
from cytoray.streaming.tiles import TileReader, TileReaderConfig
from cytoray.synthetic import SynthConfig, synthesize
from cytoray.training import CropConfig, HeadConfig, OptimConfig, PretrainConfig
from pipelines import index, pretrain

BATCH = 64
SEED = 0
WARM_S = 5.0  # until the pool of readers has grown
PARTS = ("feed", "wait", "cache", "scaling")
TO_DEVICE = ("pixels", "views")


class Chunks(IterableDataset):
    """The peer: every worker reads every n-th position and hands on batches of its own tiles."""

    def __init__(self, plan: ReadPlan, order: ChunkOrder, config: TileReaderConfig) -> None:
        self.reading = (plan, order, config)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        cv2.setNumThreads(1)
        info: Any = get_worker_info()
        reader, held, rows = TileReader(*self.reading), [], 0
        for position in range(info.id, 1 << 40, info.num_workers):
            held.append(reader.read(position))
            rows += len(held[-1]["tile_id"])
            if rows >= BATCH:
                whole = {name: np.concatenate([part[name] for part in held]) for name in held[0]}
                for start in range(0, rows - rows % BATCH, BATCH):
                    yield _batch(whole, start)
                held, rows = [{k: v[rows - rows % BATCH :] for k, v in whole.items()}], rows % BATCH


def _batch(columns: dict[str, np.ndarray], start: int) -> dict[str, Any]:
    part = {name: values[start : start + BATCH] for name, values in columns.items()}
    return {
        name: values.tolist() if values.dtype.kind == "U" else torch.from_numpy(values.copy())
        for name, values in part.items()
    }


def tiles_per_s(batches: Iterable[dict[str, Any]], device: torch.device, seconds: float) -> float:
    """Speed at which batches arrive on the device, from `WARM_S` after the first on."""
    first = begin = None
    tiles = 0
    for batch in batches:
        for name in TO_DEVICE:
            to_device(batch[name], device)
        now = time.perf_counter()
        first = first or now
        if begin is None:
            begin = now if now - first > WARM_S else None
            continue
        tiles += len(batch["pixels"])
        if now - begin >= seconds:
            return tiles / (now - begin)
    raise RuntimeError("the stream ended before the clock did")


def dataloader(
    plan: ReadPlan, order: ChunkOrder, config: TileReaderConfig, workers: int, seconds: float
) -> float:
    """Tiles per second of the peer."""
    loader = DataLoader(
        Chunks(plan, order, config),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4,
        multiprocessing_context="spawn",
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return tiles_per_s(loader, device, seconds)


def feed_loop(settings: dict[str, Any]) -> None:
    """Inside the Ray Train worker: take batches off the stream and copy them to the device."""
    name = start_dealer(settings["source"], settings["dealing"])
    stream = TileStream(name, 0)
    batches = (batch.columns for batch in stream)
    speed = tiles_per_s(batches, get_device(), settings["seconds"])
    stream.close()
    ray.kill(ray.get_actor(name, namespace="cytoray"))
    Path(settings["answer"]).write_text(json.dumps(speed))


def ours(
    plan: ReadPlan, order: ChunkOrder, config: TileReaderConfig, workers: int, seconds: float
) -> float:
    """Tiles per second of Ray Data, the dealer and a Ray Train worker."""
    share = share_cpus(ray.cluster_resources()["CPU"], 1, cpus_per_worker=None, max_readers=workers)
    source = {"plan": Shared(plan), "order": order, "config": config, "share": share,
              "reserved_cpus": share.cpus_per_worker, "reserved_gpus": 0.0}  # fmt: skip
    dealing = {"start": StreamPosition(), "end_epoch": 10_000, "batch_size": BATCH,
               "world_size": 1}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "speed.json"
        settings = {"source": source, "dealing": dealing, "seconds": seconds}
        loop: Any = feed_loop
        TorchTrainer(
            loop,
            train_loop_config=settings | {"answer": str(answer)},
            scaling_config=ScalingConfig(
                num_workers=1,
                use_gpu=torch.cuda.is_available(),
                resources_per_worker={"CPU": share.cpus_per_worker},
            ),
            run_config=RunConfig(storage_path=folder),
        ).fit()
        return json.loads(answer.read_text())


def make_index(options: argparse.Namespace, folder: Path) -> Path:
    """The index to read: as given, or made of slides that are given or generated."""
    if options.index:
        return options.index
    manifest = folder / "manifest.csv"
    if options.slides:
        paths = sorted(p for p in options.slides.iterdir() if p.suffix in (".svs", ".tiff"))
        lines = [f"{path.stem},{path.resolve()}" for path in paths[: options.max_slides]]
        manifest.write_text("\n".join(["slide_id,path", *lines]) + "\n")
    else:
        manifest = synthesize(
            SynthConfig(num_slides=2, held_out=0, size_px=4096, mpp=0.5), folder / "slides"
        )
    out = folder / "index"
    index.run(index.Config(manifest=str(manifest), out=out, tile_px=224, mpp=options.mpp))
    return out


def small_run(folder: Path, source: Path, ssl: PretrainConfig, **changes: Any) -> list[dict]:
    """Events of the steps of a small pretraining, without the first ones."""
    out = Path(tempfile.mkdtemp(dir=folder))
    config = pretrain.Config(
        index=source, out=out / "run", ssl=ssl, log_every=1, checkpoint_every=1 << 20,
        tracking_uri=f"sqlite:///{folder}/mlflow.db",
    )  # fmt: skip
    pretrain.run(replace(config, **changes))
    steps = [e for e in read_events(out / "run" / "events.jsonl") if e["event"] == "step"]
    return steps[len(steps) // 3 :]


def wait_share(folder: Path, source: Path) -> float:
    """Share of its time that a step of a ViT-tiny on 96 px crops waits for input."""
    ssl = PretrainConfig(
        crops=CropConfig(global_px=96, local_px=48, num_local=4),
        head=HeadConfig(out_dim=4096),
        optim=OptimConfig(warmup_steps=5, freeze_last_layer_steps=5),
        batch_size=32,
        total_steps=24,
    )
    return statistics.mean(step["wait_share"] for step in small_run(folder, source, ssl))


def scaling(folder: Path, source: Path, batch: int, rounds: int) -> float:
    """Tiles per second of two workers over twice those of one, in turn; median of the rounds."""
    ratios = []
    for _ in range(rounds):
        one, two = (training_speed(folder, source, batch, workers) for workers in (1, 2))
        ratios.append(two / (2 * one))
    return statistics.median(ratios)


def training_speed(folder: Path, source: Path, batch: int, workers: int) -> float:
    """Tiles per second of a pretraining, in its last steps."""
    ssl = PretrainConfig(
        crops=CropConfig(global_px=224, local_px=96, num_local=8),
        head=HeadConfig(out_dim=4096),
        optim=OptimConfig(warmup_steps=5, freeze_last_layer_steps=5),
        batch_size=batch * workers,
        total_steps=64,
    )
    steps = small_run(folder, source, ssl, workers=workers, cpus_per_worker=0.5)[-16:]
    speed = statistics.median(step["tiles_per_s"] for step in steps)
    print(f"{workers} worker(s): {speed:.2f} tiles/s", flush=True)
    return speed


def feed(source: Path, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Both ways and, if asked for, ours with a tile cache, in turn; medians."""
    plan = plan_of_index(source)
    order = ChunkOrder(num_chunks=plan.num_chunks, seed=SEED)
    config = TileReaderConfig(
        seed=SEED,
        policy=CROP_POLICIES["dinov2"],
        nuclei_dir="" if options.detect else str(source.resolve() / "nuclei"),
    )
    cache = TileCacheConfig(max_gb=20.0, key="benchmark", folder=str(folder / "tiles"))
    ways: dict[str, Any] = {}
    if "feed" in options.only:
        ways["dataloader"] = lambda: dataloader(
            plan, order, config, options.workers, options.seconds
        )
    ways["ours"] = lambda: ours(plan, order, config, options.workers, options.seconds)
    if "cache" in options.only:
        kept = replace(config, cache=cache)
        fill(plan, order, kept)
        ways["cached"] = lambda: ours(plan, order, kept, options.workers, options.seconds)
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, measure in ways.items():
            speeds[name].append(measure())
            print(f"{name:12s} {speeds[name][-1]:8.0f} tiles/s", flush=True)
    ratios = {
        "vs_dataloader": ("ours", "dataloader"),
        "cache_gain": ("cached", "ours"),
    }
    return {"tiles_per_s": float(np.median(speeds["ours"]))} | {
        name: float(np.median(np.divide(speeds[a], speeds[b])))
        for name, (a, b) in ratios.items()
        if a in speeds and b in speeds
    }


def fill(plan: ReadPlan, order: ChunkOrder, config: TileReaderConfig) -> None:
    """Read an epoch, so that what follows comes from the cache."""
    reader = TileReader(plan, order, config)
    for position in range(plan.num_chunks):
        reader.read(position)


def main() -> None:
    """Measure, print each round, and a line of JSON."""
    parser = argparse.ArgumentParser(description="Tiles into the training loop, side by side.")
    parser.add_argument("--index", type=Path, help="folder of `cytoray index`, with nuclei")
    parser.add_argument("--slides", type=Path, help="folder of slides that say their um/px")
    parser.add_argument("--max-slides", type=int, default=8)
    parser.add_argument("--mpp", type=float, default=0.5)
    parser.add_argument("--detect", action="store_true", help="find nuclei on the fly")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--workers", type=int, default=2, help="reading processes")
    parser.add_argument("--batch", type=int, default=32, help="tiles a worker, for scaling")
    parser.add_argument("--only", nargs="+", default=["feed", "wait"], choices=PARTS)
    options = parser.parse_args()
    connect()
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="cs") as name:
        folder = Path(name)
        source = make_index(options, folder)
        if {"feed", "cache"} & set(options.only):
            found |= feed(source, options, folder)
        if "wait" in options.only:
            found["wait_share"] = wait_share(folder, source)
        if "scaling" in options.only:
            found["scaling_efficiency"] = scaling(folder, source, options.batch, options.rounds)
    names = ("vs_dataloader", "wait_share", "tiles_per_s", "cache_gain", "scaling_efficiency")
    result = {key: round(found[key], 3) if key in found else None for key in names}
    print(json.dumps(result | {"cpus": len(os.sched_getaffinity(0))}))


if __name__ == "__main__":
    main()
