"""What to synthesize: the configuration, and the slides, patients, sites and split it means."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np

from cytoray.errors import InputError, raise_problems

RENDERER_VERSION = 1
"""Raised whenever the same config would give other pixels, so that old folders are not mixed in."""


@dataclass(frozen=True, kw_only=True)
class SynthConfig:
    """A set of synthetic Pap slides.

    Attributes:
        num_slides: how many slides.
        positive_fraction: share of slides with label 1.
        held_out: slides in split `test`, half of them positive where there are enough; 0 for none.
        slides_per_patient: fewest and most slides of one patient.
        num_sites: laboratories, each with its own mild stain bias.
        size_px: side of the square slides at level 0.
        mpp: um per pixel at level 0.
        cells_per_mm2: squamous cells per square millimetre, on average.
        witness: share of abnormal cells among the squamous cells of a positive slide.
        min_abnormal: fewest abnormal cells of a positive slide, whatever `witness` says.
        jpeg_quality: 1 to 100.
        seed: slide `i` hangs on (seed, i) alone.
    """

    num_slides: int = 32
    positive_fraction: float = 0.5
    held_out: int = 8
    slides_per_patient: tuple[int, int] = (1, 2)
    num_sites: int = 2
    size_px: int = 3072
    mpp: float = 0.25
    cells_per_mm2: float = 200.0
    witness: float = 0.08
    min_abnormal: int = 4
    jpeg_quality: int = 85
    seed: int = 0

    def __post_init__(self) -> None:
        fewest, most = self.slides_per_patient
        checks = [
            (self.num_slides >= 1, "num_slides must be at least 1"),
            (0 <= self.positive_fraction <= 1, "positive_fraction must be between 0 and 1"),
            (0 <= self.held_out <= self.num_slides, "held_out must be between 0 and num_slides"),
            (1 <= fewest <= most, "slides_per_patient must be (fewest, most), 1 <= fewest <= most"),
            (self.num_sites >= 1, "num_sites must be at least 1"),
            (512 <= self.size_px <= 32768, "size_px must be between 512 and 32768"),
            (0.1 <= self.mpp <= 1.0, "mpp must be between 0.1 and 1.0 um per pixel"),
            (0 < self.cells_per_mm2 <= 2000, "cells_per_mm2 must be above 0, at most 2000"),
            (0 < self.witness <= 1, "witness must be above 0, at most 1"),
            (self.min_abnormal >= 1, "min_abnormal must be at least 1"),
            (1 <= self.jpeg_quality <= 100, "jpeg_quality must be between 1 and 100"),
            (self.seed >= 0, "seed must not be negative"),
        ]
        raise_problems("the synth config is wrong:", [text for good, text in checks if not good])


@dataclass(frozen=True, kw_only=True)
class SlidePlan:
    """What slide `index` is to be. `layout` is `aperio` (.svs) or `generic` (.tiff)."""

    index: int
    slide_id: str
    patient_id: str
    site: str
    label: int
    split: str
    layout: str

    @property
    def path(self) -> str:
        """Slide file, relative to the output folder."""
        return f"slides/{self.slide_id}.{'svs' if self.layout == 'aperio' else 'tiff'}"

    @property
    def truth_path(self) -> str:
        """Truth file, relative to the output folder."""
        return f"truth/{self.slide_id}.json"


def config_fingerprint(config: SynthConfig) -> str:
    """Return a short hash of the config and of the renderer's version."""
    content = json.dumps({"renderer": RENDERER_VERSION, **asdict(config)}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


@lru_cache(maxsize=8)
def plan_slides(config: SynthConfig) -> tuple[SlidePlan, ...]:
    """Return the plan of every slide, by index; label, layout, site and index are unrelated.

    Patients are formed inside one (label, split) group, so none straddles the split. Layouts take
    turns inside each group, and so do sites from one patient to the next.
    """
    rng = np.random.default_rng([config.seed, 1])
    drafts: list[tuple[str, str, int, str, str]] = []
    num_patients = 0
    for (label, split), count in _group_sizes(config).items():
        site_offset, layout_offset = rng.integers(config.num_sites), rng.integers(2)
        left, in_group = count, 0
        while left:
            fewest, most = config.slides_per_patient
            size = min(left, int(rng.integers(fewest, most + 1)))
            site = f"site_{(in_group + site_offset) % config.num_sites}"
            for place in range(count - left, count - left + size):
                layout = ("aperio", "generic")[(place + layout_offset) % 2]
                drafts.append((f"draft_{num_patients}", site, label, split, layout))
            left, in_group, num_patients = left - size, in_group + 1, num_patients + 1
    patient_names = rng.permutation(num_patients)
    plans = []
    for index, place in enumerate(rng.permutation(len(drafts))):
        draft, site, label, split, layout = drafts[place]
        patient = int(patient_names[int(draft.removeprefix("draft_"))])
        plans.append(
            SlidePlan(
                index=index,
                slide_id=f"synth_{index:04d}",
                patient_id=f"patient_{patient:04d}",
                site=site,
                label=label,
                split=split,
                layout=layout,
            )
        )
    return tuple(plans)


def slide_plan(config: SynthConfig, index: int) -> SlidePlan:
    """Return the plan of slide `index`.

    Raises:
        InputError: there is no such slide.
    """
    if not 0 <= index < config.num_slides:
        raise InputError(f"slide index {index} is outside 0 to {config.num_slides - 1}")
    return plan_slides(config)[index]


def _group_sizes(config: SynthConfig) -> dict[tuple[int, str], int]:
    """Slides of each (label, split): half the test slides are positive where there are enough."""
    positive = round(config.num_slides * config.positive_fraction)
    negative = config.num_slides - positive
    test_positive = min(positive, max(config.held_out // 2, config.held_out - negative))
    test_negative = config.held_out - test_positive
    return {
        (1, "test"): test_positive,
        (0, "test"): test_negative,
        (1, "train"): positive - test_positive,
        (0, "train"): negative - test_negative,
    }
