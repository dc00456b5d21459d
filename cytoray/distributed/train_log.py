"""What a training worker writes down: events, metrics, quarantine lines, the tiles of each step."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import torch

from cytoray.distributed.tile_stream import TileBatch
from cytoray.runs import RunFolder, append_event
from cytoray.streaming.ledger import ledger_path
from cytoray.tracking import RunLogger

logger = logging.getLogger(__name__)


class StreamMeter:
    """Sums what the readers and the loop spent since the last log line.

    Args:
        flops_per_tile: of a training step; 0: unknown.
        peak_flops: of all devices of the run together, FLOP/s; None: unknown.
    """

    def __init__(self, flops_per_tile: int = 0, peak_flops: float | None = None) -> None:
        self._flops, self._peak = flops_per_tile, peak_flops
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.tiles = self.rows = self.cached = 0
        self.looked = self.without_nuclei = self.nuclei = 0
        self.wait_s = self.read_s = self.detect_s = self.perturb_s = 0.0
        self.most_wait_s = 0.0
        self.began = time.perf_counter()

    def add(self, batch: TileBatch) -> None:
        """Count a batch."""
        columns = batch.columns
        self.tiles += batch.tiles
        nuclei = columns["num_nuclei"]
        self.rows += len(nuclei)
        self.looked += int((nuclei >= 0).sum())  # -1: nobody looked
        self.nuclei += int(nuclei.clip(min=0).sum())
        self.without_nuclei += int((nuclei == 0).sum())
        self.cached += int(columns["cached"].sum())
        self.wait_s += batch.wait_s
        self.most_wait_s = max(self.most_wait_s, batch.wait_s)
        for name in ("read_s", "detect_s", "perturb_s"):
            setattr(self, name, getattr(self, name) + float(columns[name].sum()))

    def summary(self) -> dict[str, float]:
        """Rates since `reset`; the `*_ms_per_tile` are CPU milliseconds of one reader."""
        seconds = max(time.perf_counter() - self.began, 1e-9)
        rows = max(self.rows, 1)
        tiles_per_s = self.tiles / seconds
        values = {
            "tiles_per_s": tiles_per_s,
            "wait_share": min(1.0, self.wait_s / seconds),
            "wait_ms_most": 1e3 * self.most_wait_s,
            "read_ms_per_tile": 1e3 * self.read_s / rows,
            "detect_ms_per_tile": 1e3 * self.detect_s / rows,
            "perturb_ms_per_tile": 1e3 * self.perturb_s / rows,
            "train_ms_per_tile": 1e3 * max(seconds - self.wait_s, 0.0) / rows,
            "cache_hit_share": self.cached / rows,
        }
        if self.looked:
            values["nuclei_per_tile"] = self.nuclei / self.looked
            values["no_nucleus_share"] = self.without_nuclei / self.looked
        if self._flops:
            values["tflops"] = self._flops * tiles_per_s / 1e12
        if self._flops and self._peak:
            values["mfu"] = self._flops * tiles_per_s / self._peak
        return values


class TrainLog:
    """Writes for one worker; rank 0 speaks for all.

    Args:
        folder: of the run.
        rank: this worker.
        world: workers.
        tracking_uri, run_id: MLflow; no logging when `run_id` is empty.
        log_tiles: write down the tile ids of every step (`cytoray.streaming.ledger`).
    """

    def __init__(
        self,
        folder: RunFolder,
        rank: int,
        world: int,
        *,
        tracking_uri: str = "",
        run_id: str = "",
        log_tiles: bool = False,
    ) -> None:
        self._rank, self._world = rank, world
        self._folder, self._log_tiles = folder, log_tiles
        self._quarantine = folder.path / f"quarantine-rank{rank}.jsonl"
        self._logger: RunLogger | None = None
        if rank == 0 and run_id:
            self._logger = RunLogger(tracking_uri, run_id, pending_metrics(folder))

    def event(self, kind: str, **values: Any) -> None:
        """Write an event; from ranks other than 0 only why they ended.

        A disk that is full must not hide what the event was about: it goes to the log then.
        """
        if self._rank and kind not in ("failed", "stopped"):
            return
        facts = {"event": kind, "rank": self._rank, "world": self._world, "pid": os.getpid()}
        try:
            self._folder.append_event(facts | values)
        except OSError as error:
            logger.error("event %s could not be written (%s): %s", kind, error, values)

    def step(
        self,
        step: int,
        metrics: dict[str, torch.Tensor],
        meter: StreamMeter,
        **more: float,
    ) -> None:
        """Log the metrics of a step and what the stream did since the last one."""
        if self._rank == 0:
            values = {name: float(value) for name, value in metrics.items()}
            values |= meter.summary() | more
            self.event("step", step=step, **values)
            if self._logger is not None:
                self._logger.log(values, step)
        meter.reset()

    def batch(self, attempt: str, step: int, batch: TileBatch) -> None:
        """Note the tiles that could not be read and, if asked, all tiles of a step."""
        if batch.invalid:
            with open(self._quarantine, "a", encoding="utf-8") as file:
                for tile_id, message in batch.invalid:
                    file.write(json.dumps({"tile_id": tile_id, "message": message}) + "\n")
        if self._log_tiles:
            ids = batch.columns["tile_id"].tolist()
            record = {"attempt": attempt, "step": step, "tile_ids": ids}
            append_event(ledger_path(self._folder.path, self._rank), record)

    def close(self) -> None:
        """Send the last metrics."""
        if self._logger is not None:
            self._logger.close()


def pending_metrics(folder: RunFolder) -> Path:
    """The file of metrics that MLflow has not taken yet."""
    return folder.path / "mlflow-pending.jsonl"
