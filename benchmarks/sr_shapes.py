"""Which rows, warps and registers suit the programs of the SR kernels on this GPU.

    python -m benchmarks.sr_shapes [--tokens 37 197 257] [--heads 1536] [--rounds 10]

Times every kernel (bf16, heads of 64, top 16, relative positions) in every shape, and what else an
attention takes: products, sums by bucket, and PyTorch's own attention. What is fastest belongs into
`cytoray.models.sr_kernels` (`_ATTEND`, `_SLOPES`) and `cytoray.models.sr_kernel_products` (`_KEYS`,
`_TABLES`). The last line is JSON: for each number of tokens the microseconds of everything, null
where a shape does not compile.
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

from cytoray.models import sr_kernel_ops, sr_kernel_products, sr_kernels
from cytoray.models.irpe import PADDED_BUCKETS, bucket_index, kernel_maps

WIDTH, TOP_H = 64, 16
SHAPES: list[sr_kernels.Shape] = [
    (rows, warps, registers)
    for rows, warps in ((16, 1), (32, 2), (64, 4))
    for registers in (None, 168, 128)
]
PRODUCT_SHAPES = [(32, 4), (64, 4), (64, 8), (128, 8)]
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


def timed(function: Callable[[], Any], rounds: int) -> float | None:
    """`microseconds`, None where the device has no room for it."""
    try:
        return microseconds(function, rounds)
    except (triton.OutOfResources, triton.CompilationError):
        return None


def measure(tokens: int, heads: int, rounds: int) -> dict[str, float | None]:
    """Everything of one number of tokens (a square of patches and the class token)."""
    side = round((tokens - 1) ** 0.5)
    maps = kernel_maps(bucket_index(side, side, 1), torch.bfloat16)
    buckets, of_queries = maps.buckets.cuda(), maps.of_queries.cuda()
    crops = heads // HEADS_A_CROP

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    qkv = random(crops, tokens, 3, HEADS_A_CROP, WIDTH)
    grad = random(crops, tokens, HEADS_A_CROP, WIDTH)
    grad_qkv = torch.empty_like(qkv)
    tables = random(3, PADDED_BUCKETS, WIDTH)
    r_k, r_q, r_v = tables
    from_key = sr_kernel_ops._table_products(qkv[:, :, 1], r_q)
    scale = WIDTH**-0.5

    def attend() -> tuple[Tensor, Tensor]:
        return sr_kernels.attend(qkv, r_k, from_key, buckets, top_h=TOP_H, scale=scale)

    out, weights = attend()

    def slopes() -> tuple[Tensor, Tensor]:
        return sr_kernels.slopes(grad, out, qkv, weights, r_v, buckets, grad_qkv, scale=scale)

    slope, turned = slopes()
    sums = weights.new_empty(2, len(weights), tokens, PADDED_BUCKETS)
    for pairs, into in ((slope, sums[0]), (turned, sums[1])):
        sr_kernel_ops._sum_pairs(pairs, of_queries, into)

    def keys() -> None:
        sr_kernel_products.add_key_gradients(turned, weights, qkv, grad, grad_qkv)

    def table_gradients() -> Tensor:
        return sr_kernel_products.table_gradients(sums, qkv, tables, grad_qkv)

    found: dict[str, float | None] = {}
    for name, run, shapes in (
        ("attend", attend, sr_kernels._ATTEND),
        ("slopes", slopes, sr_kernels._SLOPES),
    ):
        before = dict(shapes)
        for shape in SHAPES:
            shapes.update(dict.fromkeys(before, shape))
            rows, warps, registers = shape
            label = f"{name} {rows} rows, {warps} warps, {registers or 255} registers"
            found[label] = timed(run, rounds)
        shapes.update(before)
    for name, run, constant in (("keys", keys, "_KEYS"), ("tables", table_gradients, "_TABLES")):
        before = getattr(sr_kernel_products, constant)
        for shape in PRODUCT_SHAPES:
            setattr(sr_kernel_products, constant, shape)
            found[f"{name} {shape[0]} rows, {shape[1]} warps"] = timed(run, rounds)
        setattr(sr_kernel_products, constant, before)
    found["sums by bucket"] = microseconds(
        lambda: sr_kernel_ops._sum_pairs(slope, of_queries, sums[0]), rounds
    )
    found["table products"] = microseconds(
        lambda: sr_kernel_ops._table_products(qkv[:, :, 1], r_q), rounds
    )
    q, k, v = crop_parts = [x.transpose(1, 2).requires_grad_() for x in qkv.unbind(2)]
    plain = F.scaled_dot_product_attention(q, k, v)
    upstream = torch.randn_like(plain)
    found["plain attention"] = microseconds(lambda: F.scaled_dot_product_attention(q, k, v), rounds)
    found["plain attention backward"] = microseconds(
        lambda: torch.autograd.grad(plain, crop_parts, upstream, retain_graph=True), rounds
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
