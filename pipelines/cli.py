"""`cytoray <job> [named-run] [--flags]`: the command line.

Each job is a module with a `Config` dataclass and `run(config)`. Exit codes: 0 done, 2 bad input,
3 finished with quarantined slides and `--strict`, 130 stopped with Ctrl-C, 141 when whoever read
the output left before its end (`| head`).
"""

from __future__ import annotations

import importlib
import os
import select
import sys
from typing import Any

JOBS = {
    "synth": "make cytology-like slides to try everything on",
    "index": "manifest -> checked slides, foreground, nuclei, quarantine and a QC page",
    "plan": "what a job would take and cost on a cluster, from a few slides really read",
    "pretrain": "self-supervised pretraining on streamed, nuclei-centred views",
    "vpu": "an encoder learns from slide labels alone which tiles are benign (LESS)",
    "embed": "encoder -> a bag of features for every slide",
    "bags": "features of other tools in as bags, and bags out (CLAM and TRIDENT's HDF5, .pt)",
    "tune": "grid over MIL aggregators and LoRA ranks, tracked in MLflow",
    "finetune": "adapt encoders to labelled cell images: linear, LoRA, full; few-shot curves",
    "evaluate": "probes, few-shot curves and paired comparison of frozen encoders",
    "quickstart": "all of the above on generated slides, with a report",
    "submit": "run any of these jobs on a Ray cluster: cytoray submit <job> --flags",
    "doctor": "what this machine and the cluster have",
}


def usage() -> str:
    width = max(map(len, JOBS))
    jobs = "\n".join(f"  {name:<{width}}  {text}" for name, text in JOBS.items())
    return (
        "usage: cytoray <job> [named-run] [--flags]\n\njobs:\n"
        f"{jobs}\n\n`cytoray <job> --help` lists a job's flags. Every job takes --config FILE "
        "(a run's config.yaml), and all that need one --address of a running Ray cluster."
    )


def load_config(kind: type, argv: list[str], *, prog: str, named: dict[str, Any]) -> Any:
    """Flags over a named run or `--config FILE` over the defaults.

    Args:
        kind: the job's config dataclass.
        argv: arguments after the job's name.
        prog: shown in the help text.
        named: named runs of this job, name -> config.
    """
    import tyro

    from cytoray.config import from_plain
    from cytoray.errors import InputError, choose
    from cytoray.runs import read_config

    argv = list(argv)
    default: Any = None
    if argv and not argv[0].startswith("-"):
        name = argv.pop(0)
        if not named:
            raise InputError(f"`{prog}` has no named runs; unexpected argument {name!r}")
        default = named[choose("named run", name, named)]
    for i, word in enumerate(argv):
        if word == "--config" or word.startswith("--config="):
            inline = word.partition("=")[2]
            if not inline and i + 1 >= len(argv):
                raise InputError("--config needs a file")
            path = inline or argv[i + 1]
            del argv[i : i + (1 if inline else 2)]
            default = from_plain(kind, read_config(path))
            break
    if default is None:
        return tyro.cli(kind, args=argv, prog=prog)
    return tyro.cli(kind, args=argv, prog=prog, default=default)


def run_job(job: str, argv: list[str]) -> int:
    """Run one job; errors of the user become one message on stderr and exit code 2."""
    from cytoray.config import check_numbers
    from cytoray.errors import InputError

    try:
        module = importlib.import_module(f"pipelines.{job}")
        if hasattr(module, "main_argv"):
            return module.main_argv(argv)
        named: dict[str, Any] = {}
        if argv and not argv[0].startswith("-"):
            from pipelines.runs import NAMED

            named = NAMED.get(job, {})
        config = load_config(module.Config, argv, prog=f"cytoray {job}", named=named)
        check_numbers(config)
        result = module.run(config)
        return int(result.get("exit_code", 0)) if isinstance(result, dict) else 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run the same command with --resume to go on", file=sys.stderr)
        return 130


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script `cytoray`."""
    try:
        code = _answer(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not _reader_left():
            raise
        return 141


def _reader_left() -> bool:
    """Whether standard output is a pipe nobody reads any more; what is left for it is dropped."""
    poll = select.poll()
    poll.register(sys.stdout.fileno())
    left = any(events & select.POLLERR for _, events in poll.poll(0))
    if left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return left


def _answer(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] in ("-V", "--version"):
        from cytoray import __version__

        print(f"cytoray {__version__}")
        return 0
    if argv[0] not in JOBS:
        print(
            f"error: unknown job {argv[0]!r}; valid: {', '.join(JOBS)}\n\n{usage()}",
            file=sys.stderr,
        )
        return 2
    return run_job(argv[0], argv[1:])


def job_main(job: str) -> None:
    """`python -m pipelines.<job>`."""
    sys.exit(main([job, *sys.argv[1:]]))


if __name__ == "__main__":
    sys.exit(main())
