"""The Triton kernels against the definition; without a GPU Triton interprets them (conftest)."""

import os
import subprocess
import sys

import pytest
import torch
from timm.layers.attention import Attention
from torch.utils.checkpoint import checkpoint

from cytoray.models import irpe, sr_transformer
from cytoray.models.irpe import (
    KERNEL_TOKENS,
    NUM_BUCKETS,
    KernelMaps,
    PatchGrids,
    bucket_index,
    kernel_maps,
    padded_tokens,
)
from cytoray.models.sr_attention import (
    fast_sr_attention,
    kernels_serve,
    sr_attention,
)
from cytoray.models.sr_kernel_ops import attend
from cytoray.models.sr_transformer import SRAttention, SRConfig

pytest.importorskip("triton")
from cytoray.models import sr_kernels

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
GRID, PREFIX, HEADS, WIDTH = (5, 4), 2, 2, 8
TOKENS = PREFIX + GRID[0] * GRID[1]
SCALE = WIDTH**-0.5


@pytest.fixture(autouse=True)
def _kernels_serve(monkeypatch):
    # Asked all the same: what it asks must not cut compiled code.
    monkeypatch.setattr(irpe, "has_kernels", lambda device, tokens: True)
    monkeypatch.setattr(sr_transformer, "kernels_serve", lambda v: kernels_serve(v) or True)


def _inputs(per_head=False, batch=2, heads=HEADS, dtype=torch.float32, tokens=TOKENS, width=WIDTH):
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape):
        made = torch.randn(*shape, generator=generator).to(DEVICE, dtype)
        return made.requires_grad_()

    qkv = [leaf(batch, heads, tokens, width) for _ in range(3)]
    shape = (heads, NUM_BUCKETS, width) if per_head else (NUM_BUCKETS, width)
    return qkv, [leaf(*shape) for _ in range(3)]


def _fast(qkv, tables, index, top_h):
    maps = None if tables[0] is None else kernel_maps(index, qkv[0].dtype)
    return fast_sr_attention(*qkv, *tables, maps, top_h, SCALE, kernels=True)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("top_h", [None, 1, 5, TOKENS - 1])
@pytest.mark.parametrize("irpe", [True, False])
def test_kernels_are_the_definition(irpe, top_h, per_head):
    qkv, tables = _inputs(per_head)
    index = bucket_index(*GRID, PREFIX).to(DEVICE)
    if not irpe:
        tables = [None, None, None]
    leaves = [x for x in (*qkv, *tables) if x is not None]
    weight = torch.randn_like(qkv[0])
    outs = [
        sr_attention(*qkv, *tables, index, top_h, SCALE),
        _fast(qkv, tables, index if irpe else None, top_h),
    ]
    torch.testing.assert_close(outs[1], outs[0], atol=1e-5, rtol=1e-5)
    wanted, got = (torch.autograd.grad((out * weight).sum(), leaves) for out in outs)
    for mine, reference in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("grid", "tokens"), [((6, 6), 37), ((16, 16), 257)])
def test_rows_of_a_whole_crop(grid, tokens):
    """As many keys as take several tiles."""
    tiles = {37: (32, 16), 257: (128, 128, 16)}[tokens]
    assert sr_kernels._tiles(padded_tokens(tokens)) == tiles
    (q, k, v), tables = _inputs(batch=1, heads=1, tokens=tokens, width=16)
    index = bucket_index(*grid, 1).to(DEVICE)
    weight = torch.randn_like(q)
    outs = [
        sr_attention(q, k, v, *tables, index, 16, SCALE),
        _fast((q, k, v), tables, index, 16),
    ]
    torch.testing.assert_close(outs[1], outs[0], atol=1e-5, rtol=1e-5)
    expected, got = (torch.autograd.grad((o * weight).sum(), [q, k, v, *tables]) for o in outs)
    for mine, reference in zip(got, expected, strict=True):
        limit = float(1e-5 * reference.abs().max())
        torch.testing.assert_close(mine, reference, atol=limit, rtol=1e-5)


def test_ties_and_signed_zeros_are_kept():
    q = torch.ones(1, 1, 6, 1, device=DEVICE)
    k = torch.tensor([3.0, -1.0, 0.0, -0.0, 0.0, -2.0], device=DEVICE).view(1, 1, 6, 1)
    v = torch.eye(6, device=DEVICE).view(1, 1, 6, 6)
    none = (None, None, None)
    wide = torch.nn.functional.pad
    got = fast_sr_attention(wide(q, (0, 5)), wide(k, (0, 5)), v, *none, None, 2, 1.0, kernels=True)
    kept = torch.tensor([3.0, -torch.inf, 0.0, 0.0, 0.0, -torch.inf], device=DEVICE)
    torch.testing.assert_close(got[0, 0], kept.softmax(0).expand(6, 6))


@pytest.mark.parametrize("tokens", range(16, KERNEL_TOKENS + 1, 16))
def test_tiles_are_powers_of_two_that_make_up_the_keys(tokens):
    tiles = sr_kernels._tiles(tokens)
    assert sum(tiles) == tokens
    assert list(tiles) == sorted(tiles, reverse=True)
    assert all(size in (16, 32, 64, 128) for size in tiles)


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf])
def test_diverged_values_are_not_hidden(bad):
    qkv, tables = _inputs()
    with torch.no_grad():
        qkv[1][0, 0, 3, 2] = bad
    out = _fast(qkv, tables, bucket_index(*GRID, PREFIX).to(DEVICE), 4)
    assert not out[0, 0].isfinite().all()
    assert out[1:].isfinite().all()


def test_half_precision_is_near_float32():
    index = bucket_index(*GRID, PREFIX).to(DEVICE)
    outs, slopes = [], []
    # the interpreter has no products of bf16
    for dtype in (torch.float32, torch.bfloat16 if CUDA else torch.float16):
        qkv, tables = _inputs(dtype=dtype)
        out = _fast(qkv, [t * 0.1 for t in tables], index, None)
        outs.append(out.float())
        slopes.append([g.float() for g in torch.autograd.grad(out.square().sum(), [*qkv, *tables])])
    torch.testing.assert_close(outs[1], outs[0], atol=0.05, rtol=0.05)
    for mine, reference in zip(slopes[1], slopes[0], strict=True):
        assert (mine - reference).norm() < 0.05 * reference.norm()


def _attention(form):
    torch.manual_seed(0)
    config = SRConfig(sparse=True, irpe=True, top_h=4, form=form)
    made = SRAttention(Attention(32, 2), PatchGrids(1), config).to(DEVICE)
    with torch.no_grad():
        for table in (made.rel_k, made.rel_q, made.rel_v):
            assert table is not None
            table.normal_(std=0.5)
    return made


@pytest.mark.parametrize("way", ["compiled", "packed", "recomputed"])
def test_block_with_kernels(way):
    plain, fast = _attention("plain"), _attention("auto")
    x = torch.randn(2, 7 if way != "packed" else 17 + 7 + 7, 32, device=DEVICE)
    grids = [(2, 3)] if way != "packed" else [(4, 4), (2, 3), (2, 3)]
    for attention in (plain, fast):
        attention.grids.note(grids)
    run = fast
    if way == "compiled":
        backend = "inductor" if CUDA else "aot_eager"
        run = torch.compile(fast, fullgraph=True, backend=backend)
    elif way == "recomputed":

        def run(x):
            return checkpoint(fast, x, use_reentrant=False)

    expected, got = plain(x), run(x)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    for out in (expected, got):
        out.square().sum().backward()
    for mine, reference in zip(fast.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, reference.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["tables", "none", "per head"])
def test_as_an_operation_it_keeps_the_rules(kind):
    """Shapes, strides and gradients told to `torch.compile` are those found, nothing is aliased."""
    qkv, tables = _inputs(per_head=kind == "per head", tokens=32)
    maps = kernel_maps(bucket_index(*GRID, PREFIX), torch.float32)
    if DEVICE != "cpu":
        maps = KernelMaps(*(x.to(DEVICE) for x in maps))
    r = torch.stack([torch.nn.functional.pad(t, (0, 0, 0, 14)) for t in tables]).detach()
    given = (None,) * 4 if kind == "none" else (r.requires_grad_(), *maps)
    torch.library.opcheck(attend, (*qkv, *given, TOKENS, 4, SCALE))


def test_where_they_serve():
    values = torch.zeros(1, 1, 4, 8)
    assert not kernels_serve(values)
    if CUDA:
        half = values.cuda().bfloat16()
        assert kernels_serve(half)
        assert not kernels_serve(half.float())
        assert not kernels_serve(half.expand(1, KERNEL_TOKENS + 1, 4, 8).transpose(1, 2))


# What a launch compiles, made for a GPU that need not be there.
_COMPILE = """
import sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from cytoray.models import sr_kernels

dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[sys.argv[1]]
values = torch.empty(1, int(sys.argv[2]), 64, dtype=dtype, device="meta")
table = torch.empty(1, values.shape[1], 64, device="meta")
numbers = {"tokens": "i32", "scale": "fp32"}
for kernel, shapes in (
    (sr_kernels._attend_kernel, sr_kernels._ATTEND),
    (sr_kernels._slope_kernel, sr_kernels._SLOPES),
):
    options = sr_kernels._options(values, table, shapes)
    launch = {name: options.pop(name) for name in ("num_warps", "maxnreg")}
    fixed = options | ({"TOP_H": 16, "BY_VALUE": 16} if "TOP_H" in kernel.arg_names else {})
    signature = {
        name: "constexpr" if name in fixed else "*u8" if name == "buckets"
        else numbers.get(name, "*" + sys.argv[1])
        for name in kernel.arg_names
    }
    places = [place for place, n in enumerate(kernel.arg_names) if signature[n].startswith("*")]
    attrs = {(place,): [["tt.divisibility", 16]] for place in places}
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=attrs)
    target = GPUTarget("cuda", int(sys.argv[3]), 32)
    made = triton.compile(source, target=target, options=launch)
    print(made.metadata.shared)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's assembler is for Linux")
@pytest.mark.parametrize(
    ("dtype", "tokens", "capability", "shared_kib"),
    [("bf16", 208, 80, 163), ("bf16", 272, 90, 227)],
)
def test_kernels_compile_for_real_devices(dtype, tokens, capability, shared_kib):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    made = subprocess.run(
        [sys.executable, "-c", _COMPILE, dtype, str(tokens), str(capability)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    sizes = [int(line) for line in made.stdout.split()]
    assert len(sizes) == 2
    assert max(sizes) <= shared_kib * 1024  # what a multiprocessor of the device has
