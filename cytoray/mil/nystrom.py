"""Nyström self-attention (Xiong et al. 2021) as TransMIL uses it, for one sequence at a time.

TransMIL pads a sequence with zero tokens in front up to a multiple of the landmarks. Zero tokens
have zero queries, keys and values and can stand anywhere, and all landmarks made of them are one
and the same: one zero token that counts `padding` times and one zero landmark that counts `copies`
times, both last, say it all. The result is that of the padded sequence; a bag of 100 pays for 101
tokens and landmarks, not for 256.

Shapes: N tokens, M landmarks, R of them with a token that is not padding, H heads, E width of a
head, D = H * E.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cytoray.mil.dropout import Dropout
from cytoray.models.linear import Linear


class IterativePinv:
    """Moore-Penrose pseudo-inverse by the third-order iteration of the paper, kept as factors.

    Z' = Z g(P) with P = A Z and g(P) = (13 I - P (15 I - P (7 I - P))) / 4, hence P' = P g(P).
    With P alone carried on, an iteration costs two square products instead of four, and the
    inverse is applied to thin matrices factor by factor. All P are symmetric, as Z starts at
    A^T / norm.

    Args:
        matrix: (H, M, M), not negative.
        iterations: number of iterations, at least 1.
        scale_over: `head` scales the first guess of each head by its own norms; `all` by the
            largest over the heads, as the published code does.
        copies: the last row and column stand for so many equal ones, and are scaled by its root
            (the corner by `copies`); the inverse is scaled alike. Products of such matrices are
            products of the full ones, so that the iteration is the full one's.
    """

    def __init__(
        self, matrix: Tensor, iterations: int = 6, *, scale_over: str = "head", copies: int = 1
    ) -> None:
        root = torch.ones(matrix.shape[-1], device=matrix.device, dtype=matrix.dtype)
        root[-1] = math.sqrt(copies)
        row_norm = (matrix @ root / root).amax(dim=-1)
        column_norm = (root @ matrix / root).amax(dim=-1)
        if scale_over == "all":
            row_norm, column_norm = row_norm.amax(), column_norm.amax()
        self.start = matrix.mT / (row_norm * column_norm).reshape(-1, 1, 1)
        self.products = [matrix @ self.start]
        for _ in range(iterations - 1):
            product = self.products[-1]
            square = product @ product
            linear = 3.25 * product - 3.75 * square
            step = torch.baddbmm(linear, square, 7.0 * product - square, alpha=0.25)
            self.products.append(step)

    def times(self, right: Tensor) -> Tensor:
        """The inverse times (H, M, X)."""
        for product in reversed(self.products):
            right = _factor_times(product, right)
        return self.start @ right

    def times_rows(self, left: Tensor) -> Tensor:
        """Rows (H, X, M) times the inverse."""
        columns = (left @ self.start).mT
        for product in self.products:
            columns = _factor_times(product, columns)
        return columns.mT


def _factor_times(product: Tensor, right: Tensor) -> Tensor:
    """g(P) X, one thin product after the other."""
    inner = torch.baddbmm(right, product, right, beta=7, alpha=-1)
    inner = torch.baddbmm(right, product, inner, beta=15, alpha=-1)
    return torch.baddbmm(right, product, inner, beta=3.25, alpha=-0.25)


def counted_softmax(scores: Tensor, count: int) -> Tensor:
    """Softmax over the last axis whose last entry stands for `count` equal ones: their sum."""
    if count > 1:
        scores[..., -1] += math.log(count)
    return scores.softmax(dim=-1)


class NystromAttention(nn.Module):
    """Self-attention of N tokens through M landmarks, linear in N.

    As if the sequence were padded with zero tokens in front up to a multiple of M; landmarks are
    the means of consecutive tokens; a depth-wise convolution of the values is added.

    Args:
        dim: D.
        heads: H.
        num_landmarks: M.
        pinv_iterations: iterations of the pseudo-inverse.
        kernel_size: of the convolution on the values, odd.
        dropout: on the output.
        scale_over: see `iterative_pinv`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        num_landmarks: int = 256,
        pinv_iterations: int = 6,
        kernel_size: int = 33,
        dropout: float = 0.1,
        scale_over: str = "head",
    ) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.num_landmarks, self.pinv_iterations = num_landmarks, pinv_iterations
        self.scale_over = scale_over
        self.to_qkv = Linear(dim, 3 * dim, bias=False)
        self.to_out = Linear(dim, dim)
        self.dropout = Dropout(dropout)
        self.values_conv = nn.Conv2d(
            heads, heads, (kernel_size, 1), padding=(kernel_size // 2, 0), groups=heads, bias=False
        )

    def forward(self, tokens_nd: Tensor, *, attention_of: int | None = None):
        """Attend.

        Args:
            tokens_nd: (N, D).
            attention_of: also return the attention row of this token.

        Returns:
            (N, D), and (N,) mean over heads of the attention of token `attention_of`, or None.
            The row may hold small negative values, as the approximation does.
        """
        num_tokens = tokens_nd.shape[0]
        padding = -num_tokens % self.num_landmarks
        group = (num_tokens + padding) // self.num_landmarks
        copies = padding // group
        if padding:
            tokens_nd = F.pad(tokens_nd, (0, 0, 0, 1))
        q, k, v = (
            part.unflatten(-1, (self.heads, self.head_dim)).transpose(0, 1)
            for part in self.to_qkv(tokens_nd).chunk(3, dim=-1)
        )
        q_land, k_land = (_landmarks(part[:, :num_tokens], group, copies) for part in (q, k))
        q_land, k_scaled = (part / math.sqrt(self.head_dim) for part in (q_land, k_land))
        to_landmarks = counted_softmax(q[:, :num_tokens] @ k_scaled.mT, copies)
        between = counted_softmax(q_land @ k_land.mT, copies)
        from_landmarks = counted_softmax(q_land @ k.mT, padding)
        root = between.new_ones(between.shape[-1])
        if copies:
            root[-1] = math.sqrt(copies)
        between = root[:, None] * between / root
        inverse = IterativePinv(
            between, self.pinv_iterations, scale_over=self.scale_over, copies=max(copies, 1)
        )
        answers = inverse.times(root[:, None] * (from_landmarks @ v)) / root[:, None]
        out = to_landmarks @ answers + self.values_conv(v[None, :, :num_tokens])[0]
        out_nd = self.dropout(self.to_out(out.transpose(0, 1).flatten(1)))
        if attention_of is None:
            return out_nd, None
        with torch.no_grad():
            asked = inverse.times_rows(to_landmarks[:, attention_of, None] / root) * root
            return out_nd, (asked @ from_landmarks)[:, 0, :num_tokens].mean(dim=0)


def _landmarks(tokens_hne: Tensor, group: int, copies: int) -> Tensor:
    """Means of consecutive groups, the first short of its zeros, then a zero one if there are."""
    first = tokens_hne.shape[1] % group
    parts = [tokens_hne[:, first:].unflatten(1, (-1, group)).mean(dim=2)]
    if first:
        parts.insert(0, tokens_hne[:, :first].sum(dim=1, keepdim=True) / group)
    if copies:
        parts.append(torch.zeros_like(tokens_hne[:, :1]))
    return torch.cat(parts, dim=1)
