"""DINO: cross-entropy between teacher targets and student logits over pairs of crops.

Shapes: b tiles of this rank, G global crops, L local crops, K prototypes.
"""

from __future__ import annotations

from torch import Tensor

from cytoray.ssl.losses.cross_entropy import soft_cross_entropy


def dino_loss(
    student_global: Tensor,
    student_local: Tensor | None,
    targets: Tensor,
    *,
    student_temp: float,
    global_batch: int,
    overwrite: bool = False,
    compile_backend: str | None = None,
) -> Tensor:
    """This rank's part of the DINO loss (Caron et al. 2021, eq. 3); the ranks' sum is the loss.

    Every teacher global crop against every *other* student crop of the tile, averaged over pairs
    and over the tiles of all ranks.

    Args:
        student_global: (b, G, K) logits.
        student_local: (b, L, K) logits, or None.
        targets: float32 (b, G, K), teacher probabilities.
        student_temp: temperature of the student.
        global_batch: tiles over all ranks.
        overwrite: the logits are not read again and may be overwritten.
        compile_backend: of `torch.compile`; None: compile nothing.

    Returns:
        float32 scalar.
    """
    tiles, num_global = targets.shape[:2]
    num_local = 0 if student_local is None else student_local.shape[1]
    pairs = num_global * (num_global - 1 + num_local)
    weights = targets.new_full((tiles,), 1.0 / (pairs * global_batch))
    total = targets.sum(1, keepdim=True)
    loss = targets.new_zeros(())
    if num_global > 1:
        # Of two crops, the others' sum is the other one.
        others = targets.flip(1) if num_global == 2 else total - targets
        loss = soft_cross_entropy(
            student_global,
            others,
            weights,
            temp=student_temp,
            mass=num_global - 1,
            overwrite=overwrite,
            compile_backend=compile_backend,
        )
    if student_local is not None and num_local:
        loss = loss + soft_cross_entropy(
            student_local,
            total,
            weights,
            temp=student_temp,
            mass=num_global,
            overwrite=overwrite,
            compile_backend=compile_backend,
        )
    return loss
