"""The exception whose message is written for the user, and messages for failures of the machine."""

import errno
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """A problem that the user can fix. Only its message is shown, without a traceback.

    Args:
        problems: one message, or several that were found together. Each names the offending value and says what would
            be right.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


def called(program: str) -> str:
    """How the user of this process starts a program of the package, for messages.

    ``diffora train``; ``python -m diffora train``; in the repository ``python train.py``.

    Args:
        program: a name in ``diffora --help``.
    """
    start = Path(sys.argv[0])
    if start.name in SCRIPTS and f"{program}.py" in SCRIPTS:
        return f"python {start.with_name(f'{program}.py')}"
    return f"{'python -m diffora' if start.name in (*SCRIPTS, '__main__.py') else 'diffora'} {program}"


SCRIPTS = ("train.py", "evaluate.py", "report.py")
"""The programs that the repository also has as files."""


class WriteError(UserError, OSError):
    """A file could not be written. It is an `OSError` too, with the bare reason in ``strerror``."""


SECRET = re.compile(
    r"(^|_)((api|secret|access|private)_?key|key_id|token|password|passwd|passphrase|secret|credentials?)$",
    re.IGNORECASE,
)
"""Names of settings that hold a secret."""
WITH_SECRET = re.compile(
    r"(?<=://)(?!git@)[^/?#\s]+(?=@)|"
    r"(?<=[?&])((?:(?:api|secret|access|private)[_-]?key|token|access[_-]token|secret|password|passwd|[\w-]*signature|sig)=)"
    r"[^&#\s]+",
    re.IGNORECASE,
)
"""The secret parts of an address: its user, with a password or a token, and keys in its query."""


def without_secrets(text: str) -> str:
    """A text whose addresses show no user, password or key."""
    return WITH_SECRET.sub(lambda found: f"{found[1] or ''}…", text)


SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Error numbers that mean a lack of space."""

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
    """Why the system refused an operation on a file, in words."""
    return REASONS.get(error.errno or 0) or error.strerror or str(error) or type(error).__name__


def first_of(names: Sequence[str]) -> str:
    """The first name, for a message, and how many others there are.

    >>> first_of(["a"]), first_of(["a", "b", "c"])
    ('a', 'a (and 2 more)')
    """
    return names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or the name of its class if the message is empty."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def place(error: OSError) -> str | None:
    """The file that an exception of the system is about; None if it does not say."""
    return os.fsdecode(error.filename) if isinstance(error.filename, str | bytes | os.PathLike) else None


def chain(error: BaseException) -> Iterator[BaseException]:
    """An exception, and those that it was raised from or raised while handling."""
    seen: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in seen:
        seen.append(following)
        yield following
        following = following.__cause__ or following.__context__


def out_of_memory(error: BaseException) -> str | None:
    """A message if an exception means that memory ran out: the machine's, the GPU's or shared memory; else None."""
    text = str(error)
    if "DataLoader worker" in text and re.search(r"Bus error|shared memory", text):
        return OUT_OF_SHARED_MEMORY
    if re.search(r"DataLoader worker \(pid.*(killed by signal|exited unexpectedly)", text):
        return (
            "a process that loads batches was killed, most likely because memory ran out: use fewer such processes, or "
            "none with trainer.num_workers=0"
        )
    if isinstance(error, RuntimeError | OSError) and re.search(
        r"shared memory object|allocate shared memory|unable to mmap .*torch_", text
    ):
        return OUT_OF_SHARED_MEMORY
    no_memory = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if no_memory or (isinstance(error, RuntimeError) and re.search(ALLOCATORS, text)):
        wanted = re.search(r"(?:tried|Tried|Unable) to allocate (\d+ bytes|[\d.]+ [KMGTPE]i?B)", text)
        return "out of memory" + (f", {_readable(wanted[1])} were asked for" if wanted else "")
    return None


OUT_OF_SHARED_MEMORY = (
    "the processes that load batches ran out of shared memory (/dev/shm): use trainer.num_workers=0, or give it more "
    "room (docker run --shm-size=8g)"
)
# Messages of allocators. torch.OutOfMemoryError is a RuntimeError, so torch need not be imported.
ALLOCATORS = (
    r"out of memory|can't allocate memory|not enough memory|Cannot allocate memory|ALLOC_FAILED|bad_alloc"
    r"|Storage size calculation overflowed|Invalid buffer size"
)


def explained(error: BaseException, advice: str = "") -> UserError | None:
    """The message for a failure of the machine (memory, disk, permissions, homes); None for any other exception.

    Args:
        advice: what to do if memory ran out.
    """
    if isinstance(error, UserError):
        return error
    if short := out_of_memory(error):
        return UserError(short if "num_workers" in short or not advice else f"{short}: {advice}")
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return UserError("the system allows no more threads or processes (ulimit -u)")
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # `Path.expanduser`
        return UserError("a path begins with ~ and a name that is no user of this machine: was ~/ meant?")
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, BrokenPipeError):
        return UserError(f"{place(error) or 'the system refused an operation'}: {reason(error)}")
    return None


@contextmanager
def machine_limits(advice: str = "") -> Iterator[None]:
    """A context that turns failures of the machine into the `UserError` of `explained`."""
    try:
        yield
    except Exception as error:
        told = explained(error, advice)
        if told is None or told is error:
            raise
        raise told from error


def _readable(text: str) -> str:
    """A size such as "123456789 bytes" in a larger unit."""
    if not text.endswith(" bytes"):
        return text
    number = float(text.removesuffix(" bytes"))
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if number < 1024 or unit == "TiB":
            break
        number /= 1024
    return f"{number:,.0f} {unit}"
