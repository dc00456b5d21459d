import pytest

from cytoray.config import from_plain, to_plain
from cytoray.errors import InputError
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


def test_config_survives_plain_values():
    config = MILConfig(options={"gated": False}, lora_targets=("q", "k"), lr=1e-3)
    assert from_plain(MILConfig, to_plain(config)) == config
