"""Runs of this project's commands in processes that are forked from one with everything imported.

A new process takes ten seconds for imports and a fork takes none, so a hundred kills take minutes. The parent process
never computes anything, so each run starts like a new one. Some tests use new processes, because imports may matter.
"""

import itertools
import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).parents[2]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "hydra.main",
        "diffora.run.experiment",
        "diffora.run.evaluate",
        "diffora.report.page",
        "lightning",
        "peft",
        "sklearn",
    ]
)
_numbers = itertools.count()


@dataclass(frozen=True)
class Limits:
    """How a process is disturbed.

    Attributes:
        kill_at: the process kills itself before its n-th change of a file, counted from 1. Changes are opening for
            writing, renaming and removing a file, and making and removing a folder.
        file_size: the largest size of a file in bytes (``ulimit -f``).
        below: only changes below this folder count.
        memory: bytes of address space.
    """

    kill_at: int | None = None
    file_size: int | None = None
    below: str = "/"
    memory: int | None = None


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        code: exit status; negative for a signal; None if it had to be stopped because it took too long.
        text: what it printed to both streams.
        changes: how many changes of files `Limits.kill_at` counted.
    """

    code: int | None
    text: str
    changes: int
    seconds: float

    @property
    def errors(self) -> list[str]:
        return [line for line in self.text.splitlines() if line.startswith("error: ")]

    @property
    def broken(self) -> str | None:
        """What is wrong if the command ended with neither success nor a clear message."""
        if self.code is None:
            return f"did not end within {self.seconds:.0f} s"
        for words in ("Traceback (most recent call last)", "fault of the program", "look at the above report"):
            if words in self.text:
                last = self.text.strip().splitlines()[-1]
                return f"{words}: {(self.errors or [last])[0][:300]}"
        if self.code < 0:
            return f"ended by signal {signal.Signals(-self.code).name}"
        if self.code and not self.errors:
            return f"status {self.code} without a message"
        return None


class Command:
    """A command that runs: ``python train.py …`` and the like.

    Args:
        program: ``train.py``, ``evaluate.py`` or ``report.py``.
        scratch: where its output is kept.
        fresh: start a new process instead of a fork.
    """

    def __init__(
        self,
        program: str,
        *arguments: str,
        scratch: Path,
        env: Mapping[str, str] | None = None,
        limits: Limits = Limits(),
        cwd: Path = REPO,
        fresh: bool = False,
    ) -> None:
        scratch.mkdir(parents=True, exist_ok=True)
        self.log = scratch / f"{next(_numbers):05d}-{program.removesuffix('.py')}.txt"
        self.began = time.monotonic()
        environment = dict(env or {})
        if fresh:
            self._process: Any = subprocess.Popen(
                [sys.executable, str(REPO / program), *arguments],
                stdout=self.log.open("wb"),
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=cwd,
                env=os.environ | environment,
                start_new_session=True,
            )
        else:
            work = (str(REPO / program), arguments, dict(os.environ) | environment, str(cwd), str(self.log), limits)
            self._process = _context.Process(target=_child, args=work)
            self._process.start()
        self.pid: int = self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None if isinstance(self._process, subprocess.Popen) else self._process.is_alive()

    def kill(self) -> None:
        """Send SIGKILL to the process and its children, like the system's memory killer or a scheduler."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has ended, or is not yet the leader of its process group
            self._process.kill()

    def kill_after(self, seconds: float) -> "Outcome":
        while self.running and time.monotonic() - self.began < seconds:
            time.sleep(0.005)
        self.kill()
        return self.wait()

    def kill_when(self, test: Callable[[], bool], timeout: float = 120) -> "Outcome":
        while self.running and not test():
            assert time.monotonic() - self.began < timeout, self.log.read_text()
            time.sleep(0.002)
        self.kill()
        return self.wait()

    def wait(self, timeout: float = 180) -> Outcome:
        code: int | None
        if isinstance(self._process, subprocess.Popen):
            try:
                code = self._process.wait(timeout)
            except subprocess.TimeoutExpired:
                code = None
        else:
            self._process.join(timeout)
            code = self._process.exitcode
        if code is None:
            self.kill()
        seconds = time.monotonic() - self.began
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        counter = Path(f"{self.log}.changes")
        return Outcome(code, text, counter.stat().st_size if counter.exists() else 0, seconds)


def _child(program: str, arguments: tuple[str, ...], env: dict[str, str], cwd: str, log: str, limits: Limits) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout, sys.stderr, sys.stdin = (
        os.fdopen(1, "w", closefd=False),
        os.fdopen(2, "w", 1, closefd=False),
        os.fdopen(0),
    )
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr  # type: ignore[misc]
    _count_changes(log, limits)
    if limits.file_size is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits.file_size, limits.file_size))
    if limits.memory is not None:
        resource.setrlimit(resource.RLIMIT_AS, (limits.memory, limits.memory))
    sys.argv = [program, *arguments]
    try:
        runpy.run_path(program, run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}


def _count_changes(log: str, limits: Limits) -> None:
    """Count changes of files, one byte each in a file beside the log. Kill the process before the given change."""
    counter = os.open(f"{log}.changes", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    me, done = os.getpid(), 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal done
        if event == "open":
            path, _, flags = args
            if not isinstance(path, str | bytes | os.PathLike) or not (flags or 0) & (os.O_WRONLY | os.O_RDWR):
                return
        elif event in CHANGES:
            path = args[0]
        else:
            return
        if os.getpid() != me or not os.fsdecode(path).startswith(limits.below):
            return
        done += 1
        with suppress(OSError):  # under ulimit -f
            os.write(counter, b".")
        if done == limits.kill_at:
            os.killpg(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
