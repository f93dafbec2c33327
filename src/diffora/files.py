"""Reading files that may be damaged or hostile, and writing files that are complete or absent."""

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from diffora.errors import SPACE, UserError, WriteError, chain, place, reason

MOST_JSON = 256 * 2**20
"""Bytes of the largest JSON file that is read."""
MOST_YAML = 2**20
"""Bytes of the largest YAML file that is read."""
MOST_DEPTH = 100
"""Levels to which JSON and YAML may be nested."""


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: the file cannot be read, is too large, is nested too deeply or is not JSON in UTF-8.
    """
    return parse_json(read_text(Path(path), MOST_JSON), path)


def parse_json(text: str, path: Path) -> Any:
    """`read_json` for text that was read already; ``path`` is for messages."""
    try:
        content = json.loads(text)
    except RecursionError:
        raise UserError(f"{path} is nested too deeply: at most {MOST_DEPTH} levels are read") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    _check_depth(content, path)
    return content


def read_yaml(path: Path) -> Any:
    """The content of a YAML file that may come from somebody else: plain values, nothing is resolved or built.

    Interpolations (``${…}``) stay text. Tags and aliases are refused: a few lines of aliases can stand for gigabytes.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: the file cannot be read, is too large, is nested too deeply, has aliases or is not YAML in UTF-8.
    """
    return parse_yaml(read_text(Path(path), MOST_YAML), path)


def parse_yaml(text: str, path: Path) -> Any:
    """`read_yaml` for text that was read already; ``path`` is for messages."""
    depth = 0
    try:
        for event in yaml.parse(text, Loader=_Loader):
            if isinstance(event, yaml.AliasEvent):
                place = f"{path}, line {event.start_mark.line + 1}"
                raise UserError(f"{place}: YAML aliases (*{event.anchor}) are not read; write the value out")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MOST_DEPTH:
                raise UserError(f"{path} is nested too deeply: at most {MOST_DEPTH} levels are read")
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2026-13-45
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # in C where it is there
    """Reads 1e-3 as a number, as OmegaConf does; YAML 1.1 wants 1.0e-3."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
    "-+0123456789.",
)


def _check_regular(path: Path) -> None:
    if not stat.S_ISREG(os.stat(path).st_mode):  # reading from a pipe or a device might never end
        raise UserError(f"{path} is not a regular file")


def read_text(path: Path, most: int) -> str:
    """The text of a file of at most ``most`` bytes; it raises what `read_json` does."""
    try:
        _check_regular(path)
        with open(path, "rb") as file:
            content = file.read(most + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from None
    if len(content) > most:
        raise UserError(f"{path} is too large: at most {most // 2**20} MB are read")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8: {error}") from None


def _check_depth(content: Any, path: Path) -> None:
    level = [content]
    for _ in range(MOST_DEPTH):
        level = [
            value
            for node in level
            if isinstance(node, dict | list)
            for value in (node.values() if isinstance(node, dict) else node)
            if isinstance(value, dict | list)
        ]
        if not level:
            return
    raise UserError(f"{path} is nested too deeply: at most {MOST_DEPTH} levels are read")


def file_digest(path: Path) -> str:
    """sha256 of a file's content, as hexadecimal digits.

    Raises:
        OSError: it cannot be read.
        UserError: it is not a regular file, or one of gigabytes that holds next to nothing, which would take hours.
    """
    _check_regular(path)
    status = os.stat(path)
    if status.st_size > 2**30 and getattr(status, "st_blocks", status.st_size) * 512 < status.st_size / 10:
        raise UserError(f"{path} is damaged: of its {status.st_size:,} bytes hardly any were written (a sparse file)")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A scratch path beside ``path`` that takes its place when the block ends well and vanishes when it does not.

    The file gets the permissions that a file has which is simply opened and written, whoever writes the scratch file.

    Raises:
        WriteError: the disk is full, the place is read-only and the like.
    """
    with _scratch_beside(Path(path)) as scratch:
        mode = _create(scratch)
        yield scratch
        _finish(scratch, mode)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A scratch folder that takes the place of ``path`` when the block ends well: `atomic` for a folder of files.

    Raises:
        WriteError: as `atomic`.
    """
    with _scratch_beside(Path(path)) as scratch:
        _remove(scratch)
        scratch.mkdir()
        mode = _create(scratch / ".mode")
        (scratch / ".mode").unlink()
        yield scratch
        for place in filter(Path.is_file, scratch.rglob("*")):
            _finish(place, mode)


@contextmanager
def _scratch_beside(path: Path) -> Iterator[Path]:
    """What `atomic` and `atomic_folder` have in common: the name, the place that it takes, the words of failures."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}-{_host()}.part")
    try:
        _check_kept(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        yield scratch
        _check_kept(path)
        if scratch.is_dir():  # which takes the place of an empty folder only
            _remove(path)
        os.replace(scratch, path)
        _sync(path.parent)
    except Exception as error:
        if (failure := _write_error(error, path, scratch)) is None:
            raise
        raise failure from error
    finally:
        with suppress(OSError):
            _remove(scratch)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically; what UTF-8 does not have (a half of a surrogate pair) is written as its escape.

    Raises:
        WriteError: as `atomic`.
    """
    with atomic(path) as scratch:
        scratch.write_text(text, encoding="utf-8", errors="backslashreplace")


def check_writable(folder: Path) -> None:
    """Find out whether files can be written to a folder, or to the one that it would be made in. Leaves nothing there.

    Raises:
        WriteError: they cannot.
    """
    folder = Path(folder)
    there = folder.absolute()
    while not os.path.lexists(there):
        there = there.parent
    scratch = there / f".probe.{os.getpid()}-{_host()}.part"
    try:
        _create(scratch)
        with open(scratch, "wb") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _failure(folder, reason(error), error.errno) from error
    finally:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)


_kept: dict[Path, os.stat_result] = {}


@contextmanager
def kept(folder: Path) -> Iterator[None]:
    """Make a folder, and write nothing below it once it has been removed: half of its files would be there anew.

    Raises:
        WriteError: it cannot be made; in the block: a file is to be written and the folder is not there any more.
    """
    folder = Path(folder).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)  # as long as it is open, no other folder gets the same number
    except OSError as error:
        raise _failure(folder, reason(error), error.errno) from error
    _kept[folder] = os.fstat(descriptor)
    try:
        yield
    finally:
        del _kept[folder]
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove scratch files of `atomic` whose process is dead: of this machine, or untouched for a day."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            match = LEFTOVER.fullmatch(entry.name)
            if match is None or entry.is_symlink():
                continue
            dead = match["host"] == _host() and not _alive(int(match["pid"]))
            if dead or time.time() - entry.stat().st_mtime > DAY:
                _remove(Path(entry.path))


LEFTOVER = re.compile(r"\..+\.(?P<pid>\d+)(?:-(?P<host>.*))?\.part")
DAY = 24 * 60 * 60


def _host() -> str:
    """The machine's name, short and fit for a file name."""
    return re.sub(r"[^\w-]", "-", platform.node())[:40]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    return True


def _create(scratch: Path) -> int:
    """Create an empty file and return the permissions that this gave it: umask and folder decide."""
    scratch.unlink(missing_ok=True)
    descriptor = os.open(scratch, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)


def _finish(file: Path, mode: int) -> None:
    """Give a written file its permissions, and have it on the disk."""
    with open(file, "rb+") as stream:
        os.chmod(file, mode)  # safetensors, like tempfile, makes files that only their owner can read
        os.fsync(stream.fileno())


def _remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Make a new name in a folder last, where the file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _keeper(path: Path) -> Path | None:
    """The folder of a `kept` block that a path is in."""
    return next((folder for folder in _kept if path.absolute().is_relative_to(folder)), None)


def _check_kept(path: Path) -> None:
    if (folder := _keeper(path)) is None:
        return
    try:
        same = os.path.samestat(os.stat(folder), _kept[folder])
    except (FileNotFoundError, NotADirectoryError):
        same = False
    if not same:
        raise WriteError(f"{folder} was removed or replaced while this process was at work there: its files are lost")


def _write_error(error: Exception, path: Path, scratch: Path) -> WriteError | None:
    """The message for an exception of a block of `atomic`; None where it is not about writing this file."""
    if isinstance(error, UserError):
        return None
    for link in chain(error):
        if (refused := _system_error(link, scratch)) is None:
            continue
        where = place(refused)
        if where is None:  # of an open file: reading may fail in other ways
            ours = refused.errno in SPACE | {errno.EIO, errno.EROFS, errno.ESTALE}
        else:
            ours = Path(where).is_relative_to(scratch) or path.is_relative_to(where)
        if ours:
            return _failure(path, reason(refused), refused.errno)
    return None


def _system_error(error: BaseException, scratch: Path) -> OSError | None:
    """What the system said to a library that has exceptions of its own."""
    if isinstance(error, OSError):
        return error if error.errno is not None else None
    if number := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors
        return OSError(int(number[1]), os.strerror(int(number[1])))
    if isinstance(error, RuntimeError) and re.search(r"inline_container|iostream error", str(error)):
        try:  # torch.save does not say why; writing more does
            with open(scratch / "probe" if scratch.is_dir() else scratch, "ab") as file:
                file.write(bytes(2**16))
                file.flush()
                os.fsync(file.fileno())
        except OSError as refused:
            return refused
    return None


def _failure(path: Path, why: str, number: int | None) -> WriteError:
    advice = ""
    if number in SPACE:
        keeper = _keeper(path)
        again = "give the same command again" + (f" with resume=true hydra.run.dir={keeper}" if keeper else "")
        advice = f"; {'raise this limit' if number == errno.EFBIG else 'free some space'} and {again}"
    error = WriteError(f"{path} cannot be written: {why}{advice}")
    error.strerror = why
    return error


def conf_dir() -> Path:
    """The ``conf/`` folder: the one inside an installed package, else the repository's."""
    package = Path(__file__).resolve().parent
    return installed if (installed := package / "conf").is_dir() else package.parents[1] / "conf"
