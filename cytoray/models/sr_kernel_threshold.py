# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false
# (Triton reads the kernels, Python does not)
"""The h-th largest score of each row, found on the chip by halving an interval around it.

A row is a tuple of tiles, whose sizes are TILES: tensors in Triton are of powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def begin(tiles, t):
    """Where the t-th tile of a row begins."""
    return sum(int(size) for size in tiles[: int(t)])


@triton.jit
def _key_of(values):
    """Integers in the order of the floats; zero and negative zero are one."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _value_of(keys):
    bits = tl.where(keys < 0, keys ^ 0x7FFFFFFF, keys)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _count(scores, bound, TILES: tl.constexpr):
    """How many of each row are at or above a bound."""
    below = tl.zeros_like(bound).to(tl.int32)
    for t in tl.static_range(len(TILES)):
        # The sign of a difference is a comparison that needs no predicate.
        apart = (scores[t] - bound[:, None]).to(tl.uint32, bitcast=True)
        below += tl.sum(apart >> 31, axis=1).to(tl.int32)
    return begin(TILES, len(TILES)) - below


@triton.jit
def _largest_below(scores, bound, TILES: tl.constexpr):
    found = tl.full(bound.shape, -float("inf"), tl.float32)
    for t in tl.static_range(len(TILES)):
        lower = tl.where(scores[t] < bound[:, None], scores[t], -float("inf"))
        found = tl.maximum(found, tl.max(lower, axis=1))
    return found


@triton.jit
def find_threshold(
    scores, lowest, highest, real,
    TILES: tl.constexpr, TOP_H: tl.constexpr, BY_VALUE: tl.constexpr,
):  # fmt: skip
    """The h-th largest of each row. Of rows that are not real, anything.

    At least h scores of a row are at or above `lowest`; `highest` is its largest.
    The interval around the threshold is halved until h scores lie at or above its lower end (the
    threshold is that end), or h - 1 at or above its upper end (it is the largest score below).
    Where several scores tie that never comes: after `BY_VALUE` rounds the integers of the same
    order are halved, of which there is one between the ends in the end.
    """
    low = lowest
    high = _value_of(tl.minimum(_key_of(highest), 0x7FFFFFFE) + 1)
    going = real
    is_above = real & (TOP_H < 0)  # no row yet
    unsettled, rounds = 1, 0
    while unsettled > 0:
        bound = 0.5 * low + 0.5 * high
        usable = (bound > low) & (bound < high)
        if rounds >= BY_VALUE:
            low_key, high_key = _key_of(low), _key_of(high)
            bound = _value_of((low_key >> 1) + (high_key >> 1) + (low_key & high_key & 1))
            usable = high_key > low_key + 1
            going = going & usable
        count = _count(scores, bound, TILES)
        moves = going & usable
        low = tl.where(moves & (count >= TOP_H), bound, low)
        high = tl.where(moves & (count < TOP_H), bound, high)
        is_above = is_above | (moves & (count == TOP_H - 1))
        going = going & ((usable & ((count == TOP_H) | (count == TOP_H - 1))) == 0)
        rounds += 1
        unsettled = tl.max(going.to(tl.int32), axis=0)
    return tl.where(is_above, _largest_below(scores, high, TILES), low)
