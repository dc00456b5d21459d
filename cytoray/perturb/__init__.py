"""Nuclei-Centred Perturbation: retained nuclei, shuffled surroundings, nucleus-centred views."""

from cytoray.perturb.config import PerturbConfig
from cytoray.perturb.nuclei_centred import (
    NucleiViews,
    inside_tile,
    near_mask,
    nuclei_centred_views,
    perturb,
    retain_nuclei,
    shuffle_pixels,
)
from cytoray.perturb.seeds import tile_rng, tile_seed
from cytoray.perturb.views import (
    CROP_POLICIES,
    NUM_VIEW_PARAMS,
    VIEW_COLUMN,
    VIEW_PARAMS,
    CropPolicy,
    identity_views,
    sample_views,
)

__all__ = [
    "CROP_POLICIES",
    "NUM_VIEW_PARAMS",
    "VIEW_COLUMN",
    "VIEW_PARAMS",
    "CropPolicy",
    "NucleiViews",
    "PerturbConfig",
    "identity_views",
    "inside_tile",
    "near_mask",
    "nuclei_centred_views",
    "perturb",
    "retain_nuclei",
    "sample_views",
    "shuffle_pixels",
    "tile_rng",
    "tile_seed",
]
