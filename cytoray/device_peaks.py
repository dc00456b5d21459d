"""What devices can do at most: GPUs by the makers' data sheets, this CPU by trying."""

from __future__ import annotations

import re
import time

import torch

# Dense bf16 (fp16 where there is none) floating point operations a second.
PEAK_FLOPS: dict[str, float] = {
    "A10": 125e12,
    "A100": 312e12,
    "A40": 150e12,
    "B200": 2250e12,
    "GB200": 2500e12,
    "H100": 989e12,
    "H100-PCIE": 756e12,
    "H200": 989e12,
    "L4": 121e12,
    "L40S": 362e12,
    "T4": 65e12,
    "V100": 125e12,
}


def peak_of_device(name: str) -> float | None:
    """Peak of a device by the name CUDA gives it, e.g. `NVIDIA H100 PCIe`; None: not known.

    The model must stand in the name as words: an `RTX A4000` is no A40.
    """
    words = f"-{'-'.join(re.findall(r'[A-Z0-9]+', name.upper()))}-"
    found = [model for model in PEAK_FLOPS if f"-{model}-" in words]
    return PEAK_FLOPS[max(found, key=len)] if found else None


def try_cpu(precision: str, threads: int) -> float:
    """FLOP/s of a large matrix product here, which no network gets past.

    Takes half a second, or one product where that is longer (bf16 on a CPU that emulates it).

    Args:
        precision: `bf16` or `fp32`.
        threads: that work on it.
    """
    side = 1024
    one = torch.rand(side, side, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    before, fastest_s, end = torch.get_num_threads(), float("inf"), time.perf_counter() + 0.5
    torch.set_num_threads(threads)
    try:
        while (began := time.perf_counter()) < end:
            torch.mm(one, one)
            fastest_s = min(fastest_s, time.perf_counter() - began)
    finally:
        torch.set_num_threads(before)
    return 2 * side**3 / fastest_s
