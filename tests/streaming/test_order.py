import numpy as np
import pytest

from cytoray.streaming import ChunkOrder, StreamPosition, permute


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 100, 1023, 4097])
def test_permute_is_a_bijection(size: int) -> None:
    out = permute(np.arange(size), size, seed=3, epoch=1)
    assert sorted(out.tolist()) == list(range(size))


def test_permute_depends_on_seed_and_epoch_and_mixes() -> None:
    values = np.arange(1000)
    first = permute(values, 1000, seed=0, epoch=0)
    assert not np.array_equal(first, permute(values, 1000, seed=1, epoch=0))
    assert not np.array_equal(first, permute(values, 1000, seed=0, epoch=1))
    # neighbours are sent far apart: the mean jump of a random permutation is a third of its size
    assert 280 < np.abs(np.diff(first)).mean() < 390


def test_permute_of_a_part_needs_no_memory_for_the_rest() -> None:
    size = 10**12
    some = permute(np.array([0, 1, 10**11, size - 1]), size, seed=5, epoch=0)
    assert len(set(some.tolist())) == 4
    assert (some >= 0).all()
    assert (some < size).all()


def test_permute_refuses_values_outside() -> None:
    with pytest.raises(ValueError, match=r"\[0, 3\)"):
        permute(np.array([3]), 3, seed=0, epoch=0)


def test_golden_order_is_the_same_on_every_machine() -> None:
    assert permute(np.arange(8), 8, seed=0, epoch=0).tolist() == GOLDEN


GOLDEN = [5, 7, 0, 4, 1, 6, 3, 2]


def test_every_epoch_visits_every_chunk_once() -> None:
    order = ChunkOrder(num_chunks=11, seed=2, shuffle_chunks=4)
    epochs, chunks = order.chunks(np.arange(33))
    for epoch in range(3):
        assert sorted(chunks[epochs == epoch].tolist()) == list(range(11))
    assert order.windows_per_epoch == 3
    assert [order.window_size(w) for w in range(3)] == [4, 4, 3]
    assert order.first_position(StreamPosition(epoch=2, window=1, offset=5)) == 26
