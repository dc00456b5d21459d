"""From what a sample of slides costs and a cluster's shape to hours, cost and the bottleneck."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from cytoray.planning.device import DeviceRate
from cytoray.planning.estimate import Interval, estimate, share_interval
from cytoray.planning.measure import SlideMeasure
from cytoray.planning.nodes import NodeGroup, price_per_hour, total_cpus, total_gpus

# Which of a slide's seconds a job spends; seconds `slide_s` are spent once, the others on tiles.
STAGES: dict[str, tuple[str, ...]] = {
    "index": ("slide_s", "read_s", "detect_s"),
    "pretrain": ("read_s", "detect_s", "perturb_s"),
    "embed": ("read_s",),
}
_FIGURES = tuple(f.name for f in fields(SlideMeasure) if f.type in ("float", "int"))
_COLUMN = {name: i for i, name in enumerate(_FIGURES)}
# A training worker or encoder has one CPU beside its GPU.
_CPUS_PER_GPU = 1
_PLAN_BYTES_PER_CHUNK = 12
_PLAN_BYTES_PER_SLIDE = 300
_STEPS_AHEAD = 4
_CHUNKS_PER_READER = 2


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is to be done.

    Attributes:
        job: `index`, `pretrain` or `embed`.
        num_slides: slides of the cohort.
        tile_px: side of a tile.
        steps: optimiser steps of a pretraining; None: `epochs` passes over the tiles.
        epochs: passes over all tiles.
        batch_size: tiles a step, all GPUs together.
        shuffle_chunks: see `cytoray pretrain`.
        has_nuclei: nuclei are in the index already and are not detected again.
        known_tiles: tiles of the cohort where an index has counted them.
        known_nuclei: likewise.
        known_quarantined: share of slides that the index has quarantined.
    """

    job: str
    num_slides: int
    tile_px: int
    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 256
    shuffle_chunks: int = 16
    has_nuclei: bool = False
    known_tiles: int | None = None
    known_nuclei: int | None = None
    known_quarantined: float | None = None

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the seconds of a slide that count."""
        stages = STAGES[self.job]
        skip = self.has_nuclei and self.job != "index"
        return tuple(name for name in stages if not (skip and name == "detect_s"))


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of the work on a tile, on one core: CPU milliseconds a tile, tiles a second."""

    name: str
    ms_per_tile: float
    tiles_per_s_core: float


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a job would take. Intervals are over slides; the speed of the machines is taken as is.

    Attributes:
        tiles, nuclei: of the cohort, once.
        tiles_processed: over all epochs.
        bytes_read: from storage, over all epochs.
        quarantined: share of slides.
        stages: CPU work of a tile, and in all (`together`).
        reader_cpus: CPUs left for reading.
        cores_to_feed_gpus: cores that make tiles as fast as the GPUs take them; None without GPUs.
        gpu: the rate of one GPU and what that figure is; None where the job needs none.
        bottleneck: `CPU` or `GPU`.
        hours, cost: of the whole cluster; at least that much where `is_bound`.
        is_bound: the GPU's rate is a bound, so hours and cost are least values, not estimates.
        object_store_bytes: on all nodes together, while it runs.
    """

    tiles: Interval
    nuclei: Interval
    tiles_processed: Interval
    bytes_read: Interval
    quarantined: Interval
    stages: tuple[Stage, ...]
    reader_cpus: int
    cores_to_feed_gpus: float | None
    gpu: DeviceRate | None
    bottleneck: str
    hours: Interval
    cost: Interval
    is_bound: bool
    object_store_bytes: float


class _Figures:
    """The figures of a job as functions of the means over slides (B, k)."""

    def __init__(self, work: Work, nodes: Sequence[NodeGroup], gpu: DeviceRate | None) -> None:
        self.work, self.gpu = work, gpu
        self.gpus = total_gpus(nodes) if gpu is not None else 0
        self.reader_cpus = total_cpus(nodes) - self.gpus * _CPUS_PER_GPU

    def of(self, name: str, known: int | None = None) -> Callable[[np.ndarray], np.ndarray]:
        """A quantity of the cohort; `known` overrules the sample."""
        if known is not None:
            return lambda means: np.full(len(means), float(known))
        return lambda means: means[:, _COLUMN[name]] * self.work.num_slides

    def tiles(self, means: np.ndarray) -> np.ndarray:
        return self.of("tiles", self.work.known_tiles)(means)

    def processed(self, means: np.ndarray) -> np.ndarray:
        if self.work.job != "pretrain":
            return self.tiles(means)
        if self.work.steps is not None:
            return np.full(len(means), float(self.work.steps * self.work.batch_size))
        return self.tiles(means) * self.work.epochs

    def per_tile(self, means: np.ndarray, names: Sequence[str]) -> np.ndarray:
        tiles = means[:, _COLUMN["tiles"]]
        # A resample of refused slides alone has no tile and says nothing about the cost of one
        tiles = np.where(tiles > 0, tiles, np.nan)
        return means[:, [_COLUMN[name] for name in names]].sum(axis=1) / tiles

    def cpu_hours(self, means: np.ndarray) -> np.ndarray:
        seconds = self.processed(means) * self.per_tile(means, self.work.stages)
        return seconds / self.reader_cpus / 3600

    def gpu_hours(self, means: np.ndarray) -> np.ndarray:
        if self.gpu is None:
            return np.zeros(len(means))
        return self.processed(means) / (self.gpus * self.gpu.tiles_per_s) / 3600

    def hours(self, means: np.ndarray) -> np.ndarray:
        return np.maximum(self.cpu_hours(means), self.gpu_hours(means))

    def bytes_read(self, means: np.ndarray) -> np.ndarray:
        chunks = self.processed(means) * self.per_tile(means, ["chunk_bytes"])
        once = self.of("slide_bytes")(means) if self.work.job == "index" else 0.0
        return chunks + once

    def object_store(self, means: np.ndarray) -> float:
        """Bytes of chunks under way, of the batches dealt ahead, and of the plan."""
        work = self.work
        tile_bytes = 3.0 * work.tile_px**2
        slides = work.num_slides * _PLAN_BYTES_PER_SLIDE
        if work.job == "index":
            return float(slides)
        per_chunk = float(1 / self.per_tile(means, ["chunks"])[0])
        chunks = float(self.processed(means)[0]) / per_chunk
        plan = slides + _PLAN_BYTES_PER_CHUNK * float(self.tiles(means)[0]) / per_chunk
        under_way = min(chunks, _CHUNKS_PER_READER * self.reader_cpus)
        ahead = 0.0
        if work.job == "pretrain":
            under_way += min(chunks, 2 * work.shuffle_chunks)
            ahead = _STEPS_AHEAD * work.batch_size * tile_bytes
        return plan + under_way * per_chunk * tile_bytes + ahead


def forecast(
    sample: Sequence[SlideMeasure],
    work: Work,
    nodes: Sequence[NodeGroup],
    gpu: DeviceRate | None,
    *,
    seed: int = 0,
) -> Forecast:
    """What the work takes on the cluster.

    CPUs read while GPUs train, so the slower side sets the pace: hours = max(tiles x CPU seconds a
    tile / reading CPUs, tiles / (GPUs x tiles a second of one)) / 3600, cost = hours x the price of
    all nodes.

    Args:
        sample: slides measured, at least one of them usable.
        work: what is to be done.
        nodes: the cluster.
        gpu: rate of one GPU; None: the job runs on CPUs alone.
        seed: of the bootstrap.
    """
    columns = np.array([[getattr(slide, name) for name in _FIGURES] for slide in sample], float)
    means = columns.mean(axis=0, keepdims=True)
    figures = _Figures(work, nodes, gpu)

    def over_slides(statistic: Callable[[np.ndarray], np.ndarray]) -> Interval:
        return estimate(columns, statistic, population=work.num_slides, seed=seed)

    stages = []
    for name, parts in [*((n, [n]) for n in work.stages), ("together", list(work.stages))]:
        seconds = float(figures.per_tile(means, parts)[0])
        rate = 1 / seconds if seconds else float("inf")
        label = name.removesuffix("_s")
        stages.append(Stage(name=label, ms_per_tile=1000 * seconds, tiles_per_s_core=rate))
    hours = over_slides(figures.hours)
    cpu_is_slower = figures.cpu_hours(means)[0] >= figures.gpu_hours(means)[0]
    quarantined = share_interval(sum(bool(slide.reason) for slide in sample), len(sample))
    if work.known_quarantined is not None:
        known = work.known_quarantined
        quarantined = Interval(value=known, low=known, high=known)
    return Forecast(
        tiles=over_slides(figures.tiles),
        nuclei=over_slides(figures.of("nuclei", work.known_nuclei)),
        tiles_processed=over_slides(figures.processed),
        bytes_read=over_slides(figures.bytes_read),
        quarantined=quarantined,
        stages=tuple(stages),
        reader_cpus=figures.reader_cpus,
        cores_to_feed_gpus=(
            figures.gpus * gpu.tiles_per_s / stages[-1].tiles_per_s_core if gpu else None
        ),
        gpu=gpu,
        bottleneck="CPU" if cpu_is_slower else "GPU",
        hours=hours,
        cost=hours.scaled(price_per_hour(nodes)) if price_per_hour(nodes) else Interval(value=0.0),
        is_bound=gpu is not None and gpu.is_bound,
        object_store_bytes=figures.object_store(means),
    )
