"""Environment variables that torch's libraries read when torch is imported. What the user has set stays."""

import os
import time
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables that say how threads wait."""
CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256", "LRU_CACHE_CAPACITY": "256"}
"""How many compiled products oneDNN and torch keep, each about a quarter of a MB. Their own limit is 1024. A training
step in bfloat16 needs about ten for each width of a batch."""


def prepare(environment: MutableMapping[str, str]) -> str | None:
    """Set the variables. Call it before torch is imported.

    OpenMP's threads spin while they wait for each other. Beside other busy processes, a spinning thread takes the core
    that the other thread waits for, and a run is several times slower. So threads wait passively on a busy machine.

    Args:
        environment: `os.environ`.

    Returns:
        A line for the user if threads wait passively because of this call, else None.
    """
    for name, value in CACHES.items():
        environment.setdefault(name, value)
    cores = os.cpu_count() or 1
    threads = _threads(environment) or cores
    if threads == 1 or any(name in environment for name in WAITING):  # a single thread waits for nobody
        return None
    others = other_tasks()
    if not others or others + threads <= cores:
        return None
    environment["OMP_WAIT_POLICY"] = "passive"
    tasks = "1 other task runs or waits" if others == 1 else f"{others} other tasks run or wait"
    return f"{tasks} for the {cores} cores of this machine: threads wait passively (OMP_WAIT_POLICY=passive)"


def _threads(environment: MutableMapping[str, str]) -> int | None:
    """How many threads the user wants; None if that is not said, or in a form that only OpenMP reads."""
    with suppress(ValueError):
        return int(environment.get("OMP_NUM_THREADS", ""))
    return None


def other_tasks() -> int:
    """How many other processes and threads run or wait for a core, now and not only for a moment.

    Linux is asked for a tenth of a second. Its mean of the last minute is not used: a run that has just ended is still
    in it. Elsewhere there is only that mean.
    """
    with suppress(OSError, ValueError):
        return max(0, min(_running() for _ in range(5)))
    with suppress(OSError, AttributeError):  # Windows has neither
        return round(os.getloadavg()[0])
    return 0


def _running() -> int:
    """Tasks that run or wait for a core besides this one, on the whole machine, a moment later; from Linux."""
    time.sleep(0.02)
    *_, tasks, _ = Path("/proc/loadavg").read_text().split()
    return int(tasks.partition("/")[0]) - 1
