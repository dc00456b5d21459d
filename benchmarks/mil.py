"""MIL aggregators on packed bags against one bag at a time, and against padded `torchmil`.

    python -m benchmarks.mil [--bags 8] [--repeats 7] [--threads 2] [--names abmil clam ...] [--all]

Bags of 50 to 5,000 instances (log-uniform) x 384. A training step is forward, loss and backward
over all bags, without the optimiser (a batch needs one step, the loop as well: it accumulates).
The loop is the published form in plain torch (`benchmarks.plain_mil`), one bag at a time; LESS,
which was published for 100 tiles a slide, gets so many, and its loop is the package's own
aggregator. A batch of 8 is that of `MILConfig`. Rounds are interleaved; figures are ratios of
medians. torchmil's ABMIL runs on the same bags padded to the longest, where torchmil is installed.
Both sides are float32 (what `train_frozen` uses) without dropout; `vs_loop_bf16` has both under
autocast, `dropout_vs_loop` both with the dropout of `MILConfig`, and `abmil_vs_stepping_loop` an
optimiser step for the batch against one a bag, as a loop of batch 1 trains.
`--all` adds prediction, and `own`: the package's aggregator one bag at a time.

The multi-task figure is the time of one UniCAS pass for three tasks (8 blocks, top 256, 8 experts)
over that of three TransMIL passes (512 wide, 256 landmarks) on the same bags, prediction only, at
the papers' sizes but for the features' width: 384 instead of 1,024. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.plain_mil import PLAIN, one_bag, sum_of
from cytoray.mil import AGGREGATORS, MILConfig, PackedBags, build_aggregator, pack

WIDTH, SMALLEST, LARGEST = 384, 50, 5_000
SECONDS = 8.0  # of an aggregator's rounds, about
IN_DETAIL = ("abmil", "clam", "clam_mb", "dsmil")
KINDS = {"bf16": "vs_loop_bf16", "dropout": "dropout_vs_loop", "step": "vs_stepping_loop"}
HAS_TORCHMIL = importlib.util.find_spec("torchmil") is not None


def make_bags(count: int) -> tuple[list[Tensor], Tensor]:
    """`count` bags of log-uniform size, and labels (count,)."""
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.uniform(np.log(SMALLEST), np.log(LARGEST), count)).astype(int)
    generator = torch.Generator().manual_seed(0)
    bags = [torch.randn(int(size), WIDTH, generator=generator) for size in sizes]
    return bags, torch.from_numpy(rng.integers(0, 2, count))


def interleaved(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each run, one of each a round, after a warm-up.

    There are `repeats` rounds, or fewer (2 at least) where they take more than `SECONDS`.
    """
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    began = time.perf_counter()
    for done in range(repeats):
        if done >= 2 and time.perf_counter() - began > SECONDS:
            break
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def train_packed(model: Any, packed: PackedBags, labels: Tensor, *, bf16: bool = False) -> float:
    """One training step on all bags at once."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = sum_of(model.loss(model(*packed), labels))
    loss.backward()
    return float(loss.detach())


def train_loop(
    model: Any, bags: list[Tensor], labels: Tensor, step: Any, *, bf16: bool = False
) -> float:
    """One training step, a bag at a time."""
    model.zero_grad()
    total = 0.0
    for bag, label in zip(bags, labels, strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = step(model, bag, label)[1] / len(bags)
        loss.backward()
        total += float(loss.detach())
    return total


def stepping(model: Any, bags: list[Tensor], labels: Tensor) -> dict[str, Callable[[], Any]]:
    """ABMIL with its optimiser: a step for all bags, and a step a bag."""
    packed, plain = pack(bags), PLAIN["abmil"]
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def once() -> None:
        train_packed(model, packed, labels)
        optimiser.step()

    def each() -> None:
        for bag, label in zip(bags, labels, strict=True):
            train_loop(model, [bag], label[None], plain)
            optimiser.step()

    return {"step packed": once, "step loop": each}


@torch.no_grad()
def predict_packed(model: Any, packed: PackedBags) -> Tensor:
    """Logits (B, C) of all tasks."""
    return torch.cat(model(*packed).task_logits, dim=1)


@torch.no_grad()
def predict_loop(model: Any, bags: list[Tensor], step: Any, label: Tensor) -> Tensor:
    """The same, a bag at a time."""
    return torch.stack([step(model, bag, label)[0] for bag in bags])


def padded_abmil(bags: list[Tensor], labels: Tensor) -> Callable[[], Any]:
    """A training step of torchmil's ABMIL, of the same sizes, on padded bags."""
    from torchmil.models import ABMIL  # pyright: ignore[reportMissingImports]

    features = nn.Sequential(nn.Linear(WIDTH, 512), nn.ReLU())
    model = ABMIL(in_shape=(WIDTH,), att_dim=128, gated=True, feat_ext=features)
    padded = nn.utils.rnn.pad_sequence(bags, batch_first=True)
    lengths = torch.tensor([len(bag) for bag in bags])
    mask = (torch.arange(padded.shape[1]) < lengths[:, None]).float()

    def step() -> None:
        model.zero_grad()
        logits = model(padded, mask)
        nn.functional.binary_cross_entropy_with_logits(logits, labels.float()).backward()

    return step


def runs_of(name: str, bags: list[Tensor], labels: Tensor) -> dict[str, Callable[[], Any]]:
    """Training and prediction runs of one aggregator, on no more instances than it is made for."""
    torch.manual_seed(0)
    model = build_aggregator(name, WIDTH, 2, dropout=0.0)
    limit = AGGREGATORS[name].optimizer_defaults.get("max_instances", LARGEST)
    bags = [bag[:limit] for bag in bags]
    packed, plain = pack(bags), PLAIN[name]
    runs: dict[str, Callable[[], Any]] = {
        "train packed": lambda: train_packed(model, packed, labels),
        "train loop": lambda: train_loop(model, bags, labels, plain),
        "train own": lambda: train_loop(model, bags, labels, one_bag),
        "predict packed": lambda: predict_packed(model, packed),
        "predict loop": lambda: predict_loop(model, bags, plain, labels[0]),
        "predict own": lambda: predict_loop(model, bags, one_bag, labels[0]),
    }
    if name in IN_DETAIL:
        dropping = build_aggregator(name, WIDTH, 2, dropout=MILConfig().dropout)
        runs |= {
            "bf16 packed": lambda: train_packed(model, packed, labels, bf16=True),
            "bf16 loop": lambda: train_loop(model, bags, labels, plain, bf16=True),
            "dropout packed": lambda: train_packed(dropping, packed, labels),
            "dropout loop": lambda: train_loop(dropping, bags, labels, plain),
        }
    if name == "abmil":
        runs |= stepping(build_aggregator(name, WIDTH, 2, dropout=0.0), bags, labels)
    if name == "abmil" and HAS_TORCHMIL:
        runs["train torchmil"] = padded_abmil(bags, labels)
    return runs


def measure(
    name: str, bags: list[Tensor], labels: Tensor, repeats: int, *, everything: bool
) -> dict[str, float]:
    """Measure one aggregator, print a line, return its figures."""
    runs = runs_of(name, bags, labels)
    same_answer = name not in ("dtfd",)  # deals its pseudo-bags at random while training
    gap = float((runs["predict packed"]() - runs["predict loop"]()).abs().max())
    if same_answer and gap > 1e-3:
        raise RuntimeError(f"{name}: packed and plain logits differ by {gap:.1e}")
    if not everything:
        left_out = ("train own", "predict packed", "predict loop", "predict own")
        runs = {run: call for run, call in runs.items() if run not in left_out}
    seconds = interleaved(runs, repeats)
    figures = {f"{name}_vs_loop": seconds["train loop"] / seconds["train packed"]}
    for kind, key in KINDS.items():
        if f"{kind} loop" in seconds:
            ratio = seconds[f"{kind} loop"] / seconds[f"{kind} packed"]
            figures[f"{name}_{key}"] = ratio
    if everything:
        figures[f"{name}_vs_own_loop"] = seconds["train own"] / seconds["train packed"]
        figures[f"{name}_predict_vs_loop"] = seconds["predict loop"] / seconds["predict packed"]
    figures[f"{name}_bags_per_s"] = len(bags) / seconds["train packed"]
    if "train torchmil" in seconds:
        figures["abmil_vs_torchmil"] = seconds["train torchmil"] / seconds["train packed"]
    line = "  ".join(f"{run} {1e3 * value:8.1f}" for run, value in seconds.items())
    print(f"{name:<8} ms: {line}  (gap {gap:.0e})", flush=True)
    return figures


def measure_tasks(bags: list[Tensor], repeats: int) -> dict[str, float]:
    """Three tasks in one UniCAS pass against three TransMIL passes."""
    torch.manual_seed(0)
    several = build_aggregator("unicas", WIDTH, (2, 2, 2)).eval()
    single = [build_aggregator("transmil", WIDTH, 2).eval() for _ in range(3)]
    packed = pack(bags)
    seconds = interleaved(
        {
            "unicas": lambda: predict_packed(several, packed),
            "transmil": lambda: [predict_packed(model, packed) for model in single],
        },
        repeats,
    )
    print(
        f"three tasks: one UniCAS pass {1e3 * seconds['unicas']:.1f} ms, three TransMIL passes "
        f"{1e3 * seconds['transmil']:.1f} ms"
    )
    return {"multitask_vs_three_transmil": seconds["unicas"] / seconds["transmil"]}


def _memory_kib(field: str) -> int:
    """A field of this process's memory status, KiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def _peak(kind: str, count: int, results: Any) -> None:
    torch.set_num_threads(1)
    bags, labels = make_bags(count)
    run = runs_of("abmil", bags, labels)[kind]
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts anew
    before = _memory_kib("VmRSS")
    run()
    results.put(_memory_kib("VmHWM") - before)


def peak_mb(kind: str, count: int) -> float:
    """Peak memory of one ABMIL run over what the process held before, MB; on Linux."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_peak, args=(kind, count, results))
    process.start()
    kibibytes = results.get()
    process.join()
    return kibibytes / 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--bags", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--names", nargs="*", default=list(AGGREGATORS), choices=list(AGGREGATORS))
    parser.add_argument("--all", action="store_true", help="prediction and the own loop as well")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bags, labels = make_bags(arguments.bags)
    print(
        f"{len(bags)} bags, {sum(map(len, bags))} instances x {WIDTH}, {arguments.threads} threads"
    )
    figures: dict[str, float] = {}
    for name in arguments.names:
        figures |= measure(name, bags, labels, arguments.repeats, everything=arguments.all)
    figures |= measure_tasks(bags, arguments.repeats)
    if "abmil" in arguments.names and sys.platform == "linux":
        kinds = ["train packed", "train loop", *(["train torchmil"] if HAS_TORCHMIL else [])]
        for kind in kinds:
            figures[f"abmil_{kind.split()[1]}_mb"] = peak_mb(kind, arguments.bags)
    if not HAS_TORCHMIL:
        print("torchmil is not installed: abmil_vs_torchmil is left out (pip install torchmil)")
    print(json.dumps({key: round(value, 3) for key, value in figures.items()}))


if __name__ == "__main__":
    main()
