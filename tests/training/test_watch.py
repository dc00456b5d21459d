import math
import pickle

import pytest
import torch

from cytoray.training import (
    CollapseWatch,
    StepGuard,
    TrainingDiverged,
    check_finite,
    collapse_message,
)

GOOD = {
    "feature_std": 0.6,
    "effective_rank": 20.0,
    "entropy_bound": math.log(1024),
    "teacher_entropy": 3.0,
    "prototype_entropy": 6.0,
}


def test_a_healthy_run_is_silent():
    assert collapse_message(GOOD) == ""
    assert collapse_message({"loss": 1.0}) == ""


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("feature_std", 0.001, "same feature"),
        ("effective_rank", 1.01, "on a line"),
        ("teacher_entropy", math.log(1024) - 1e-4, "uniform target"),
        ("prototype_entropy", 1e-3, "same prototype"),
    ],
)
def test_each_kind_of_collapse(name, value, words):
    assert words in collapse_message(GOOD | {name: torch.tensor(value)})


def test_watch_waits_for_the_warmup_and_for_patience():
    watch = CollapseWatch(start_step=10, patience=2)
    bad = GOOD | {"feature_std": 0.0}
    heard = [watch.update(m, s)[0] for s, m in enumerate([bad] * 10 + [GOOD, bad, GOOD, bad, bad])]
    assert heard == [""] * 14 + ["collapse"]


def test_watch_speaks_when_collapse_begins_changes_and_ends_and_not_between():
    watch = CollapseWatch(patience=2)
    same_std = {"feature_std": 0.0}
    same, flat = GOOD | same_std, GOOD | {"effective_rank": 1.0}
    course = [same] * 20 + [same, GOOD] * 5 + [same, flat | same_std, flat, flat, flat, GOOD, GOOD]
    news = {s: watch.update(m, s) for s, m in enumerate([*course, GOOD, GOOD, same, same])}
    heard = {step: kind for step, (kind, _) in news.items() if kind}
    assert heard == {1: "collapse", 31: "collapse", 33: "collapse", 36: "collapse_ended",
                     40: "collapse"}  # fmt: skip
    said = [news[step][1] for step in (1, 31, 33)]
    assert [("same feature" in text, "on a line" in text) for text in said] == [
        (True, False), (True, True), (False, True)]  # fmt: skip


def test_diverged_says_step_and_value():
    check_finite({"loss": torch.tensor(1.0), "feature_std": torch.tensor(math.nan)}, 3)
    with pytest.raises(TrainingDiverged, match=r"step 7: loss_koleo = inf") as caught:
        check_finite({"loss": 1.0, "loss_koleo": torch.tensor(math.inf)}, 7)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.step, str(again)) == (7, str(caught.value))


def test_the_first_bad_step_is_found_afterwards_with_its_tiles():
    guard = StepGuard()
    guard.add(1, {"loss": torch.tensor(1.0), "lr": torch.tensor(math.nan)}, ["a", "b"])
    guard.check()
    guard.add(2, {"loss": torch.tensor(1.0)}, ["c"])
    guard.add(3, {"loss": torch.tensor(2.0), "grad_norm_b": torch.tensor(math.inf)}, list("defgh"))
    guard.add(4, {"loss": torch.tensor(math.nan)}, ["i"])
    with pytest.raises(TrainingDiverged, match=r"step 3: grad_norm_b = inf.*d, e, f and 2 more"):
        guard.check()
    guard.check()  # what was looked at is not looked at again
