"""A grid of 24 MIL trials on the cluster against the same trials one after another.

    python -m benchmarks.tune [--slides 48] [--epochs 20] [--rounds 3] [--cpus 2]
    python -m benchmarks.tune --kill-drill [--seed 0]

Three aggregators x four learning rates x two weight decays on the same features, held in memory:
bags of 100 to 1,000 instances x 384. `grid` is what `cytoray tune` does for them on a running Ray
with an open MLflow store (`cytoray tune` makes its database while Ray starts: `ray_start_s`):
features into the object store, actors, trials, heads and results on disk, MLflow runs. `serial` is
plain Python, `train_frozen` for one trial after another: `vs_serial` with one thread, which is what
a trial of the grid has, and `vs_serial_all_threads` with as many threads as the grid has cores. The
second is estimated: one trial of each aggregator is timed with one thread and with all, in turn,
and the serial seconds are divided by what the threads gain. `trial_overhead_s` is what a trial
costs an actor beyond its training: (grid seconds x actors - seconds spent in trials) / trials.
Several rounds are interleaved and their medians taken.

The kill drill starts `cytoray tune` on a 24-trial grid, kills the driver at a random moment, starts
it again with `--resume`, and checks that no finished trial ran again and that MLflow has one run
for each trial. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import torch

from benchmarks.made_study import make_study
from cytoray.distributed.cluster import Shared, connect
from cytoray.distributed.search import TRIAL_MODULE, run_search
from cytoray.distributed.trials import SearchSettings, TrialSpec, read_result
from cytoray.mil import MILConfig, train_frozen
from cytoray.mil.cohort import Cohort, FeatureSet
from cytoray.mil.folds import Fold, make_folds
from cytoray.mil.space import candidates_of, configs_of, grid
from cytoray.progress import Progress
from cytoray.tracking import ChildRun, ChildRuns, Tracker

WIDTH, SMALLEST, LARGEST = 384, 100, 1_000
AXES = {
    "aggregator": ("clam", "abmil", "dsmil"),
    "lr": (1e-3, 5e-4, 2e-4, 1e-4),
    "weight_decay": (1e-4, 1e-2),
}


def make_cohort(num_slides: int) -> tuple[Cohort, FeatureSet, Fold]:
    """Labelled bags of log-uniform size in memory, and one split."""
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.uniform(np.log(SMALLEST), np.log(LARGEST), num_slides)).astype(int)
    labels = np.arange(num_slides) % 2
    ids = [f"s{i}" for i in range(num_slides)]
    features = []
    for size, label in zip(sizes, labels, strict=True):
        bag = rng.normal(size=(size, WIDTH)).astype(np.float16)
        bag[: size // 10, :8] += label
        features.append(bag)
    cohort = Cohort(
        slide_ids=ids,
        labels=labels,
        tasks={"label": ("0", "1")},
        groups=np.array(ids),
        split=[None] * num_slides,
    )
    bags = FeatureSet(name="made", encoder_id="made", features=features, tile_ids=[()] * num_slides)
    options = {"val_fraction": 0.25, "test_fraction": 0.25, "seed": 0}
    [fold] = make_folds(labels, cohort.groups, folds=0, **options)
    return cohort, bags, fold


def serial(configs: list[MILConfig], cohort: Cohort, bags: FeatureSet, fold: Fold) -> float:
    """Seconds of the trials one after another."""
    began = time.perf_counter()
    for config in configs:
        train_frozen(config, bags.bags(cohort, fold.train), bags.bags(cohort, fold.val), 2)
    return time.perf_counter() - began


def on_cluster(
    configs: list[MILConfig],
    cohort: Cohort,
    bags: FeatureSet,
    fold: Fold,
    folder: Path,
) -> tuple[float, float]:
    """Seconds of the search as a whole, and the sum over its trials."""
    tracker = Tracker(f"sqlite:///{folder}/mlflow.db", "benchmark")
    began = time.perf_counter()
    settings = SearchSettings(
        cohort=Shared(cohort),
        folds={"": fold},
        features=(Shared(bags),),
        encoders=("",),
    )
    parent = tracker.start_run("tune")
    specs = [
        TrialSpec(key=c.key, candidate=c.key, config=c.config, encoder=0, fold="",
                  folder=str(folder / c.key))
        for c in candidates_of(configs, ["made"])
    ]  # fmt: skip
    runs = [ChildRun(key=s.key, name=s.key, folder=Path(s.folder)) for s in specs]
    with ChildRuns(tracker, parent, runs) as children, Progress("grid") as progress:
        results, failed = run_search(
            specs, settings, folder, progress=progress,
            on_result=lambda result: children.finish(result["key"], "FINISHED"),
        )  # fmt: skip
    behind = children.settle()
    seconds = time.perf_counter() - began
    if failed or behind or len(tracker.child_runs(parent)) != len(specs):
        raise RuntimeError(f"failed {failed}, not tracked {behind}")
    return seconds, sum(result["seconds"] for result in results)


def thread_gain(configs: list[MILConfig], threads: int, *data: Any) -> float:
    """How much faster plain Python is with so many threads than with one."""
    few = list({config.aggregator: config for config in configs}.values())
    seconds = {1: 0.0, threads: 0.0}
    for config in few:
        for count in seconds:
            torch.set_num_threads(count)
            seconds[count] += serial([config], *data)
    return seconds[1] / seconds[threads]


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Interleaved rounds of both."""
    configs = configs_of(grid(AXES), MILConfig(epochs=arguments.epochs, patience=0))
    data = make_cohort(arguments.slides)
    gain = thread_gain(configs, arguments.cpus, *data)
    began = time.perf_counter()
    connect(None, num_cpus=arguments.cpus, preload=TRIAL_MODULE)
    start_s = time.perf_counter() - began
    rounds = []
    for _ in range(arguments.rounds):
        folder = Path(tempfile.mkdtemp(prefix="cytoray-tune-"))
        grid_s, inside_s = on_cluster(configs, *data, folder)
        torch.set_num_threads(1)
        serial_s = serial(configs, *data)
        shutil.rmtree(folder)
        slots = min(arguments.cpus, len(configs))
        overhead_s = (grid_s * slots - inside_s) / len(configs)
        rounds.append((serial_s / grid_s, serial_s / gain / grid_s, overhead_s, serial_s, grid_s,
                       inside_s / len(configs)))  # fmt: skip
        print(
            f"serial {serial_s:.1f} s, grid {grid_s:.1f} s ({rounds[-1][0]:.2f}x), a trial "
            f"{rounds[-1][-1]:.2f} s, overhead {overhead_s:.2f} s",
            flush=True,
        )
    ray.shutdown()
    names = ("vs_serial", "vs_serial_all_threads", "trial_overhead_s", "serial_s", "grid_s",
             "trial_s")  # fmt: skip
    medians = {
        name: round(statistics.median(column), 3)
        for name, column in zip(names, zip(*rounds, strict=True), strict=True)
    }
    return medians | {"ray_start_s": round(start_s, 2), "thread_gain": round(gain, 2),
                      "trials": len(configs)}  # fmt: skip


def _end_ray(folder: str) -> None:
    """Wait until the Ray of a killed driver is gone, and end what is left of it."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        left = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("RAY_TMPDIR") == folder:
                    left.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        if not left:
            return
        time.sleep(0.2)
    for process in left:
        process.kill()


def kill_drill(arguments: argparse.Namespace) -> dict[str, Any]:
    """Kill the driver of a 24-trial grid at a random moment, resume, and look."""
    folder = Path(tempfile.mkdtemp(prefix="ck"))
    index, bags = make_study(folder, 64, signal=1.0, size=(100, 300), width=64)
    out, uri = folder / "run", f"sqlite:///{folder}/mlflow.db"
    command = [sys.executable, "-m", "pipelines.cli", "tune", "--index", index, "--bags", bags,
               "--out", out, "--lora-ranks", "0", "--aggregators", *AXES["aggregator"],
               "--lrs", *AXES["lr"], "--weight-decays", *AXES["weight_decay"],
               "--mil.epochs", arguments.epochs, "--mil.patience", 0, "--tracking-uri", uri,
               "--resume"]  # fmt: skip
    environment = os.environ | {"RAY_TMPDIR": str(folder), "CYTORAY_NUM_CPUS": str(arguments.cpus)}
    argv = [str(word) for word in command]
    wanted = random.Random(arguments.seed).randint(1, 22)
    driver = subprocess.Popen(argv, env=environment, start_new_session=True)
    while len(list(out.glob("trials/*/result.json"))) < wanted:
        if driver.poll() is not None:
            raise RuntimeError("the search ended before it could be killed")
        time.sleep(0.01)
    time.sleep(random.Random(arguments.seed + 1).random())
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    _end_ray(str(folder))
    before = {path: path.stat().st_mtime_ns for path in out.glob("trials/*/result.json")}
    subprocess.run(argv, env=environment, check=True)
    after = {path: path.stat().st_mtime_ns for path in out.glob("trials/*/result.json")}
    tracker = Tracker(uri)
    summary = json.loads((out / "summary.json").read_text())
    children = tracker.child_runs(summary["mlflow_run_id"])
    found = {
        "killed_after": len(before),
        "trials": len(after),
        "run_again": sum(after[path] != stamp for path, stamp in before.items()),
        "mlflow_runs": len(children),
        "mlflow_doubles": len(children) - len({child.key for child in children}),
        "mlflow_finished": sum(child.status == "FINISHED" for child in children),
        "results_whole": all(read_result(path.parent) for path in after),
    }
    shutil.rmtree(folder, ignore_errors=True)
    good = {"trials": 24, "run_again": 0, "mlflow_runs": 24, "mlflow_doubles": 0,
            "mlflow_finished": 24}  # fmt: skip
    return found | {"ok": all(found[name] == value for name, value in good.items())}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--slides", type=int, default=48)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kill-drill", action="store_true")
    arguments = parser.parse_args()
    print(json.dumps(kill_drill(arguments) if arguments.kill_drill else measure(arguments)))


if __name__ == "__main__":
    main()
