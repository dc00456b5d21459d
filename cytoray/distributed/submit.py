"""Submit the same command as a Ray job, follow its log and hand back its exit code."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ray.job_submission import JobStatus, JobSubmissionClient

from cytoray.errors import InputError

_FINISHED = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)
_READY_WITHIN_S = 60.0
_EXCLUDES = [
    ".git", ".venv", "**/__pycache__", ".pytest_cache", ".ruff_cache", "quickstart", "runs",
    "*.svs", "*.tif", "*.tiff", "*.ndpi", "*.mrxs", "mlruns", "mlflow.db",
]  # fmt: skip


def client_for(address: str) -> JobSubmissionClient:
    """A client of the job server (the dashboard's port) at `address`.

    Raises:
        InputError: nothing answers there.
    """
    token = Path("~/.ray/auth_token").expanduser()
    if token.exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    logging.getLogger("ray.dashboard.modules.dashboard_sdk").setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(address)
    except Exception as error:  # the client raises ConnectionError, RuntimeError and its own
        first = str(error).strip().splitlines()[0]
        raise InputError(
            f"no Ray job server answers at {address!r} ({first}); give the dashboard's address, "
            "e.g. --address http://127.0.0.1:8265 of a head started with `ray start --head`"
        ) from None


def submit(
    address: str,
    argv: list[str],
    *,
    working_dir: Path,
    submission_id: str | None = None,
    python: str | None = None,
    wait: bool = True,
) -> int:
    """Run `cytoray <argv>` as a Ray job with `working_dir` packaged along.

    Args:
        address: the job server, e.g. `http://127.0.0.1:8265`.
        argv: job name and flags, as on the command line.
        working_dir: folder sent to the cluster; the command runs in the copy of it there. Slides
            and outputs are not sent: paths of those must be visible from the cluster's nodes.
        submission_id: name of the job; a used one is refused by the server.
        python: interpreter on the head; default: this one's path.
        wait: follow the log until the job ends.

    Returns:
        The exit code of the command (0 at once when not waiting).

    Raises:
        InputError: no server, no such folder, or a name that was used before.
    """
    if not working_dir.is_dir():
        raise InputError(f"--working-dir {working_dir} is not a folder")
    client = client_for(address)
    entrypoint = subprocess.list2cmdline([python or sys.executable, "-m", "pipelines.cli", *argv])
    try:
        job = _submit_when_ready(
            client,
            entrypoint=entrypoint,
            submission_id=submission_id,
            runtime_env={
                "working_dir": str(working_dir),
                "excludes": _EXCLUDES,
                "env_vars": {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1"},
            },
            metadata={"cytoray_job": argv[0] if argv else ""},
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"the job was not accepted: {str(error).strip().splitlines()[-1]}"
        ) from None
    print(f"submitted as {job}; stop it with: ray job stop --address {address} {job}", flush=True)
    return follow(client, job) if wait else 0


def _submit_when_ready(client: JobSubmissionClient, **job: Any) -> str:
    """Submit; a head that was started a moment ago answers before it can take a job."""
    end = time.monotonic() + _READY_WITHIN_S
    while True:
        try:
            return client.submit_job(**job)
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > end:
                raise
        time.sleep(1.0)


def follow(client: JobSubmissionClient, job: str) -> int:
    """Print the job's log until it ends and return its exit code."""

    async def tail() -> None:
        async for text in client.tail_job_logs(job):
            print(text, end="", flush=True)

    try:
        asyncio.run(tail())
    except KeyboardInterrupt:
        client.stop_job(job)
        raise
    while client.get_job_status(job) not in _FINISHED:
        time.sleep(0.5)
    info = client.get_job_info(job)
    if info.status == JobStatus.SUCCEEDED:
        return 0
    print(f"job {job}: {info.status.value} {info.message or ''}", file=sys.stderr)
    return info.driver_exit_code or 1
