"""iBOT: cross-entropy on masked patches (Zhou et al. 2022, eq. 2, weighted as in DINOv2)."""

from __future__ import annotations

from torch import Tensor

from cytoray.ssl.losses.cross_entropy import soft_cross_entropy
from cytoray.ssl.losses.lazy_targets import LazyTargets


def ibot_loss(
    student: Tensor,
    targets: Tensor | LazyTargets,
    weights: Tensor,
    *,
    student_temp: float,
    global_crops: int,
    overwrite: bool = False,
    compile_backend: str | None = None,
) -> Tensor:
    """This rank's part of the masked patch loss; the sum over the ranks is the loss.

    Args:
        student: (M, K) logits of this rank's masked patches.
        targets: float32 (M, K), teacher probabilities of the same patches, or how to make them.
        weights: float32 (M,), 1 / (number of patches masked in the patch's crop).
        student_temp: temperature of the student.
        global_crops: all global crops of all ranks, masked or not.
        overwrite: the logits are not read again and may be overwritten.
        compile_backend: of `torch.compile`; None: compile nothing.

    Returns:
        float32 scalar (0 when nothing is masked).
    """
    weights = weights / global_crops
    return soft_cross_entropy(
        student.unsqueeze(1),
        targets.unsqueeze(1) if isinstance(targets, Tensor) else targets,
        weights,
        temp=student_temp,
        overwrite=overwrite,
        compile_backend=compile_backend,
    )
