"""Multiple instance learning: bags on disk, aggregators, trials and heads."""

from cytoray.mil.aggregators import AGGREGATORS, build_aggregator
from cytoray.mil.bags import Bag, BagInfo, BagMeta, BagStore, open_bags, read_bag, write_bag
from cytoray.mil.base import Aggregator, MILOutput
from cytoray.mil.config import MILConfig
from cytoray.mil.head import MILHead, load_head, save_head
from cytoray.mil.packing import PackedBags, pack
from cytoray.mil.tiles import ArrayTileSource, TileSource, embed_tiles
from cytoray.mil.train import LabelledBag, Predictions, predict, train_frozen
from cytoray.mil.train_lora import adapt_encoder, train_lora
from cytoray.mil.trial import MILResult

__all__ = [
    "AGGREGATORS",
    "Aggregator",
    "ArrayTileSource",
    "Bag",
    "BagInfo",
    "BagMeta",
    "BagStore",
    "LabelledBag",
    "MILConfig",
    "MILHead",
    "MILOutput",
    "MILResult",
    "PackedBags",
    "Predictions",
    "TileSource",
    "adapt_encoder",
    "build_aggregator",
    "embed_tiles",
    "load_head",
    "open_bags",
    "pack",
    "predict",
    "read_bag",
    "save_head",
    "train_frozen",
    "train_lora",
    "write_bag",
]
