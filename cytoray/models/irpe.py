"""Image relative position encoding, product method (Wu et al. 2021): buckets of token pairs.

The offset between two patches falls into one of 7 bins on each axis, 49 buckets in all; one more
bucket holds every pair with a prefix token (class, registers), which has no place in the image.
Shapes: N tokens, prefix tokens first; n batch times heads; K buckets.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from cytoray.errors import InputError

ALPHA, BETA, GAMMA = 1.9, 3.8, 15.2
NUM_BUCKETS = (2 * int(BETA) + 1) ** 2 + 1
KERNEL_TOKENS = 512  # rows of as many scores fit the registers of a kernel
PADDED_BUCKETS = -(-NUM_BUCKETS // 16) * 16  # as the kernels have them
Grid = tuple[int, int]  # rows and columns of patches


def axis_bin(offset: int, alpha: float = ALPHA, beta: float = BETA, gamma: float = GAMMA) -> int:
    """Signed bin of an offset along one axis, in [-int(beta), int(beta)].

    Offsets up to `alpha` keep their value, farther ones share bins of logarithmic width, and all
    from about `gamma` on fall into the last (the piecewise function of Wu et al. 2021, sec. 3.2).
    """
    distance = abs(offset)
    if distance > alpha:
        share = math.log(distance / alpha) / math.log(gamma / alpha)
        # A bound of 3.8 stands for bin 3, as in the published 7 x 7 buckets.
        distance = int(min(round(alpha + share * (beta - alpha)), beta))
    return distance if offset >= 0 else -distance


def bucket_index(
    height: int,
    width: int,
    num_prefix: int,
    alpha: float = ALPHA,
    beta: float = BETA,
    gamma: float = GAMMA,
) -> Tensor:
    """Bucket of every pair of tokens of an image.

    Args:
        height: rows of patches.
        width: columns of patches.
        num_prefix: class and register tokens in front of the patches.
        alpha: up to this offset every value has a bin of its own.
        beta: bins on either side of 0 (its whole part s).
        gamma: from about this offset on all share the last bin.

    Returns:
        int64 (N, N), N = num_prefix + height * width. Entry (i, j) of two patches is
        (bin(row_i - row_j) + s) * (2s + 1) + bin(column_i - column_j) + s; it is (2s + 1)^2 if i
        or j is a prefix token.
    """
    side = int(beta)
    bins = 2 * side + 1
    far = max(height, width)
    with torch.device("cpu"):
        by_offset = torch.tensor(
            [axis_bin(offset, alpha, beta, gamma) + side for offset in range(-far, far + 1)]
        )
        row_bin, column_bin = (
            by_offset[torch.arange(size).unsqueeze(1) - torch.arange(size) + far]
            for size in (height, width)
        )
        patches = row_bin[:, None, :, None] * bins + column_bin[None, :, None, :]
        tokens = num_prefix + height * width
        buckets = torch.full((tokens, tokens), bins * bins)
        buckets[num_prefix:, num_prefix:] = patches.reshape(height * width, height * width)
    return buckets


@contextmanager
def _lasting() -> Iterator[None]:
    """Tensors made here may be kept: real ones, that can serve training, whoever asks first."""
    with _disable_current_modes(), torch.inference_mode(False):
        yield


@lru_cache(maxsize=64)
def _cached_buckets(grid: Grid, num_prefix: int, device: torch.device) -> Tensor:
    with _lasting():
        return bucket_index(*grid, num_prefix).to(device)


@lru_cache(maxsize=64)
def _cached_maps(
    grid: Grid, num_prefix: int, device: torch.device, dtype: torch.dtype | None
) -> Tensor:
    index = _cached_buckets(grid, num_prefix, device)
    with _lasting():
        return gather_maps(index) if dtype is None else one_hot_maps(index, dtype)


@lru_cache(maxsize=64)
def _cached_kernel_maps(
    grid: Grid, num_prefix: int, device: torch.device, dtype: torch.dtype
) -> KernelMaps:
    index = _cached_buckets(grid, num_prefix, device)
    with _lasting():
        return kernel_maps(index, dtype)


@torch.compiler.assume_constant_result
def cached_buckets(grid: Grid, num_prefix: int, device: torch.device) -> Tensor:
    """`bucket_index` of a grid on `device`, made once."""
    return _cached_buckets(grid, num_prefix, device)


@torch.compiler.assume_constant_result
def pair_maps(grid: Grid, num_prefix: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The buckets of a grid in the form in which `device` reads them fastest; made once.

    Args:
        grid: rows and columns of patches.
        num_prefix: tokens in front of the patches.
        device: where the attention runs.
        dtype: of queries and keys.

    Returns:
        `gather_maps` on the CPU, elsewhere `one_hot_maps` of type `dtype`: sums over the pairs of a
        bucket are then matrix products, which need no atomic additions and are repeatable.
    """
    return _cached_maps(grid, num_prefix, device, None if device.type == "cpu" else dtype)


class KernelMaps(NamedTuple):
    """The buckets of a grid as the kernels have them, padded by zeros to T tokens and K buckets.

    Attributes:
        buckets: uint8 (T, T).
        of_queries: (T, T, K), 1 at the bucket of query i and key j.
        of_keys: (T, T, K), the same by key and query.
    """

    buckets: Tensor
    of_queries: Tensor
    of_keys: Tensor


@torch.compiler.assume_constant_result
def _lasting_kernel_maps(
    grid: Grid, num_prefix: int, device: torch.device, dtype: torch.dtype
) -> KernelMaps:
    return _cached_kernel_maps(grid, num_prefix, device, dtype)


def has_kernels(device: torch.device, tokens: int) -> bool:
    """Whether attention over `tokens` tokens on `device` may be left to the kernels."""
    return device.type == "cuda" and tokens <= KERNEL_TOKENS


class PairBuckets(NamedTuple):
    """The buckets of a grid in every form: int64 (N, N), `pair_maps`, and for the kernels."""

    index: Tensor
    maps: Tensor
    kernel: KernelMaps | None


def _pair_buckets(
    grid: Grid, num_prefix: int, device: torch.device, dtype: torch.dtype
) -> PairBuckets:
    where = (grid, num_prefix, device)
    served = has_kernels(device, num_prefix + grid[0] * grid[1])
    kernel = _lasting_kernel_maps(*where, dtype) if served else None
    return PairBuckets(cached_buckets(*where), pair_maps(*where, dtype), kernel)


def padded_tokens(tokens: int) -> int:
    """Tokens that the kernels work on: whole 16, which fast loads and products ask for."""
    return -(-tokens // 16) * 16


def kernel_maps(index: Tensor, dtype: torch.dtype) -> KernelMaps:
    """`KernelMaps` of type `dtype` from buckets, int64 (N, N)."""
    more = padded_tokens(len(index)) - len(index)
    one_hot = one_hot_maps(index, dtype)
    padding = (0, PADDED_BUCKETS - NUM_BUCKETS, 0, more, 0, more)
    of_queries, of_keys = (F.pad(x, padding) for x in (one_hot, one_hot.transpose(0, 1)))
    buckets = F.pad(index, (0, more, 0, more)).to(torch.uint8)
    return KernelMaps(buckets, of_queries.contiguous(), of_keys.contiguous())


def gather_maps(index: Tensor) -> Tensor:
    """Places in flattened (N, K) tables, of query i and of key j, for every pair (i, j).

    Args:
        index: int64 (N, N), buckets.

    Returns:
        int64 (2, N * N): i * K + index[i, j] and j * K + index[i, j].
    """
    first = torch.arange(len(index), device=index.device) * NUM_BUCKETS
    return torch.stack([index + first.unsqueeze(1), index + first]).flatten(1)


def one_hot_maps(index: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, N, K) of type `dtype`, 1 at the bucket of each pair."""
    return F.one_hot(index, NUM_BUCKETS).to(dtype)


def pairs_from_queries(table: Tensor, maps: Tensor) -> Tensor:
    """(n, N, K) to (n, N, N): out[:, i, j] = table[:, i, bucket(i, j)]."""
    if maps.is_floating_point():
        return torch.einsum("nib,ijb->nij", table, maps)
    return table.flatten(1).index_select(1, maps[0]).unflatten(1, (table.shape[1], -1))


def pairs_from_keys(table: Tensor, maps: Tensor) -> Tensor:
    """(n, N, K) to (n, N, N): out[:, i, j] = table[:, j, bucket(i, j)]."""
    if maps.is_floating_point():
        return torch.einsum("njb,ijb->nij", table, maps)
    return table.flatten(1).index_select(1, maps[1]).unflatten(1, (table.shape[1], -1))


def sums_for_queries(pairs: Tensor, maps: Tensor) -> Tensor:
    """(n, N, N) to (n, N, K): out[:, i, b] = sum of pairs[:, i, j] over j with bucket(i, j) = b."""
    if maps.is_floating_point():
        return torch.einsum("nij,ijb->nib", pairs, maps)
    return _sums(pairs, maps[0])


def sums_for_keys(pairs: Tensor, maps: Tensor) -> Tensor:
    """(n, N, N) to (n, N, K): out[:, j, b] = sum of pairs[:, i, j] over i with bucket(i, j) = b."""
    if maps.is_floating_point():
        return torch.einsum("nij,ijb->njb", pairs, maps)
    return _sums(pairs, maps[1])


def _sums(pairs: Tensor, places: Tensor) -> Tensor:
    n, tokens = pairs.shape[:2]
    sums = pairs.new_zeros(n, tokens * NUM_BUCKETS)
    return sums.scatter_add_(1, places.expand(n, -1), pairs.flatten(1)).unflatten(1, (tokens, -1))


class PatchGrids:
    """Which grids of patches a number of tokens stands for.

    Fed as a forward pre-hook of the patch embedding and read by the blocks, which see tokens only.
    All numbers are remembered: activation checkpointing runs a block again when crops of another
    size have passed since.

    Args:
        num_prefix: class and register tokens in front of the patches of a crop.
    """

    def __init__(self, num_prefix: int) -> None:
        self.num_prefix = num_prefix
        self._known: dict[int, tuple[Grid, ...]] = {}
        self._trained: dict[int, tuple[Grid, ...]] = {}
        self._buckets: dict[tuple[Grid, torch.device, torch.dtype], PairBuckets] = {}

    def __call__(self, patch_embed: Any, args: tuple[Any, ...]) -> None:
        """Note the grid of the images that are about to be embedded."""
        height, width = patch_embed.dynamic_feat_size(tuple(args[0].shape[-2:]))
        grid = (int(height), int(width))
        self.note([grid], in_training=patch_embed.training)
        images = args[0]
        kind, dtype = images.device.type, images.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        key = (grid, images.device, dtype)
        if key not in self._buckets:
            self._buckets[key] = _pair_buckets(grid, self.num_prefix, images.device, dtype)

    def buckets(self, grid: Grid, device: torch.device, dtype: torch.dtype) -> PairBuckets:
        """The buckets of a grid, for queries of type `dtype`.

        Compiled code takes those made by `__call__` as inputs. Others become constants of it, of
        which it can hold those of one grid.
        """
        made = self._buckets.get((grid, device, dtype))
        return _pair_buckets(grid, self.num_prefix, device, dtype) if made is None else made

    def tokens_of(self, grid: Grid) -> int:
        """Tokens of one crop, prefix included."""
        return self.num_prefix + grid[0] * grid[1]

    def note(self, grids: Sequence[Grid], *, in_training: bool = False) -> None:
        """Let sequences of as many tokens stand for `grids` from now on.

        Args:
            grids: of the crops that follow each other in a sequence, each with its prefix tokens;
                crops attend to themselves only. Usually one.
            in_training: whether gradients will be taken.

        Raises:
            InputError: in training, when that number already stands for other grids.
        """
        tokens = sum(self.tokens_of(grid) for grid in grids)
        wanted = tuple(grids)
        if in_training and torch.is_grad_enabled():
            before = self._trained.setdefault(tokens, wanted)
            if before != wanted:
                raise InputError(
                    f"crops of {list(wanted)} and of {list(before)} patches have equally many "
                    "tokens, and blocks that are recomputed cannot tell them apart; train on crops "
                    "of one shape"
                )
        self._known[tokens] = wanted

    def noted(self, tokens: int) -> tuple[Grid, ...] | None:
        """What was last noted for a sequence of `tokens`."""
        return self._known.get(tokens)

    def of(self, tokens: int) -> tuple[Grid, ...]:
        """The grids of a sequence of `tokens`; one square grid if nothing was noted.

        Raises:
            InputError: neither noted nor a square.
        """
        noted = self.noted(tokens)
        if noted is not None:
            return noted
        side = 0
        while self.tokens_of((side + 1, side + 1)) <= tokens:
            side += 1
        if self.tokens_of((side, side)) != tokens:
            raise InputError(
                f"{tokens} tokens, {self.num_prefix} of them in front of the patches, make no "
                "square grid; pass images through the whole model, or tell the grid by `note`"
            )
        return ((side, side),)
