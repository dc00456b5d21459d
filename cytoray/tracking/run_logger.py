"""Metrics from a worker process to MLflow, never in the way of the training step."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric

from cytoray.tracking.values import clean_name, sqlite_path

logger = logging.getLogger(__name__)

_PER_BATCH = 500
_BYTES_PER_READ = 1 << 20


class RunLogger:
    """Log metrics of a run the driver has started; a dead MLflow costs nothing but a warning.

    `log` appends one line to a local file and returns; a background thread sends what the file
    holds and empties it. While the server is away the file grows, and its lines go out when the
    server is back, when the next logger opens the file, or with `send_pending`. A line sent twice
    is stored once, since its time stamp is part of it. Use one file per process.

    Args:
        uri: the resolved tracking URI (`Tracker.uri`).
        run_id: from `Tracker.start_run`.
        pending_path: the local file of unsent metrics, in the run folder.
        flush_every_s: pause between sendings.
    """

    def __init__(
        self, uri: str, run_id: str, pending_path: str | Path, flush_every_s: float = 5.0
    ) -> None:
        self._uri = uri
        self._run_id = run_id
        self._path = Path(pending_path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        _end_torn_line(self._path)
        self._sent_bytes = 0
        self._file_lock = threading.Lock()
        self._send_lock = threading.Lock()
        self._closed = threading.Event()
        self._warned = False
        self._thread = threading.Thread(
            target=self._run, args=(flush_every_s,), name="cytoray-mlflow", daemon=True
        )
        self._thread.start()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Keep one value of each metric at `step`; returns at once and never raises on I/O."""
        record = {
            "run_id": self._run_id,
            "step": int(step),
            "time_ms": int(time.time() * 1000),
            "metrics": {clean_name(name): float(value) for name, value in metrics.items()},
        }
        try:
            with self._file_lock, self._path.open("ab") as stream:
                stream.write(json.dumps(record).encode() + b"\n")
        except OSError as error:
            self._warn(error)

    def flush(self) -> bool:
        """Send everything now; False (after one warning) if the store did not take it."""
        with self._send_lock:
            try:
                while data := self._next_lines():
                    _send(self._uri, data)
                    self._sent_bytes += len(data)
                self._empty_file()
            except Exception as error:
                self._warn(error)
                return False
        if self._warned:
            logger.warning("MLflow is back: the metrics kept in %s were sent", self._path)
            self._warned = False
        return True

    def close(self) -> bool:
        """Stop the thread and send the rest; False if lines stay in the file for later."""
        self._closed.set()
        self._thread.join(timeout=60)
        return self.flush()

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, flush_every_s: float) -> None:
        while not self._closed.wait(flush_every_s):
            self.flush()

    def _next_lines(self) -> bytes:
        """The next whole lines not yet sent, about a megabyte at most."""
        if not self._path.exists():
            return b""
        with self._file_lock, self._path.open("rb") as stream:
            stream.seek(self._sent_bytes)
            data = stream.read(_BYTES_PER_READ)
        return data[: data.rfind(b"\n") + 1]

    def _empty_file(self) -> None:
        """Empty the file once all of it was sent; lines written meanwhile keep it for later."""
        with self._file_lock:
            if self._sent_bytes and self._path.stat().st_size == self._sent_bytes:
                os.truncate(self._path, 0)
                self._sent_bytes = 0

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            lines = str(error).strip().splitlines() or [type(error).__name__]
            logger.warning(
                "MLflow at %s does not answer (%s); training goes on, metrics are kept in %s",
                self._uri,
                lines[0][:200],
                self._path,
            )


def send_pending(uri: str, pending_path: str | Path) -> int:
    """Send the metrics a `RunLogger` had to leave in its file, then empty the file.

    For the driver at the end of a job, when no logger has the file open: it reaches a SQLite store
    that a worker on another machine does not.

    Returns:
        How many lines were sent; 0 for an absent or empty file.

    Raises:
        Exception: what the store raised; the file is left as it is.
    """
    path = Path(pending_path)
    data = path.read_bytes() if path.exists() else b""
    if data:
        num_lines = _send(uri, data)
        os.truncate(path, 0)
        return num_lines
    return 0


def _send(uri: str, data: bytes) -> int:
    """Send JSON lines to the store; a torn line (the process died in it) is skipped."""
    database = sqlite_path(uri)
    if database is not None and not database.exists():
        # MLflow would create an empty database here: the real one is on another machine.
        raise FileNotFoundError(f"{database} is not on this machine")
    by_run: dict[str, list[Metric]] = {}
    num_lines = 0
    for line in data.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        num_lines += 1
        by_run.setdefault(record["run_id"], []).extend(
            Metric(name, value, record["time_ms"], record["step"])
            for name, value in record["metrics"].items()
        )
    client = MlflowClient(tracking_uri=uri)
    for run_id, metrics in by_run.items():
        for start in range(0, len(metrics), _PER_BATCH):
            client.log_batch(run_id, metrics=metrics[start : start + _PER_BATCH])
    return num_lines


def _end_torn_line(path: Path) -> None:
    """Close the line a killed process left open, so that the next one starts on its own."""
    if path.exists() and path.read_bytes()[-1:] not in (b"", b"\n"):
        with path.open("ab") as stream:
            stream.write(b"\n")
