"""Teacher targets: Sinkhorn-Knopp (DINOv2) or a moving centre (DINO, iBOT).

Shapes: n rows of this rank, K prototypes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cytoray.compilation import compiled
from cytoray.ssl.collectives import all_max, all_sum
from cytoray.ssl.losses.cross_entropy import row_blocks
from cytoray.ssl.losses.lazy_targets import LazyTargets

TINY = 1e-30  # keeps empty rows and columns finite


@torch.no_grad()
def sinkhorn_knopp(
    logits: Tensor,
    *,
    temp: float,
    iterations: int = 3,
    overwrite: bool = False,
    compile_backend: str | None = None,
    lazy: bool = False,
) -> Tensor | LazyTargets:
    """Targets whose mass is spread evenly over the prototypes (Caron et al. 2020, eq. 3).

    The matrix exp(logits / temp) is kept as it is; each iteration updates a factor per prototype
    and one per row, so it costs two matrix-vector products. One maximum over all ranks is
    subtracted: a maximum per row would change the result.

    Args:
        logits: (n, K); n may differ between ranks and may be 0.
        temp: temperature of the teacher.
        iterations: pairs of normalisations.
        overwrite: the result may take the memory of `logits`.
        compile_backend: of `torch.compile`, for code that makes the matrix anew from the logits
            wherever it is read; None: keep it.
        lazy: with `compile_backend`, do not write the targets out.

    Returns:
        float32 (n, K); every row sums to 1.
    """
    rows, prototypes = logits.shape
    largest = logits.max().float() if rows else logits.new_full((), -torch.inf, dtype=torch.float32)
    largest = all_max(largest.clone())
    kernel: _Kernel | _CompiledKernel
    if compile_backend is not None and rows:
        kernel = _CompiledKernel(logits, largest, temp, compile_backend)
    else:
        kernel = _Kernel(logits, largest, temp, overwrite=overwrite)
    count = all_sum(largest.new_full((), float(rows)))
    row_factor = largest.new_ones(rows)
    column_factor = largest.new_ones(prototypes)
    for _ in range(iterations):
        column_sum = all_sum(kernel.column_sums(row_factor))
        column_factor = 1.0 / (prototypes * column_sum.clamp_min(TINY))
        row_factor = 1.0 / (count * kernel.row_sums(column_factor).clamp_min(TINY))
    if lazy and isinstance(kernel, _CompiledKernel):
        return kernel.lazy(row_factor * count, column_factor)
    return kernel.times(row_factor * count, column_factor)


class _Kernel:
    """exp((logits - largest) / temp), kept as float32 (n, K)."""

    def __init__(self, logits: Tensor, largest: Tensor, temp: float, *, overwrite: bool) -> None:
        scores = logits.float()
        in_place = overwrite or scores is not logits
        scores = scores.sub_(largest) if in_place else scores - largest
        self.values = scores.div_(temp).exp_()

    def column_sums(self, row_factor: Tensor) -> Tensor:
        return row_factor @ self.values

    def row_sums(self, column_factor: Tensor) -> Tensor:
        return self.values @ column_factor

    def times(self, row_factor: Tensor, column_factor: Tensor) -> Tensor:
        return self.values.mul_(column_factor).mul_(row_factor.unsqueeze(1))


class _CompiledKernel:
    """The same without its matrix: logits in bf16 are half as large, and are read alone."""

    def __init__(self, logits: Tensor, largest: Tensor, temp: float, backend: str) -> None:
        # As a tensor: the temperature changes from step to step, the code does not.
        self._known = (logits, largest, torch.full_like(largest, 1.0 / temp))
        self._backend = backend

    def column_sums(self, row_factor: Tensor) -> Tensor:
        return self._run(_column_sums, row_factor)

    def row_sums(self, column_factor: Tensor) -> Tensor:
        return self._run(_row_sums, column_factor)

    def times(self, row_factor: Tensor, column_factor: Tensor) -> Tensor:
        return self._run(_times, row_factor, column_factor)

    def lazy(self, row_factor: Tensor, column_factor: Tensor) -> LazyTargets:
        logits, largest, sharpness = self._known
        row = row_factor.clamp_min(TINY).log() - largest * sharpness
        return LazyTargets(logits, column_factor.clamp_min(TINY).log(), row, sharpness)

    def _run(self, what: Callable[..., Tensor], *factors: Tensor) -> Tensor:
        made: Tensor = compiled(what, self._backend, dynamic=True)(*self._known, *factors)
        return made


def _exponential(logits: Tensor, largest: Tensor, sharpness: Tensor) -> Tensor:
    return ((logits.float() - largest) * sharpness).exp()


def _column_sums(logits: Tensor, largest: Tensor, sharpness: Tensor, row_factor: Tensor) -> Tensor:
    return (_exponential(logits, largest, sharpness) * row_factor[:, None]).sum(0)


def _row_sums(logits: Tensor, largest: Tensor, sharpness: Tensor, column_factor: Tensor) -> Tensor:
    return (_exponential(logits, largest, sharpness) * column_factor).sum(1)


def _times(
    logits: Tensor, largest: Tensor, sharpness: Tensor, row_factor: Tensor, column_factor: Tensor
) -> Tensor:
    return _exponential(logits, largest, sharpness) * column_factor * row_factor[:, None]


def _centred_softmax(logits: Tensor, centre: Tensor, sharpness: Tensor) -> tuple[Tensor, Tensor]:
    """softmax((logits - centre) * sharpness) in float32, and the sum of the rows; for compilers."""
    scores = logits.float()
    return torch.softmax((scores - centre) * sharpness, dim=-1), scores.sum(0)


def _centred_row_terms(logits: Tensor, centre: Tensor, sharpness: Tensor) -> tuple[Tensor, Tensor]:
    """What each row lacks to be the softmax, and the sum of the rows; for compilers."""
    scores = logits.float()
    return -((scores - centre) * sharpness).logsumexp(-1), scores.sum(0)


def _softmax(
    scores: Tensor, centre: Tensor, temp: float, total: Tensor, *, overwrite: bool
) -> Tensor:
    """softmax((scores - centre) / temp), and the sum of the rows of `scores` added to `total`.

    On a CPU a few rows at a time, while they are in cache.
    """
    if scores.device.type != "cpu":
        total += scores.sum(0)
        return torch.softmax((scores - centre).div_(temp), dim=-1)
    out = scores if overwrite else torch.empty_like(scores)
    for rows in row_blocks(scores):
        total += scores[rows].sum(0)
        work = torch.sub(scores[rows], centre, out=out[rows]).div_(temp)
        work.sub_(work.amax(-1, keepdim=True)).exp_()
        work.div_(work.sum(-1, keepdim=True))
    return out


class MovingCentre(nn.Module):
    """softmax((logits - c) / temp) with c the moving mean of the logits (Caron et al. 2021, eq. 4).

    Args:
        dim: number of prototypes K.
        momentum: share of the old centre that is kept.

    Attributes:
        compile_backend: compile the softmax with this backend of `torch.compile`; None: do not.
    """

    centre: Tensor

    def __init__(self, dim: int, *, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.compile_backend: str | None = None
        self.register_buffer("centre", torch.zeros(dim))

    @torch.no_grad()
    def forward(
        self, logits: Tensor, *, temp: float, overwrite: bool = False, lazy: bool = False
    ) -> Tensor | LazyTargets:
        """Targets (n, K) float32 by the centre so far; then the centre takes in all ranks' rows.

        With `overwrite` the targets may take the memory of the logits; with `lazy` they are not
        written out where the losses are compiled.
        """
        targets: Tensor | LazyTargets
        total = logits.new_zeros(logits.shape[1] + 1, dtype=torch.float32)
        total[-1:].fill_(logits.shape[0])  # an assignment would wait for the device
        if self.compile_backend is not None and len(logits):
            sharpness = torch.full_like(total[-1], 1.0 / temp)
            what = _centred_row_terms if lazy else _centred_softmax
            run = compiled(what, self.compile_backend, dynamic=True)
            made, total[:-1] = run(logits, self.centre, sharpness)
            targets = made
            if lazy:
                targets = LazyTargets(logits, -self.centre * sharpness, made, sharpness)
        else:
            scores = logits.float()
            targets = _softmax(scores, self.centre, temp, total[:-1], overwrite=overwrite)
        all_sum(total)
        usable = (total[-1] > 0) & total.isfinite().all()
        mean = torch.where(usable, total[:-1] / total[-1].clamp_min(1), self.centre)
        self.centre.lerp_(mean, 1.0 - self.momentum)
        return targets


class Sinkhorn(nn.Module):
    """`sinkhorn_knopp` as a module like `MovingCentre`; it has no state."""

    def __init__(self) -> None:
        super().__init__()
        self.compile_backend: str | None = None

    def forward(
        self, logits: Tensor, *, temp: float, overwrite: bool = False, lazy: bool = False
    ) -> Tensor | LazyTargets:
        return sinkhorn_knopp(
            logits,
            temp=temp,
            overwrite=overwrite,
            compile_backend=self.compile_backend,
            lazy=lazy,
        )


def build_targets(name: str, dim: int, *, centre_momentum: float) -> nn.Module:
    """The module that turns teacher logits (n, dim) into targets, by the name in `TARGETS`."""
    return TARGETS[name](dim, centre_momentum)


TARGETS = {
    "sinkhorn": lambda dim, momentum: Sinkhorn(),
    "centering": lambda dim, momentum: MovingCentre(dim, momentum=momentum),
}
