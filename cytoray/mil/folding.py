"""Attention of a few queries to many tokens without forming keys and values.

With keys K = X W_k^T and values V = X W_v^T, a query's scores q K^T are (q W_k) X^T and its answer
a V is (a X) W_v^T: two thin products instead of two of N x D x D. A bias of the keys would add the
same number to all scores, and vanishes in the softmax.

Shapes: H heads, E = D / H, D width; leading axes are free.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def fold_query(query: Tensor, key_weight: Tensor, heads: int) -> Tensor:
    """Queries (..., D) through the key weights (D, D), scaled by 1 / sqrt(E): (..., H, D).

    The scores of head h are the last axis at h times the tokens.
    """
    query_he = query.unflatten(-1, (heads, -1))
    key_hed = key_weight.unflatten(0, (heads, -1))
    return torch.einsum("...he,hed->...hd", query_he, key_hed) / math.sqrt(query_he.shape[-1])


def unfold_values(context: Tensor, value_weight: Tensor) -> Tensor:
    """Tokens pooled by each head (..., H, D) through the value weights (D, D): (..., D)."""
    value_hed = value_weight.unflatten(0, (context.shape[-2], -1))
    return torch.einsum("...hd,hed->...he", context, value_hed).flatten(-2)
