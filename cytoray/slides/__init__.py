"""Slides: manifest, readers, scale, tiling, foreground, quarantine. Numpy in, numpy out."""

from cytoray.slides.chunks import ChunkPixels, best_level, read_chunk, read_region_px
from cytoray.slides.focus import OUT_OF_FOCUS, chunk_focus, score_of_blur, tile_focus
from cytoray.slides.foreground import (
    DEFAULT_KEEP_SHARE,
    Foreground,
    Overview,
    background_rgb,
    foreground_mask,
    read_overview,
    slide_foreground,
    tile_shares,
)
from cytoray.slides.grid import (
    CHUNK_TILES,
    TILES_PER_CHUNK,
    Grid,
    SlideGrid,
    bool_to_mask,
    chunk_id,
    mask_indices,
    mask_to_bool,
    parse_tile_id,
    tile_id,
)
from cytoray.slides.manifest import Manifest, read_manifest
from cytoray.slides.mpp import ResolvedMpp, magnification_to_mpp, resolve_mpp
from cytoray.slides.mpp_estimate import mpp_from_nuclei
from cytoray.slides.quarantine import (
    QUARANTINE_SCHEMA,
    merge_quarantine,
    quarantine_row,
    read_quarantine,
    row_from_error,
    write_quarantine,
)
from cytoray.slides.reader import READERS, SlideInfo, SlideReader, open_slide
from cytoray.slides.slide_table import (
    SLIDE_SCHEMA,
    fingerprint,
    grid_of_row,
    inspect_slide,
    read_slide_table,
    slide_schema,
    write_slide_table,
)
from cytoray.slides.z_stack import StackReader, open_row, open_stack

__all__ = [
    "CHUNK_TILES",
    "DEFAULT_KEEP_SHARE",
    "OUT_OF_FOCUS",
    "QUARANTINE_SCHEMA",
    "READERS",
    "SLIDE_SCHEMA",
    "TILES_PER_CHUNK",
    "ChunkPixels",
    "Foreground",
    "Grid",
    "Manifest",
    "Overview",
    "ResolvedMpp",
    "SlideGrid",
    "SlideInfo",
    "SlideReader",
    "StackReader",
    "background_rgb",
    "best_level",
    "bool_to_mask",
    "chunk_focus",
    "chunk_id",
    "fingerprint",
    "foreground_mask",
    "grid_of_row",
    "inspect_slide",
    "magnification_to_mpp",
    "mask_indices",
    "mask_to_bool",
    "merge_quarantine",
    "mpp_from_nuclei",
    "open_row",
    "open_slide",
    "open_stack",
    "parse_tile_id",
    "quarantine_row",
    "read_chunk",
    "read_manifest",
    "read_overview",
    "read_quarantine",
    "read_region_px",
    "read_slide_table",
    "resolve_mpp",
    "row_from_error",
    "score_of_blur",
    "slide_foreground",
    "slide_schema",
    "tile_focus",
    "tile_id",
    "tile_shares",
    "write_quarantine",
    "write_slide_table",
]
