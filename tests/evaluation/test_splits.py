import numpy as np
import pytest

from cytoray.errors import InputError
from cytoray.evaluation.splits import check_no_leak, given_split, grouped_kfold, train_val_test


def make(patients=100, seed=0):
    """Patients with 1 to 5 bags; a tenth of them have one positive bag among others."""
    rng = np.random.default_rng(seed)
    labels, groups = [], []
    for patient in range(patients):
        size = int(rng.integers(1, 6))
        mine = np.zeros(size, dtype=int)
        if patient % 10 == 0:
            mine[0] = 2
        elif patient % 3 == 0:
            mine[:] = 1
        labels += mine.tolist()
        groups += [f"patient {patient}"] * size
    order = rng.permutation(len(labels))
    return np.array(labels)[order], np.array(groups)[order]


@pytest.mark.parametrize("folds", [2, 5, 10])
def test_kfold_keeps_patients_whole_and_labels_balanced(folds):
    labels, groups = make()
    pairs = grouped_kfold(labels, groups, folds, seed=1)
    held_out = np.concatenate([test for _, test in pairs])
    assert sorted(held_out.tolist()) == list(range(len(labels)))
    rare = []
    for rest, test in pairs:
        check_no_leak(groups, {"rest": rest, "test": test})
        assert len(rest) + len(test) == len(labels)
        assert abs(len(test) - len(labels) / folds) <= 5
        rare.append(int((labels[test] == 2).sum()))
    assert max(rare) - min(rare) <= 1


def test_three_parts_keep_patients_whole_and_shares():
    labels, groups = make()
    split = train_val_test(labels, groups, (0.6, 0.2, 0.2), seed=1)
    check_no_leak(groups, split)
    assert sorted(np.concatenate(split).tolist()) == list(range(len(labels)))
    assert [len(np.unique(groups[part])) for part in split] == [60, 20, 20]
    assert [int((labels[part] == 2).sum()) for part in split] == [6, 2, 2]


def test_every_part_gets_every_class_even_of_three_patients():
    labels = np.array([0] * 30 + [1] * 3)
    split = train_val_test(labels, np.arange(33), (0.8, 0.1, 0.1))
    assert all((labels[part] == 1).sum() == 1 for part in split)
    without_test = train_val_test(labels, np.arange(33), (0.8, 0.2, 0.0))
    assert len(without_test.test) == 0


def test_seeds_decide():
    labels, groups = make()
    for splitter in (grouped_kfold, lambda *a, seed: [train_val_test(*a, seed=seed)]):
        first, again, other = (splitter(labels, groups, seed=s)[0] for s in (1, 1, 2))
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
        assert not np.array_equal(first[0], other[0])


def test_a_given_split_is_used_as_it_is():
    labels, groups = np.array([0, 1, 0, 1]), np.array(["a", "b", "c", "a"])
    split = train_val_test(labels, groups, split=["train", "test", "val", "train"])
    assert [part.tolist() for part in split] == [[0, 3], [2], [1]]
    with pytest.raises(InputError, match="holds dev, nan; valid: train, val, test"):
        given_split(["train", "dev", "nan", "train"], groups)


def test_leaking_patients_are_named_all_at_once():
    groups = np.array(["ann", "bob", "cy", "ann", "bob"])
    with pytest.raises(InputError) as error:
        train_val_test(np.zeros(5), groups, split=["train", "train", "val", "test", "val"])
    assert error.value.problems == [
        "patient ann is in train and test",
        "patient bob is in train and val",
    ]
    with pytest.raises(InputError, match="patient 7 is in 0 and 1"):
        check_no_leak([7, 8, 7], [np.array([0]), np.array([1, 2])])


def test_too_few_patients_and_bad_fractions_are_said():
    labels, groups = np.array([0] * 10 + [1] * 2), np.arange(12)
    with pytest.raises(InputError, match="class 1 counts 2 patients"):
        grouped_kfold(labels, groups, 5)
    with pytest.raises(InputError, match="at least 3 patients"):
        train_val_test(labels, groups)
    with pytest.raises(InputError, match="sum to 1"):
        train_val_test(labels, groups, (0.5, 0.5, 0.5))
    with pytest.raises(InputError, match="at least 2 folds"):
        grouped_kfold(labels, groups, 1)
    with pytest.raises(InputError, match="one of each"):
        grouped_kfold(labels, groups[:3])
