"""Nyström self-attention (Xiong et al. 2021) as TransMIL uses it, for one sequence at a time.

TransMIL pads a sequence with zero tokens in front up to a multiple of the landmarks. Zero tokens
have zero queries, keys and values, so that all landmarks made of them are one and the same: they
are kept as a single landmark that counts `copies` times, and the zero tokens themselves as a term
in the softmax's denominator. The result is that of the padded sequence; a bag of 100 pays for 100
tokens and landmarks, not for 256.

Shapes: N tokens, M landmarks, R of them with a token that is not padding, H heads, E width of a
head, D = H * E.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def iterative_pinv(
    matrix: Tensor, iterations: int = 6, *, scale_over: str = "head", copies: int = 1
) -> Tensor:
    """Moore-Penrose pseudo-inverse of (H, M, M) by the third-order iteration of the paper.

    Args:
        matrix: (H, M, M), not negative.
        iterations: number of iterations.
        scale_over: `head` scales the first guess of each head by its own norms; `all` by the
            largest over the heads, as the published code does.
        copies: the last row and column stand for so many equal ones, and are scaled by its root
            (the corner by `copies`); the result is scaled alike. Products of such matrices are
            products of the full ones, so that the iteration is the full one's.
    """
    root = torch.ones(matrix.shape[-1], device=matrix.device, dtype=matrix.dtype)
    root[-1] = math.sqrt(copies)
    row_norm = (matrix @ root / root).amax(dim=-1)
    column_norm = (root @ matrix / root).amax(dim=-1)
    if scale_over == "all":
        row_norm, column_norm = row_norm.amax(), column_norm.amax()
    inverse = matrix.mT / (row_norm * column_norm).reshape(-1, 1, 1)
    for _ in range(iterations):
        product = matrix @ inverse
        inner = torch.baddbmm(product, product, product, beta=7, alpha=-1)
        inner = torch.baddbmm(product, product, inner, beta=15, alpha=-1)
        inverse = torch.baddbmm(inverse, inverse, inner, beta=13 / 4, alpha=-1 / 4)
    return inverse


def shared_softmax(scores: Tensor, zeros: int) -> Tensor:
    """Softmax over the last axis and `zeros` further scores of 0, whose sum is the last column.

    With no such score there is no such column.
    """
    if zeros == 0:
        return scores.softmax(dim=-1)
    return F.pad(scores, (0, 1), value=math.log(zeros)).softmax(dim=-1)


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
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
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
        q, k, v = (
            part.unflatten(-1, (self.heads, self.head_dim)).transpose(0, 1)
            for part in self.to_qkv(tokens_nd).chunk(3, dim=-1)
        )
        q = q / math.sqrt(self.head_dim)
        padding = -num_tokens % self.num_landmarks
        group = (num_tokens + padding) // self.num_landmarks
        copies = padding // group
        q_land, k_land = (_landmarks(part, group) for part in (q, k))
        to_landmarks = _scaled_last(shared_softmax(q @ k_land.mT, copies), copies)
        between = _scaled_last(shared_softmax(q_land @ k_land.mT, copies), copies)
        from_landmarks = shared_softmax(q_land @ k.mT, padding)[..., :num_tokens]
        if copies:
            root = math.sqrt(copies)
            uniform = between.new_full((self.heads, 1, between.shape[-1]), root)
            uniform[..., -1] = copies
            between = torch.cat([between, uniform / self.num_landmarks], dim=1)
            keys = from_landmarks.new_full((self.heads, 1, num_tokens), root)
            from_landmarks = torch.cat([from_landmarks, keys / (num_tokens + padding)], dim=1)
        inverse = iterative_pinv(
            between, self.pinv_iterations, scale_over=self.scale_over, copies=max(copies, 1)
        )
        out = to_landmarks @ (inverse @ (from_landmarks @ v)) + self.values_conv(v[None])[0]
        out_nd = self.dropout(self.to_out(out.transpose(0, 1).flatten(1)))
        if attention_of is None:
            return out_nd, None
        asked = to_landmarks[:, attention_of, None].detach()
        row = (asked @ inverse.detach() @ from_landmarks.detach())[:, 0].mean(dim=0)
        return out_nd, row


def _landmarks(tokens_hne: Tensor, group: int) -> Tensor:
    """Means of consecutive groups (H, R, E), the first filled up with zeros in front."""
    filled = F.pad(tokens_hne, (0, 0, -tokens_hne.shape[1] % group, 0))
    return filled.unflatten(1, (-1, group)).mean(dim=2)


def _scaled_last(shares: Tensor, copies: int) -> Tensor:
    """Turn the summed share of `copies` equal landmarks into the root-scaled one of each."""
    if copies == 0:
        return shares
    scale = shares.new_ones(shares.shape[-1])
    scale[-1] = 1.0 / math.sqrt(copies)
    return shares * scale
