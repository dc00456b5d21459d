"""Probes of the encoder while it is trained: how well frozen features tell labelled cells apart.

The driver looks for new checkpoints and hands the encoder in them to a Ray task. Training waits for
none of it.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayError

from cytoray.errors import InputError
from cytoray.evaluation import Split
from cytoray.evaluation.metrics import CELL_METRICS, evaluate_scores
from cytoray.evaluation.protocol import Examples, probe_examples
from cytoray.finetune import read_cells, split_cells
from cytoray.finetune.data import CellData, prepare_cells
from cytoray.models.encoder import load_encoder
from cytoray.training import latest_checkpoint

PROBES = ("knn", "linear")
_BATCH_IMAGES = 32
_LOOK_EVERY_S = 1.0


@dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """What every probe of a run is made on.

    Attributes:
        data: labelled cell images.
        split: their parts, groups whole.
        every: steps between probes, at least; each is of a checkpoint.
    """

    data: CellData
    split: Split
    every: int


def prepare_probe(source: Path, img_px: int, out: Path, *, every: int, seed: int) -> ProbeSettings:
    """Read the labelled cells and decode them once.

    Args:
        source: a folder per class or a CSV; see `read_cells`.
        img_px: side of the images the encoder takes.
        out: folder of the decoded pixels.
        every: steps between probes.
        seed: of the split.

    Raises:
        InputError: the cells cannot be used, or cannot be split by group.
    """
    data, _ = prepare_cells(read_cells(source), [img_px], out)
    return ProbeSettings(data=data, split=split_cells(data.cells, seed=seed), every=every)


def probe_encoder(encoder: Path, settings: ProbeSettings) -> dict[str, float]:
    """kNN and linear probe of an encoder folder.

    Returns:
        `probe_<probe>_<metric>` of the test part, for the metrics of cells.
    """
    model = load_encoder(encoder)
    images = settings.data.images(model.spec.img_px)
    with torch.inference_mode():
        parts = [
            model(torch.from_numpy(np.array(images[start : start + _BATCH_IMAGES]))).float().numpy()
            for start in range(0, len(images), _BATCH_IMAGES)
        ]
    features, cells = np.concatenate(parts), settings.data.cells
    examples = Examples(
        names=cells.names,
        labels=cells.labels,
        classes=cells.classes,
        groups=cells.groups,
        split=settings.split,
    )
    values = {}
    for probe in PROBES:
        answers, _ = probe_examples(probe, features, examples)
        scores = evaluate_scores(examples.test()[0], answers, CELL_METRICS)
        values |= {f"probe_{probe}_{metric}": value for metric, value in scores.items()}
    return values


# No CPU is asked for: readers and workers hold them all. It runs at the lowest priority instead.
@ray.remote(num_cpus=0, max_retries=0)
def _probe_task(encoder: str, settings: ProbeSettings) -> dict[str, float]:
    os.nice(19)
    torch.set_num_threads(1)
    return probe_encoder(Path(encoder), settings)


class ProbeWatch:
    """Probes new checkpoints of a run; used by `with`, which ends with a probe of the last one.

    Args:
        folder: of the run.
        settings: None: nothing is done.
        report: called with step and metrics, or an empty mapping and what went wrong.
        last_step: of the newest probe there is already; -1: none.
    """

    def __init__(
        self,
        folder: Path,
        settings: ProbeSettings | None,
        report: Callable[[int, dict[str, float], str], None],
        *,
        last_step: int = -1,
    ) -> None:
        self._checkpoints, self._scratch = folder / "checkpoints", folder / ".probe"
        self._settings, self._report, self._last = settings, report, last_step
        self._under_way: tuple[int, Any] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> ProbeWatch:
        if self._settings is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._settings is None:
            return
        self._stop.set()
        self._thread.join()
        if kind is None:
            self._collect(wait=True)
            self._start(every=1)
            self._collect(wait=True)
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _follow(self) -> None:
        assert self._settings is not None
        while not self._stop.wait(_LOOK_EVERY_S):
            self._collect(wait=False)
            if self._under_way is None:
                self._start(every=self._settings.every)

    def _start(self, every: int) -> None:
        """Probe the newest checkpoint if it is `every` steps past the last that was probed."""
        found = latest_checkpoint(self._checkpoints).checkpoint
        if found is None or found.step < max(self._last, 0) + every:
            return
        copy = self._scratch / f"step_{found.step}"  # old checkpoints are removed while it is read
        try:
            shutil.copytree(found.encoder, copy, dirs_exist_ok=True)
        except OSError:
            return
        self._last = found.step
        task: Any = _probe_task
        self._under_way = found.step, task.remote(str(copy), self._settings)

    def _collect(self, *, wait: bool) -> None:
        if self._under_way is None:
            return
        step, task = self._under_way
        metrics: Any = {}
        problem = ""
        try:
            if not ray.wait([task], timeout=None if wait else 0)[0]:
                return
            metrics = ray.get(task)
        except (RayError, InputError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            problem = lines[-1]
        self._under_way = None
        self._report(step, metrics, problem)
        shutil.rmtree(self._scratch / f"step_{step}", ignore_errors=True)
