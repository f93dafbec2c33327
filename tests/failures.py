"""Imitated failures of the machine: a full disk, a refused system call, a failed allocation."""

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SHORT_LORA = [
    "experiment=quickstart",
    "method=lora",
    "task.train_rows=64",
    "task.validation_rows=32",
    "finetune.epochs=2",
    "finetune.warmup_steps=2",
]
"""Overrides of a run of a few seconds without a search."""

NO_MEMORY = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4000000000000 bytes. Error code 12 (Cannot allocate memory)"
)
"""What torch says when a CPU has no memory left."""


@contextmanager
def largest_file(n_bytes: int) -> Iterator[None]:
    """Limit the size of files like ``ulimit -f``. Tests use it in place of a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def refusing(
    function: Callable[..., Any], number: int, when: Callable[..., bool] = lambda *_: True
) -> Callable[..., Any]:
    """A function of `os` that fails like a system call, with the error ``number``, for calls that ``when`` accepts."""

    def refused(*arguments: Any, **more: Any) -> Any:
        if when(*arguments):
            raise OSError(number, os.strerror(number), *[a for a in arguments[:1] if isinstance(a, str | Path)])
        return function(*arguments, **more)

    return refused
