"""Synthetic Papanicolaou slides with exact truth, for quickstart and the tests."""

from cytoray.synthetic.bodies import render_debris, render_lymphocyte, render_neutrophil
from cytoray.synthetic.cells import CELL_KINDS, CellPatch, render_cell
from cytoray.synthetic.config import (
    SlidePlan,
    SynthConfig,
    config_fingerprint,
    plan_slides,
    slide_plan,
)
from cytoray.synthetic.corrupt import (
    anucleate_slide,
    blank_slide,
    corrupt_tile,
    not_a_slide,
    strip_mpp,
    truncate,
    zero_bytes,
)
from cytoray.synthetic.files import SlideTruth, read_truth, write_pyramid, write_slide
from cytoray.synthetic.folder import synthesize
from cytoray.synthetic.slides import NUCLEI_SCHEMA, SyntheticSlide, make_slide
from cytoray.synthetic.stain import Stain, sample_stain

__all__ = [
    "CELL_KINDS",
    "NUCLEI_SCHEMA",
    "CellPatch",
    "SlidePlan",
    "SlideTruth",
    "Stain",
    "SynthConfig",
    "SyntheticSlide",
    "anucleate_slide",
    "blank_slide",
    "config_fingerprint",
    "corrupt_tile",
    "make_slide",
    "not_a_slide",
    "plan_slides",
    "read_truth",
    "render_cell",
    "render_debris",
    "render_lymphocyte",
    "render_neutrophil",
    "sample_stain",
    "slide_plan",
    "strip_mpp",
    "synthesize",
    "truncate",
    "write_pyramid",
    "write_slide",
    "zero_bytes",
]
