"""Cross-entropy against soft targets, in one pass over the logits.

With 65,536 prototypes the logits are by far the largest tensors of a step. Written with ordinary
operations the loss makes a dozen more of their size; here the gradient is the only one: computed
together with the loss, a few rows at a time, or by compiled code in the backward pass.

Shapes: n groups of v rows, K prototypes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cytoray.compilation import compiled
from cytoray.ssl.losses.lazy_targets import LazyTargets, probabilities

# Rows worked on at once on a CPU: what stays in its cache. A GPU is given all at once.
_CPU_BLOCK_BYTES = 4 << 20


def soft_cross_entropy(
    logits: Tensor,
    targets: Tensor | LazyTargets,
    weights: Tensor,
    *,
    temp: float,
    mass: float = 1.0,
    overwrite: bool = False,
    compile_backend: str | None = None,
) -> Tensor:
    """sum_n w_n sum_v sum_k -t_nvk log softmax(s_nv / temp)_k.

    Args:
        logits: float (n, v, K), s.
        targets: float32 (n, v, K), or (n, 1, K) for targets that the rows of a group share; every
            row sums to `mass`. With `compile_backend` also `LazyTargets` of n rows, which groups
            share. No gradient.
        weights: float32 (n,), w. No gradient.
        temp: temperature of the student.
        mass: what a row of targets sums to; above 1 it is the sum of several targets.
        overwrite: keep the gradient in the memory of `logits`, which nothing else may read after.
        compile_backend: of `torch.compile`; None: compile nothing.

    Returns:
        float32 scalar. It can be differentiated once.
    """
    parts: tuple[Tensor, ...]
    if isinstance(targets, Tensor):
        parts = (targets,)
    elif compile_backend is None or not len(logits):
        parts = (targets.written().unsqueeze(1),)
    else:
        parts = (targets.logits, targets.column, targets.row, targets.sharpness)
    return _SoftCrossEntropy.apply(  # type: ignore[no-any-return]
        logits, weights, temp, mass, overwrite, compile_backend, *parts
    )


def _written(targets: tuple[Tensor, ...]) -> Tensor:
    """Targets of a loss, given as they are or as the parts of `LazyTargets`."""
    if len(targets) == 1:
        return targets[0]
    logits, column, row, sharpness = targets
    return probabilities(logits, column, row, sharpness).unsqueeze(1)


def _loss_and_log_sum(
    logits: Tensor, weights: Tensor, temp: float, mass: float, *targets: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss, and of each row the logarithm its probabilities are divided by; for compilers."""
    scaled = logits.float() / temp
    log_sum = scaled.logsumexp(-1, keepdim=True)
    hit = (scaled * _written(targets)).sum(-1, keepdim=True)
    return (weights[:, None, None] * (mass * log_sum - hit)).sum(), log_sum


def _slope(
    logits: Tensor,
    weights: Tensor,
    log_sum: Tensor,
    upstream: Tensor,
    temp: float,
    mass: float,
    *targets: Tensor,
) -> Tensor:
    """The gradient in the type of the logits; for compilers."""
    shares = (logits.float() / temp - log_sum).exp()
    factor = weights[:, None, None] * (upstream / temp)
    return ((mass * shares - _written(targets)) * factor).to(logits.dtype)


def _slope_in_place(logits: Tensor, *rest: Any) -> None:
    logits.copy_(_slope(logits, *rest))


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        weights: Tensor,
        temp: float,
        mass: float,
        overwrite: bool,
        compile_backend: str | None,
        *targets: Tensor,
    ) -> Tensor:
        ctx.numbers, ctx.overwrite = (temp, mass), overwrite
        ctx.backend = compile_backend if len(logits) else None
        if compile_backend is not None and len(logits):
            run = compiled(_loss_and_log_sum, compile_backend, dynamic=True)
            total, log_sum = run(logits.detach(), weights, temp, mass, *targets)
            if ctx.needs_input_grad[0]:
                ctx.save_for_backward(logits, weights, log_sum, *targets)
            return total
        logits = logits.detach()
        gradient = None
        if ctx.needs_input_grad[0]:
            gradient = logits if overwrite else torch.empty_like(logits)
        total = logits.new_zeros((), dtype=torch.float32)
        for rows in row_blocks(logits):
            if gradient is not None and gradient.dtype == torch.float32:
                work = gradient[rows]
            else:
                work = torch.empty_like(logits[rows], dtype=torch.float32)
            if logits.dtype == torch.float32:
                scaled = torch.div(logits[rows], temp, out=work)
            else:  # a division into fp32 would still be rounded as the logits are
                scaled = work.copy_(logits[rows]).div_(temp)
            aimed, weight = targets[0][rows], weights[rows].view(-1, 1)
            hit = torch.linalg.vecdot(scaled, aimed)
            largest = scaled.amax(-1, keepdim=True)
            exponential = scaled.sub_(largest).exp_()
            partition = exponential.sum(-1, keepdim=True)
            log_sum = (largest + partition.log()).squeeze(-1)
            total += (weight * (mass * log_sum - hit)).sum()
            if gradient is not None:
                exponential.mul_(mass / partition).sub_(aimed)
                exponential.mul_(weight.unsqueeze(-1) / temp)
                if work.data_ptr() != gradient[rows].data_ptr():
                    gradient[rows] = exponential
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # In place: going backward a second time is an error of autograd's own, not a wrong result.
        nothing = [None] * (len(ctx.needs_input_grad) - 1)
        if ctx.backend is None:
            (gradient,) = ctx.saved_tensors
            return gradient.mul_(upstream), *nothing
        logits, weights, log_sum, *targets = ctx.saved_tensors
        what = _slope_in_place if ctx.overwrite else _slope
        run = compiled(what, ctx.backend, dynamic=True)
        slope = run(logits.detach(), weights, log_sum, upstream, *ctx.numbers, *targets)
        return logits.detach() if ctx.overwrite else slope, *nothing


def row_blocks(x: Tensor) -> list[slice]:
    """Runs of rows of a tensor that fit a CPU's cache as fp32; one run on another device."""
    count = len(x)
    if x.device.type != "cpu" or not count:
        return [slice(0, count)] if count else []
    step = max(1, _CPU_BLOCK_BYTES // max(4 * x[0].numel(), 1))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]
