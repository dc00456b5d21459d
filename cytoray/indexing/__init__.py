"""Indexing slides: open, settle the scale, find the foreground, detect the nuclei; resumable."""

from cytoray.indexing.attempts import Attempt
from cytoray.indexing.indexer import IndexSettings, SlideIndexer
from cytoray.indexing.journal import Journal
from cytoray.indexing.parts import IndexedSlide, is_finished, part_path, read_indexed, refused

__all__ = [
    "Attempt",
    "IndexSettings",
    "IndexedSlide",
    "Journal",
    "SlideIndexer",
    "is_finished",
    "part_path",
    "read_indexed",
    "refused",
]
