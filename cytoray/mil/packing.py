"""Ragged bags as one packed tensor, and the segment operations every aggregator is made of.

Shapes: B bags, T instances of all bags together, D width, K score columns.
A bag's result never depends on its neighbours: there is no padding to leak through.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cytoray.errors import InputError, raise_problems


class PackedBags(NamedTuple):
    """Bags laid end to end.

    Attributes:
        features: (T, D) floating point.
        offsets: (B + 1,) int64; bag b is `features[offsets[b]:offsets[b + 1]]`.
    """

    features: Tensor
    offsets: Tensor

    def to(self, device: torch.device | str) -> PackedBags:
        """The same bags on `device`."""
        return PackedBags(self.features.to(device), self.offsets.to(device))


def pack(bags: Sequence[Tensor | np.ndarray]) -> PackedBags:
    """Lay bags (N_i, D) end to end.

    Args:
        bags: at least one bag; every bag has one instance or more and the same width.

    Raises:
        InputError: no bag, an empty bag, a bag that is not 2-D, or bags of different widths;
            every offending position is listed.
    """
    tensors = [torch.as_tensor(bag) for bag in bags]
    if not tensors:
        raise InputError("no bag to pack: give at least one bag of features (N, D)")
    problems = []
    width = tensors[0].shape[-1] if tensors[0].ndim else 0
    for position, tensor in enumerate(tensors):
        if tensor.ndim != 2:
            problems.append(f"bag {position} has shape {tuple(tensor.shape)}, expected (N, D)")
        elif tensor.shape[0] == 0:
            problems.append(f"bag {position} is empty: a bag needs at least one instance")
        elif tensor.shape[1] != width:
            problems.append(f"bag {position} has width {tensor.shape[1]}, bag 0 has {width}")
    raise_problems("these bags cannot be packed:", problems)
    lengths = torch.tensor([tensor.shape[0] for tensor in tensors])
    offsets = torch.zeros(len(tensors) + 1, dtype=torch.int64)
    torch.cumsum(lengths, 0, out=offsets[1:])
    return PackedBags(torch.cat(tensors), offsets)


def check_packed(features: Tensor, offsets: Tensor, in_dim: int) -> None:
    """Check a packed batch against the aggregator's width.

    Raises:
        InputError: wrong shapes or width, offsets that do not end at T, or an empty bag.
    """
    if features.ndim != 2 or features.shape[1] != in_dim:
        raise InputError(
            f"features of shape {tuple(features.shape)} do not fit this aggregator: expected "
            f"(T, {in_dim}); build it with in_dim equal to the encoder's width"
        )
    if offsets.ndim != 1 or offsets.shape[0] < 2:
        raise InputError(f"offsets of shape {tuple(offsets.shape)}: expected (B + 1,), B >= 1")
    bounds = offsets.tolist()
    if bounds[0] != 0 or bounds[-1] != features.shape[0]:
        raise InputError(
            f"offsets run from {bounds[0]} to {bounds[-1]}; they must run from 0 to the number of "
            f"instances, {features.shape[0]}"
        )
    empty = [bag for bag, (start, stop) in enumerate(pairwise(bounds)) if stop <= start]
    if empty:
        raise InputError(f"empty bag at position {empty}: a bag needs at least one instance")


def bag_ids(offsets: Tensor, num_instances: int) -> Tensor:
    """The bag each instance belongs to: (T,) int64."""
    bags = torch.arange(offsets.shape[0] - 1, device=offsets.device)
    return torch.repeat_interleave(bags, offsets.diff(), output_size=num_instances)


def segment_sum(values_td: Tensor, ids: Tensor, num_bags: int) -> Tensor:
    """Sum over the instances of each bag: (T, ...) to (B, ...)."""
    zeros = values_td.new_zeros((num_bags, *values_td.shape[1:]))
    return zeros.index_add(0, ids, values_td)


def segment_max(values: Tensor, ids: Tensor, num_bags: int) -> Tensor:
    """Maximum over the instances of each bag: (T, ...) to (B, ...).

    Where several instances share the maximum, the gradient is split evenly among them.
    """
    low = values.new_full((num_bags, *values.shape[1:]), -torch.inf)
    index = ids.reshape(-1, *(1,) * (values.ndim - 1)).expand_as(values)
    return low.scatter_reduce(0, index, values, "amax", include_self=False)


def segment_softmax(scores: Tensor, ids: Tensor, num_bags: int) -> Tensor:
    """Softmax over the instances of each bag, column by column: (T,) or (T, K), same shape.

    Computed in float32 (or wider) whatever the input, and returned in that precision.
    """
    scores = scores if scores.dtype == torch.float64 else scores.float()
    top = segment_max(scores.detach(), ids, num_bags)
    exponentials = (scores - top[ids]).exp()
    return exponentials / segment_sum(exponentials, ids, num_bags)[ids]


def segment_argmax(values: Tensor, ids: Tensor, num_bags: int) -> Tensor:
    """Index into T of the first largest instance of each bag and column: (T, K) to (B, K) int64."""
    top = segment_max(values.detach(), ids, num_bags)
    rows = torch.arange(values.shape[0], device=values.device)[:, None].expand_as(values)
    candidates = torch.where(values.detach() == top[ids], rows, values.shape[0])
    none = candidates.new_full((num_bags, values.shape[1]), values.shape[0])
    index = ids[:, None].expand_as(values)
    return none.scatter_reduce(0, index, candidates, "amin", include_self=False)


class TokenRows(NamedTuple):
    """How bags lie end to end once each has K tokens of its own in front.

    Attributes:
        sizes: rows of each bag, its tokens included.
        token_rows: (B, K) int64, where the tokens are.
        origin: (R,) int64, the instance that each row holds, -1 for a token.
    """

    sizes: list[int]
    token_rows: Tensor
    origin: Tensor


def prepend_tokens(
    tokens_kd: Tensor, features_td: Tensor, offsets: Tensor
) -> tuple[Tensor, TokenRows]:
    """Put the same K tokens in front of every bag: rows (T + B * K, D), and how they lie."""
    num_tokens, pieces = len(tokens_kd), []
    bounds = offsets.tolist()
    for start, stop in pairwise(bounds):
        pieces += [torch.full((num_tokens,), -1), torch.arange(start, stop)]
    origin = torch.cat(pieces).to(offsets.device)
    sizes = [num_tokens + stop - start for start, stop in pairwise(bounds)]
    within = torch.arange(num_tokens, device=offsets.device)
    starts = offsets[:-1] + num_tokens * torch.arange(len(sizes), device=offsets.device)
    token_rows = starts[:, None] + within
    source = origin + num_tokens
    source[token_rows] = within.expand_as(token_rows)
    joined = torch.cat([tokens_kd.to(features_td.dtype), features_td])
    return joined[source], TokenRows(sizes, token_rows, origin)


class _WeightedSums(torch.autograd.Function):
    """Bag by bag matrix products written in place: no (T, D) temporary, no joining of parts."""

    @staticmethod
    def forward(ctx, weights_tk: Tensor, values_td: Tensor, bounds: list[int]) -> Tensor:
        ctx.save_for_backward(weights_tk, values_td)
        ctx.bounds = bounds
        num_bags = len(bounds) - 1
        out = values_td.new_empty((num_bags, weights_tk.shape[1], values_td.shape[1]))
        for bag, (start, stop) in enumerate(pairwise(bounds)):
            torch.mm(weights_tk[start:stop].T, values_td[start:stop], out=out[bag])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_bkd: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        weights_tk, values_td = ctx.saved_tensors
        grad_weights = grad_values = None
        if ctx.needs_input_grad[0]:
            grad_weights = torch.empty_like(weights_tk)
            for bag, (start, stop) in enumerate(pairwise(ctx.bounds)):
                out = grad_weights[start:stop]
                torch.mm(values_td[start:stop], grad_bkd[bag].T, out=out)
        if ctx.needs_input_grad[1]:
            grad_values = torch.empty_like(values_td)
            for bag, (start, stop) in enumerate(pairwise(ctx.bounds)):
                torch.mm(weights_tk[start:stop], grad_bkd[bag], out=grad_values[start:stop])
        return grad_weights, grad_values, None


def weighted_sums(weights_tk: Tensor, values_td: Tensor, offsets: Tensor) -> Tensor:
    """Sum the instances of each bag under K weightings: (T, K) and (T, D) to (B, K, D).

    The weights are converted to the precision of the values.
    """
    weights_tk = weights_tk.to(values_td.dtype).contiguous()
    return _WeightedSums.apply(weights_tk, values_td.contiguous(), offsets.tolist())


def split_bags(values: Tensor, offsets: Tensor) -> list[Tensor]:
    """The packed instances as one view per bag."""
    return list(values.split(offsets.diff().tolist()))
