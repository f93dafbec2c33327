"""What is set before torch is imported: how threads wait on a busy machine, and the sizes of oneDNN's caches."""

import os
import subprocess
import sys

import pytest

from diffora.cli import environment
from diffora.cli.environment import CACHES, other_tasks, prepare


@pytest.fixture
def others(monkeypatch):
    """A function that sets how many other tasks the machine has."""

    def busy(number):
        monkeypatch.setattr(environment, "other_tasks", lambda: number)

    return busy


@pytest.mark.parametrize(
    ("number", "threads", "passive"),
    [
        (0, None, False),
        (1, None, True),
        (1, "8", True),
        (1, "7", False),
        (2, "7", True),
        (0, "9", False),
        (5, "", True),
    ],
)
def test_threads_wait_passively_where_they_do_not_have_a_core_each(number, threads, passive, others, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    others(number)
    variables = {} if threads is None else {"OMP_NUM_THREADS": threads}
    given = dict(variables)
    said = prepare(variables)
    if not passive:
        assert said is None and variables == CACHES | given
        return
    assert said.startswith(f"{number} other task") and "wait passively" in said
    assert variables == CACHES | given | {"OMP_WAIT_POLICY": "passive"}
    assert prepare(variables) is None  # as in the other processes of a run, which inherit it


@pytest.mark.parametrize(
    "own", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "100"}, {"KMP_BLOCKTIME": "1"}, {"OMP_NUM_THREADS": "1"}]
)
def test_what_the_user_has_set_stays(own, others):
    others(10_000)
    variables = own | {"LRU_CACHE_CAPACITY": "7"}
    assert prepare(variables) is None
    assert variables == CACHES | own | {"LRU_CACHE_CAPACITY": "7"}


def test_other_tasks_are_counted():
    assert 0 <= other_tasks() < 100_000


@pytest.mark.parametrize(("present", "others"), [("1/300", 0), ("4/300", 3), ("0/0", 0)])
def test_work_that_has_ended_does_not_count(present, others, monkeypatch):
    """The mean of the last minute, the first number, still has it."""
    monkeypatch.setattr(environment.Path, "read_text", lambda self: f"8.05 2.01 1.10 {present} 4711\n")
    assert other_tasks() == others


def test_a_task_that_runs_for_a_moment_does_not_count(monkeypatch):
    present = iter([5, 1, 7, 7, 7])
    monkeypatch.setattr(environment.Path, "read_text", lambda self: f"0.0 0.0 0.0 {next(present)}/300 4711\n")
    assert other_tasks() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp shows its settings on Linux")
def test_it_is_set_before_the_threads_are_made():
    """libgomp prints the policy that it uses when torch loads it."""
    code = (
        "from contextlib import suppress\n"
        "from diffora.cli import environment, train; environment.other_tasks = lambda: 10_000\n"
        "with suppress(SystemExit): train.main(['--help'])\n"
        "import torch; torch.ones(2) + 1"
    )
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables | {"OMP_DISPLAY_ENV": "true"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr
    assert "wait passively" not in done.stdout + done.stderr  # a run says it, not the help
