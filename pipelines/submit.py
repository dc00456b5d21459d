"""`cytoray submit <job> --flags`: the same command, on a running Ray cluster."""

from __future__ import annotations

import os
from pathlib import Path

from cytoray.errors import InputError, choose

USAGE = """usage: cytoray submit [--address URL] [--working-dir DIR] [--submission-id ID]
                      [--no-wait] [--python PATH] <job> [flags of the job]

Packages the working folder, runs `cytoray <job> ...` as a Ray job on the cluster, follows its log
and returns its exit code. --address is the job server of the head, http://127.0.0.1:8265 where it
was started with `ray start --head` (default: the environment variable RAY_API_SERVER_ADDRESS).
Paths of slides and outputs must be visible from the cluster's nodes; give them absolute."""

_WITH_VALUE = {"--address", "--working-dir", "--submission-id", "--python"}


def main_argv(argv: list[str]) -> int:
    """Parse our own flags up to the job's name; everything after it belongs to the job."""
    from pipelines.cli import JOBS

    options: dict[str, str] = {}
    wait = True
    rest = list(argv)
    while rest and rest[0].startswith("-"):
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if word in ("-h", "--help"):
            print(USAGE)
            return 0
        if word == "--no-wait":
            wait = False
        elif name not in _WITH_VALUE:
            raise InputError(f"unknown flag {name}\n\n{USAGE}")
        elif not equals and not rest:
            raise InputError(f"{name} needs a value")
        else:
            options[name] = value if equals else rest.pop(0)
    if not rest:
        raise InputError(f"name the job to submit\n\n{USAGE}")
    choose("job", rest[0], [job for job in JOBS if job not in ("submit", "doctor")])

    from cytoray.distributed.submit import submit

    address = options.get("--address") or os.environ.get("RAY_API_SERVER_ADDRESS")
    return submit(
        address or "http://127.0.0.1:8265",
        rest,
        working_dir=Path(options.get("--working-dir", ".")),
        submission_id=options.get("--submission-id"),
        python=options.get("--python"),
        wait=wait,
    )


if __name__ == "__main__":
    from pipelines.cli import job_main

    job_main("submit")
