"""NT-Xent: each view against all other views of the batch (SimCLR, Chen et al. 2020)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cytoray.ssl.collectives import gather_rows


def nt_xent(views: Tensor, *, temperature: float) -> Tensor:
    """Mean over all 2B views of -log softmax of the similarity to the tile's other view (eq. 1).

    Args:
        views: float (B, 2, D); scaled to unit length here.
        temperature: of the cosines.

    Returns:
        float32 scalar.
    """
    with torch.autocast(views.device.type, enabled=False):
        z = F.normalize(views.float(), dim=-1).flatten(0, 1)
        rows = torch.arange(len(z), device=z.device)
        itself = rows.unsqueeze(1) == rows
        logits = (z @ z.T / temperature).masked_fill(itself, -torch.inf)
        return F.cross_entropy(logits, rows ^ 1)


def nt_xent_loss(views: Tensor, *, temperature: float, global_batch: int, offset: int) -> Tensor:
    """NT-Xent over the tiles of all ranks.

    Every rank returns the whole value; gradients reach this rank's own views only, so that their
    sum over the ranks is the gradient of the loss.

    Args:
        views: float (b, 2, D), of this rank's tiles.
        temperature: of the cosines.
        global_batch: tiles over all ranks.
        offset: position of this rank's first tile.

    Returns:
        float32 scalar.
    """
    rows = F.normalize(views.float(), dim=-1).flatten(1)
    everyone = gather_rows(rows, total=global_batch, offset=offset)
    return nt_xent(everyone.unflatten(1, (2, -1)), temperature=temperature)
