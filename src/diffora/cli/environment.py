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
    cores, others = os.cpu_count() or 1, other_tasks()
    alone = environment.get("OMP_NUM_THREADS", "").strip() == "1"  # a single thread waits for nobody
    if others < cores or alone or any(name in environment for name in WAITING):
        return None
    environment["OMP_WAIT_POLICY"] = "passive"
    return (
        f"this machine has {cores} core{'s' if cores > 1 else ''}, and {others} other tasks run or wait: threads wait "
        "passively (OMP_WAIT_POLICY=passive)"
    )


def other_tasks() -> int:
    """How many other processes and threads run or wait for a core, now and not only for a moment.

    Linux is asked three times. Its mean of the last minute is not used: a run that has just ended is still in it.
    Elsewhere there is only that mean.
    """
    with suppress(OSError, ValueError):
        return max(0, min(_running() for _ in range(3)))
    with suppress(OSError, AttributeError):  # Windows has neither
        return round(os.getloadavg()[0])
    return 0


def _running() -> int:
    """Tasks that run or wait for a core besides this one, on the whole machine, a moment later; from Linux."""
    time.sleep(0.01)
    *_, tasks, _ = Path("/proc/loadavg").read_text().split()
    return int(tasks.partition("/")[0]) - 1
