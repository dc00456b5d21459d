"""Named runs: configurations as values, started with `cytoray <job> <name>`."""

from __future__ import annotations

from typing import Any

PRETRAIN_RUNS: dict[str, Any] = {}
