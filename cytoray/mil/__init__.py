"""Multiple instance learning: bags on disk, aggregators, trials and heads."""

from cytoray.mil.aggregators import AGGREGATORS, build_aggregator
from cytoray.mil.bags import Bag, BagInfo, BagMeta, BagStore, open_bags, read_bag, write_bag
from cytoray.mil.base import Aggregator, MILOutput
from cytoray.mil.coarse import coarsen
from cytoray.mil.config import MILConfig
from cytoray.mil.feature_files import TileFacts, read_feature_file
from cytoray.mil.hdf5 import export_hdf5, import_hdf5
from cytoray.mil.head import MILHead, load_head, save_head
from cytoray.mil.packing import PackedBags, pack
from cytoray.mil.tiles import ArrayTileSource, TileSource, embed_tiles
from cytoray.mil.train import LabelledBag, Predictions, predict, train_frozen
from cytoray.mil.train_lora import adapt_encoder, train_lora
from cytoray.mil.trial import MILResult
from cytoray.mil.vpu import variational_loss, vpu_loss

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
    "TileFacts",
    "TileSource",
    "adapt_encoder",
    "build_aggregator",
    "coarsen",
    "embed_tiles",
    "export_hdf5",
    "import_hdf5",
    "load_head",
    "open_bags",
    "pack",
    "predict",
    "read_bag",
    "read_feature_file",
    "save_head",
    "train_frozen",
    "train_lora",
    "variational_loss",
    "vpu_loss",
    "write_bag",
]
