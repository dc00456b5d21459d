"""Runs, metrics and models in MLflow, for the driver: one experiment, runs found again by key."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import shlex
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from cytoray.errors import InputError, choose
from cytoray.tracking.model_facts import ModelFacts, write_mlmodel
from cytoray.tracking.values import (
    KEY_TAG,
    PARENT_TAG,
    check_artifacts,
    clean_name,
    content_hash,
    flatten_params,
    key_value,
    resolve_uri,
    shorten,
    sqlite_path,
)

logger = logging.getLogger(__name__)

RUN_STATUSES = ("RUNNING", "FINISHED", "FAILED", "KILLED")
_PER_BATCH = 100
_PER_CALL = 1000


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """One MLflow run as plain values; `metrics` holds the last value of each."""

    run_id: str
    name: str
    status: str
    key: str
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]


def open_tracker(uri: str | None = None, experiment: str = "cytoray") -> Callable[[], Tracker]:
    """Open a store in the background: to make a database takes a second or two.

    Args:
        uri, experiment: as of `Tracker`.

    Returns:
        What waits for the tracker and returns it, or raises what `Tracker` raised.
    """
    opened: Future[Tracker] = Future()

    def work() -> None:
        try:
            opened.set_result(Tracker(uri, experiment))
        except BaseException as error:
            opened.set_exception(error)

    # Not a daemon: a process that ends early must not leave a database half made.
    threading.Thread(target=work).start()
    return opened.result


@contextlib.contextmanager
def keep_going(action: str) -> Iterator[None]:
    """Log, instead of raise, a failure of the tracking store: results on disk matter more."""
    try:
        yield
    except (MlflowException, OSError) as error:
        logger.warning("MLflow: could not %s (%s); the run goes on", action, _first_line(error))


class Tracker:
    """One experiment in one tracking store. Make it in the driver, before any worker starts.

    Args:
        uri: tracking URI; None for `MLFLOW_TRACKING_URI`, else `mlflow.db` in `folder`. A missing
            SQLite database is created here, under a lock: workers that created it at the same
            time would crash in its migrations.
        experiment: its name; created when new.
        folder: the working folder for the default database.

    Attributes:
        uri: the resolved URI (absolute path), to hand to workers.
        experiment_id: the id MLflow gave.

    Raises:
        InputError: the store cannot be reached or the experiment was deleted.
    """

    def __init__(
        self, uri: str | None = None, experiment: str = "cytoray", folder: str | Path = "."
    ) -> None:
        self.uri = resolve_uri(uri, folder)
        self.experiment = experiment
        with _creation_lock(self.uri):
            self._client = MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
            try:
                self.experiment_id = self._find_or_create_experiment()
            except MlflowException as error:
                raise InputError(
                    f"cannot use the MLflow store {self.uri}: {_first_line(error)}; start the "
                    "server, or leave the tracking URI out to use a local SQLite file"
                ) from error

    def _find_or_create_experiment(self) -> str:
        found = self._client.get_experiment_by_name(self.experiment)
        if found is None:
            path = sqlite_path(self.uri)
            # MLflow's own default is relative to whatever folder the process happens to be in.
            location = (path.parent / "mlartifacts").as_uri() if path else None
            return self._client.create_experiment(self.experiment, artifact_location=location)
        if found.lifecycle_stage != "active":
            raise InputError(
                f"experiment {self.experiment!r} in {self.uri} was deleted: restore it with "
                f"`mlflow experiments restore -x {found.experiment_id}` or use another name"
            )
        return found.experiment_id

    def start_run(
        self,
        name: str,
        tags: Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
        parent_run_id: str | None = None,
        key: str | None = None,
    ) -> str:
        """Start a run, or take up the one that has this key.

        A parameter cannot change in MLflow: on resume, a parameter with a new value is kept as
        first logged, and its new value goes to the tag `cytoray.changed.<name>`.

        Args:
            name: shown in the UI.
            tags: more tags.
            params: the config; nested mappings are flattened, long values cut.
            parent_run_id: makes the run a child of that run.
            key: what makes the run the same run when the job is started again.

        Returns:
            The run id; the run is RUNNING.
        """
        found = self.find_run(key) if key else None
        if found is None:
            all_tags = {clean_name(k): str(v) for k, v in (tags or {}).items()}
            all_tags |= {KEY_TAG: key_value(key)} if key else {}
            all_tags |= {PARENT_TAG: parent_run_id} if parent_run_id else {}
            run = self._client.create_run(self.experiment_id, run_name=name, tags=all_tags)
            run_id, known = run.info.run_id, {}
        else:
            run_id, known = found.run_id, found.params
            self._client.update_run(run_id, status="RUNNING", name=name)
            self.set_tags(run_id, tags or {})
        self._log_params(run_id, flatten_params(params or {}), known)
        return run_id

    def _log_params(self, run_id: str, params: dict[str, str], known: Mapping[str, str]) -> None:
        fresh = [Param(name, value) for name, value in params.items() if name not in known]
        for start in range(0, len(fresh), _PER_BATCH):
            self._client.log_batch(run_id, params=fresh[start : start + _PER_BATCH])
        changed = {name: value for name, value in params.items() if known.get(name, value) != value}
        self.set_tags(run_id, {f"cytoray.changed.{name}": v for name, v in changed.items()})

    def find_run(self, key: str) -> RunInfo | None:
        """The run of this experiment started with `key`; the oldest, should there be several."""
        runs = self._client.search_runs(
            [self.experiment_id],
            filter_string=f"tags.`{KEY_TAG}` = '{key_value(key)}'",
            order_by=["attributes.start_time ASC"],
            max_results=1,
        )
        return _run_info(runs[0]) if runs else None

    def get_run(self, run_id: str) -> RunInfo:
        """One run by id."""
        return _run_info(self._client.get_run(run_id))

    def child_runs(self, parent_run_id: str) -> list[RunInfo]:
        """All runs started with this parent, oldest first."""
        children: list[RunInfo] = []
        token = None
        while True:
            page = self._client.search_runs(
                [self.experiment_id],
                filter_string=f"tags.`{PARENT_TAG}` = '{parent_run_id}'",
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
            children += [_run_info(run) for run in page]
            token = page.token
            if not token:
                return children

    def set_tags(self, run_id: str, tags: Mapping[str, Any]) -> None:
        """Set or replace tags, e.g. the URI of the last checkpoint."""
        entries = [RunTag(clean_name(k), shorten(str(v), 5000)) for k, v in tags.items()]
        for start in range(0, len(entries), _PER_BATCH):
            self._client.log_batch(run_id, tags=entries[start : start + _PER_BATCH])

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log one value of each metric at `step`."""
        now_ms = int(time.time() * 1000)
        entries = [Metric(clean_name(k), float(v), now_ms, step) for k, v in metrics.items()]
        for start in range(0, len(entries), _PER_BATCH):
            self._client.log_batch(run_id, metrics=entries[start : start + _PER_BATCH])

    def log_lines(self, run_id: str, data: bytes) -> None:
        """Log JSON lines of `step`, `time_ms` and `metrics`; one sent twice is stored once.

        A torn line (the process died in it) is skipped.
        """
        entries = []
        for line in data.splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            entries += [
                Metric(clean_name(name), value, record["time_ms"], record["step"])
                for name, value in record["metrics"].items()
            ]
        for start in range(0, len(entries), _PER_CALL):
            self._client.log_batch(run_id, metrics=entries[start : start + _PER_CALL])

    def log_artifact(self, run_id: str, path: str | Path, artifact_path: str | None = None) -> None:
        """Upload a file. Images, tables and pages are refused: they may hold patient data.

        Raises:
            ValueError: the suffix is not one of `ARTIFACT_SUFFIXES`.
        """
        check_artifacts(Path(path))
        self._client.log_artifact(run_id, str(path), artifact_path)

    def log_artifacts(
        self, run_id: str, folder: str | Path, artifact_path: str | None = None
    ) -> None:
        """Upload every file of a folder, under the rule of `log_artifact`."""
        check_artifacts(Path(folder))
        self._client.log_artifacts(run_id, str(folder), artifact_path)

    @property
    def is_local(self) -> bool:
        """Whether the store is a file of this machine and no server that others use too."""
        return sqlite_path(self.uri) is not None

    def log_picture(self, run_id: str, png: bytes, artifact_file: str) -> None:
        """Store a picture made for the report (never one of a slide's label or macro image).

        It may show slide pixels: ask before sending it to a server.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / Path(artifact_file).name
            path.write_bytes(png)
            self._client.log_artifact(run_id, str(path), str(Path(artifact_file).parent))

    def end_run(self, run_id: str, status: str = "FINISHED") -> None:
        """Close a run as FINISHED, FAILED or KILLED."""
        self._client.set_terminated(run_id, choose("run status", status, RUN_STATUSES))

    def register_model(
        self,
        run_id: str,
        name: str,
        folder: str | Path,
        tags: Mapping[str, Any] | None = None,
        description: str = "",
        facts: ModelFacts | None = None,
    ) -> str:
        """Upload a model folder (safetensors and JSON) and register it as a model version.

        The folder goes below the run's own artifacts, the only local source a tracking server
        accepts, into a place named by its content: registering the same files twice gives the
        same version, other files give the next one.

        Args:
            run_id: the run that made the model.
            name: the registered model; created when new.
            folder: what to upload.
            tags: tags of the version, e.g. AUC and encoder id.
            description: a sentence for the registry page.
            facts: the model's signature, for the registry page.

        Returns:
            The version, e.g. "1".
        """
        files = check_artifacts(Path(folder))
        digest = content_hash(files, Path(folder))
        artifact_path = f"model/{digest[:16]}"
        run = self._client.get_run(run_id)
        source = f"{(run.info.artifact_uri or '').rstrip('/')}/{artifact_path}"
        self._create_registered_model(name)
        for version in self._client.search_model_versions(f"run_id = '{run_id}'"):
            if version.name == name and version.source == source:
                return str(version.version)
        self._client.log_artifacts(run_id, str(folder), artifact_path)
        if facts is not None:
            with tempfile.TemporaryDirectory() as draft:
                path = write_mlmodel(facts, Path(draft), run_id, artifact_path)
                self._client.log_artifact(run_id, str(path), artifact_path)
        version = self._client.create_model_version(
            name,
            source=source,
            run_id=run_id,
            tags={"cytoray.sha256": digest, **{k: str(v) for k, v in (tags or {}).items()}},
            description=description or None,
        )
        return str(version.version)

    def _create_registered_model(self, name: str) -> None:
        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def model_uri(self, name: str, version: str) -> str:
        """Where the files of a registered version lie; loadable with `download_model`."""
        return self._client.get_model_version_download_uri(name, version)

    def download_model(self, name: str, version: str, folder: str | Path) -> Path:
        """Copy the files of a registered version below `folder`; returns where they are."""
        found = self._client.get_model_version(name, version)
        run = self._client.get_run(found.run_id or "")
        relative = (found.source or "").removeprefix(run.info.artifact_uri or "").strip("/")
        Path(folder).mkdir(parents=True, exist_ok=True)
        return Path(self._client.download_artifacts(run.info.run_id, relative, str(folder)))

    def ui_command(self) -> str:
        """How to see this store: a command for this machine alone, or the server's address."""
        if self.uri.startswith(("http://", "https://")):
            return self.uri
        return f"mlflow ui --backend-store-uri {shlex.quote(self.uri)} --host 127.0.0.1"


@contextlib.contextmanager
def _creation_lock(uri: str) -> Iterator[None]:
    """Let one process at a time create and migrate a local database."""
    path = sqlite_path(uri)
    if path is None:
        yield
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(path.name + ".lock").open("a")
    except OSError as error:
        raise InputError(
            f"cannot write the MLflow database {path}: {error.strerror}; choose another tracking "
            "URI, e.g. sqlite:////tmp/mlflow.db"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run_info(run: Run) -> RunInfo:
    tags = dict(run.data.tags)
    return RunInfo(
        run_id=run.info.run_id,
        name=run.info.run_name or "",
        status=str(run.info.status),
        key=tags.get(KEY_TAG, ""),
        params=dict(run.data.params),
        metrics=dict(run.data.metrics),
        tags=tags,
    )


def _first_line(error: Exception) -> str:
    return shorten((str(error).strip() or type(error).__name__).splitlines()[0], 300)
