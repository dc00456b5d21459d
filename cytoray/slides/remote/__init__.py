"""Slides at any fsspec URL: staged to a cache of the node, then opened like local files."""

from cytoray.slides.remote.cache import SlideCache, StagedSlide
from cytoray.slides.remote.default import default_cache, stage
from cytoray.slides.remote.lookup import (
    RemoteFile,
    RemoteSlide,
    remote_fingerprint,
    remote_slide,
)
from cytoray.slides.remote.retry import DownloadPolicy
from cytoray.slides.remote.urls import check_urls, is_remote, local_path, redact

__all__ = [
    "DownloadPolicy",
    "RemoteFile",
    "RemoteSlide",
    "SlideCache",
    "StagedSlide",
    "check_urls",
    "default_cache",
    "is_remote",
    "local_path",
    "redact",
    "remote_fingerprint",
    "remote_slide",
    "stage",
]
