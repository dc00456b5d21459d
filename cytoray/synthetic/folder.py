"""Fill a folder with synthetic slides, in parallel and resumable, and write its manifest."""

from __future__ import annotations

import csv
import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import cv2

from cytoray.errors import InputError
from cytoray.synthetic.config import SlidePlan, SynthConfig, config_fingerprint, plan_slides
from cytoray.synthetic.files import write_atomically, write_slide
from cytoray.synthetic.slides import make_slide

MANIFEST_NAME = "manifest.csv"
FINGERPRINT_NAME = "synth.json"
MANIFEST_COLUMNS = ("slide_id", "path", "patient_id", "site", "label", "split")

Progress = Callable[[int, int], None]


def synthesize(
    config: SynthConfig,
    out_dir: Path | str,
    *,
    workers: int = 1,
    progress: Progress | None = None,
) -> Path:
    """Make every slide of `config` under `out_dir`; finished slides of an earlier call are kept.

    The folder gets `slides/`, `truth/` (one JSON a slide, see `read_truth`), `synth.json` (the
    config and its fingerprint) and, last, `manifest.csv` with columns slide_id, path (relative to
    the folder), patient_id, site, label (0 or 1), split (train or test).

    Args:
        config: what to make.
        out_dir: the folder; made when missing.
        workers: processes; 1 works in this one. More are spawned, so a script that asks for them
            needs `if __name__ == "__main__":`.
        progress: called as (finished, total) at the start and after every slide.

    Returns:
        The manifest file.

    Raises:
        InputError: the folder holds slides of another config, or another project's manifest.
    """
    if workers < 1:
        raise InputError(f"workers must be at least 1, not {workers}")
    root = Path(out_dir)
    _claim_folder(config, root)
    plans = plan_slides(config)
    missing = [plan.index for plan in plans if not is_finished(root, plan)]
    finished = len(plans) - len(missing)
    if progress:
        progress(finished, len(plans))
    for _ in _make_all(config, root, missing, workers):
        finished += 1
        if progress:
            progress(finished, len(plans))
    return write_atomically(root / MANIFEST_NAME, lambda file: _write_manifest(file, plans))


def is_finished(root: Path, plan: SlidePlan) -> bool:
    """Whether the slide and its truth are both there (each appears whole or not at all)."""
    return (root / plan.path).is_file() and (root / plan.truth_path).is_file()


def make_and_write(config: SynthConfig, root: Path, index: int) -> int:
    """Make and write slide `index`; return `index`. Runs in a worker process."""
    write_slide(make_slide(config, index), config, root)
    return index


def _make_all(config: SynthConfig, root: Path, indices: list[int], workers: int) -> Iterable[int]:
    if workers == 1 or len(indices) <= 1:
        yield from (make_and_write(config, root, index) for index in indices)
        return
    with _worker_pool(min(workers, len(indices))) as pool:
        pending = [pool.submit(make_and_write, config, root, index) for index in indices]
        for future in as_completed(pending):
            yield future.result()


@contextmanager
def _worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of fresh (spawned) processes whose waiting work is dropped when one slide fails."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=cv2.setNumThreads, initargs=(1,)
    )
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _claim_folder(config: SynthConfig, root: Path) -> None:
    """Mark the folder as this config's, or refuse it."""
    mark = root / FINGERPRINT_NAME
    fingerprint = config_fingerprint(config)
    if root.exists() and not root.is_dir():
        raise InputError(f"{root} is a file; give a folder to put the slides in")
    if mark.is_file():
        if _read_fingerprint(mark) != fingerprint:
            raise InputError(
                f"{root} holds synthetic slides of another config (see {mark}); "
                "give another folder, or remove that one first"
            )
        return
    if (root / MANIFEST_NAME).exists():
        raise InputError(
            f"{root / MANIFEST_NAME} is there already and was not made by synth; "
            "give another folder so that it is not overwritten"
        )
    content = json.dumps({"fingerprint": fingerprint, "config": asdict(config)}, indent=2)
    write_atomically(mark, lambda file: file.write_text(content + "\n"))


def _read_fingerprint(mark: Path) -> str:
    try:
        return str(json.loads(mark.read_text()).get("fingerprint"))
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError):
        return "unreadable"


def _write_manifest(file: Path, plans: Iterable[SlidePlan]) -> None:
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, MANIFEST_COLUMNS, lineterminator="\n")
        writer.writeheader()
        for plan in plans:
            writer.writerow({name: getattr(plan, name) for name in MANIFEST_COLUMNS})
