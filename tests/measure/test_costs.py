"""Parameters and FLOPs by the formulas of costs.py, against real networks."""

import pytest
import torch
from support.small_networks import network_inputs, random_config

from nanosd3.components import on_meta
from nanosd3.config import CONFIGS
from nanosd3.machine.distributed import Compute, ParallelModel
from nanosd3.measure import costs, meters
from nanosd3.mmdit import MMDiT

META = torch.device("meta")


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_of_configs(name):
    model = on_meta(CONFIGS[name], "mmdit")
    assert costs.parameters(CONFIGS[name].mmdit) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("seed", range(8))
def test_parameters_of_any_network(seed):
    config = random_config(seed)
    with META:
        model = MMDiT(config)
    assert costs.parameters(config) == sum(p.numel() for p in model.parameters())
    for i, block in enumerate(model.joint_blocks):
        assert costs.block_parameters(config, i) == sum(p.numel() for p in block.parameters())


SHAPES = [(1, 1, 1, 1), (2, 4, 4, 7), (3, 2, 5, 1), (2, 5, 3, 11)]


@pytest.mark.parametrize("seed", range(8))
def test_flops(seed):
    """Exact: forward, backward, and recomputation."""
    config, sizes = random_config(seed), SHAPES[seed % 4]
    with META:
        model, inputs = MMDiT(config), network_inputs(config, *sizes)
    forward = costs.forward_flops(config, *sizes)
    assert meters.count_flops(lambda: model(*inputs)) == forward
    # The network's inputs need no gradient: these products are computed twice, not three times.
    patches, context, time, _, pooled, _ = costs.embedders(config)
    batch, rows, columns, text = sizes
    saved = costs.linear_flops([patches, context, time, pooled], batch, rows * columns, text)
    for checkpointing in (False, True):
        parallel = ParallelModel(
            model, compute=Compute(checkpointing=checkpointing), blocks=model.joint_blocks
        )
        counted = meters.count_flops(lambda net=parallel: net(*inputs).sum().backward())
        assert counted == costs.training_flops(config, *sizes, checkpointing=checkpointing) - saved
