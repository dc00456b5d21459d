"""Independent pieces of work as Ray tasks: a finished one leaves its result and is not run again.

A piece has a folder; `result.json`, written last, says that it is finished. What a piece returns
is what is in that file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import torch

from cytoray.errors import InputError
from cytoray.io import atomic_write_text
from cytoray.plain import json_ready

RESULT = "result.json"
AHEAD = 2  # pieces handed to Ray beyond those that fit, so that no core waits for the driver


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One piece of work.

    Attributes:
        key: its name, unique in the run and the same on resume.
        folder: its own folder.
        payload: what it is about; for `Work`.
        run_id: its MLflow run, if it has one.
    """

    key: str
    folder: str
    payload: Any
    run_id: str = ""


Work = Callable[[Piece, Any], dict[str, Any]]


def read_piece(piece: Piece) -> dict[str, Any] | None:
    """The result of a finished piece, or None."""
    path = Path(piece.folder) / RESULT
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def do_piece(work: Work, piece: Piece, shared: Any) -> dict[str, Any]:
    """Do one piece and keep its result."""
    Path(piece.folder).mkdir(parents=True, exist_ok=True)
    result = json_ready(work(piece, shared))
    atomic_write_text(Path(piece.folder) / RESULT, json.dumps(result, indent=1) + "\n")
    return result


def _remote(work: Work, piece: Piece, shared: Any, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    return do_piece(work, piece, shared)


def run_pieces(
    pieces: Sequence[Piece],
    work: Work,
    shared: Any,
    *,
    cpus: float = 1.0,
    gpus: float = 0.0,
    max_concurrent: int = 0,
    on_start: Callable[[Piece], Piece] | None = None,
    on_done: Callable[[Piece, dict[str, Any] | None, str], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Do every piece that has no result yet.

    Args:
        pieces: all of them.
        work: a function of a module, (piece, shared) to a result of plain values.
        shared: what all pieces look at; kept in the object store once.
        cpus, gpus: of a piece.
        max_concurrent: pieces at a time; 0: as many as fit.
        on_start: called before a piece starts; what it returns is run.
        on_done: called with piece, result and error message of each that has just ended.
        on_progress: called with pieces finished (failed ones too) and pieces in all.

    Returns:
        results of all finished pieces in order, and the message of each failed one by key.
    """
    todo = [piece for piece in pieces if read_piece(piece) is None]
    done, failed = len(pieces) - len(todo), {}
    if on_progress is not None:
        on_progress(done, len(pieces))
    if todo:
        task = ray.remote(_remote).options(num_cpus=cpus, num_gpus=gpus or None, max_retries=1)
        reference = ray.put(shared)
        limit = max_concurrent or _fitting(cpus, gpus) + AHEAD
        running: dict[Any, Piece] = {}
        waiting = iter(todo)
        while True:
            while len(running) < limit and (piece := next(waiting, None)) is not None:
                piece = piece if on_start is None else on_start(piece)
                threads = max(1, int(cpus))
                running[task.remote(work, piece, reference, threads)] = piece
            if not running:
                break
            ready, _ = ray.wait(list(running), num_returns=1)
            piece = running.pop(ready[0])
            result, error = _outcome(ready[0])
            if error:
                failed[piece.key] = error
            done += 1
            if on_done is not None:
                on_done(piece, result, error)
            if on_progress is not None:
                on_progress(done, len(pieces))
    results = [read_piece(piece) for piece in pieces]
    return [result for result in results if result is not None], failed


def _outcome(reference: Any) -> tuple[dict[str, Any] | None, str]:
    try:
        return ray.get(reference), ""
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, InputError):
            return None, str(cause)
        return None, f"{type(cause).__name__}: {str(cause).strip()[:500]}"
    except ray.exceptions.RayError as error:
        return None, str(error).strip().splitlines()[0][:500]


def _fitting(cpus: float, gpus: float) -> int:
    """Pieces that the cluster can do at the same time."""
    have = ray.cluster_resources()
    counts = [have.get("CPU", 1.0) / cpus if cpus else math.inf]
    counts += [have.get("GPU", 0.0) / gpus] if gpus else []
    return max(1, int(min(counts) + 1e-6))
