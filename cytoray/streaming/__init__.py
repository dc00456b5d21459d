"""Which tile is used when: the reading order, windows and global batches (no Ray, no pixels)."""

from cytoray.streaming.dealing import Slice, Step, deal, shuffle_window
from cytoray.streaming.order import ChunkOrder, StreamPosition, permute

__all__ = [
    "ChunkOrder",
    "Slice",
    "Step",
    "StreamPosition",
    "deal",
    "permute",
    "shuffle_window",
]
