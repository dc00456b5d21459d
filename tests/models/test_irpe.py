import math

import pytest
import torch

from cytoray.errors import InputError
from cytoray.models.irpe import (
    NUM_BUCKETS,
    PADDED_BUCKETS,
    PatchGrids,
    axis_bin,
    bucket_index,
    cached_buckets,
    gather_maps,
    kernel_maps,
    one_hot_maps,
    padded_tokens,
    pair_maps,
    pairs_from_keys,
    pairs_from_queries,
    sums_for_keys,
    sums_for_queries,
)

CPU = torch.device("cpu")


def test_axis_bins_by_hand():
    # 1.9 + ln(x / 1.9) / ln 8 * 1.9: 1.947, 2.317, 2.580, 2.784 for x = 2..5, 3.8 at 15.2
    expected = {0: 0, 1: 1, 2: 2, 3: 2, 4: 3, 5: 3, 6: 3, 8: 3, 13: 3, 15: 3, 16: 3, 100: 3}
    assert {x: axis_bin(x) for x in expected} == expected
    assert {x: axis_bin(-x) for x in expected} == {x: -b for x, b in expected.items()}
    assert {axis_bin(x) for x in range(-200, 201)} == set(range(-3, 4))
    assert axis_bin(5, alpha=5, beta=10, gamma=40) == 5
    assert axis_bin(14, alpha=5, beta=10, gamma=40) == round(5 + math.log(14 / 5) / math.log(8) * 5)


def _bin_by_formula(x):
    if abs(x) <= 1.9:
        return x
    value = round(1.9 + math.log(abs(x) / 1.9) / math.log(15.2 / 1.9) * (3.8 - 1.9))
    return int(math.copysign(min(value, 3.8), x))


@pytest.mark.parametrize(
    ("height", "width", "prefix"), [(14, 14, 1), (6, 6, 5), (3, 8, 2), (1, 1, 0)]
)
def test_buckets_against_the_formula(height, width, prefix):
    tokens = prefix + height * width
    expected = torch.full((tokens, tokens), 49)
    for i in range(height * width):
        for j in range(height * width):
            row = _bin_by_formula(i // width - j // width)
            column = _bin_by_formula(i % width - j % width)
            expected[prefix + i, prefix + j] = (row + 3) * 7 + column + 3
    got = bucket_index(height, width, prefix)
    assert got.dtype == torch.int64
    assert torch.equal(got, expected)


def test_buckets_by_hand():
    index = bucket_index(2, 2, 1)
    assert index.tolist() == [
        [49, 49, 49, 49, 49],
        [49, 24, 23, 17, 16],
        [49, 25, 24, 18, 17],
        [49, 31, 30, 24, 23],
        [49, 32, 31, 25, 24],
    ]
    assert len(bucket_index(14, 14, 1).unique()) == NUM_BUCKETS == 50
    patches = bucket_index(5, 9, 0)
    assert torch.equal(patches.T, 48 - patches)


@pytest.mark.parametrize("form", [gather_maps, lambda index: one_hot_maps(index, torch.float64)])
def test_pairs_and_sums_against_loops(form):
    torch.manual_seed(0)
    index = bucket_index(2, 3, 1)
    maps, tokens = form(index), len(index)
    table = torch.randn(2, tokens, NUM_BUCKETS, dtype=torch.float64)
    pairs = torch.randn(2, tokens, tokens, dtype=torch.float64)
    from_queries, from_keys = torch.zeros_like(pairs), torch.zeros_like(pairs)
    for_queries, for_keys = torch.zeros_like(table), torch.zeros_like(table)
    for i in range(tokens):
        for j in range(tokens):
            bucket = index[i, j]
            from_queries[:, i, j] = table[:, i, bucket]
            from_keys[:, i, j] = table[:, j, bucket]
            for_queries[:, i, bucket] += pairs[:, i, j]
            for_keys[:, j, bucket] += pairs[:, i, j]
    torch.testing.assert_close(pairs_from_queries(table, maps), from_queries)
    torch.testing.assert_close(pairs_from_keys(table, maps), from_keys)
    torch.testing.assert_close(sums_for_queries(pairs, maps), for_queries)
    torch.testing.assert_close(sums_for_keys(pairs, maps), for_keys)


def test_maps_of_the_kernels_are_padded_by_zeros():
    index = bucket_index(3, 5, 1)
    tokens, padded = len(index), padded_tokens(len(index))
    assert (tokens, padded, padded_tokens(32), PADDED_BUCKETS) == (16, 16, 32, 64)
    index = bucket_index(4, 5, 1)
    tokens, padded = len(index), padded_tokens(len(index))
    assert (tokens, padded) == (21, 32)
    maps = kernel_maps(index, torch.float64)
    assert maps.buckets.shape == (padded, padded)
    assert torch.equal(maps.buckets[:tokens, :tokens].long(), index)
    one_hot = one_hot_maps(index, torch.float64)
    for made, wanted in ((maps.of_queries, one_hot), (maps.of_keys, one_hot.transpose(0, 1))):
        assert made.shape == (padded, padded, PADDED_BUCKETS)
        assert torch.equal(made[:tokens, :tokens, :NUM_BUCKETS], wanted)
        assert made.sum() == wanted.sum()


def test_maps_are_made_once_and_serve_training_after_inference():
    with torch.inference_mode():
        first = pair_maps((3, 7), 2, CPU, torch.float32)
        buckets = cached_buckets((3, 7), 2, CPU)
    assert not first.is_inference()
    assert not buckets.is_inference()
    assert pair_maps((3, 7), 2, CPU, torch.float32) is first
    assert cached_buckets((3, 7), 2, CPU) is buckets
    assert pair_maps((7, 3), 2, CPU, torch.float32) is not first


def test_grids_by_token_count():
    grids = PatchGrids(num_prefix=5)
    assert grids.of(5 + 36) == ((6, 6),)
    assert grids.of(5) == ((0, 0),)
    with pytest.raises(InputError, match="17 tokens, 5 of them"):
        grids.of(17)
    grids.note([(3, 4)])
    grids.note([(2, 2), (1, 1)])
    assert grids.of(17) == ((3, 4),)
    assert grids.of(9 + 6) == ((2, 2), (1, 1))


def test_grids_that_cannot_be_told_apart_are_refused_in_training():
    grids = PatchGrids(num_prefix=1)
    grids.note([(2, 8)])  # validation on other shapes is free
    grids.note([(4, 4)], in_training=True)
    grids.note([(8, 2)])
    assert grids.of(17) == ((8, 2),)
    grids.note([(4, 4)], in_training=True)
    assert grids.of(17) == ((4, 4),)
    with pytest.raises(InputError, match="train on crops of one shape"):
        grids.note([(2, 8)], in_training=True)
    with torch.no_grad():
        grids.note([(2, 8)], in_training=True)
    assert grids.of(17) == ((2, 8),)
