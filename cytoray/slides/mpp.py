"""How many micrometres a level-0 pixel is, and who says so; never a silent guess."""

from __future__ import annotations

from dataclasses import dataclass

from cytoray.errors import SlideError
from cytoray.slides.readers_base import SlideInfo, plausible_mpp

# Sources further apart than this factor contradict each other (20x and 40x differ by 2).
MAX_RATIO = 1.5
# By convention a 40x objective gives 0.25 um/px and a 20x one 0.5.
UM_PX_POWER = 10.0


@dataclass(frozen=True, kw_only=True)
class ResolvedMpp:
    """um per level-0 pixel along x and y, with its source: `manifest`, `file` or `objective`."""

    mpp_x: float
    mpp_y: float
    source: str


def resolve_mpp(
    info: SlideInfo, manifest_mpp: float | None = None, *, trust_manifest_mpp: bool = False
) -> ResolvedMpp:
    """Settle the slide's scale from the manifest, the file's um/px, and the objective, in turn.

    Args:
        info: the opened slide.
        manifest_mpp: the manifest's `mpp` for the slide, or None (NaN counts as None).
        trust_manifest_mpp: let the manifest overrule a file that contradicts it.

    Raises:
        SlideError: `mpp_missing` when nobody says, `mpp_contradiction` when two sources differ by
            more than 1.5x.
    """
    claims: list[tuple[str, float, float]] = []
    given = plausible_mpp(manifest_mpp)
    if given is not None:
        claims.append(("manifest", given, given))
    if info.mpp_x is not None and info.mpp_y is not None:
        claims.append(("file", info.mpp_x, info.mpp_y))
    if info.objective_power:
        estimate = UM_PX_POWER / info.objective_power
        claims.append(("objective", estimate, estimate))
    if not claims:
        raise SlideError(
            "mpp_missing",
            "the file states neither um/px nor an objective; add an `mpp` column to the manifest "
            "with this slide's um per pixel",
        )
    if not (given is not None and trust_manifest_mpp):
        _refuse_contradictions(claims)
    source, mpp_x, mpp_y = claims[0]
    return ResolvedMpp(mpp_x=mpp_x, mpp_y=mpp_y, source=source)


def _refuse_contradictions(claims: list[tuple[str, float, float]]) -> None:
    along_x = {source: mpp_x for source, mpp_x, _ in claims}
    along_y = {source: mpp_y for source, _, mpp_y in claims}
    for values in (along_x, along_y):
        if max(values.values()) / min(values.values()) > MAX_RATIO:
            said = ", ".join(f"{source} {value:.4g}" for source, value in values.items())
            raise SlideError(
                "mpp_contradiction",
                f"sources of um/px disagree ({said}); find out which is right, put it in the "
                "manifest's `mpp` column and trust the manifest (trust_manifest_mpp)",
            )
