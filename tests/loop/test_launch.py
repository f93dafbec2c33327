"""Variables of torchrun, SLURM and Lightning that contradict each other are reported; others are accepted."""

import pytest

from diffora.errors import UserError
from diffora.loop.launch import launch_problems
from diffora.run.check import check


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


AGENTS = {"TORCHELASTIC_RUN_ID": "a", "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
SRUN = {
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
}


@pytest.mark.parametrize("environment", [AGENTS, SRUN])
@pytest.mark.parametrize(
    ("devices", "nodes", "words"),
    [
        (2, 2, None),
        ("auto", 2, None),
        (2, 1, "trainer.num_nodes=1 must be 2: 4 processes were started"),
        ("auto", 1, "trainer.num_nodes=1 must be 2"),
        (4, 1, "trainer.num_nodes=1 must be 2"),
        (4, 2, "trainer.devices=4 must be 2, the number of processes that were started on each machine"),
        (2, 4, "trainer.num_nodes=4 must be 2"),
    ],
)
def test_processes_of_several_machines_are_counted(environment, devices, nodes, words):
    problems = list(launch_problems(environment, devices, nodes))
    assert problems == [] if words is None else words in problems[0] and len(problems) == 1


@pytest.mark.parametrize(
    "environment", [{}, {"SLURM_JOB_NAME": "bash"}, {"SLURM_NTASKS": "1"}, {"LOCAL_RANK": "0"}, {"SLURM_JOB_NAME": "x"}]
)
def test_one_process_alone_is_not_two_machines(environment):
    [problem] = launch_problems(environment, 1, 2)
    assert "torchrun" in problem or "trainer.num_nodes=2 must be 1" in problem


def test_lightning_reads_the_same_numbers_from_slurm(monkeypatch):
    """The variables that srun sets for the last of four processes on two machines."""
    from lightning.fabric.plugins.environments import SLURMEnvironment

    more = {"SLURM_JOB_NAME": "train", "SLURM_NODELIST": "first,second", "SLURM_JOB_ID": "12345", "SLURM_LOCALID": "1"}
    for name, value in (SRUN | more | {"SLURM_NODEID": "1"}).items():
        monkeypatch.setenv(name, value)
    found = SLURMEnvironment()
    assert SLURMEnvironment.detect() and found.creates_processes_externally
    assert (found.world_size(), found.global_rank(), found.local_rank(), found.node_rank()) == (4, 3, 1, 1)
    found.validate_settings(num_devices=2, num_nodes=2)
    assert found.main_address == "first"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["finetune.batch_size=15"], "finetune.batch_size=15 must be a multiple of 2"),
        (["finetune.batch_size=18", "finetune.accumulate=6"], "finetune.batch_size=18 / finetune.accumulate=6 must be"),
        (["search.batch_size=9"], "search.batch_size=9 must be a multiple of 2"),
        (["finetune.batch_size=10", "trainer.num_nodes=2"], "finetune.batch_size=10 must be a multiple of 4"),
    ],
)
def test_a_batch_that_the_processes_cannot_share_is_named_before_anything_is_loaded(cfg, overrides, words):
    base = ["method=diffora", "task=paraphrase", "model=tiny", "trainer=ddp_cpu"]
    check(cfg(*base))
    with pytest.raises(UserError) as caught:
        check(cfg(*base, *overrides))
    assert any(words in problem for problem in caught.value.problems)
