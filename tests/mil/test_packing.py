import numpy as np
import pytest
import torch

from cytoray.errors import InputError
from cytoray.mil.packing import (
    bag_ids,
    check_packed,
    pack,
    prepend_tokens,
    segment_argmax,
    segment_max,
    segment_softmax,
    segment_sum,
    weighted_sums,
)


def bags(sizes=(1, 7, 300), width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, width, generator=generator) for size in sizes]


def test_pack_lays_bags_end_to_end_and_takes_numpy():
    parts = bags()
    features, offsets = pack([part.numpy() for part in parts])
    assert offsets.tolist() == [0, 1, 8, 308]
    assert offsets.dtype == torch.int64
    assert torch.equal(features, torch.cat(parts))


def test_pack_names_every_bag_that_does_not_fit():
    wrong = [torch.zeros(2, 5), torch.zeros(0, 5), torch.zeros(3, 4), torch.zeros(3)]
    with pytest.raises(InputError) as error:
        pack(wrong)
    assert len(error.value.problems) == 3
    assert "bag 1 is empty" in str(error.value)
    with pytest.raises(InputError, match="no bag"):
        pack([])


@pytest.mark.parametrize("columns", [None, 3])
def test_segment_operations_equal_a_loop(columns):
    packed = pack(bags(width=columns or 1))
    values = packed.features if columns else packed.features[:, 0]
    ids = bag_ids(packed.offsets, len(values))
    parts = values.split([1, 7, 300])
    softmax = segment_softmax(values, ids, 3)
    assert torch.allclose(softmax, torch.cat([p.softmax(0) for p in parts]), atol=1e-7)
    assert torch.equal(segment_max(values, ids, 3), torch.stack([p.amax(0) for p in parts]))
    total = torch.stack([p.sum(0) for p in parts])
    assert torch.allclose(segment_sum(values, ids, 3), total, atol=1e-4)


def test_softmax_survives_large_scores():
    scores = torch.tensor([1e4, 1e4, -1e4, 3e38, 0.0])
    out = segment_softmax(scores, torch.tensor([0, 0, 0, 1, 1]), 2)
    assert torch.equal(out, torch.tensor([0.5, 0.5, 0.0, 1.0, 0.0]))


def test_argmax_takes_the_first_of_equal_values():
    values = torch.tensor([[1.0, 0.0], [2.0, 5.0], [2.0, 5.0], [-3.0, -1.0]])
    index = segment_argmax(values, torch.tensor([0, 0, 0, 1]), 2)
    assert index.tolist() == [[1, 1], [3, 3]]


def test_weighted_sums_equal_a_loop_with_gradients():
    packed = pack([part.double() for part in bags()])
    values = packed.features.requires_grad_()
    weights = torch.rand(308, 3, dtype=torch.float64, requires_grad=True)
    out = weighted_sums(weights, values, packed.offsets)
    parts = zip(weights.split([1, 7, 300]), values.split([1, 7, 300]), strict=True)
    expected = torch.stack([w.T @ v for w, v in parts])
    assert torch.allclose(out, expected)
    factor = torch.randn_like(out)
    mine = torch.autograd.grad((out * factor).sum(), (weights, values))
    theirs = torch.autograd.grad((expected * factor).sum(), (weights, values))
    for a, b in zip(mine, theirs, strict=True):
        assert torch.allclose(a, b)
    (alone,) = torch.autograd.grad(
        weighted_sums(weights, values.detach(), packed.offsets).sum(), weights
    )
    assert torch.allclose(alone, values.detach().sum(1, keepdim=True).expand(-1, 3))


def test_tokens_stand_in_front_of_each_bag():
    packed, tokens = pack(bags((2, 3))), torch.full((2, 5), 9.0)
    rows, lie = prepend_tokens(tokens, packed.features, packed.offsets)
    assert lie.sizes == [4, 5]
    assert lie.token_rows.tolist() == [[0, 1], [4, 5]]
    assert lie.origin.tolist() == [-1, -1, 0, 1, -1, -1, 2, 3, 4]
    assert torch.equal(rows[lie.origin >= 0], packed.features)
    assert bool((rows[lie.token_rows] == 9.0).all())


@pytest.mark.parametrize(
    ("offsets", "match"),
    [([0, 4, 4, 8], "empty bag"), ([0, 4], "run from 0"), ([1, 8], "run from 0"), ([0], "B >= 1")],
)
def test_check_packed_refuses_bad_offsets(offsets, match):
    with pytest.raises(InputError, match=match):
        check_packed(torch.zeros(8, 5), torch.tensor(offsets), 5)


def test_check_packed_names_both_widths():
    with pytest.raises(InputError, match=r"\(T, 6\)"):
        check_packed(torch.from_numpy(np.zeros((8, 5))), torch.tensor([0, 8]), 6)
