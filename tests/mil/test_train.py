import numpy as np
import pytest
import torch

from cytoray.errors import InputError
from cytoray.mil.aggregators import AGGREGATORS
from cytoray.mil.config import MILConfig
from cytoray.mil.train import LabelledBag, epoch_order, predict, sampled, train_frozen
from cytoray.mil.trial import class_weights, lr_factor, sampling_weights

SMALL = {
    "abmil": {"hidden_dim": 32, "attention_dim": 16},
    "clam": {"hidden_dim": 32, "attention_dim": 16},
    "transmil": {"hidden_dim": 32, "heads": 4, "num_landmarks": 4},
    "dtfd": {"hidden_dim": 32, "attention_dim": 16},
    "clam_mb": {"hidden_dim": 32, "attention_dim": 16},
    "unicas": {"num_blocks": 2, "num_slots": 4},
    "less": {"hidden_dim": 32, "heads": 4, "num_blocks": 1, "coarse_depth": 1},
}


def make_bags(count, seed, num_classes=2, width=16, positives=(0.6, 0.3)):
    """Class 0 is noise; class c has a share of instances shifted along its own axis."""
    rng = np.random.default_rng(seed)
    bags = []
    for index in range(count):
        label = index % num_classes if positives is None else int(rng.random() < positives[1])
        size = int(rng.integers(4, 40))
        features = rng.normal(size=(size, width)).astype(np.float32)
        if label:
            features[: max(1, size // 5), label] += 6.0
        bags.append(LabelledBag(f"s{seed}-{index}", features, label))
    return bags


@pytest.mark.parametrize("precision", ["auto", "bf16"])
@pytest.mark.parametrize("name", AGGREGATORS)
def test_separable_bags_are_learnt(name, precision):
    options = SMALL.get(name, {})
    lr = 3e-3 if options else 3e-2  # those without a hidden layer are linear in the features
    epochs = 5 if name in ("transmil", "less") else 15
    config = MILConfig(
        aggregator=name,
        options=options,
        lr=lr,
        epochs=epochs,
        dropout=0,
        patience=0,
        precision=precision,
    )
    result = train_frozen(config, make_bags(80, 1), make_bags(40, 2), 2)
    assert all(value.dtype == torch.float32 for value in result.state_dict.values())
    test_bags = make_bags(60, 3)
    predictions = predict(result.build(), [bag.features for bag in test_bags])
    labels = np.array([bag.label for bag in test_bags])
    scores = predictions.probabilities[:, 1]
    auc = (scores[labels == 1][:, None] > scores[labels == 0]).mean()
    assert auc > 0.95
    assert result.val_metrics["auc"] > 0.95
    assert len(result.history) == epochs


def test_several_classes_and_attention_on_the_evidence():
    config = MILConfig(options=SMALL["abmil"], lr=3e-3, epochs=15, dropout=0.0)
    result = train_frozen(
        config, make_bags(90, 1, 3, positives=None), make_bags(45, 2, 3, positives=None), 3
    )
    assert result.val_metrics["auc"] > 0.95
    bag = make_bags(3, 4, 3, positives=None)[2]
    attention = predict(result.build(), [bag.features]).attention[0]
    evidence = max(1, len(attention) // 5)
    assert attention[:evidence].mean() > 3 * attention[evidence:].mean()


def make_task_bags(count, seed):
    """Two tasks on the same bags, of which each knows a part."""
    bags, rng = make_bags(count, seed), np.random.default_rng(seed)
    made = []
    for index, bag in enumerate(bags):
        second = int(rng.integers(0, 3))
        features = bag.features.copy()
        if second:
            features[:, 4 + second] += 3.0
        labels = (bag.label if index % 3 else -1, second if index % 4 else -1)
        made.append(LabelledBag(bag.slide_id, features, labels))
    return made


@pytest.mark.parametrize("name", ["abmil", "unicas"])
def test_several_tasks_are_learnt_from_partial_labels(name):
    config = MILConfig(aggregator=name, options=SMALL[name], lr=3e-3, epochs=12, dropout=0.0)
    result = train_frozen(config, make_task_bags(90, 1), make_task_bags(60, 2), (2, 3))
    metrics = result.val_metrics
    assert min(metrics["task0_auc"], metrics["task1_auc"]) > 0.9
    assert metrics["auc"] == pytest.approx((metrics["task0_auc"] + metrics["task1_auc"]) / 2)
    bags = make_task_bags(20, 3)
    predictions = predict(result.build(), [bag.features for bag in bags])
    assert [p.shape for p in predictions.task_probabilities] == [(20, 2), (20, 3)]
    assert np.array_equal(predictions.probabilities, predictions.task_probabilities[0])


def test_labels_of_several_tasks_are_checked():
    config, good = MILConfig(), make_task_bags(12, 1)

    def with_labels(*labels):
        return [LabelledBag("x", good[0].features, label) for label in labels]

    with pytest.raises(InputError, match="every training bag needs 2 labels"):
        train_frozen(config, with_labels(0, 1), good, (2, 3))
    with pytest.raises(InputError, match=r"of task 1 must be whole numbers in 0\.\.2"):
        train_frozen(config, with_labels((0, 3), (1, 0)), good, (2, 3))
    with pytest.raises(InputError, match="same label of task 1"):
        train_frozen(config, with_labels((0, 1), (1, 1)), good, (2, 3))
    with pytest.raises(InputError, match="no validation bag has a label of task 0"):
        train_frozen(config, good, with_labels((-1, 1)), (2, 3))


def test_a_second_scale_reaches_the_aggregator():
    """The label can be read from the coarse view alone."""
    rng = np.random.default_rng(0)

    def make(count):
        bags = []
        for index in range(count):
            coarse = rng.normal(size=(int(rng.integers(2, 6)), 16)).astype(np.float32)
            coarse[:, 0] += 4.0 * (index % 2)
            fine = rng.normal(size=(9, 16)).astype(np.float32)
            bags.append(LabelledBag(str(index), fine, index % 2, coarse))
        return bags

    config = MILConfig(aggregator="less", options=SMALL["less"], lr=3e-3, epochs=6, dropout=0.0)
    train, val = make(40), make(20)
    result = train_frozen(config, train, val, 2)
    assert result.val_metrics["auc"] > 0.95
    again = predict(result.build(), [b.features for b in val], (b.coarse for b in val))
    assert (again.probabilities.argmax(1) == [b.label for b in val]).mean() > 0.9
    without = [LabelledBag(b.slide_id, b.features, b.label) for b in train]
    with pytest.raises(InputError, match="every bag a coarse view, or none"):
        train_frozen(config, [*train[:20], *without[20:]], val, 2)
    narrow = LabelledBag("narrow", train[0].features, 0, train[0].coarse[:, :3])
    with pytest.raises(InputError, match="bag narrow: shape"):
        train_frozen(config, [*train, narrow], val, 2)


def test_same_seed_same_result_and_the_callers_random_state_is_left():
    config = MILConfig(options=SMALL["abmil"], epochs=2, max_instances=10)
    torch.manual_seed(5)
    first = train_frozen(config, make_bags(12, 1), make_bags(12, 2), 2)
    drawn = torch.rand(1)
    torch.manual_seed(6)
    second = train_frozen(config, make_bags(12, 1), make_bags(12, 2), 2)
    assert first.history == second.history
    assert all(torch.equal(v, second.state_dict[k]) for k, v in first.state_dict.items())
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))


def test_best_epoch_is_kept_not_the_last():
    records = []
    config = MILConfig(options=SMALL["abmil"], lr=0.05, epochs=12, patience=0)
    val = make_bags(30, 2)
    result = train_frozen(config, make_bags(30, 1), val, 2, on_epoch=records.append)
    assert records == result.history
    best = max(records, key=lambda r: (r["val_auc"], -r["val_loss"]))
    assert result.best_epoch == best["epoch"]
    probabilities = predict(result.build(), [bag.features for bag in val]).probabilities
    labels = np.array([bag.label for bag in val])
    accuracy = (probabilities.argmax(1) == labels).mean()
    assert accuracy == pytest.approx(best["val_accuracy"]) == result.val_metrics["accuracy"]


def test_patience_and_the_callback_stop_a_trial():
    bags = make_bags(30, 1), make_bags(20, 2)
    config = MILConfig(options=SMALL["abmil"], lr=1e-9, min_lr=0, epochs=50, patience=3)
    result = train_frozen(config, *bags, 2)
    assert len(result.history) - result.best_epoch == 3
    stopped = train_frozen(config, *bags, 2, on_epoch=lambda record: record["epoch"] == 2)
    assert len(stopped.history) == 2


def test_bags_that_do_not_fit_are_named():
    good, config = make_bags(10, 1), MILConfig()
    bad = [
        LabelledBag("empty", np.zeros((0, 16), np.float32), 0),
        LabelledBag("wide", np.zeros((3, 17), np.float32), 0),
        LabelledBag("nan", np.full((3, 16), np.nan, np.float32), 1),
    ]
    with pytest.raises(InputError) as error:
        train_frozen(config, good + bad, good, 2)
    assert [p.split(":")[0] for p in error.value.problems] == ["bag empty", "bag wide", "bag nan"]
    with pytest.raises(InputError, match="no validation bag"):
        train_frozen(config, good, [], 2)
    with pytest.raises(InputError, match="same label"):
        train_frozen(config, [bag for bag in good if bag.label == 0], good, 2)
    with pytest.raises(InputError, match=r"0\.\.1"):
        train_frozen(config, good, [LabelledBag("x", good[0].features, 2)], 2)


def test_instances_are_dropped_and_capped_in_order():
    rng = np.random.default_rng(0)
    bag = np.arange(40.0).reshape(20, 2)
    assert sampled(bag, 30, 0.0, rng) is bag
    half, capped = sampled(bag, 30, 0.5, rng), sampled(bag, 3, 0.25, rng)
    assert (len(half), len(capped), len(sampled(bag[:1], 30, 0.9, rng))) == (10, 3, 1)
    assert (np.diff(half[:, 0]) > 0).all()
    drawn = np.concatenate([sampled(bag, 30, 0.5, rng)[:, 0] for _ in range(200)])
    assert np.bincount((drawn / 2).astype(int)).min() > 60


def test_predict_streams_and_restores_the_mode(monkeypatch):
    import cytoray.mil.train as module

    bags = make_bags(9, 3)
    aggregator = train_frozen(MILConfig(epochs=1), make_bags(8, 1), bags, 2).build().train()
    whole = predict(aggregator, [bag.features for bag in bags])
    monkeypatch.setattr(module, "PREDICT_INSTANCES", 25)
    parts = predict(aggregator, (bag.features for bag in bags))
    assert aggregator.training
    assert np.allclose(whole.probabilities, parts.probabilities, atol=1e-6)
    assert [len(a) for a in parts.attention] == [len(bag.features) for bag in bags]
    assert predict(aggregator, []).probabilities.shape == (0, 2)


def test_class_weights_and_schedule():
    assert class_weights(np.array([0, 0, 0, 1]), 3).tolist() == pytest.approx([4 / 9, 4 / 3, 1.0])
    factors = [lr_factor(100, 0.1, 0.01, step) for step in range(101)]
    assert factors[:10] == sorted(factors[:10])
    assert factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[100] == pytest.approx(0.01)


def test_patience_may_wait_for_the_loss_alone(monkeypatch):
    """The AUC rises to the end; the loss is lowest in the second epoch."""
    bags = make_bags(24, 1)
    seen = {}
    for watched in ("auc", "loss"):
        losses = iter([0.5, 0.4, 0.45, 0.44, 0.43, 0.42])
        aucs = iter([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])

        def evaluate(self, losses=losses, aucs=aucs):
            auc = next(aucs)
            return {"val_loss": next(losses), "val_auc": auc, "val_accuracy": 0.5}, {"auc": auc}

        monkeypatch.setattr("cytoray.mil.trial.Trial._evaluate", evaluate)
        config = MILConfig(options=SMALL["abmil"], epochs=6, patience=3, patience_on=watched)
        seen[watched] = train_frozen(config, bags, bags, 2)
    assert len(seen["auc"].history) == 6
    assert len(seen["loss"].history) == 5, "lowest loss in epoch 2, three epochs without a lower"
    assert seen["loss"].best_epoch == 5, "kept is still the epoch with the best AUC"
    with pytest.raises(InputError, match="patience_on 'f1'; valid: auc, loss"):
        MILConfig(patience_on="f1")


def test_balanced_sampling_draws_classes_equally_often():
    labels = np.array([0] * 90 + [1] * 10)
    config = MILConfig(balanced_sampling=True, batch_bags=20)
    rng = np.random.default_rng(0)
    batches = [batch for _ in range(40) for batch in epoch_order(labels, config, rng)]
    assert {len(batch) for batch in batches} == {20}
    assert labels[np.concatenate(batches)].mean() == pytest.approx(0.5, abs=0.03)
    assert sampling_weights(labels).sum() == pytest.approx(1.0)
    tasks = np.array([[0, -1], [0, 0], [1, 1], [0, 0], [-1, -1]])
    weights = sampling_weights(tasks)
    assert weights[2] == weights.max()
    assert weights[4] == 0
    plain = epoch_order(labels, MILConfig(batch_bags=20), rng)
    assert sorted(np.concatenate(plain).tolist()) == list(range(100))
    result = train_frozen(
        MILConfig(options=SMALL["abmil"], epochs=2, balanced_sampling=True),
        make_bags(20, 1), make_bags(10, 2), 2,
    )  # fmt: skip
    assert np.isfinite(result.history[-1]["train_loss"])
