"""Indexing slides: open, settle the scale, find the foreground, detect the nuclei; resumable."""

from cytoray.indexing.attempts import PARTIAL, Attempt, Patience
from cytoray.indexing.indexer import IndexSettings, SlideIndexer
from cytoray.indexing.journal import Journal
from cytoray.indexing.parts import IndexedSlide, is_finished, part_path, read_indexed, refused

__all__ = [
    "PARTIAL",
    "Attempt",
    "IndexSettings",
    "IndexedSlide",
    "Journal",
    "Patience",
    "SlideIndexer",
    "is_finished",
    "part_path",
    "read_indexed",
    "refused",
]
