"""Runs of a sweep in other processes: lines about how many have ended, and what happens when a process dies."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus

from diffora.records import ENDED, NAME

SECONDS = 2.0
"""Between two looks at the records of the runs."""
BROKEN = ("failed", "interrupted")
"""The status of runs that ended too early. A run whose process died is still ``running``."""


@contextmanager
def waiting_for_all(launcher: str) -> Iterator[None]:
    """Inside, Hydra's launchers for Ray and submitit wait for all runs, also if the process of one of them dies.

    Both collect the results one after another, and stop at the first process that died: the runs that are still going
    on would then be ended with the program.

    Args:
        launcher: the name of the launcher's class.
    """
    if launcher == "RayLauncher":
        import ray

        with _replaced(ray, "get", ray.exceptions.RayError, lambda failed: failed):
            yield
    elif launcher in ("LocalLauncher", "SlurmLauncher"):
        from submitit.core.core import Job
        from submitit.core.utils import UncompletedJobError

        with _replaced(Job, "results", UncompletedJobError, lambda failed: [failed]):
            yield
    else:
        yield


@contextmanager
def _replaced(owner: Any, name: str, error: type[Exception], shape: Callable[[JobReturn], Any]) -> Iterator[None]:
    """Inside, a function returns a failed job where it would raise an error of this type."""
    original = getattr(owner, name)

    def collect(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except error as died:
            reason = next(iter(str(died).strip().splitlines()), "")
            job = JobReturn()
            job.status = JobStatus.FAILED
            job.return_value = RuntimeError(f"its process died ({type(died).__name__}: {reason})")
            return shape(job)

    setattr(owner, name, collect)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def ended_runs_shown(
    folders: Iterable[Path], show: Callable[[str], None] = lambda line: print(line, flush=True)
) -> Iterator[None]:
    """Inside, show a line whenever runs of a sweep have ended: how many, and about how long the others will take.

    Args:
        folders: of the runs.
        show: what to do with a line.
    """
    stop, runs = threading.Event(), list(folders)
    thread = threading.Thread(target=_tell, args=(runs, show, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _tell(runs: list[Path], show: Callable[[str], None], stop: threading.Event) -> None:
    from diffora.run.record import read_record

    before = {folder: _written(folder) for folder in runs}  # an earlier attempt may have left a record
    ended: dict[Path, str] = {}
    began = time.monotonic()
    last = False
    while not last:
        last = stop.wait(SECONDS)  # look once more after the end
        told = len(ended)
        for folder in runs:
            if folder not in ended and _written(folder) != before[folder]:
                status = (read_record(folder) or {}).get("status")
                if status in (*ENDED, *BROKEN):
                    ended[folder] = str(status)
        if len(ended) > told:
            failed = sum(status in BROKEN for status in ended.values())
            seconds = time.monotonic() - began
            left = seconds / len(ended) * (len(runs) - len(ended))
            words = f", {failed} failed" if failed else ""
            show(f"sweep: {len(ended)}/{len(runs)} runs ended{words}  {seconds:.0f} s, {left:.0f} s left")


def _written(folder: Path) -> int | None:
    """When the record of a run was written; None if there is none."""
    try:
        return (folder / NAME).stat().st_mtime_ns
    except OSError:
        return None
