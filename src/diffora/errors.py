"""The one exception a person is meant to read, and what failures of the machine are in its words."""

import errno
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class UserError(Exception):
    """Something the user can mend: shown as its message alone, without a traceback.

    Args:
        problems: one message, or several that were found together. Each names the
            offending value and says what would be right.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class WriteError(UserError, OSError):
    """A file could not be written. An `OSError` too, with the bare reason in ``strerror``."""


SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Errors that go away when there is room."""

REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "your disk quota is used up",
    errno.EFBIG: "files may not become this large here (ulimit -f)",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ENOENT: "no such file or folder",
    errno.ENOTDIR: "a part of this path is a file, not a folder",
    errno.EEXIST: "a file of this name is there, where a folder is needed",
    errno.EISDIR: "it is a folder, not a file",
    errno.EMFILE: "too many files are open (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine",
    errno.EIO: "the disk reports an input/output error",
    errno.ESTALE: "the network file system does not have it any more",
}


def reason(error: OSError) -> str:
    """Why the system refused something to do with files, in words."""
    return REASONS.get(error.errno or 0) or error.strerror or str(error) or type(error).__name__


def place(error: OSError) -> str | None:
    """The file that an exception of the system is about, where it says so."""
    return os.fsdecode(error.filename) if isinstance(error.filename, str | bytes | os.PathLike) else None


def chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and those that it was raised from, or while handling."""
    seen: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in seen:
        seen.append(following)
        yield following
        following = following.__cause__ or following.__context__


def out_of_memory(error: BaseException) -> str | None:
    """What ran out, in words, if an exception says that memory did: the machine's, the GPU's or what workers share."""
    text = str(error)
    if "DataLoader worker" in text and re.search(r"Bus error|shared memory", text):
        return OUT_OF_SHARED_MEMORY
    if re.search(r"DataLoader worker \(pid.*(killed by signal|exited unexpectedly)", text):
        return (
            "a process that loads batches was killed, most likely for want of memory: use fewer, or none with "
            "trainer.num_workers=0"
        )
    if isinstance(error, RuntimeError | OSError) and re.search(
        r"shared memory object|allocate shared memory|unable to mmap .*torch_", text
    ):
        return OUT_OF_SHARED_MEMORY
    no_memory = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if no_memory or (isinstance(error, RuntimeError) and re.search(ALLOCATORS, text)):
        wanted = re.search(r"(?:tried|Tried|Unable) to allocate (\d+ bytes|[\d.]+ [KMGTPE]i?B)", text)
        return "out of memory" + (f", {_size(wanted[1])} were asked for" if wanted else "")
    return None


OUT_OF_SHARED_MEMORY = (
    "the processes that load batches ran out of shared memory (/dev/shm): use trainer.num_workers=0, or give it more "
    "room (docker run --shm-size=8g)"
)
# torch.OutOfMemoryError is a RuntimeError: the name need not be imported.
ALLOCATORS = (
    r"out of memory|can't allocate memory|not enough memory|Cannot allocate memory|ALLOC_FAILED|bad_alloc"
    r"|Storage size calculation overflowed|Invalid buffer size"
)


def explained(error: BaseException, advice: str = "") -> UserError | None:
    """The message for a failure of the machine (memory, disk, permissions); None if it is something else.

    Args:
        advice: what to do where memory is short.
    """
    if isinstance(error, UserError):
        return error
    if short := out_of_memory(error):
        return UserError(short if "num_workers" in short or not advice else f"{short}: {advice}")
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return UserError("the system allows no more threads or processes (ulimit -u)")
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, BrokenPipeError):
        return UserError(f"{place(error) or 'the system refused an operation'}: {reason(error)}")
    return None


@contextmanager
def machine_limits(advice: str = "") -> Iterator[None]:
    """Turn failures of the machine into a `UserError`, as `explained` does."""
    try:
        yield
    except Exception as error:
        told = explained(error, advice)
        if told is None or told is error:
            raise
        raise told from error


def _size(text: str) -> str:
    if not text.endswith(" bytes"):
        return text
    number = float(text.removesuffix(" bytes"))
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if number < 1024 or unit == "TiB":
            break
        number /= 1024
    return f"{number:,.0f} {unit}"
