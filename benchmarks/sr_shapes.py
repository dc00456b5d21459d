"""Which rows, warps and registers suit the programs of the SR kernels on this GPU.

    python -m benchmarks.sr_shapes [--tokens 37 197 257] [--heads 1536] [--rounds 10]

Times both kernels (bf16, heads of 64, top 16, relative positions) in every shape, and what else an
attention takes: products, sums by bucket, and PyTorch's own attention. What is fastest belongs into
`cytoray.models.sr_kernels` (`_ATTEND`, `_SLOPES`). The last line is JSON: for each number of tokens
the microseconds of everything, null where a shape does not compile.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from cytoray.models import sr_kernel_ops, sr_kernels
from cytoray.models.irpe import PADDED_BUCKETS, bucket_index, kernel_maps, padded_tokens

WIDTH, TOP_H = 64, 16
SHAPES: list[sr_kernels.Shape] = [
    (rows, warps, registers)
    for rows, warps in ((16, 1), (16, 4), (32, 2), (32, 4), (64, 4))
    for registers in (None, 168, 128)
]
HEADS_A_CROP = 6


def microseconds(function: Callable[[], Any], rounds: int) -> float:
    """Time of a call on the device, after two to warm up."""
    for _ in range(2):
        function()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(rounds):
        function()
    stop.record()
    stop.synchronize()
    return round(1e3 * start.elapsed_time(stop) / rounds, 1)


def measure(tokens: int, heads: int, rounds: int) -> dict[str, float | None]:
    """Everything of one number of tokens (a square of patches and the class token)."""
    side = round((tokens - 1) ** 0.5)
    maps = kernel_maps(bucket_index(side, side, 1), torch.bfloat16)
    buckets, of_queries = maps.buckets.cuda(), maps.of_queries.cuda()
    padded = padded_tokens(tokens)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    q, k, v, grad = (
        F.pad(random(heads, tokens, WIDTH), (0, 0, 0, padded - tokens)) for _ in range(4)
    )
    table = random(PADDED_BUCKETS, WIDTH)
    from_query, from_key = q @ table.mT, k @ table.mT
    scale = WIDTH**-0.5

    def attend() -> tuple[Tensor, Tensor]:
        return sr_kernels.attend(
            q, k, v, from_query, from_key, buckets, tokens=tokens, top_h=TOP_H, scale=scale
        )

    out, weights = attend()

    def slopes() -> tuple[Tensor, ...]:
        return sr_kernels.slopes(grad, out, k, v, weights, from_query, buckets, scale=scale)

    found: dict[str, float | None] = {}
    for shape in SHAPES:
        for name, run, shapes in (
            ("attend", attend, sr_kernels._ATTEND),
            ("slopes", slopes, sr_kernels._SLOPES),
        ):
            before = dict(shapes)
            shapes.update(dict.fromkeys(before, shape))
            try:
                took = microseconds(run, rounds)
            except (triton.OutOfResources, triton.CompilationError):
                took = None
            shapes.update(before)
            rows, warps, registers = shape
            found[f"{name} {rows} rows, {warps} warps, {registers or 255} registers"] = took
    slope = slopes()[0]
    sums = sr_kernel_ops._sums(slope, of_queries)
    heads_of_one = q.unsqueeze(1)
    found["sums by bucket"] = microseconds(lambda: sr_kernel_ops._sums(slope, of_queries), rounds)
    found["table product"] = microseconds(lambda: q @ table.mT, rounds)
    found["table added"] = microseconds(
        lambda: sr_kernel_ops._add_product(heads_of_one, sums, table), rounds
    )
    found["keys' gradient"] = microseconds(lambda: slope @ q, rounds)
    crop_q, crop_k, crop_v = crops = [
        x[:, :tokens].unflatten(0, (-1, HEADS_A_CROP)).contiguous().requires_grad_()
        for x in (q, k, v)
    ]
    plain = F.scaled_dot_product_attention(crop_q, crop_k, crop_v)
    upstream = torch.randn_like(plain)
    found["plain attention"] = microseconds(
        lambda: F.scaled_dot_product_attention(crop_q, crop_k, crop_v), rounds
    )
    found["plain attention backward"] = microseconds(
        lambda: torch.autograd.grad(plain, crops, upstream, retain_graph=True), rounds
    )
    return found


def main() -> None:
    """Print a table for each number of tokens, and a line of JSON."""
    parser = argparse.ArgumentParser(description="Shapes of the SR kernels' programs.")
    parser.add_argument("--tokens", type=int, nargs="+", default=[37, 197, 257])
    parser.add_argument("--heads", type=int, default=1536, help="crops times heads of each")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    made = {}
    for tokens in options.tokens:
        made[tokens] = measure(tokens, options.heads, options.rounds)
        print(f"{tokens} tokens, {options.heads} heads, microseconds", flush=True)
        for name, took in made[tokens].items():
            print(f"  {name:42s} {'does not compile' if took is None else took}", flush=True)
    print(json.dumps({"device": torch.cuda.get_device_name(), "microseconds": made}))


if __name__ == "__main__":
    main()
