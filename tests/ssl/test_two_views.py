import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from cytoray.errors import InputError
from cytoray.ssl import METHODS
from cytoray.ssl.base import Crops, MicroBatch, StepContext
from cytoray.ssl.losses import byol_loss, info_nce_loss, nt_xent, queue_loss
from cytoray.training import (
    BackboneConfig,
    CropConfig,
    OptimConfig,
    PretrainConfig,
    PretrainEngine,
    SRConfig,
    TwoViewConfig,
)

TILES = 6
SMALL = TwoViewConfig(hidden_dim=24, out_dim=12)
TINY = {"depth": 2, "embed_dim": 32, "num_heads": 2}
CASES = {
    "simclr": ("simclr", SMALL),
    "moco": ("moco", SMALL),
    "byol": ("byol", SMALL),
    "queue": ("moco", dataclasses.replace(SMALL, queue_size=20)),
}


def _config(case, **changes):
    method, two_views = CASES[case]
    values = {
        "precision": "fp32",
        "method": method,
        "two_views": two_views,
        "backbone": BackboneConfig(kwargs=dict(TINY)),
        "crops": CropConfig(global_px=32, num_local=0),
        "optim": OptimConfig(lr=0.01, warmup_steps=1, ema=0.9),
        "batch_size": TILES,
        "total_steps": 20,
    }
    return PretrainConfig(**(values | changes))


def _build(case, **changes):
    torch.manual_seed(0)
    config = _config(case, **changes)
    return METHODS[config.method](config)


def _images(seed=0, tiles=TILES):
    return torch.randn(tiles, 2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def _context(tiles=TILES):
    return StepContext(step=0, global_batch=tiles, offset=0, teacher_temp=0.07)


def _step(method, images):
    """Loss, with its graph, and metrics of a step over all tiles at once."""
    batches = [MicroBatch(Crops(images, None), _context())]
    known = method.begin(batches, 1.0)
    loss, values = method(batches[0], known[0])
    return loss, method.metrics(batches, known, [values])


def _projected(network, images, *, predict):
    """What the networks should give for each view: the view alone through backbone and heads."""
    heads = [network.projector, *([network.predictor] if predict else [])]
    views = []
    for view in range(2):
        x = network.backbone(images[:, view]).cls
        for head in heads:
            x = head(x)
        views.append(x)
    return torch.stack(views, dim=1)


def test_simclr_step_by_hand():
    method, images = _build("simclr"), _images()
    loss, metrics = _step(method, images)
    features = method.student.backbone(images.flatten(0, 1)).cls
    views = method.student.projector(features).unflatten(0, (TILES, 2))
    torch.testing.assert_close(loss, nt_xent(views, temperature=0.1))
    assert metrics["loss"] == loss
    assert method.teacher is None
    assert method.encoder() is method.student.backbone


def test_moco_step_by_hand():
    method, images = _build("moco"), _images()
    method.after_step(0.5)
    loss, _ = _step(method, images)
    queries = _projected(method.student, images, predict=True)
    keys = _projected(method.teacher, images, predict=False)
    expected = sum(
        info_nce_loss(queries[:, v], keys[:, 1 - v], temperature=0.2, offset=0) for v in range(2)
    )
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


def test_byol_step_by_hand():
    method, images = _build("byol"), _images()
    loss, _ = _step(method, images)
    predictions = _projected(method.student, images, predict=True)
    targets = _projected(method.teacher, images, predict=False)
    expected = byol_loss(predictions, targets, global_batch=TILES)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


def test_the_queue_is_used_before_it_takes_in_the_keys():
    method, images = _build("queue"), _images()
    assert method.student.predictor is None
    before = method.queue.clone()
    torch.testing.assert_close(before.norm(dim=1), torch.ones(20))
    loss, _ = _step(method, images)
    queries = _projected(method.student, images, predict=False)
    keys = _projected(method.teacher, images, predict=False)
    expected = sum(
        queue_loss(queries[:, v], keys[:, 1 - v], before, temperature=0.2, global_batch=TILES) / 2
        for v in range(2)
    )
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    loss.backward()
    fresh = F.normalize(keys.flatten(0, 1), dim=1)
    torch.testing.assert_close(method.queue, torch.cat([fresh, before])[:20], atol=1e-5, rtol=1e-5)
    after = method.queue.clone()
    _step(method, images * torch.nan)
    assert torch.equal(method.queue, after)


@pytest.mark.parametrize("case", ["moco", "byol", "queue"])
def test_the_teacher_follows_and_has_no_gradient(case):
    method, images = _build(case), _images()
    old = copy.deepcopy(method.teacher.state_dict())
    loss, _ = _step(method.train(), images)
    loss.backward()
    assert all(p.grad is None for p in method.teacher.parameters())
    assert not method.teacher.training
    unused = [n for n, p in method.student.named_parameters() if p.requires_grad and p.grad is None]
    assert unused == []
    with torch.no_grad():
        for parameter in method.student.parameters():
            parameter.add_(1.0)
    method.after_step(0.9)
    new, student = method.teacher.state_dict(), method.student.state_dict()
    assert set(new) == {key for key in student if not key.startswith("predictor")}
    for key, value in new.items():
        torch.testing.assert_close(value, 0.9 * old[key] + 0.1 * student[key])


@pytest.mark.parametrize("case", sorted(CASES))
@pytest.mark.parametrize("sr", [None, SRConfig(sparse=True, irpe=True, top_h=3)])
def test_engine_learns_to_tell_tiles_apart(case, sr):
    backbone = BackboneConfig(kwargs=dict(TINY), sr=sr or SRConfig(), drop_path=0.2)
    engine = PretrainEngine(_config(case, backbone=backbone), "cpu")
    generator = torch.Generator().manual_seed(0)
    tiles = torch.randn(TILES, 1, 3, 32, 32, generator=generator)
    noise = 0.3 * torch.randn(TILES, 2, 3, 32, 32, generator=generator)
    steps = [engine.step({"global_crops": tiles + noise}, step) for step in range(12)]
    losses = [float(metrics["loss"]) for metrics in steps]
    if case == "queue":  # which fills with earlier keys of the very same tiles
        assert max(losses) < 6
    else:
        assert min(losses[-3:]) < 0.9 * losses[0], losses
    assert {"feature_std", "effective_rank", "grad_norm_projector"} <= set(steps[0])
    table = "student.backbone.vit.blocks.0.attn.rel_k"
    state = engine.method.state_dict()
    assert (table in state) == (sr is not None)
    if sr is not None:
        assert state[table].abs().max() > 0
    if case in ("moco", "byol") and sr is not None:
        assert state[table.replace("student", "teacher")].abs().max() > 0


def test_moco_keeps_a_random_patch_projection():
    name = "backbone.vit.patch_embed.proj.weight"

    def trains(**changes):
        return dict(_build("moco", **changes).student.named_parameters())[name].requires_grad

    assert not trains()
    assert trains(two_views=dataclasses.replace(SMALL, freeze_patch_embed=False))
    assert dict(_build("queue").student.named_parameters())[name].requires_grad
    assert dict(_build("byol").student.named_parameters())[name].requires_grad


def test_bad_settings_are_reported_at_once():
    wrong = TwoViewConfig(temperature=-1.0, hidden_dim=0, queue_size=5)
    with pytest.raises(InputError) as caught:
        _config("byol", two_views=wrong, crops=CropConfig(global_px=32))
    text = str(caught.value)
    for words in (
        "byol compares two alike views of a tile; set crops.num_global to 2 and crops.num_local",
        "temperature must be above 0",
        "hidden_dim",
        "queue_size is of moco",
    ):
        assert words in text
    PretrainConfig(two_views=wrong)  # dinov2 does not read it


def test_published_sizes():
    config = _config("moco", two_views=TwoViewConfig())
    method = METHODS["moco"](config)
    widths = [tuple(p.shape) for p in method.student.projector.parameters() if p.dim() == 2]
    assert widths == [(4096, 32), (4096, 4096), (256, 4096)]
    assert method.temperature == 0.2
    simclr = METHODS["simclr"](_config("simclr", two_views=TwoViewConfig()))
    assert simclr.temperature == 0.1
    assert simclr.student.projector.linear1.weight.shape == (128, 2048)
