import math

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from cytoray.errors import InputError
from cytoray.models.encoder import load_encoder, save_encoder
from cytoray.perturb.views import CropPolicy, sample_views
from cytoray.ssl.base import Crops, MicroBatch, StepContext
from cytoray.ssl.masks import make_block_masks
from cytoray.training import (
    BackboneConfig,
    CropConfig,
    HeadConfig,
    LossConfig,
    OptimConfig,
    PretrainConfig,
    PretrainEngine,
    TrainingDiverged,
    check_finite,
    encoder_spec,
    load_checkpoint,
    save_checkpoint,
)

KWARGS: dict = {"depth": 2, "embed_dim": 32, "num_heads": 2}


def _config(**changes) -> PretrainConfig:
    values = {
        "precision": "fp32",  # the same on any machine
        "backbone": BackboneConfig(kwargs=KWARGS, drop_path=0.25),
        "crops": CropConfig(global_px=64, local_px=32, num_local=2),
        "head": HeadConfig(out_dim=48, hidden_dim=32, bottleneck_dim=16),
        "optim": OptimConfig(lr=0.01, warmup_steps=2, freeze_last_layer_steps=2),
        "batch_size": 6,
        "total_steps": 20,
    }
    return PretrainConfig(**(values | changes))


def _batch(step: int, tiles: int = 6, num_local: int = 2) -> dict:
    rng = np.random.default_rng(step)
    policy = CropPolicy(num_local=num_local)
    views = [sample_views(rng.uniform(0, 80, (5, 2)), 80, policy, rng) for _ in range(tiles)]
    pixels = rng.integers(0, 256, (tiles, 80, 80, 3), dtype=np.uint8)
    return {"pixels": pixels, "views": np.stack(views)}


def _run(engine: PretrainEngine, steps: range) -> list[dict[str, float]]:
    return [{k: float(v) for k, v in engine.step(_batch(s), s).items()} for s in steps]


def _assert_same(left, right, where="state"):
    assert type(left) is type(right), where
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            _assert_same(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for index, pair in enumerate(zip(left, right, strict=True)):
            _assert_same(*pair, f"{where}[{index}]")
    else:
        assert left == right, where


@pytest.mark.parametrize("method", ["dinov2", "ibot"])
def test_resume_is_exact(tmp_path, method):
    config = _config(method=method)
    straight = PretrainEngine(config, "cpu")
    metrics = _run(straight, range(5))

    first = PretrainEngine(config, "cpu")
    before = _run(first, range(3))
    saved = save_checkpoint(tmp_path, 3, first.state_dict())
    torch.manual_seed(99)
    second = PretrainEngine(config, "cpu")
    second.load_state_dict(load_checkpoint(saved.path))
    assert second.steps_done == 3
    after = _run(second, range(3, 5))

    assert before + after == metrics
    left, right = straight.state_dict(), second.state_dict()
    left["rng"] = right["rng"]
    _assert_same(left, right)


def test_seed_decides_the_weights_and_building_leaves_the_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one = PretrainEngine(_config(seed=1), "cpu").method.state_dict()
    assert torch.equal(torch.rand(1), expected)
    same = PretrainEngine(_config(seed=1), "cpu").method.state_dict()
    other = PretrainEngine(_config(seed=2), "cpu").method.state_dict()
    _assert_same(dict(one), dict(same))
    key = "student.cls_head.mlp.0.weight"
    assert not torch.equal(one[key], other[key])
    teacher = {k.removeprefix("teacher."): v for k, v in one.items() if k.startswith("teacher.")}
    for name, tensor in teacher.items():
        assert torch.equal(tensor, one[f"student.{name}"])


def test_loss_falls_on_one_batch():
    config = _config(
        backbone=BackboneConfig(kwargs=KWARGS),
        optim=OptimConfig(lr=0.05, warmup_steps=2, freeze_last_layer_steps=0, ema=0.9),
        total_steps=60,
    )
    engine = PretrainEngine(config, "cpu")
    batch = _batch(0)
    losses = [float(engine.step(batch, s)["loss_dino"]) for s in range(40)]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:3])


def test_teacher_is_the_moving_average_and_gets_no_gradient():
    engine = PretrainEngine(_config(), "cpu")
    method = engine.method
    _run(engine, range(2))
    old = {k: v.clone() for k, v in method.state_dict().items()}
    ema = _run(engine, range(2, 3))[0]["ema"]
    new = method.state_dict()
    for name, tensor in new.items():
        if name.startswith("teacher."):
            student = new[name.replace("teacher.", "student.", 1)]
            expected = ema * old[name] + (1 - ema) * student
            torch.testing.assert_close(tensor, expected, atol=1e-7, rtol=1e-6)
    assert not method.teacher.training
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())


def test_last_layer_is_frozen_at_first():
    engine = PretrainEngine(_config(), "cpu")
    last = engine.method.student.cls_head.last_layer.weight
    start = last.detach().clone()
    _run(engine, range(2))
    assert torch.equal(last, start)
    _run(engine, range(2, 3))
    assert not torch.equal(last, start)


def test_metrics_are_consistent():
    metrics = _run(PretrainEngine(_config(), "cpu"), range(1))[0]
    total = metrics["loss_dino"] + metrics["loss_ibot"] + 0.1 * metrics["loss_koleo"]
    assert metrics["loss"] == pytest.approx(total, rel=1e-6)
    assert metrics["entropy_bound"] == pytest.approx(math.log(48))
    assert 0 < metrics["teacher_entropy"] < metrics["prototype_entropy"] <= math.log(48) + 1e-5
    assert metrics["grad_norm_backbone"] > 0
    assert metrics["grad_norm_cls_head"] > 0
    assert (metrics["lr"], metrics["ema"], metrics["teacher_temp"]) == (0.0, 0.992, 0.04)


def _slow_loss(engine: PretrainEngine, crops: Crops, step: int) -> float:
    """DINO + iBOT with centres at zero, pair by pair and patch by patch."""
    student, teacher = engine.method.student, engine.method.teacher
    tiles = crops.global_crops.shape[0]
    made = make_block_masks(0, step, num_crops=2 * tiles, start=0, stop=2 * tiles, grid=(4, 4))
    mask = torch.from_numpy(made.mask)
    temp, patch_temp = 0.04, 0.06  # of step 4, halfway to 0.08
    total, pairs, patch_total = 0.0, 0, 0.0
    assert crops.local_crops is not None
    for tile in range(tiles):
        targets, outs = [], []
        for view in range(2):
            image, own = crops.global_crops[tile, view][None], mask[2 * tile + view][None]
            t, s = teacher.backbone(image), student.backbone(image, own)
            targets.append(torch.softmax(teacher.cls_head(t.cls) / temp, -1))
            outs.append(torch.log_softmax(student.cls_head(s.cls) / 0.1, -1))
            patches = torch.softmax(teacher.cls_head(t.patches[own]) / patch_temp, -1)
            logs = torch.log_softmax(student.cls_head(s.patches[own]) / 0.1, -1)
            if own.any():
                patch_total += float(-(patches * logs).sum(-1).mean())
        for image in crops.local_crops[tile]:
            outs.append(
                torch.log_softmax(student.cls_head(student.backbone(image[None]).cls) / 0.1, -1)
            )
        for t, target in enumerate(targets):
            for s, out in enumerate(outs):
                if s != t:
                    total += float(-(target * out).sum())
                    pairs += 1
    return total / pairs + patch_total / (2 * tiles)


def test_whole_method_against_loops():
    loss = LossConfig(teacher_patch_temp=0.08, teacher_temp_warmup_steps=8)
    config = _config(method="ibot", backbone=BackboneConfig(kwargs=KWARGS), loss=loss)
    engine = PretrainEngine(config, "cpu")
    metrics = _run(engine, range(2))  # so that teacher and student differ
    assert metrics[1]["teacher_temp"] == pytest.approx(0.04 + 0.03 / 8)
    assert metrics[1]["teacher_patch_temp"] == pytest.approx(0.045)
    for targets in (engine.method.cls_targets, engine.method.patch_targets):
        targets.centre.zero_()
    generator = torch.Generator().manual_seed(0)
    crops = Crops(
        torch.randn(5, 2, 3, 64, 64, generator=generator),
        torch.randn(5, 2, 3, 32, 32, generator=generator),
    )
    with torch.no_grad():
        expected = _slow_loss(engine, crops, 4)
        context = StepContext(step=4, global_batch=5, offset=0, teacher_temp=0.04)
        batches = [MicroBatch(crops, context)]
        known = engine.method.begin(batches, 1.0)
        loss, values = engine.method(batches[0], known[0])
        metrics = engine.method.metrics(batches, known, [values])
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("num_global", "num_local"), [(2, 0), (1, 3), (3, 1)])
def test_numbers_of_crops(num_global, num_local):
    crops = CropConfig(global_px=32, local_px=16, num_global=num_global, num_local=num_local)
    engine = PretrainEngine(_config(crops=crops), "cpu")
    batch = {
        "global_crops": torch.randn(6, num_global, 3, 32, 32),
        "local_crops": torch.randn(6, num_local, 3, 16, 16),
    }
    assert math.isfinite(float(engine.step(batch, 0)["loss"]))


def test_a_step_that_is_not_finite_changes_nothing_and_is_said():
    engine = PretrainEngine(_config(loss=LossConfig(centering="centering")), "cpu")
    _run(engine, range(3))
    before = {k: v.clone() for k, v in engine.method.student.state_dict().items()}
    centre = engine.method.cls_targets.centre.clone()
    bad = torch.full((6, 2, 3, 64, 64), torch.nan)
    batch = {"global_crops": bad, "local_crops": torch.randn(6, 2, 3, 32, 32)}
    metrics = engine.step(batch, 3)
    _assert_same(before, dict(engine.method.student.state_dict()))
    assert torch.equal(engine.method.cls_targets.centre, centre)
    with pytest.raises(TrainingDiverged, match="step 3"):
        check_finite(metrics, 3)
    check_finite(engine.step(_batch(4), 4), 4)


def test_bf16_and_recomputed_blocks():
    exact = _run(PretrainEngine(_config(), "cpu"), range(2))
    again = _run(PretrainEngine(_config(checkpoint_blocks=True), "cpu"), range(2))
    assert again == exact
    low = _run(PretrainEngine(_config(precision="bf16"), "cpu"), range(2))
    assert low[1]["loss"] == pytest.approx(exact[1]["loss"], rel=0.05)
    assert low[1]["loss"] != exact[1]["loss"]


def test_exported_encoder_is_the_teacher(tmp_path):
    config = _config()
    engine = PretrainEngine(config, "cpu")
    _run(engine, range(2))
    spec = encoder_spec(config, mpp=0.5)
    folder = save_encoder(tmp_path / "encoder", engine.encoder_state_dict(), spec)
    encoder = load_encoder(folder)
    pixels = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    images = encoder.prepare(pixels)
    with torch.no_grad():
        expected = engine.method.teacher.backbone(images).cls
        torch.testing.assert_close(encoder(pixels), expected)
        plain = timm.create_model(spec.architecture, num_classes=0, **spec.kwargs).eval()
        plain.load_state_dict(load_file(folder / "model.safetensors"))
        torch.testing.assert_close(plain(images), expected)
    start = BackboneConfig(kwargs=KWARGS, init_from=str(folder))
    continued = PretrainEngine(_config(backbone=start), "cpu")
    _assert_same(dict(continued.encoder_state_dict()), dict(engine.encoder_state_dict()))


def test_wrong_batches_and_states():
    engine = PretrainEngine(_config(), "cpu")
    with pytest.raises(InputError, match="wants 4"):
        engine.step(_batch(0, num_local=5), 0)
    state = engine.state_dict()
    with pytest.raises(InputError, match="format 99"):
        engine.load_state_dict(state | {"format": 99})
    wider = PretrainEngine(
        _config(head=HeadConfig(out_dim=49, hidden_dim=32, bottleneck_dim=16)), "cpu"
    )
    with pytest.raises(InputError, match="does not fit"):
        wider.load_state_dict(state)
