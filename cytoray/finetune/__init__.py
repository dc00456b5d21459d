"""Adapting an encoder to labelled cell images: linear head, LoRA, or all of it."""

from cytoray.finetune.adapters import Adapter, adapt, parse_adapter
from cytoray.finetune.cells import Cells, Columns, read_cells, split_cells
from cytoray.finetune.config import CellTrial, TrainConfig, grid_trials
from cytoray.finetune.pixels import FITS, CellPixels, cached_pixels, read_image
from cytoray.finetune.results import best_trial, predictions_frame, result_table
from cytoray.finetune.saved import (
    AdapterFacts,
    export_encoder,
    load_classifier,
    read_adapter,
    save_adapter,
)
from cytoray.finetune.train import CellClassifier, TrainedCells, draw_examples, train_cells

__all__ = [
    "FITS",
    "Adapter",
    "AdapterFacts",
    "CellClassifier",
    "CellPixels",
    "CellTrial",
    "Cells",
    "Columns",
    "TrainConfig",
    "TrainedCells",
    "adapt",
    "best_trial",
    "cached_pixels",
    "draw_examples",
    "export_encoder",
    "grid_trials",
    "load_classifier",
    "parse_adapter",
    "predictions_frame",
    "read_adapter",
    "read_cells",
    "read_image",
    "result_table",
    "save_adapter",
    "split_cells",
    "train_cells",
]
