"""How many steps a run has, before it starts."""

from types import SimpleNamespace

import numpy as np
import pytest

from diffora.loop.plan import plan_of
from diffora.loop.samplers import LengthGroupedBatchSampler
from diffora.training.steps import steps_of


@pytest.mark.parametrize("n_rows", [32, 33, 34, 64, 65])
@pytest.mark.parametrize(("devices", "nodes"), [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_steps_are_those_of_the_sampler_of_all_processes(n_rows, devices, nodes, accumulate):
    finetune = SimpleNamespace(max_steps=None, batch_size=32, epochs=3, accumulate=accumulate)
    trainer = SimpleNamespace(devices=devices, num_nodes=nodes, accelerator="cpu")
    found, _ = steps_of(SimpleNamespace(finetune=finetune, trainer=trainer), n_rows)
    batches = LengthGroupedBatchSampler(np.ones(n_rows), 32 // accumulate, 0, world_size=devices * nodes)
    assert found == plan_of(-(-len(batches) // accumulate), 3).total
