"""How many micrometres a level-0 pixel is, and who says so; never a silent guess."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cytoray.errors import InputError, SlideError
from cytoray.slides.readers_base import SlideInfo, plausible_mpp

# Sources further apart than this factor contradict each other (20x and 40x differ by 2).
MAX_RATIO = 1.5
# An estimate from nuclei is rough: it only tells an error by ten from the truth.
MAX_RATIO_TO_ESTIMATE = 4.0
# Pixels are oblong when their sides differ by more than this share.
SQUARE_WITHIN = 0.01
# By convention a 40x objective gives 0.25 um/px and a 20x one 0.5.
UM_PX_POWER = 10.0


@dataclass(frozen=True, kw_only=True)
class ResolvedMpp:
    """um per level-0 pixel along x and y, with its source.

    `source` is `manifest`, `file`, `objective` or `estimated`.
    """

    mpp_x: float
    mpp_y: float
    source: str


@dataclass(frozen=True)
class _Claim:
    source: str
    mpp_x: float
    mpp_y: float

    @property
    def mean(self) -> float:
        return math.sqrt(self.mpp_x * self.mpp_y)

    @property
    def is_square(self) -> bool:
        return abs(self.mpp_x / self.mpp_y - 1) <= SQUARE_WITHIN

    def __str__(self) -> str:
        along_y = "" if self.is_square else f" x {self.mpp_y:.4g}"
        return f"{self.source} {self.mpp_x:.4g}{along_y}"


def magnification_to_mpp(magnification: float) -> float:
    """um per pixel of a magnification, by the usual convention: 20 is 0.5, 40 is 0.25.

    Raises:
        InputError: it is not above 0.
    """
    if not magnification > 0:
        raise InputError(f"a magnification must be above 0, not {magnification:g}")
    return UM_PX_POWER / magnification


def resolve_mpp(
    info: SlideInfo,
    manifest_mpp: float | None = None,
    *,
    trust_manifest_mpp: bool = False,
    estimated: float | None = None,
) -> ResolvedMpp:
    """Settle the slide's scale from the manifest, the file, the objective, an estimate, in turn.

    Oblong pixels stay oblong: the manifest's single number is then the geometric mean of their
    sides. Only where it is trusted against the file are they made square.

    Args:
        info: the opened slide.
        manifest_mpp: the manifest's `mpp` for the slide, or None (NaN counts as None).
        trust_manifest_mpp: let the manifest overrule what contradicts it.
        estimated: um/px from `mpp_from_nuclei`, where the user asked for it.

    Raises:
        SlideError: `mpp_missing` when nobody says; `mpp_contradiction` when two sources, or the
            two sides of a pixel, differ by more than 1.5x, or a source and the estimate by more
            than 4x.
    """
    claims = _claims(info, manifest_mpp, estimated)
    if not claims:
        raise SlideError(
            "mpp_missing",
            "the file states neither um/px nor an objective; add an `mpp` column to the manifest "
            "with this slide's um per pixel",
        )
    first = claims[0]
    trusted = first.source == "manifest" and trust_manifest_mpp
    if not trusted:
        _refuse_contradictions(claims)
    aspect = 1.0
    file = next((claim for claim in claims if claim.source == "file"), None)
    if first.source == "manifest" and file and not file.is_square and not trusted:
        aspect = math.sqrt(file.mpp_x / file.mpp_y)
    return ResolvedMpp(mpp_x=first.mpp_x * aspect, mpp_y=first.mpp_y / aspect, source=first.source)


def _claims(info: SlideInfo, manifest_mpp: float | None, estimated: float | None) -> list[_Claim]:
    """Who says what, the most trusted first."""
    claims: list[_Claim] = []
    given = plausible_mpp(manifest_mpp)
    if given is not None:
        claims.append(_Claim("manifest", given, given))
    if info.mpp_x is not None and info.mpp_y is not None:
        claims.append(_Claim("file", info.mpp_x, info.mpp_y))
    if info.objective_power:
        mpp = magnification_to_mpp(info.objective_power)
        claims.append(_Claim("objective", mpp, mpp))
    if (guess := plausible_mpp(estimated)) is not None:
        claims.append(_Claim("estimated", guess, guess))
    return claims


def _refuse_contradictions(claims: list[_Claim]) -> None:
    stated = [claim for claim in claims if claim.source != "estimated"]
    sides = [side for claim in stated for side in (claim.mpp_x, claim.mpp_y)]
    wrong = bool(sides) and max(sides) / min(sides) > MAX_RATIO
    for guess in (claim for claim in claims if claim.source == "estimated"):
        wrong |= any(_ratio(claim.mean, guess.mean) > MAX_RATIO_TO_ESTIMATE for claim in stated)
    if wrong:
        raise SlideError(
            "mpp_contradiction",
            f"sources of um/px disagree ({', '.join(map(str, claims))}); find out which is right, "
            "put it in the manifest's `mpp` column and trust the manifest (trust_manifest_mpp)",
        )


def _ratio(one: float, other: float) -> float:
    return max(one / other, other / one)
