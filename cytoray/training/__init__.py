"""The Ray-free training step: configuration, engine, checkpoints, watches."""

from cytoray.training.checkpoint import (
    BackgroundCheckpointer,
    Checkpoint,
    CheckpointError,
    FoundCheckpoint,
    SkippedCheckpoint,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from cytoray.training.config import (
    BackboneConfig,
    CropConfig,
    HeadConfig,
    LossConfig,
    OptimConfig,
    PretrainConfig,
    SRConfig,
    TwoViewConfig,
    encoder_spec,
)
from cytoray.training.engine import PretrainEngine
from cytoray.training.watch import (
    CollapseLimits,
    CollapseWatch,
    StepGuard,
    TrainingDiverged,
    check_finite,
    collapse_message,
)

__all__ = [
    "BackboneConfig",
    "BackgroundCheckpointer",
    "Checkpoint",
    "CheckpointError",
    "CollapseLimits",
    "CollapseWatch",
    "CropConfig",
    "FoundCheckpoint",
    "HeadConfig",
    "LossConfig",
    "OptimConfig",
    "PretrainConfig",
    "PretrainEngine",
    "SRConfig",
    "SkippedCheckpoint",
    "StepGuard",
    "TrainingDiverged",
    "TwoViewConfig",
    "check_finite",
    "collapse_message",
    "encoder_spec",
    "latest_checkpoint",
    "load_checkpoint",
    "save_checkpoint",
]
