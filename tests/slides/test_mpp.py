import pytest

from cytoray.errors import SlideError
from cytoray.slides.mpp import resolve_mpp
from cytoray.slides.readers_base import SlideInfo


def info(mpp_x=None, mpp_y=None, objective=None):
    return SlideInfo(
        width_px_level0=100,
        height_px_level0=100,
        level_dimensions=((100, 100),),
        level_downsamples=(1.0,),
        mpp_x=mpp_x,
        mpp_y=mpp_y,
        objective_power=objective,
        vendor="test",
        reader="image",
        reader_reason="",
    )


@pytest.mark.parametrize(
    ("slide", "manifest", "expected"),
    [
        (info(0.25, 0.25, 40.0), None, (0.25, 0.25, "file")),
        (info(0.25, 0.26, 40.0), 0.24, (0.24, 0.24, "manifest")),
        (info(objective=20.0), None, (0.5, 0.5, "objective")),
        (info(), 0.3, (0.3, 0.3, "manifest")),
        (info(0.2, 0.21), float("nan"), (0.2, 0.21, "file")),
    ],
)
def test_sources_in_turn(slide, manifest, expected):
    resolved = resolve_mpp(slide, manifest)
    assert (resolved.mpp_x, resolved.mpp_y, resolved.source) == expected


@pytest.mark.parametrize(
    ("slide", "manifest"),
    [(info(0.25, 0.25, 20.0), None), (info(0.25, 0.25), 0.5), (info(0.25, 0.5), 0.25)],
)
def test_contradictions_are_refused_unless_the_manifest_is_trusted(slide, manifest):
    with pytest.raises(SlideError) as caught:
        resolve_mpp(slide, manifest)
    assert caught.value.code == "mpp_contradiction"
    if manifest is not None:
        assert resolve_mpp(slide, manifest, trust_manifest_mpp=True).mpp_x == manifest


def test_missing_says_what_to_do():
    with pytest.raises(SlideError, match="`mpp` column") as caught:
        resolve_mpp(info(), None, trust_manifest_mpp=True)
    assert caught.value.code == "mpp_missing"
