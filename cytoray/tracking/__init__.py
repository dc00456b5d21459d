"""Experiment tracking, the only part of cytoray that knows MLflow.

`Tracker` is for the driver: it creates the store, runs and model versions. `RunLogger` is for
worker processes: it sends metrics in the background and outlives a dead server.
"""

import logging
import os

# Read by MLflow when it is imported or called; a user's own settings win. No usage data leaves the
# machine, and an unreachable server is given up within seconds instead of MLflow's many minutes.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")

from cytoray.tracking.child_runs import ChildRun, ChildRuns, patiently
from cytoray.tracking.mlflow_tracking import RunInfo, Tracker, keep_going, open_tracker
from cytoray.tracking.model_facts import ModelFacts
from cytoray.tracking.run_logger import RunLogger, send_pending
from cytoray.tracking.values import ARTIFACT_SUFFIXES, flatten_params, resolve_uri

for _chatty in ("mlflow.store.db.utils", "mlflow.store.model_registry.abstract_store", "alembic"):
    logging.getLogger(_chatty).setLevel(logging.WARNING)

__all__ = [
    "ARTIFACT_SUFFIXES",
    "ChildRun",
    "ChildRuns",
    "ModelFacts",
    "RunInfo",
    "RunLogger",
    "Tracker",
    "flatten_params",
    "keep_going",
    "open_tracker",
    "patiently",
    "resolve_uri",
    "send_pending",
]
