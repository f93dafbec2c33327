"""Sweeps of twelve runs on Ray and submitit, where one process is killed. They need these packages.

For Ray, make an environment of its own, because its plugin needs cloudpickle below 3:
``pip install -e '.[ray]' pytest hypothesis rouge-score``, then ``pytest -m slow tests/run/test_launchers.py``.
"""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPO

RUNS = 12
SWEEP = [
    "method=lora",
    "task=paraphrase",
    "model=tiny",
    "trainer=cpu",
    "logger=none",
    "task.train_rows=32",
    "task.validation_rows=16",
    "finetune.epochs=4",
    f"seed=range({RUNS})",
]
LAUNCHERS = {
    "ray": ["+hydra.launcher.ray.init.num_cpus=2", "+hydra.launcher.ray.remote.max_retries=0"],
    "submitit_local": [],
}


def kill_run(folder: Path, until: float) -> None:
    """Kill the process that has the log of a run open, as soon as there is one."""
    while time.monotonic() < until:
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if any(os.readlink(file) == str(folder / "run.log") for file in (process / "fd").iterdir()):
                    os.kill(int(process.name), signal.SIGKILL)
                    return
            except OSError:  # it has ended, or is not ours
                continue
        time.sleep(0.05)
    raise AssertionError("the run never started")


def statuses(place: Path) -> list[str]:
    return [json.loads(file.read_text())["status"] for file in sorted(place.glob("*/run.json"))]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="finds processes in /proc")
@pytest.mark.timeout(3600)  # submitit starts all twelve at once
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_killed_run_is_named_and_the_others_finish(launcher, tmp_path):
    module = f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher"
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    place = tmp_path / "sweep"
    command = [sys.executable, str(REPO / "train.py"), "-m", *SWEEP, *LAUNCHERS[launcher], f"hydra/launcher={launcher}"]
    command.append(f"hydra.sweep.dir={place}")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as sweep:
        kill_run(place / "4-lora-paraphrase-tiny-seed4", time.monotonic() + 600)
        printed, _ = sweep.communicate(timeout=1800)
    assert sweep.returncode == 1
    assert f"1 of {RUNS} runs failed" in printed and "4-lora-paraphrase-tiny-seed4" in printed.rpartition("failed;")[2]
    assert "its process died" in printed
    assert statuses(place).count("completed") == RUNS - 1
    counted = [int(n) for n in re.findall(rf"sweep: (\d+)/{RUNS} runs ended", printed)]
    assert counted == sorted(counted) and counted[-1] == RUNS - 1

    again = subprocess.run([*command, "resume=true"], capture_output=True, text=True, env=environment, timeout=1800)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"runs: {RUNS} in {place}, {RUNS - 1} complete" in again.stdout
    assert statuses(place) == ["completed"] * RUNS
