import math

import pytest
import torch
import torch.nn.functional as F

from cytoray.models.irpe import NUM_BUCKETS, bucket_index, gather_maps, one_hot_maps
from cytoray.models.sr_attention import fast_sr_attention, sr_attention
from cytoray.models.sr_ops import attend, row_threshold

GRID, PREFIX, HEADS, WIDTH = (3, 4), 2, 2, 8
TOKENS = PREFIX + GRID[0] * GRID[1]
SCALE = WIDTH**-0.5


def _inputs(dtype=torch.float32, per_head=False, batch=3, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return torch.randn(*shape, dtype=dtype, generator=generator).requires_grad_()

    qkv = [leaf(batch, HEADS, TOKENS, WIDTH) for _ in range(3)]
    shape = (HEADS, NUM_BUCKETS, WIDTH) if per_head else (NUM_BUCKETS, WIDTH)
    return qkv, [leaf(*shape) for _ in range(3)]


def _by_loops(q, k, v, r_k, r_q, r_v, buckets, top_h, scale):
    """Equations (7)-(9) for one head, in Python floats."""
    tokens = len(q)
    out = torch.zeros_like(v)
    for i in range(tokens):
        scores = []
        for j in range(tokens):
            b = buckets[i, j]
            relative = (q[i] @ r_k[b] + k[j] @ r_q[b]).item()
            scores.append(((q[i] @ k[j]).item() + relative) * scale)
        threshold = sorted(scores, reverse=True)[top_h - 1]
        kept = [math.exp(s) if s >= threshold else 0.0 for s in scores]
        for j in range(tokens):
            out[i] += kept[j] / sum(kept) * (v[j] + r_v[buckets[i, j]])
    return out


@pytest.mark.parametrize("per_head", [False, True])
def test_definition_against_loops(per_head):
    qkv, tables = _inputs(torch.float64, per_head, batch=1)
    buckets = bucket_index(*GRID, PREFIX)
    got = sr_attention(*qkv, *tables, buckets, 4, SCALE)
    for head in range(HEADS):
        own = [t[head] if per_head else t for t in tables]
        expected = _by_loops(*(x[0, head].detach() for x in qkv), *own, buckets, 4, SCALE)
        torch.testing.assert_close(got[0, head].detach(), expected.detach())


def test_ties_are_all_kept():
    q = torch.ones(1, 1, 1, 1)
    k = torch.tensor([3.0, 1.0, 2.0, 2.0, 2.0]).view(1, 1, 5, 1)
    v = torch.eye(5).view(1, 1, 5, 5)
    expected = torch.tensor([3.0, -torch.inf, 2.0, 2.0, 2.0]).softmax(0)
    none = (None, None, None, None)
    q5 = q.expand(1, 1, 5, 1)
    assert torch.allclose(sr_attention(q5, k, v, *none, 2, 1.0)[0, 0, 0], expected)
    assert torch.allclose(fast_sr_attention(q5, k, v, *none, 2, 1.0)[0, 0, 0], expected)


@pytest.mark.parametrize("form", ["gather", "one_hot"])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("top_h", [None, 1, 5, TOKENS])
@pytest.mark.parametrize("irpe", [True, False])
def test_fast_form_is_the_definition(irpe, top_h, per_head, form):
    qkv, tables = _inputs(per_head=per_head)
    index = bucket_index(*GRID, PREFIX)
    maps = gather_maps(index) if form == "gather" else one_hot_maps(index, torch.float32)
    if not irpe:
        tables, maps = [None, None, None], None
    leaves = [x for x in (*qkv, *tables) if x is not None]
    weight = torch.randn_like(qkv[0])
    expected = sr_attention(*qkv, *tables, index, top_h, SCALE)
    got = fast_sr_attention(*qkv, *tables, maps, top_h, SCALE)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    wanted = torch.autograd.grad((expected * weight).sum(), leaves)
    for mine, reference in zip(
        torch.autograd.grad((got * weight).sum(), leaves), wanted, strict=True
    ):
        torch.testing.assert_close(mine, reference, atol=1e-5, rtol=1e-5)


def test_fast_form_at_the_size_of_a_crop():
    grid = (14, 14)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 3, 197, 64, requires_grad=True) for _ in range(3))
    tables = [(torch.randn(NUM_BUCKETS, 64) * 0.1).requires_grad_() for _ in range(3)]
    index = bucket_index(*grid, 1)
    weight = torch.randn_like(q)
    outs = [
        sr_attention(q, k, v, *tables, index, 16, 0.125),
        fast_sr_attention(q, k, v, *tables, gather_maps(index), 16, 0.125),
    ]
    torch.testing.assert_close(outs[1], outs[0], atol=1e-5, rtol=1e-5)
    expected, got = (torch.autograd.grad((o * weight).sum(), [q, k, v, *tables]) for o in outs)
    for mine, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-5 * reference.abs().max(), rtol=1e-5)


def test_gradients_by_finite_differences():
    qkv, tables = _inputs(torch.float64, batch=1)
    maps = gather_maps(bucket_index(*GRID, PREFIX))

    def run(*leaves):
        return fast_sr_attention(*leaves, maps, 5, SCALE)

    assert torch.autograd.gradcheck(run, (*qkv, *tables), fast_mode=True)


def test_all_kept_and_zero_tables_is_plain_attention():
    qkv, _ = _inputs()
    zeros = [torch.zeros(NUM_BUCKETS, WIDTH) for _ in range(3)]
    maps = gather_maps(bucket_index(*GRID, PREFIX))
    plain = F.scaled_dot_product_attention(*qkv)
    for got in (
        sr_attention(*qkv, *zeros, bucket_index(*GRID, PREFIX), TOKENS, SCALE),
        fast_sr_attention(*qkv, *zeros, maps, TOKENS, SCALE),
        fast_sr_attention(*qkv, *[None] * 4, TOKENS + 9, SCALE),
    ):
        torch.testing.assert_close(got, plain, atol=1e-6, rtol=1e-6)


def test_mask_hides_before_the_largest_are_chosen():
    qkv, tables = _inputs()
    index = bucket_index(*GRID, PREFIX)
    seen = torch.ones(TOKENS, dtype=torch.bool)
    seen[[3, 7, 8]] = False
    got = sr_attention(*qkv, *tables, index, 4, SCALE, mask=seen)
    q, k, v = (x[:, :, seen] for x in qkv)
    expected = sr_attention(q, k, v, *tables, index[seen][:, seen], 4, SCALE)
    torch.testing.assert_close(got[:, :, seen], expected)
    bias = torch.zeros(TOKENS).masked_fill(~seen, -torch.inf)
    torch.testing.assert_close(sr_attention(*qkv, *tables, index, 4, SCALE, mask=bias), got)


@pytest.mark.parametrize("threads", [1, 16])
def test_row_threshold(threads):
    scores = torch.randn(2, 3, 5, 40)
    scores[0, 0, 0, :20] = 1.0
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for h in (1, 16, 40):
            expected = scores.sort(-1, descending=True).values[..., h - 1 : h]
            assert torch.equal(row_threshold(scores, h), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_diverged_values_are_not_hidden(bad):
    qkv, tables = _inputs()
    maps = gather_maps(bucket_index(*GRID, PREFIX))
    with torch.no_grad():
        qkv[1][0, 0, 3, 2] = bad
    out = fast_sr_attention(*qkv, *tables, maps, 4, SCALE)
    assert not out[0, 0].isfinite().all()
    assert out[1:].isfinite().all()


@pytest.mark.parametrize("kind", ["one-hot", "gathered", "none", "per head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_an_operation_it_keeps_the_rules(kind, dtype):
    """Shapes, strides and gradients told to `torch.compile` are those found, nothing is aliased."""
    qkv, tables = _inputs(dtype, per_head=kind == "per head")
    qkv = [
        x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in qkv
    ]  # as timm lays them
    qkv = [x.requires_grad_() for x in qkv]
    index = bucket_index(*GRID, PREFIX)
    maps = one_hot_maps(index, dtype) if kind == "one-hot" else gather_maps(index)
    given = (None,) * 4 if kind == "none" else (*tables, maps)
    torch.library.opcheck(attend, (*qkv, *given, 4, SCALE))
