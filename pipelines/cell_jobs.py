"""What `finetune` and `evaluate` do alike: parts of the images, the run's folder and MLflow run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cytoray.config import to_plain
from cytoray.distributed.cells import gpus_of_task
from cytoray.distributed.cluster import Need, check_fits, connect
from cytoray.evaluation import Split
from cytoray.finetune import Cells, split_cells
from cytoray.finetune.data import split_counts
from cytoray.runs import RunFolder
from cytoray.tracking import Tracker, open_tracker


def split_of(config: Any, cells: Cells) -> Split:
    """The parts, by the fractions and seed of a config."""
    return split_cells(
        cells,
        val_fraction=config.val_fraction,
        test_fraction=config.test_fraction,
        seed=config.split_seed,
    )


@dataclass(frozen=True, kw_only=True)
class Begun:
    """A job under way.

    Attributes:
        folder: of the run.
        tracker: MLflow.
        run_id: its run there.
        gpus: GPUs of a task.
    """

    folder: RunFolder
    tracker: Tracker
    run_id: str
    gpus: float


def begin(
    job: str, config: Any, what: str, *, unit: str, cpus: float, gpus: float | None,
    may_change: frozenset[str],
) -> Begun:  # fmt: skip
    """Connect, see that a task fits, open the folder, start the MLflow run.

    Args:
        job: its name.
        config: of the job.
        what: it works on.
        unit: what a task is, as in the names of the flags: `task`, `trial`.
        cpus: of a task.
        gpus: of a task; None: 1 where there are any.
        may_change: fields that may differ on resume.

    Raises:
        InputError: a task does not fit, or the folder is another run's.
    """
    opened = open_tracker(config.tracking_uri or None, config.experiment)
    connect(config.address)
    gpus = gpus_of_task(gpus)
    check_fits(
        [Need(what=unit, count=1, cpus=cpus, gpus=gpus)],
        hint=f"ask for less --cpus-per-{unit} or --gpus-per-{unit}",
    )
    tracker = opened()  # before anything is written
    folder = RunFolder.open(config.out, job, to_plain(config), config.resume, may_change)
    run_id = tracker.start_run(
        f"{job} {what}", params=to_plain(config), tags={"cytoray.job": job}, key=folder.run_id
    )
    return Begun(folder=folder, tracker=tracker, run_id=run_id, gpus=gpus)


def class_lines(cells: Any, split: Split) -> dict[str, str]:
    """Examples and groups of each class in each part, for a dry run."""
    parts: Sequence[str] = ("train", "val", "test")
    return {
        f"class {row['class']}": ", ".join(
            f"{row[part]} {part} ({row[f'{part} groups']} groups)" for part in parts
        )
        for row in split_counts(cells, split)
    }
