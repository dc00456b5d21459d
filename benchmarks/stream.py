"""Tiles from slides into the training loop: our stream against a plain torch DataLoader.

    python -m benchmarks.stream [--index DIR | --slides DIR] [--detect] [--rounds 3]
        [--seconds 8] [--workers 2] [--only feed|wait|cache|scaling]

`feed`: both ways read the same chunks of the same slides, take nuclei from the table (`--detect`:
find them on the fly), perturb and draw views, with as many processes, and copy every batch to the
device: ours through Ray Data and the dealer into a Ray Train worker, the other as an
IterableDataset whose workers take every other chunk. The clock runs in mid-stream, when what was
read ahead is the same at both of its ends. `wait`: the share of a step that a small real pretraining
(ViT-tiny, 96 px crops) waits for input. `cache`: the same stream with `--cache-tiles`, from the
second epoch on. `scaling`: a pretraining with two workers against one, one thread each and the same
batch a worker, on crops so large that reading is light work beside training.

Without a folder, slides are generated. The last line is JSON: vs_dataloader, the median ratio of the
rounds (above 1, ours is faster); tiles_per_s; wait_share; cache_gain; scaling_efficiency (null where
not measured); cpus.
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
from cytoray.streaming.tiles import TileReader, TileReaderConfig
from cytoray.synthetic import SynthConfig, synthesize
from cytoray.training import BackboneConfig, CropConfig, HeadConfig, OptimConfig, PretrainConfig
from pipelines import index, pretrain

BATCH = 64
SEED = 0
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
    """Speed at which batches arrive on the device, from 2 s after the first on."""
    first = begin = None
    tiles = 0
    for batch in batches:
        for name in TO_DEVICE:
            to_device(batch[name], device)
        now = time.perf_counter()
        first = first or now
        if begin is None:
            begin = now if now - first > 2.0 else None
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
