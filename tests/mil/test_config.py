import pytest

from cytoray.config import from_plain, to_plain
from cytoray.errors import InputError
from cytoray.mil.aggregators import AGGREGATORS
from cytoray.mil.config import MILConfig


def test_all_problems_in_one_message():
    with pytest.raises(InputError) as error:
        MILConfig(aggregator="abml", lr=0, epochs=0, dropout=1.0, lora_rank=-1, lora_targets=("x",))
    assert len(error.value.problems) == 6
    assert "valid: mean, max, abmil" in str(error.value)


def test_options_are_checked_against_the_aggregator():
    assert MILConfig(aggregator="dtfd", options={"distillation": "max"}).options
    with pytest.raises(InputError, match=r"options.gated is not one of clam's"):
        MILConfig(aggregator="clam", options={"gated": True})


def test_published_settings_and_betas():
    dsmil = MILConfig.published("dsmil", epochs=3)
    assert (dsmil.lr, dsmil.weight_decay, dsmil.min_lr, dsmil.epochs) == (1e-4, 1e-3, 5e-6, 3)
    assert dsmil.adam_betas == (0.5, 0.9) == MILConfig(aggregator="dsmil").adam_betas
    assert MILConfig(aggregator="dsmil", betas=(0.8, 0.99)).adam_betas == (0.8, 0.99)
    assert MILConfig().adam_betas == (0.9, 0.999)
    assert MILConfig.published("unicas").batch_bags == 16
    for name in AGGREGATORS:
        assert MILConfig.published(name).aggregator == name
    with pytest.raises(InputError, match="betas are"):
        MILConfig(betas=(0.9, 1.0))
    with pytest.raises(InputError, match="unknown aggregator"):
        MILConfig.published("abml")


def test_config_survives_plain_values():
    config = MILConfig(options={"gated": False}, lora_targets=("q", "k"), betas=(0.5, 0.9))
    assert from_plain(MILConfig, to_plain(config)) == config
