from __future__ import annotations

import numpy as np
import pytest

from cytoray.errors import InputError
from cytoray.mil.folds import final_fold, fold_problems, joined_groups, make_folds, strata

LABELS = np.arange(40) // 2 % 2
PATIENTS = np.array([f"p{i // 2}" for i in range(40)])
SHARES = {"val_fraction": 0.25, "test_fraction": 0.25, "seed": 0}


def test_slides_that_share_anything_go_together() -> None:
    groups = joined_groups(
        {"patient": ["a", "a", "b", "c", "d"], "image": [None, "x", "x", None, "y"]}
    )
    assert groups.tolist() == ["a", "a", "a", "c", "d"]


def test_k_folds_test_every_slide_once_and_split_no_patient() -> None:
    folds = make_folds(LABELS, PATIENTS, folds=5, **SHARES)
    assert [fold.name for fold in folds] == [f"fold{i}" for i in range(5)]
    tested = np.concatenate([fold.test for fold in folds])
    assert sorted(tested.tolist()) == list(range(40))
    for fold in folds:
        parts = [set(PATIENTS[part]) for part in fold[1:]]
        assert not parts[0] & parts[1]
        assert not (parts[0] | parts[1]) & parts[2]
        assert sorted(np.concatenate(fold[1:]).tolist()) == list(range(40))
        for part in fold[1:]:
            assert abs(LABELS[part].mean() - 0.5) < 0.2, "stratified"
    again = make_folds(LABELS, PATIENTS, folds=5, **SHARES)
    assert all(np.array_equal(a.test, b.test) for a, b in zip(folds, again, strict=True))


def test_the_final_fold_holds_nothing_back() -> None:
    fold = final_fold(LABELS, PATIENTS, val_fraction=0.2, seed=1)
    assert len(fold.test) == 0
    assert len(fold.train) + len(fold.val) == 40


def test_too_few_patients_of_a_class() -> None:
    labels = np.array([0] * 38 + [1, 1])
    with pytest.raises(InputError, match="class '1' counts 1 patients"):
        make_folds(labels, PATIENTS, folds=5, **SHARES)
    more = {"patient": PATIENTS, "image": PATIENTS}
    for folds in (0, 5):
        with pytest.raises(InputError, match="class '1' counts 1 groups"):
            make_folds(labels, PATIENTS, folds=folds, leak_columns=more, **SHARES)
    with pytest.raises(InputError, match="class '1' counts 1 groups"):
        final_fold(labels, PATIENTS, val_fraction=0.2, seed=1, unit="group")


def given(split, **options):
    return make_folds(LABELS, PATIENTS, folds=0, split=split, **(SHARES | options))


def test_a_given_split_is_kept_and_its_validation_cut_from_training() -> None:
    split = ["train"] * 30 + ["test"] * 10
    [fold] = given(split)
    assert fold.name == ""
    assert fold.test.tolist() == list(range(30, 40))
    assert sorted([*fold.train, *fold.val]) == list(range(30))
    [fold] = given(["train"] * 20 + ["val"] * 10 + ["test"] * 10)
    assert fold.val.tolist() == list(range(20, 30))


def test_a_given_split_that_leaks_names_what_and_where() -> None:
    split = ["train"] * 29 + ["test"] * 11
    images = [f"i{i}" for i in range(40)]
    images[0] = images[39]
    columns = {"patient": PATIENTS.tolist(), "source_image": images}
    with pytest.raises(InputError) as caught:
        given(split, leak_columns=columns)
    assert caught.value.problems == [
        "patient p14 is in train and test",
        "source_image i39 is in train and test",
    ]


def test_a_given_split_that_cannot_be_used() -> None:
    with pytest.raises(InputError, match="no labelled slide in split `test`"):
        given(["train"] * 40)
    with pytest.raises(InputError, match="1 of 40 labelled slides have no `split`"):
        given(["train"] * 29 + [None] + ["test"] * 10)
    with pytest.raises(InputError, match="split column holds held"):
        given(["train"] * 30 + ["held"] * 10)


def test_several_tasks_are_stratified_by_what_is_common_enough() -> None:
    rng = np.random.default_rng(0)
    labels = np.stack([LABELS, rng.integers(-1, 2, 40)], axis=1)
    names = strata(labels, PATIENTS, 3)
    for name in np.unique(names):
        assert len(np.unique(PATIENTS[names == name])) >= 3
    folds = make_folds(labels, PATIENTS, folds=3, **SHARES)
    assert sorted(np.concatenate([fold.test for fold in folds]).tolist()) == list(range(40))
    tasks = {"a": ("no", "yes"), "b": ("no", "yes")}
    assert [problem for fold in folds for problem in fold_problems(fold, labels, tasks)] == []
    labels[folds[0].train, 1] = 0
    labels[folds[0].val, 1] = -1
    assert fold_problems(folds[0], labels, tasks) == [
        "fold0: b: the training slides have fewer than two classes",
        "fold0: b: no validation slide has a label",
    ]
