import numpy as np
import pytest
import torch
from torch import nn

from cytoray.errors import InputError, SlideError
from cytoray.mil.tiles import ArrayTileSource
from cytoray.mil.train_vpu import TilePool, VPUConfig, VPUTrainer

CONFIG = VPUConfig(
    epochs=4, steps_per_epoch=15, batch_tiles=8, val_tiles=24, lr=1e-2, augment=False
)


class Encoder(nn.Module):
    """Mean colour of a tile through two layers; has `model` and `embed_dim` as ours have."""

    embed_dim = 6

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 6), nn.Tanh())

    def forward(self, images):
        images = images.float() / 255.0 if images.dtype == torch.uint8 else images
        return self.model(4.0 * (images.mean(dim=(1, 2)) - 0.5))


def tiles(*shades):
    rng = np.random.default_rng(0)
    flat = np.array(shades, np.float64)[:, None, None, None]
    return (flat + rng.normal(0, 8, (len(shades), 4, 4, 3))).clip(0, 255).astype(np.uint8)


def source():
    """Benign slides hold dark tiles alone, the others dark and bright ones."""
    made = {f"benign{i}": tiles(*[60] * 12) for i in range(4)}
    return ArrayTileSource(made | {f"other{i}": tiles(*[60] * 6, *[190] * 6) for i in range(4)})


def trainer(config=CONFIG, encoder=None, **options):
    train = (["benign0", "benign1", "benign2"], ["other0", "other1", "other2"])
    return VPUTrainer(
        config, encoder or Encoder(), source(), train, (["benign3"], ["other3"]), **options
    )


def test_benign_tiles_are_told_from_the_others_without_a_label_of_theirs():
    made = trainer()
    result = made.run()
    losses = [record["val_loss"] for record in result.history]
    assert [record["epoch"] for record in result.history] == [0, 1, 2, 3, 4]
    assert result.best_epoch == int(np.argmin(losses)) > 0
    assert min(losses) < losses[0] - 0.1
    with torch.no_grad():
        dark, bright = (made.log_phi(torch.from_numpy(tiles(shade))).exp() for shade in (60, 190))
    assert float(dark) > float(bright) + 0.3
    for name, value in made.encoder.model.state_dict().items():
        assert torch.equal(value, result.state_dict[name])


def test_a_killed_training_goes_on_as_if_nothing_had_been(tmp_path):
    whole = trainer().run()
    path = tmp_path / "state.pt"

    def kill(record):
        if record["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer(state_path=path).run(kill)
    seen = []
    resumed = trainer(state_path=path).run(lambda record: seen.append(record["epoch"]))
    assert seen == [3, 4]
    assert resumed.history[1:] == whole.history[1:]
    assert resumed.best_epoch == whole.best_epoch
    for name, value in whole.state_dict.items():
        assert torch.equal(value, resumed.state_dict[name])
    assert trainer(state_path=path).run().history[1:] == whole.history[1:]


class Broken(ArrayTileSource):
    def __call__(self, slide_id, indices, rng):
        if slide_id == "benign1":
            raise SlideError("decode_error", "the tile is damaged")
        return super().__call__(slide_id, indices, rng)


def test_a_slide_that_cannot_be_read_leaves_the_pool_and_is_told():
    pool = TilePool(Broken({"benign0": tiles(60), "benign1": tiles(60)}), ["benign0", "benign1"])
    assert pool.draw(20, np.random.default_rng(0)).shape == (20, 4, 4, 3)
    assert pool.slides == ["benign0"]
    assert pool.bad["benign1"].code == "decode_error"
    empty = TilePool(ArrayTileSource({"a": np.zeros((0, 4, 4, 3), np.uint8)}), ["a"])
    with pytest.raises(InputError, match="no slide of this kind is left") as caught:
        empty.draw(1, np.random.default_rng(0))
    assert caught.value.problems == ["a: no tile of the slide was kept [no_tiles]"]


def test_what_does_not_fit_is_said_at_once():
    with pytest.raises(InputError) as caught:
        VPUTrainer(CONFIG, Encoder(), source(), ([], ["other0"]), (["benign3"], []))
    assert caught.value.problems == [
        "no positive training slide",
        "no unlabelled validation slide",
    ]
    with pytest.raises(InputError) as caught:
        VPUConfig(epochs=0, lr=0.0, precision="fp8")
    assert len(caught.value.problems) == 3
