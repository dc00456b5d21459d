"""Targets that are not written out: compiled losses make them anew wherever they read them.

With 65,536 prototypes the targets of the masked patches are the largest tensor of a step, in
float32 twice as large as the teacher's logits in bf16, and it is reading and writing such tensors
that losses take their time for.
Shapes: n rows, K prototypes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


def probabilities(logits: Tensor, column: Tensor, row: Tensor, sharpness: Tensor) -> Tensor:
    """exp(sharpness * logits + column + row) in float32; arguments as the fields below."""
    return (logits.float() * sharpness + column + row.unsqueeze(-1)).exp()


@dataclass(frozen=True)
class LazyTargets:
    """Centred or Sinkhorn targets by what they are made of.

    Attributes:
        logits: (n, K), of the teacher.
        column: float32 (K,), what is added to the scores of each prototype.
        row: float32 (n,), what is added to those of each row, so that it sums to 1.
        sharpness: float32 scalar, 1 / temperature of the teacher.
    """

    logits: Tensor
    column: Tensor
    row: Tensor
    sharpness: Tensor

    def split(self, sizes: Sequence[int]) -> list[LazyTargets]:
        """Runs of rows, as `Tensor.split`."""
        parts = zip(self.logits.split(list(sizes)), self.row.split(list(sizes)), strict=True)
        return [LazyTargets(x, self.column, row, self.sharpness) for x, row in parts]

    def written(self) -> Tensor:
        """float32 (n, K)."""
        return probabilities(self.logits, self.column, self.row, self.sharpness)
