"""Missing devices and processes are found before anything is loaded."""

import pytest
import torch

from diffora.errors import UserError
from diffora.loop import machine


@pytest.fixture
def found(cfg, monkeypatch):
    """The problems of a trainer section, on a machine with the given numbers of CPU cores and GPUs."""
    for name in ("SLURM_NTASKS", "SLURM_JOB_NAME", "SLURM_STEP_ID", "SLURM_NTASKS_PER_NODE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def problems(*overrides, cores=4, gpus=0):
        monkeypatch.setattr(machine.os, "cpu_count", lambda: cores)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        machine._device_problems.cache_clear()
        try:
            machine.check_machine(cfg(*overrides))
        except UserError as error:
            return error.problems
        finally:
            machine._device_problems.cache_clear()
        return []

    return problems


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.accelerator=gpu", "trainer.accelerator=gpu: torch finds no GPU on this machine; use trainer=cpu"),
        ("trainer.accelerator=cuda", "trainer.accelerator=cuda: torch finds no GPU on this machine"),
        ("trainer.accelerator=mps", "trainer.accelerator=mps: torch finds no such device on this machine"),
        ("trainer.devices=99", "trainer.devices=99 must be at most 4: this machine has 4 CPU cores"),
        ("trainer.precision=16-mixed", "trainer.precision=16-mixed needs a GPU"),
    ],
)
def test_devices_that_the_machine_lacks_are_named(found, override, words):
    """C: `trainer.accelerator=gpu` without one, `trainer.devices=99` on a CPU."""
    [problem] = found(override)
    assert words in problem


def test_devices_that_the_machine_has_are_accepted(found):
    assert found("trainer=cpu") == found("trainer=default") == []
    assert found("trainer=ddp_cpu", cores=1) == []  # allowed on any machine, for trying things out
    assert found("trainer=ddp_cpu", "trainer.devices=3", cores=1) != []


def test_too_many_gpus_are_named(found):
    [problem] = found("trainer=gpu", "trainer.devices=3", gpus=2)
    assert problem == "trainer.devices=3 must be at most 2: this machine has 2 of them"


@pytest.mark.parametrize(
    ("gpus", "accelerator", "words"),
    [
        (0, "auto", "trainer.devices=auto finds 1 here, and this is process 2 of this machine: name the number"),
        (4, "cpu", "name the number of processes, trainer.devices=N"),
        (1, "gpu", "--gpus-per-node, not --gpus-per-task"),
        (2, "auto", None),
    ],
)
def test_a_process_without_a_device_of_its_own_is_named(monkeypatch, gpus, accelerator, words):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        problems = list(machine._process_problems({name: "1"}, accelerator, "auto"))
        assert problems == [] if words is None else words in problems[0]
    assert list(machine._process_problems({}, accelerator, "auto")) == []
    assert list(machine._process_problems({"LOCAL_RANK": "1"}, accelerator, 2)) == []


def test_slurms_variables_without_its_launch_are_named(found, monkeypatch):
    """`SLURM_NTASKS=2` outside SLURM's own launch; the other variables are in tests/loop/test_launch.py."""
    monkeypatch.setenv("SLURM_NTASKS", "2")
    [problem] = found("trainer=cpu")
    assert "SLURM_NTASKS=2" in problem and "srun" in problem
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert found("trainer=cpu") == []


def test_an_interactive_job_of_slurm_may_start_processes_itself(found, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    assert found("trainer=cpu") == []
