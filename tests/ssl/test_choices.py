"""Masks and kept rows of a step: the same however it is cut, and made before they are asked for."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np

from cytoray.ssl.choices import Ahead, ChoiceRules, StepShape
from cytoray.ssl.masks import MaskPolicy

RULES = ChoiceRules(seed=3, depth=2, drop_path=0.4, masks=MaskPolicy())
WHOLE = StepShape(global_batch=10, runs=((0, 10),), views=(2, 4), grid=(4, 4))


def test_micro_batches_and_ranks_have_their_part_of_the_whole():
    (whole,) = RULES(5, WHOLE)
    parts = RULES(5, replace(WHOLE, runs=((0, 3), (3, 4), (7, 3))))
    assert whole.masked is not None
    masks = np.concatenate([part.masked.mask for part in parts if part.masked is not None])
    assert np.array_equal(masks, whole.masked.mask)
    for group, views in enumerate(WHOLE.views):
        kept = whole.kept[group]
        assert kept is not None
        for branch, rows in enumerate(kept.rows):
            joined = []
            for part, first in zip(parts, (0, 3, 7), strict=True):
                own = part.kept[group]
                assert own is not None
                assert own.scale == kept.scale
                joined += list(own.rows[branch] + first * views)
            assert joined == rows.tolist()


def test_what_is_not_wanted_is_not_made():
    (made,) = replace(RULES, masks=None, drop_path=0.0)(5, WHOLE)
    assert made.masked is None
    assert made.kept == (None, None)


def test_the_next_step_is_made_ahead_on_another_thread():
    made: dict[tuple[int, StepShape], str] = {}
    begun = {step: threading.Event() for step in range(10)}

    def make(step, shape):
        made[step, shape] = threading.current_thread().name
        begun[step].set()
        return RULES(step, shape)

    ahead = Ahead(make)
    for step in (4, 5):
        (got,), (expected,) = ahead(step, WHOLE), RULES(step, WHOLE)
        assert got.masked is not None
        assert expected.masked is not None
        assert np.array_equal(got.masked.mask, expected.masked.mask)
        assert begun[step + 1].wait(60)
    here = threading.current_thread().name
    assert made[4, WHOLE] == here
    assert made[5, WHOLE] != here
    ahead(8, WHOLE)  # a resumed run starts anywhere
    assert made[8, WHOLE] == here
    other = replace(WHOLE, global_batch=12, runs=((0, 12),))
    ahead(9, other)  # the number of tiles may change
    assert made[9, other] == here
