"""HTML pages and figures. Plain dicts and arrays in, files or image bytes out."""

from typing import TYPE_CHECKING

from cytoray.lazy import lazy_names

if TYPE_CHECKING:
    from cytoray.report.figures import loss_curves, message_figure, roc_figure, series_from_events
    from cytoray.report.overlays import (
        attention_map,
        crop_outlines,
        foreground_overlay,
        nuclei_density,
        nuclei_overlay,
        view_grid,
        views_to_uint8,
    )
    from cytoray.report.page import trial_table, write_report
    from cytoray.report.qc import write_qc
    from cytoray.report.slide_images import encode_jpeg, focus_image, qc_images

__all__ = [
    "attention_map",
    "crop_outlines",
    "encode_jpeg",
    "focus_image",
    "foreground_overlay",
    "loss_curves",
    "message_figure",
    "nuclei_density",
    "nuclei_overlay",
    "qc_images",
    "roc_figure",
    "series_from_events",
    "trial_table",
    "view_grid",
    "views_to_uint8",
    "write_qc",
    "write_report",
]

__getattr__ = lazy_names(
    __name__,
    {
        "figures": ("loss_curves", "message_figure", "roc_figure", "series_from_events"),
        "overlays": (
            "attention_map",
            "crop_outlines",
            "foreground_overlay",
            "nuclei_density",
            "nuclei_overlay",
            "view_grid",
            "views_to_uint8",
        ),
        "page": ("trial_table", "write_report"),
        "qc": ("write_qc",),
        "slide_images": ("encode_jpeg", "focus_image", "qc_images"),
    },
)
