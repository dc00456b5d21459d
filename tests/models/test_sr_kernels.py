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
from cytoray.models.sr_attention import kernels_serve, sr_attention
from cytoray.models.sr_kernel_ops import attend, attend_by_kernels
from cytoray.models.sr_transformer import SRAttention, SRConfig

pytest.importorskip("triton")
from cytoray.models import sr_kernel_products, sr_kernels

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
GRID, PREFIX, HEADS, WIDTH = (5, 4), 2, 2, 8
TOKENS = PREFIX + GRID[0] * GRID[1]
SCALE = WIDTH**-0.5


@pytest.fixture(autouse=True)
def _kernels_serve(monkeypatch):
    # Asked all the same: what it asks must not cut compiled code.
    monkeypatch.setattr(irpe, "has_kernels", lambda device, tokens: True)
    monkeypatch.setattr(sr_transformer, "kernels_serve", lambda qkv: kernels_serve(qkv) or True)


def _inputs(per_head=False, batch=2, heads=HEADS, dtype=torch.float32, tokens=TOKENS, width=WIDTH):
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape):
        made = torch.randn(*shape, generator=generator).to(DEVICE, dtype)
        return made.requires_grad_()

    qkv = [leaf(batch, heads, tokens, width) for _ in range(3)]
    shape = (heads, NUM_BUCKETS, width) if per_head else (NUM_BUCKETS, width)
    return qkv, [leaf(*shape) for _ in range(3)]


def _fast(qkv, tables, index, top_h, scale=SCALE):
    maps = None if tables[0] is None else kernel_maps(index, qkv[0].dtype)
    packed = torch.stack([x.transpose(1, 2) for x in qkv], dim=2)
    return attend_by_kernels(packed, *tables, maps, top_h, scale).transpose(1, 2)


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


@pytest.mark.parametrize("per_head", [False, True])
def test_gradients_that_several_programs_add_up(per_head, monkeypatch):
    """More rows than one program of the tables takes: 5 crops of 22 tokens in blocks of 64."""
    monkeypatch.setattr(sr_kernel_products, "_BLOCKS", 1)
    qkv, tables = _inputs(per_head, batch=5)
    index = bucket_index(*GRID, PREFIX).to(DEVICE)
    weight = torch.randn_like(qkv[0])
    leaves = [*qkv, *tables]
    wanted, got = (
        torch.autograd.grad((out * weight).sum(), leaves)
        for out in (
            sr_attention(*qkv, *tables, index, 5, SCALE),
            _fast(qkv, tables, index, 5),
        )
    )
    for mine, reference in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-5, rtol=1e-5)


def test_no_crop_at_all():
    """As drop path may leave it."""
    qkv, tables = _inputs(batch=0)
    out = _fast(qkv, tables, bucket_index(*GRID, PREFIX).to(DEVICE), 5)
    assert out.shape == qkv[0].shape
    for grad in torch.autograd.grad(out.sum(), [*qkv, *tables]):
        assert not grad.any()


def test_ties_and_signed_zeros_are_kept():
    q = torch.ones(1, 1, 6, 1, device=DEVICE)
    k = torch.tensor([3.0, -1.0, 0.0, -0.0, 0.0, -2.0], device=DEVICE).view(1, 1, 6, 1)
    v = torch.eye(6, device=DEVICE).view(1, 1, 6, 6)
    none = (None, None, None)
    wide = torch.nn.functional.pad
    got = _fast((wide(q, (0, 5)), wide(k, (0, 5)), v), none, None, 2, 1.0)
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


def test_crops_of_few_tokens_without_positions_are_left_to_pytorch(monkeypatch):
    """With no more tokens than a query keeps it is plain attention."""
    served = []
    monkeypatch.setattr(
        sr_transformer,
        "attend_by_kernels",
        lambda qkv, *_: served.append(qkv.shape[1]) or qkv[:, :, 0],
    )
    config = SRConfig(sparse=True, irpe=False, top_h=4)
    attention = SRAttention(Attention(32, 2), PatchGrids(1), config).to(DEVICE)
    for tokens in (3, 4, 5):
        attention(torch.randn(2, tokens, 32, device=DEVICE))
    assert served == [5]


@pytest.mark.parametrize("kind", ["tables", "none", "per head"])
def test_as_an_operation_it_keeps_the_rules(kind):
    """Shapes, strides and gradients told to `torch.compile` are those found, nothing is aliased."""
    qkv, tables = _inputs(per_head=kind == "per head")
    maps = kernel_maps(bucket_index(*GRID, PREFIX), torch.float32)
    if DEVICE != "cpu":
        maps = KernelMaps(*(x.to(DEVICE) for x in maps))
    r = torch.stack([torch.nn.functional.pad(t, (0, 0, 0, 14)) for t in tables]).detach()
    given = (None,) * 4 if kind == "none" else (r.requires_grad_(), *maps)
    packed = torch.stack([x.detach().transpose(1, 2) for x in qkv], dim=2).requires_grad_()
    torch.library.opcheck(attend, (packed, *given, 4, SCALE))


def test_where_they_serve():
    qkv = torch.zeros(1, 4, 3, 1, 8)
    assert not kernels_serve(qkv)
    if CUDA:
        half = qkv.cuda().bfloat16()
        assert kernels_serve(half)
        assert not kernels_serve(half.float())
        assert not kernels_serve(half[:, :1].expand(1, KERNEL_TOKENS + 1, 3, 1, 8))


# Every launch of an attention and its gradient is compiled, for a GPU that need not be there.
_COMPILE = """
import sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from cytoray.models import sr_kernel_products, sr_kernels
from cytoray.models.irpe import bucket_index, kernel_maps
from cytoray.models.sr_kernel_ops import attend_by_kernels

side, capability = int(sys.argv[1]), int(sys.argv[2])
kinds = {
    torch.bfloat16: "*bf16", torch.uint8: "*u8", torch.float32: "*fp32", int: "i32", float: "fp32"
}

class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, **fixed):
        names = self.kernel.arg_names
        launch = {name: fixed.pop(name) for name in ("num_warps", "maxnreg") if name in fixed}
        given = [kinds[x.dtype if isinstance(x, torch.Tensor) else type(x)] for x in args]
        signature = dict.fromkeys(names, "constexpr") | dict(zip(names, given))
        aligned = {(n,): [["tt.divisibility", 16]] for n, x in enumerate(given) if x[0] == "*"}
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=fixed, attrs=aligned)
        target = GPUTarget("cuda", capability, 32)
        made = triton.compile(source, target=target, options=launch)
        print(self.kernel.__name__, made.metadata.shared)

for module in (sr_kernels, sr_kernel_products):
    for name in [name for name in vars(module) if name.endswith("_kernel")]:
        setattr(module, name, Compiled(getattr(module, name)))
index = bucket_index(side, side, 1)
qkv = torch.zeros(1, len(index), 3, 2, 64, dtype=torch.bfloat16, requires_grad=True)
tables = [torch.zeros(50, 64, requires_grad=True) for _ in range(3)]
maps = kernel_maps(index, torch.bfloat16)
attend_by_kernels(qkv, *tables, maps, 16, 0.125).sum().backward()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's assembler is for Linux")
@pytest.mark.parametrize(
    ("side", "capability", "shared_kib"), [(6, 90, 227), (14, 80, 163), (16, 90, 227)]
)
def test_kernels_compile_for_real_devices(side, capability, shared_kib):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    made = subprocess.run(
        [sys.executable, "-c", _COMPILE, str(side), str(capability)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    lines = [line.split() for line in made.stdout.splitlines()]
    kernels = ["_attend_kernel", "_slope_kernel", "_key_kernel", "_table_kernel", "_table_kernel"]
    assert [name for name, _ in lines] == kernels
    # what a multiprocessor of the device has
    assert max(int(shared) for _, shared in lines) <= shared_kib * 1024
