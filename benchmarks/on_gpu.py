"""Everything that needs a GPU, in one go: tests marked `gpu`, step and SR-attention, an ablation.

    python -m benchmarks.on_gpu --out FOLDER [--tiles tiles.npz --cells labels.csv --steps 300]
        [--only tests step sr shapes ablation] [--limit-s 900]

For a box with a GPU and no Ray: it needs torch, timm and what the parts import. Compile caches are
filled by networks of two blocks side by side, beside the tests; what is timed then runs alone. Each
part is a process of its own with a log in FOLDER; one that fails or outlasts the limit does not
stop the next. The last line is JSON: for each part its exit status, seconds and last line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.pretrain_step import BATCH_CUDA

SR_COMPILED = ("benchmarks.sr_attention", "--compile")
SHAPES = ("benchmarks.sr_shapes",)
TOKENS = (37, 197, 257)  # of the shapes, as by default

GPU_TESTS = ("tests/training/test_engine_device.py", "tests/ssl/test_augment.py")
KERNEL_TESTS = ("tests/models/test_sr_kernels.py", "tests/models/test_projection_parts.py")
PARTS = ("tests", "step", "sr", "shapes", "ablation")


@dataclass(frozen=True)
class Part:
    """A command, by the name of its log."""

    name: str
    arguments: tuple[str, ...]

    @staticmethod
    def pytest(name: str, *arguments: str) -> Part:
        side_by_side = ("-n", "6") if find_spec("xdist") else ()
        return Part(name, ("pytest", "-q", "-p", "no:cacheprovider", *side_by_side, *arguments))


def run(part: Part, folder: Path, until: float) -> dict[str, Any]:
    """Run `python -m` a part; its facts."""
    began = time.monotonic()
    log = folder / f"{part.name}.log"
    with log.open("wb") as file:
        try:
            status: int | str = subprocess.run(
                [sys.executable, "-u", "-m", *part.arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=max(until - began, 1.0),
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            status = "out of time"
    lines = log.read_text(errors="replace").strip().splitlines() or [""]
    seconds = round(time.monotonic() - began, 1)
    print(f"{part.name}: exit {status}, {seconds} s\n  {lines[-1]}", flush=True)
    return {"exit": status, "seconds": seconds, "last_line": lines[-1]}


def beside(options: argparse.Namespace) -> list[Part]:
    """What may run side by side: tests, and steps that fill the compile caches."""
    parts = []
    if "tests" in options.only:
        parts += [
            Part.pytest("tests_gpu", "-m", "gpu", *GPU_TESTS),
            Part.pytest("tests_kernels", *KERNEL_TESTS),
        ]
    if "step" in options.only:
        parts += [
            Part(f"warm_{name}", (*_step(name), "--depth", "2", "--rounds", "1", "--no-lightly"))
            for name in BATCH_CUDA
        ]
    if "sr" in options.only:
        parts.append(Part("warm_sr", (*SR_COMPILED, "--rounds", "1")))
    if "shapes" in options.only:
        parts += [
            Part(f"warm_shapes_{tokens}", (*SHAPES, "--tokens", str(tokens), "--rounds", "1"))
            for tokens in TOKENS
        ]
    return parts


def alone(options: argparse.Namespace) -> list[Part]:
    """What is timed, one after the other."""
    parts = []
    if "step" in options.only:
        parts += [Part(f"step_{name}", _step(name)) for name in BATCH_CUDA]
    if "sr" in options.only:
        parts += [
            Part("sr_compiled", SR_COMPILED),
            Part("sr", ("benchmarks.sr_attention",)),
        ]
    if "shapes" in options.only:
        parts.append(Part("sr_shapes", SHAPES))
    if "ablation" in options.only and options.tiles and options.cells:
        settings = f"--steps {options.steps} --batch 256 --global-px 224 --local-px 96 --locals 8"
        given = ("--tiles", str(options.tiles), "--cells", str(options.cells))
        out = ("--out", str(options.out / "ablation"), "--workers", str(options.workers))
        parts.append(Part("ablation", ("benchmarks.ablation", *given, *out, *settings.split())))
    return parts


def _step(name: str) -> tuple[str, ...]:
    return ("benchmarks.pretrain_step", "--backbones", name)


def main() -> None:
    """Run the parts, print what they found and a line of JSON."""
    parser = argparse.ArgumentParser(description="Everything that needs a GPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the logs")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--tiles", type=Path, help="of `benchmarks.tile_set`, for the ablation")
    parser.add_argument("--cells", type=Path, help="labelled cells, for the ablation")
    parser.add_argument("--steps", type=int, default=300, help="of each encoder of the ablation")
    parser.add_argument("--workers", type=int, default=12, help="that make views for the ablation")
    parser.add_argument("--limit-s", type=float, default=900.0)
    options = parser.parse_args()
    until = time.monotonic() + options.limit_s
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    print(f"{device}, torch {torch.__version__}, Python {sys.version.split()[0]}", flush=True)
    found: dict[str, Any] = {}
    first = beside(options)
    with ThreadPoolExecutor(max(len(first), 1)) as pool:
        facts = pool.map(lambda part: run(part, options.out, until), first)
        found |= dict(zip((part.name for part in first), facts, strict=True))
    for part in alone(options):
        found[part.name] = run(part, options.out, until)
    print(json.dumps({"device": device, "torch": torch.__version__, "parts": found}))


if __name__ == "__main__":
    main()
