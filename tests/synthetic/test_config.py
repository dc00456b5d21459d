from collections import defaultdict

import pytest

from cytoray.errors import InputError
from cytoray.synthetic import SynthConfig, config_fingerprint, plan_slides, slide_plan


def test_config_reports_every_problem_at_once():
    with pytest.raises(InputError) as caught:
        SynthConfig(num_slides=0, mpp=9.0, slides_per_patient=(3, 1), held_out=5)
    assert len(caught.value.problems) == 4


@pytest.mark.parametrize("seed", range(4))
def test_split_is_balanced_and_no_patient_straddles_it(seed):
    config = SynthConfig(num_slides=33, held_out=8, seed=seed)
    plans = plan_slides(config)
    assert sum(plan.label for plan in plans) == 16
    test = [plan for plan in plans if plan.split == "test"]
    assert len(test) == 8
    assert sum(plan.label for plan in test) == 4
    splits, slides, sites = defaultdict(set), defaultdict(int), defaultdict(set)
    for plan in plans:
        splits[plan.patient_id].add(plan.split)
        sites[plan.patient_id].add(plan.site)
        slides[plan.patient_id] += 1
    assert all(len(found) == 1 for found in splits.values())
    assert all(len(found) == 1 for found in sites.values())
    assert set(slides.values()) == {1, 2}


def test_layout_and_site_do_not_tell_the_label():
    plans = plan_slides(SynthConfig(num_slides=64, held_out=16))
    for label in (0, 1):
        group = [plan for plan in plans if plan.label == label]
        assert abs(sum(plan.layout == "aperio" for plan in group) - len(group) / 2) <= 1
        assert 0.25 < sum(plan.site == "site_0" for plan in group) / len(group) < 0.75


def test_few_positives_still_fill_the_test_split():
    plans = plan_slides(SynthConfig(num_slides=10, positive_fraction=0.1, held_out=6))
    test = [plan for plan in plans if plan.split == "test"]
    assert (len(test), sum(plan.label for plan in test)) == (6, 1)


def test_slide_plan_refuses_an_index_outside():
    with pytest.raises(InputError, match="outside 0 to 31"):
        slide_plan(SynthConfig(), 32)


def test_fingerprint_follows_the_config():
    assert config_fingerprint(SynthConfig()) == config_fingerprint(SynthConfig())
    assert config_fingerprint(SynthConfig()) != config_fingerprint(SynthConfig(seed=1))
