"""Kill a pretraining at random moments and see whether every tile of every epoch is used once.

    python -m benchmarks.resume_drill [--rounds 20] [--seed 0]

A round is a tiny pretraining of three epochs with one or two workers. At a random moment one of its
processes gets SIGKILL: the driver, a training worker, or a reader. After the driver the same
command goes on with `--resume` and any number of workers; the others are replaced by the run
itself. Then the tile ids that each step has used are held against the tiles of the index. All
rounds share one Ray, and drivers are forked from a process that has imported everything, so a
round is mostly the start of the workers.

The last line is JSON: rounds; ok, those in which every tile of every epoch was used exactly once;
kills by kind; resumed_with_other_workers; steps_done_again, after all kills together; problems;
seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import ray

from cytoray.distributed.cluster import connect
from cytoray.runs import read_events
from cytoray.streaming.ledger import ledger_problems, used_tiles
from cytoray.streaming.plan import plan_of_index
from cytoray.streaming.tile_pixels import ChunkTiles
from cytoray.synthetic import SynthConfig, synthesize
from cytoray.training import BackboneConfig, CropConfig, HeadConfig, OptimConfig, PretrainConfig
from pipelines import index, pretrain

KINDS = ("driver", "worker", "reader")
TIMEOUT_S = 240.0
EPOCHS = 3
BATCH = 8
READER = "ReadTiles"


def tiny(total_steps: int) -> PretrainConfig:
    """A model whose step takes milliseconds."""
    return PretrainConfig(
        backbone=BackboneConfig(kwargs={"depth": 2, "embed_dim": 64, "num_heads": 2}),
        crops=CropConfig(global_px=32, local_px=16, num_local=2),
        head=HeadConfig(out_dim=64, hidden_dim=64, bottleneck_dim=32),
        optim=OptimConfig(warmup_steps=2, freeze_last_layer_steps=2),
        batch_size=BATCH,
        total_steps=total_steps,
        precision="fp32",
    )


class Drill:
    """Rounds on one index and one Ray.

    Args:
        folder: for everything that is written.
        seed: of the kills.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.address = start_ray(folder)
        config = SynthConfig(
            num_slides=4, held_out=0, size_px=1024, mpp=0.5, slides_per_patient=(1, 1)
        )
        manifest = synthesize(config, folder / "slides")
        self.index = folder / "index"

        def make() -> None:
            connect(self.address)
            index.run(index.Config(manifest=str(manifest), out=self.index, tile_px=64, mpp=0.5))

        assert self.wait(fork(make, folder / "index.log"), lambda: False) == 0, "no index"
        plan = plan_of_index(self.index)
        chunks = ChunkTiles(plan)
        self.tile_ids = [i for c in range(plan.num_chunks) for i in chunks.read(c)["tile_id"]]
        self.steps = EPOCHS * len(self.tile_ids) // BATCH

    def round(self, number: int) -> dict[str, Any]:
        """One run with one kill, and what came of it."""
        kind = KINDS[number % len(KINDS)]
        workers = self.random.choice((1, 2))
        out = self.folder / f"run-{number}"
        # So few tiles are read before half of the steps are taken: a reader is killed at once.
        at_step = 0 if kind == "reader" else self.random.randint(1, self.steps - 5)
        driver = self.start(out, workers, resume=False)
        killed: list[int] = []

        def strike() -> bool:
            """Kill once the step is reached; True when the driver itself was killed."""
            if not killed and last_step(out) >= at_step:
                time.sleep(self.random.random())
                killed.extend(self.victims(kind, out, driver)[:1])
                for pid in killed:
                    os.kill(pid, signal.SIGKILL)
            return False

        code = self.wait(driver, strike)
        resumed_with = workers
        if code != 0:
            resumed_with = self.random.choice((1, 2))
            code = self.wait(self.start(out, resumed_with, resume=True), lambda: False)
        return self.judge(out, code) | {
            "kind": kind,
            "killed": bool(killed),
            "other_workers": kind == "driver" and resumed_with != workers,
        }

    def judge(self, out: Path, code: int) -> dict[str, Any]:
        """Whether the run ended well and used its tiles as it should."""
        if code != 0:
            log = (out.parent / f"{out.name}.log").read_text(errors="replace")
            return {"problems": [f"exit code {code}: {log.strip()[-300:]}"], "again": 0}
        try:
            steps = used_tiles(out)
        except ValueError as error:
            return {"problems": [str(error)], "again": 0}
        problems = ledger_problems(steps, self.tile_ids)
        if len(steps) != self.steps:
            problems.append(f"{len(steps)} steps instead of {self.steps}")
        logged = Counter(
            e["step"] for e in read_events(out / "events.jsonl") if e["event"] == "step"
        )
        return {"problems": problems, "again": sum(logged.values()) - len(logged)}

    def start(self, out: Path, workers: int, *, resume: bool) -> int:
        """Fork a driver; returns its pid."""
        config = pretrain.Config(
            index=self.index, out=out, ssl=tiny(self.steps), workers=workers, resume=resume,
            cpus_per_worker=0.5, shuffle_chunks=4, checkpoint_every=10, log_every=1,
            log_tiles=True, address=self.address, tracking_uri=f"sqlite:///{self.folder}/mlflow.db",
        )  # fmt: skip
        return fork(lambda: pretrain.run(config), out.parent / f"{out.name}.log")

    def victims(self, kind: str, out: Path, driver: int) -> list[int]:
        """Processes of a kind, one of them by chance first."""
        if kind == "driver":
            return [driver]
        if kind == "worker":
            starts = [e for e in read_events(out / "events.jsonl") if e["event"] == "start"]
            return [starts[-1]["pid"]]
        found = [p.pid for p in psutil.process_iter() if READER in " ".join(_command(p))]
        ours = [pid for pid in found if self.is_ours(pid)]
        self.random.shuffle(ours)
        return ours

    def is_ours(self, pid: int) -> bool:
        """Whether a process belongs to the Ray of this drill and no other."""
        try:
            parents = psutil.Process(pid).parents()
        except psutil.Error:
            return False
        return any(str(self.folder) in word for parent in parents for word in _command(parent))

    def wait(self, pid: int, poll: Callable[[], bool]) -> int:
        """Exit code of a driver, negative when it was killed."""
        end = time.monotonic() + TIMEOUT_S
        while time.monotonic() < end:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            poll()
            time.sleep(0.02)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return 124


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def last_step(out: Path) -> int:
    """The newest step in the run's events."""
    return max((e["step"] for e in read_events(out / "events.jsonl") if e["event"] == "step"),
               default=0)  # fmt: skip


def fork(work: Callable[[], Any], log: Path) -> int:
    """Run `work` in a forked process whose output goes to a file; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with log.open("ab") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        work()
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    finally:
        os._exit(code)


def start_ray(folder: Path) -> str:
    """A Ray of its own that outlives the drivers; returns its address."""
    port = random.SystemRandom().randint(20_000, 40_000)
    command = [Path(sys.executable).with_name("ray"), "start", "--head", f"--port={port}",
               "--num-cpus=4", "--include-dashboard=false", "--object-store-memory=300000000",
               f"--temp-dir={folder}", "--disable-usage-stats"]  # fmt: skip
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
    return f"127.0.0.1:{port}"


def end_ray(folder: Path) -> None:
    """End the processes of the Ray that was started in `folder`."""
    for process in psutil.process_iter():
        if any(str(folder) in word for word in _command(process)) and process.pid != os.getpid():
            process.kill()


def main() -> None:
    """Run the rounds, print each, and a line of JSON."""
    parser = argparse.ArgumentParser(description="Kill a pretraining and count its tiles.")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ["RAY_AUTH_MODE"] = "disabled"
    began = time.perf_counter()
    folder = Path(tempfile.mkdtemp(prefix="cr"))  # short: names of Unix sockets end at 107 bytes
    assert not ray.is_initialized()
    results = []
    try:
        drill = Drill(folder, options.seed)
        for number in range(options.rounds):
            results.append(drill.round(number))
            print(number, json.dumps(results[-1]), flush=True)
    finally:
        end_ray(folder)
        shutil.rmtree(folder, ignore_errors=True)
    kills = Counter(result["kind"] for result in results if result["killed"])
    print(
        json.dumps(
            {
                "rounds": len(results),
                "ok": sum(r["killed"] and not r["problems"] for r in results),
                "kills": dict(kills),
                "resumed_with_other_workers": sum(r["other_workers"] for r in results),
                "steps_done_again": sum(r["again"] for r in results),
                "problems": [problem for r in results for problem in r["problems"]],
                "seconds": round(time.perf_counter() - began, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
