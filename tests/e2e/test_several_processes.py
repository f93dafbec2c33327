"""Runs in several processes, started as users start them: they stop together, and a sweep ends with its last run."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import REPO
from processes import start

from diffora.run.record import read_record

pytestmark = pytest.mark.slow

SMALL = ["method=lora", "task=paraphrase", "model=tiny", "trainer=ddp_cpu", "logger=csv", "task.validation_rows=17"]
SWEEP = ["-m", "seed=0,1", *SMALL, "task.train_rows=32", "finetune.epochs=1", "finetune.batch_size=16"]
FAILS = """
from lightning.pytorch import Callback

class FailsInOne(Callback):
    def on_train_batch_start(self, trainer, module, *rest):
        if trainer.global_rank == 0:
            raise RuntimeError("boom")
"""


def sweep(folder, *more):
    """The finished process of a sweep that two processes do together."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(REPO / "train.py"), *SWEEP, f"hydra.sweep.dir={folder / 'sweep'}", *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(REPO / "src"), str(folder)])}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)


def statuses(folder):
    return [read_record(file.parent)["status"] for file in sorted((folder / "sweep").glob("*/run.json"))]


def test_a_signal_stops_all_processes_and_the_run_can_go_on(tmp_path):
    process = start(*SMALL, "task.train_rows=64", "finetune.epochs=200", "finetune.batch_size=8",
                    f"hydra.run.dir={tmp_path / 'run'}")  # fmt: skip
    deadline = time.time() + 120
    while not list(tmp_path.glob("run/checkpoints/finetune-0001*")):
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert read_record(tmp_path / "run")["status"] == "interrupted"


def test_a_sweep_of_several_processes_ends_when_its_last_run_is_written(tmp_path):
    done = sweep(tmp_path)
    assert done.returncode == 0 and "all 2 runs are complete" in done.stdout, done.stdout + done.stderr
    assert statuses(tmp_path) == ["completed", "completed"]


def test_a_sweep_of_several_processes_ends_at_a_run_that_fails_in_one(tmp_path):
    (tmp_path / "own_callback.py").write_text(FAILS)
    done = sweep(tmp_path, "trainer.callbacks=[{_target_: own_callback.FailsInOne}]")
    assert done.returncode != 0 and statuses(tmp_path) == ["failed"]
    assert "own_callback.FailsInOne fails with RuntimeError: boom" in done.stderr
    assert "the sweep ends here" in done.stderr
