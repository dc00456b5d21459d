from __future__ import annotations

import pytest

from cytoray.errors import InputError
from cytoray.planning.nodes import (
    NodeGroup,
    gpu_model,
    parse_nodes,
    price_per_hour,
    total_cpus,
    total_gpus,
)


def test_groups_and_their_sums() -> None:
    nodes = parse_nodes("4x16cpu@0.35, 2x96cpu+8xh200@33.6")
    assert nodes == (
        NodeGroup(count=4, cpus=16, price_per_hour=0.35),
        NodeGroup(count=2, cpus=96, gpus=8, gpu_model="H200", price_per_hour=33.6),
    )
    assert (total_cpus(nodes), total_gpus(nodes), gpu_model(nodes)) == (256, 16, "H200")
    assert price_per_hour(nodes) == pytest.approx(4 * 0.35 + 2 * 33.6)


def test_all_that_is_wrong_is_said_at_once() -> None:
    text = "4x16@0.35,0x8cpu@1,1x8cpu+1xH900@1,1x8cpu+1xA100@1,1x8cpu+2xL4@1,x"
    with pytest.raises(InputError) as caught:
        parse_nodes(text)
    found = "\n".join(caught.value.problems)
    assert "'4x16@0.35' is not of the form COUNTxCPUScpu" in found
    assert "'0x8cpu@1': a group has at least one node" in found
    assert "unknown GPU 'H900'; valid: A10, A100" in found
    assert "of one model" in found
    assert "'x' is not of the form" in found
