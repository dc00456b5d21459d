import numpy as np
import pytest
import torch

from cytoray.errors import InputError
from cytoray.mil.aggregators import AGGREGATORS
from cytoray.mil.config import MILConfig
from cytoray.mil.head import load_head, save_head
from cytoray.mil.train import LabelledBag, predict, train_frozen
from cytoray.mil.train_lora import train_lora

from .test_train_lora import CONFIG, TinyEncoder, make_slides


@pytest.fixture
def frozen():
    rng = np.random.default_rng(0)
    bags = [
        LabelledBag(str(i), rng.normal(size=(i + 1, 8)).astype(np.float32), i % 2) for i in range(6)
    ]
    config = MILConfig(aggregator="clam", options={"hidden_dim": 16, "subtyping": True}, epochs=2)
    return bags, train_frozen(config, bags, bags, 2)


def test_a_frozen_head_comes_back_whole(tmp_path, frozen):
    bags, result = frozen
    folder = save_head(
        tmp_path / "head",
        result,
        classes=("benign", "malignant"),
        encoder_id="abc",
        encoder_name="tiny",
        extra={"mpp": 0.5, "task": "cancer"},
    )
    head = load_head(folder)
    features = [bag.features for bag in bags]
    expected = predict(result.build(), features)
    got = predict(head.aggregator, features)
    assert np.array_equal(got.logits, expected.logits)
    assert not head.aggregator.training
    assert head.classes == ("benign", "malignant")
    assert head.tasks == {"label": head.classes}
    assert (head.encoder_id, head.encoder_name, head.in_dim) == ("abc", "tiny", 8)
    assert head.config == result.config
    assert head.extra == {"mpp": 0.5, "task": "cancer"}
    assert head.val_metrics == pytest.approx(result.val_metrics, nan_ok=True)
    encoder = TinyEncoder()
    assert head.adapt(encoder) is encoder
    assert sorted(p.name for p in folder.iterdir()) == ["head.json", "head.safetensors"]


@pytest.mark.parametrize("name", sorted(AGGREGATORS))
def test_the_head_of_every_aggregator_comes_back(tmp_path, name):
    rng = np.random.default_rng(0)
    bags = [
        LabelledBag(str(i), rng.normal(size=(5, 8)).astype(np.float32), i % 2) for i in range(4)
    ]
    result = train_frozen(MILConfig(aggregator=name, epochs=1), bags, bags, 2)
    folder = save_head(
        tmp_path / "head", result, classes=("no", "yes"), encoder_id="abc", encoder_name="tiny"
    )
    features = [bag.features for bag in bags]
    expected = predict(result.build(), features).logits
    assert np.array_equal(predict(load_head(folder).aggregator, features).logits, expected)


def test_a_head_of_several_tasks_comes_back_whole(tmp_path):
    rng = np.random.default_rng(0)
    bags = [
        LabelledBag(str(i), rng.normal(size=(i + 1, 8)).astype(np.float32), (i % 2, i % 3 - 1))
        for i in range(12)
    ]
    options = {"num_blocks": 1, "num_slots": 2}
    config = MILConfig(aggregator="unicas", options=options, epochs=1)
    result = train_frozen(config, bags, bags, (2, 2))
    classes = {"cancer": ("no", "yes"), "candida": ("no", "yes")}
    head = load_head(save_head(tmp_path, result, classes=classes, encoder_id="abc"))
    assert head.tasks == classes
    assert head.classes == ("no", "yes")
    features = [bag.features for bag in bags]
    expected = predict(result.build(), features).task_logits
    for mine, theirs in zip(predict(head.aggregator, features).task_logits, expected, strict=True):
        assert np.array_equal(mine, theirs)
    with pytest.raises(InputError, match="2, 3 class names"):
        save_head(tmp_path, result, classes=classes | {"candida": "abc"}, encoder_id="abc")


def test_a_lora_head_adapts_its_encoder(tmp_path):
    source, ids, labels = make_slides(8)
    encoder = TinyEncoder().eval()
    result = train_lora(CONFIG, encoder, source, ids[:4], labels[:4], ids[4:], labels[4:], 2)
    for value in result.lora_state.values():
        value.add_(0.05)
    save_head(tmp_path, result, classes=("a", "b"), encoder_id="abc")
    head = load_head(tmp_path)
    assert all(torch.equal(head.lora_state[k], v) for k, v in result.lora_state.items())
    adapted, tiles = head.adapt(encoder), torch.from_numpy(source.tiles["s1"])
    with torch.no_grad():
        assert not torch.allclose(adapted(tiles), encoder(tiles), atol=1e-3)
        assert torch.equal(adapted(tiles), load_head(tmp_path).adapt(encoder)(tiles))


def test_what_is_wrong_is_said(tmp_path, frozen):
    _, result = frozen
    with pytest.raises(InputError, match="3 class names for 2 classes"):
        save_head(tmp_path, result, classes=("a", "b", "c"), encoder_id="abc")
    with pytest.raises(InputError, match="no head at"):
        load_head(tmp_path)
    save_head(tmp_path, result, classes=("a", "b"), encoder_id="abc")
    weights = tmp_path / "head.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(InputError, match="are not those"):
        load_head(tmp_path)
    (tmp_path / "head.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        load_head(tmp_path)
