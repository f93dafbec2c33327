"""Variables of torchrun, SLURM and Lightning that contradict each other are reported; others are accepted."""

import pytest

from diffora.loop.launch import launch_problems


@pytest.mark.parametrize(
    ("environment", "devices", "words"),
    [
        ({"SLURM_NTASKS": "2"}, 1, "srun did not start this process"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, 2, "srun did not start this process"),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, 2, "--ntasks-per-node=2"),
        (
            {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"},
            1,
            "trainer.devices=1 must be 2",
        ),
        ({"SLURM_NTASKS": "two"}, 1, "SLURM_NTASKS=two must be a whole number"),
        ({"SLURM_PROCID": "1"}, 1, "without SLURM_NTASKS"),
        ({"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "bash", "SLURM_PROCID": "1"}, 1, "interactive"),
        ({"LOCAL_RANK": "1"}, 1, "LOCAL_RANK=1 is set without WORLD_SIZE"),
        ({"LOCAL_RANK": "0"}, 2, "LOCAL_RANK=0 is set without WORLD_SIZE"),
        ({"RANK": "1"}, 1, "RANK=1 is set without WORLD_SIZE"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, 1, "without LOCAL_RANK"),
        ({"RANK": "2", "LOCAL_RANK": "2", "WORLD_SIZE": "2"}, 2, "must be less than WORLD_SIZE=2"),
        ({"LOCAL_RANK": "-1", "WORLD_SIZE": "x"}, 1, "LOCAL_RANK=-1 must be a whole number"),
        ({"TORCHELASTIC_RUN_ID": "a", "LOCAL_RANK": "0"}, 1, "without RANK, WORLD_SIZE"),
        ({"TORCHELASTIC_RUN_ID": "a", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, 1, "trainer.devices=1 must"),
    ],
)
def test_contradictory_launch_variables_are_named(environment, devices, words):
    assert words in next(launch_problems(environment, devices))


@pytest.mark.parametrize(
    ("environment", "devices"),
    [
        ({}, 1),
        ({}, 4),
        ({"LOCAL_RANK": "0"}, 1),  # left behind by Lightning
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2", "NODE_RANK": "0"}, 2),  # set by Lightning for its processes
        ({"TORCHELASTIC_RUN_ID": "a", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, 2),
        ({"TORCHELASTIC_RUN_ID": "a", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, "auto"),
        ({"SLURM_NTASKS": "1"}, 1),
        ({"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "bash"}, 1),
        (
            {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"},
            2,
        ),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, 1),  # set by submitit
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "a"}, 1),
    ],
)
def test_consistent_launch_variables_are_accepted(environment, devices):
    assert list(launch_problems(environment, devices)) == []
