"""How many steps a run has, before it starts."""

from types import SimpleNamespace

import numpy as np
import pytest

from diffora.errors import UserError
from diffora.loop.plan import plan_of
from diffora.loop.samplers import LengthGroupedBatchSampler
from diffora.training.steps import steps_of, warmup_steps


@pytest.mark.parametrize("n_rows", [32, 33, 34, 64, 65])
@pytest.mark.parametrize(("devices", "nodes"), [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_steps_are_those_of_the_sampler_of_all_processes(n_rows, devices, nodes, accumulate):
    finetune = SimpleNamespace(max_steps=None, batch_size=32, epochs=3, accumulate=accumulate)
    trainer = SimpleNamespace(devices=devices, num_nodes=nodes, accelerator="cpu")
    found, _ = steps_of(SimpleNamespace(finetune=finetune, trainer=trainer), n_rows)
    batches = LengthGroupedBatchSampler(np.ones(n_rows), 32 // accumulate, 0, world_size=devices * nodes)
    assert found == plan_of(-(-len(batches) // accumulate), 3).total


@pytest.mark.parametrize(
    ("given", "recipe", "steps", "used"),
    [(10, 10, 20, 10), (11, 10, 20, 11), (20, 10, 20, 20), (10, 10, 19, 1), (10, 10, 21, 10), (50, 50, 9, 0)],
)
def test_the_recipes_warm_up_is_a_tenth_of_a_run_if_it_is_more_than_half_of_it(given, recipe, steps, used):
    finetune = SimpleNamespace(max_steps=steps, warmup_steps=given)
    task = SimpleNamespace(recipe=SimpleNamespace(warmup_steps=recipe))
    assert warmup_steps(SimpleNamespace(finetune=finetune, task=task), 100) == used


def test_a_warm_up_of_the_user_that_never_ends_is_refused():
    finetune = SimpleNamespace(max_steps=20, warmup_steps=21)
    task = SimpleNamespace(recipe=SimpleNamespace(warmup_steps=10))
    with pytest.raises(UserError, match="must be at most 20"):
        warmup_steps(SimpleNamespace(finetune=finetune, task=task), 100)
