"""The order of reading: a seeded permutation of chunks that needs no memory.

An epoch visits every chunk once. `chunk_order(position)` is computed, never stored, so a plan of a
hundred million chunks costs the same few bytes as one of ten, every process computes the same
order from the seed alone, and reading can start at any position.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

_ROUNDS = 6


def _round_keys(seed: int, epoch: int) -> np.ndarray:
    """Six 64-bit keys drawn from (seed, epoch); uint64 (6,)."""
    digest = hashlib.blake2b(f"{seed}:{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").copy()


def _mix(x: np.ndarray, key: np.uint64) -> np.ndarray:
    """A 64-bit finaliser (splitmix64) keyed by addition; uint64 in, uint64 out."""
    with np.errstate(over="ignore"):
        x = x + key
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _feistel(values: np.ndarray, half_bits: int, keys: np.ndarray) -> np.ndarray:
    """A balanced Feistel network: a bijection of [0, 4**half_bits); uint64 arrays."""
    mask = np.uint64((1 << half_bits) - 1)
    shift = np.uint64(half_bits)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right, key) & mask)
    return (left << shift) | right


def permute(values: np.ndarray, size: int, *, seed: int, epoch: int) -> np.ndarray:
    """Send each of `values` in [0, size) to its place in a seeded permutation of [0, size).

    A Feistel network permutes the next power of four; values that land outside [0, size) walk on
    until they come back in (cycle walking), which keeps the map a bijection.

    Args:
        values: int64 (N,), each in [0, size).
        size: number of items permuted.
        seed: the run's seed.
        epoch: another epoch is another permutation.

    Returns:
        int64 (N,).

    Raises:
        ValueError: a value lies outside [0, size).
    """
    values = np.asarray(values, dtype=np.int64)
    if values.size and (values.min() < 0 or values.max() >= size):
        raise ValueError(f"values must lie in [0, {size})")
    half_bits = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    keys = _round_keys(seed, epoch)
    out = _feistel(values.astype(np.uint64), half_bits, keys)
    outside = np.flatnonzero(out >= np.uint64(size))
    while outside.size:
        out[outside] = _feistel(out[outside], half_bits, keys)
        outside = outside[out[outside] >= np.uint64(size)]
    return out.astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class StreamPosition:
    """Where in the endless sequence of tiles a run stands; all that exact resume needs.

    Attributes:
        epoch: passes over the data completed before the current window.
        window: window within the epoch (a window is `shuffle_chunks` consecutive chunks).
        offset: tiles of that window already used.
    """

    epoch: int = 0
    window: int = 0
    offset: int = 0


@dataclass(frozen=True, kw_only=True)
class ChunkOrder:
    """Chunks in reading order: positions 0, 1, 2, ... run through epoch after epoch.

    Attributes:
        num_chunks: chunks that hold at least one kept tile.
        seed: the run's seed, shared by all ranks.
        shuffle_chunks: chunks whose tiles are mixed with each other (the window).
    """

    num_chunks: int
    seed: int
    shuffle_chunks: int = 16

    @property
    def windows_per_epoch(self) -> int:
        return -(-self.num_chunks // self.shuffle_chunks)

    def window_size(self, window: int) -> int:
        """Chunks in a window: `shuffle_chunks`, fewer in the last one of an epoch."""
        return min(self.shuffle_chunks, self.num_chunks - window * self.shuffle_chunks)

    def first_position(self, at: StreamPosition) -> int:
        """The position of the first chunk of the window that `at` stands in."""
        return at.epoch * self.num_chunks + at.window * self.shuffle_chunks

    def chunks(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Epoch and chunk number of each position.

        Args:
            positions: int64 (N,), counted over all epochs.

        Returns:
            (epochs int64 (N,), chunk numbers int64 (N,)).
        """
        positions = np.asarray(positions, dtype=np.int64)
        epochs, within = np.divmod(positions, self.num_chunks)
        out = np.empty_like(within)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            out[here] = permute(within[here], self.num_chunks, seed=self.seed, epoch=int(epoch))
        return epochs, out
