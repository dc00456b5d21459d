"""Nyström self-attention (Xiong et al. 2021) as TransMIL uses it, for one sequence at a time.

Shapes: N tokens, M landmarks, H heads, E width of a head, D = H * E.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def iterative_pinv(matrix: Tensor, iterations: int = 6, *, scale_over: str = "head") -> Tensor:
    """Moore-Penrose pseudo-inverse of (H, M, M) by the third-order iteration of the paper.

    Args:
        matrix: (H, M, M), rows summing to 1.
        iterations: number of iterations.
        scale_over: `head` scales the first guess of each head by its own norms; `all` by the
            largest over the heads, as the published code does.
    """
    absolute = matrix.abs()
    row_norm = absolute.sum(dim=-1).amax(dim=-1)
    column_norm = absolute.sum(dim=-2).amax(dim=-1)
    if scale_over == "all":
        row_norm, column_norm = row_norm.amax(), column_norm.amax()
    inverse = matrix.mT / (row_norm * column_norm).reshape(-1, 1, 1)
    eye = torch.eye(matrix.shape[-1], device=matrix.device, dtype=matrix.dtype)
    for _ in range(iterations):
        product = matrix @ inverse
        inner = 15 * eye - product @ (7 * eye - product)
        inverse = 0.25 * inverse @ (13 * eye - product @ inner)
    return inverse


class NystromAttention(nn.Module):
    """Self-attention of N tokens through M landmarks, linear in N.

    The sequence is padded with zero tokens in front up to a multiple of M; landmarks are the
    means of consecutive tokens; a depth-wise convolution of the values is added.

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
        padding = -num_tokens % self.num_landmarks
        padded_nd = F.pad(tokens_nd, (0, 0, padding, 0))
        q, k, v = (
            part.unflatten(-1, (self.heads, self.head_dim)).transpose(0, 1)
            for part in self.to_qkv(padded_nd).chunk(3, dim=-1)
        )
        q = q / math.sqrt(self.head_dim)
        group = padded_nd.shape[0] // self.num_landmarks
        q_land = q.unflatten(1, (self.num_landmarks, group)).mean(dim=2)
        k_land = k.unflatten(1, (self.num_landmarks, group)).mean(dim=2)
        to_landmarks = (q @ k_land.mT).softmax(dim=-1)
        between = (q_land @ k_land.mT).softmax(dim=-1)
        from_landmarks = (q_land @ k.mT).softmax(dim=-1)
        inverse = iterative_pinv(between, self.pinv_iterations, scale_over=self.scale_over)
        mixing = to_landmarks @ inverse
        out = mixing @ (from_landmarks @ v) + self.values_conv(v[None])[0]
        out_nd = self.dropout(self.to_out(out.transpose(0, 1).flatten(1)))[padding:]
        if attention_of is None:
            return out_nd, None
        row = (mixing[:, padding + attention_of, None] @ from_landmarks)[:, 0].mean(dim=0)
        return out_nd, row[padding:].detach()
