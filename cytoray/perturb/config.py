"""Nuclei-Centred Perturbation as a switch: what a run does to each tile before training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from cytoray.errors import raise_problems
from cytoray.perturb.nuclei_centred import NucleiViews, nuclei_centred_views
from cytoray.perturb.views import CropPolicy


@dataclass(frozen=True, kw_only=True)
class PerturbConfig:
    """Nuclei-Centred Perturbation (Cyto-SSL, Algorithm 1).

    Attributes:
        enabled: centre the crops on nuclei and scramble what is far from them; without it the tile
            is left alone and crops lie anywhere in it, as DINOv2, iBOT and the others publish it.
        shuffle: scramble the pixels far from every retained nucleus; without it crops are centred
            on nuclei, and no more.
        radius_um: r; 12.5 um is the paper's 50 px at 40x.
        retain_fraction: range of the share of a tile's nuclei that is retained.
    """

    enabled: bool = True
    shuffle: bool = True
    radius_um: float = 12.5
    retain_fraction: tuple[float, float] = (0.5, 1.0)

    def __post_init__(self) -> None:
        low, high = self.retain_fraction
        problems = []
        if not self.radius_um > 0:
            problems.append(f"perturb.radius_um must be above 0, not {self.radius_um:g}")
        if not 0 <= low <= high <= 1:
            problems.append(
                f"perturb.retain_fraction must be two numbers, 0 <= low <= high <= 1, not "
                f"{low:g} {high:g}"
            )
        raise_problems("the perturbation cannot be done:", problems)

    def views(
        self,
        tile: np.ndarray,
        nuclei_xy_px: np.ndarray,
        policy: CropPolicy,
        rng: np.random.Generator,
        *,
        mpp: float,
    ) -> NucleiViews:
        """The tile and its views as configured; arguments as of `nuclei_centred_views`.

        Args:
            mpp: um per pixel of the tile.
        """
        if not self.enabled:
            policy = _anywhere(policy)
        return nuclei_centred_views(
            tile,
            nuclei_xy_px,
            self.radius_um / mpp,
            policy,
            rng,
            retain_fraction=self.retain_fraction,
            perturbed=self.enabled and self.shuffle,
        )


@lru_cache(maxsize=64)
def _anywhere(policy: CropPolicy) -> CropPolicy:
    return replace(policy, centre="random")
