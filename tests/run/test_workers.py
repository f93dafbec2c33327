"""Sweeps whose runs are other processes: what is said while they go on, and what happens when a process dies."""

import sys
import time
from types import ModuleType, SimpleNamespace

import pytest
from hydra.core.utils import JobStatus

from diffora.files import write_text
from diffora.run import workers


class RayError(Exception):
    pass


@pytest.fixture
def ray(monkeypatch) -> ModuleType:
    """As much of Ray as the launcher uses: the second of three tasks lost its process."""
    module = ModuleType("ray")

    def get(task):
        if task == 1:
            raise RayError("The worker died unexpectedly\nwhile executing this task")
        return task

    module.get, module.exceptions = get, SimpleNamespace(RayError=RayError)
    monkeypatch.setitem(sys.modules, "ray", module)
    return module


def test_the_results_of_the_others_are_collected_when_a_process_dies(ray):
    original = ray.get
    with workers.waiting_for_all("RayLauncher"):
        first, died, third = [ray.get(task) for task in range(3)]
    assert (first, third) == (0, 2) and ray.get is original
    assert died.status == JobStatus.FAILED and "process died (RayError: The worker died unexp" in str(
        died._return_value
    )
    with workers.waiting_for_all("JoblibLauncher"):
        assert ray.get is original


def test_other_errors_are_raised(ray):
    ray.get = lambda task: 1 / 0
    with pytest.raises(ZeroDivisionError), workers.waiting_for_all("RayLauncher"):
        ray.get(0)


def record(folder, status):
    folder.mkdir(exist_ok=True)
    write_text(folder / "run.json", f'{{"status": "{status}"}}')


def test_lines_count_the_runs_that_end_and_not_those_of_an_earlier_attempt(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "SECONDS", 0.05)
    monkeypatch.setattr(
        "diffora.run.record.read_record", lambda folder: {"status": (folder / "run.json").read_text()[12:-2]}
    )
    runs = [tmp_path / str(number) for number in range(4)]
    record(runs[2], "failed")  # by an earlier attempt
    lines: list[str] = []

    def until(count):
        deadline = time.monotonic() + 20
        while len(lines) < count and time.monotonic() < deadline:
            time.sleep(0.02)

    with workers.ended_runs_shown(runs, lines.append):
        record(runs[0], "running")
        time.sleep(0.2)
        assert lines == []
        record(runs[0], "completed")
        until(1)
        time.sleep(0.02)
        record(runs[2], "failed")
        until(2)
        record(runs[1], "selected")
    assert [line.split("  ")[0] for line in lines] == [
        "sweep: 1/4 runs ended",
        "sweep: 2/4 runs ended, 1 failed",
        "sweep: 3/4 runs ended, 1 failed",
    ]
    assert all(line.endswith(" s left") for line in lines)
