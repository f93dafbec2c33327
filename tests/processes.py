"""Run `train.py` as a process, like a user."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from conftest import REPO


def start(*overrides: str, **more: str) -> subprocess.Popen[str]:
    """Start `train.py` with these overrides; ``more`` are environment variables."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | more
    return subprocess.Popen(
        [sys.executable, str(REPO / "train.py"), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPO,
        env=environment,
    )


def train(*overrides: str, expect: int = 0, **more: str) -> str:
    """Run `train.py` to its end and return what it printed: stdout if it should succeed, else stderr."""
    process = start(*overrides, **more)
    out, err = process.communicate(timeout=300)
    assert process.returncode == expect, out + err
    return out if expect == 0 else err


def kill_when(process: subprocess.Popen[str], folder: Path, pattern: str) -> None:
    """Kill a process (SIGKILL) as soon as a file that matches the pattern appears in the folder."""
    deadline = time.time() + 120
    while not list(folder.glob(pattern)):
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
