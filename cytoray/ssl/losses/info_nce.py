"""InfoNCE: a query against the keys of the batch (MoCo v3) or of a queue (MoCo v2).

Shapes: b tiles of this rank, B of all ranks, D width, K keys in the queue.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce_loss(queries: Tensor, keys: Tensor, *, temperature: float, offset: int) -> Tensor:
    """This rank's part of MoCo v3's contrastive loss; the ranks' sum is the loss.

    -2 temperature * mean log softmax(q . k / temperature) at the tile's own key (Chen et al. 2021,
    eq. 1 and alg. 1, where the factor keeps the gradient's size at any temperature).

    Args:
        queries: float (b, D); scaled to unit length here.
        keys: float (B, D), of all ranks, without gradient; scaled to unit length here.
        temperature: of the cosines.
        offset: position of this rank's first tile.

    Returns:
        float32 scalar.
    """
    with torch.autocast(queries.device.type, enabled=False):
        logits = _unit(queries) @ _unit(keys).T / temperature
        own = torch.arange(len(queries), device=queries.device) + offset
        return 2 * temperature * F.cross_entropy(logits, own, reduction="sum") / len(keys)


def queue_loss(
    queries: Tensor, keys: Tensor, queue: Tensor, *, temperature: float, global_batch: int
) -> Tensor:
    """This rank's part of MoCo's loss against a queue (He et al. 2020, eq. 1).

    Args:
        queries: float (b, D); scaled to unit length here.
        keys: float (b, D), the tiles' own keys, without gradient; scaled to unit length here.
        queue: float (K, D), unit length: keys of other tiles.
        temperature: of the cosines.
        global_batch: tiles over all ranks.

    Returns:
        float32 scalar.
    """
    with torch.autocast(queries.device.type, enabled=False):
        q, k = _unit(queries), _unit(keys)
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.float().T], dim=1)
        first = torch.zeros(len(q), dtype=torch.int64, device=q.device)
        return F.cross_entropy(logits / temperature, first, reduction="sum") / global_batch


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.float(), dim=-1)
