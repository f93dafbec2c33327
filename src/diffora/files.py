"""Reading files that may be damaged or hostile, and writing files that are always complete."""

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
"""Size limit of JSON files, in bytes."""
MOST_YAML = 2**20
"""Size limit of YAML files, in bytes."""
MOST_DEPTH = 100
"""The most levels of nesting in JSON and YAML."""


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        FileNotFoundError: the file does not exist.
        UserError: it cannot be read, is too large, is nested too deeply, or is not JSON in UTF-8.
    """
    return parse_json(read_text(Path(path), MOST_JSON), path)


def parse_json(text: str, path: Path) -> Any:
    """`read_json` for text that is already in memory; ``path`` is for messages."""
    try:
        content = json.loads(text)
    except RecursionError:
        raise UserError(f"{path} is nested too deeply: at most {MOST_DEPTH} levels are read") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    _check_depth(content, path)
    return content


def read_yaml(path: Path) -> Any:
    """The content of a YAML file, as plain values. The file may come from an untrusted source.

    Nothing is resolved or constructed: interpolations (``${…}``) stay text. Tags and aliases are refused, because a few
    lines of aliases can expand to gigabytes.

    Raises:
        FileNotFoundError: the file does not exist.
        UserError: it cannot be read, is too large, is nested too deeply, has aliases, or is not YAML in UTF-8.
    """
    return parse_yaml(read_text(Path(path), MOST_YAML), path)


def parse_yaml(text: str, path: Path) -> Any:
    """`read_yaml` for text that is already in memory; ``path`` is for messages."""
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


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # the C version is faster, but optional
    """Reads 1e-3 as a number, as OmegaConf does; in YAML 1.1 only 1.0e-3 is one."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
    "-+0123456789.",
)


def _check_regular(path: Path) -> None:
    if not stat.S_ISREG(os.stat(path).st_mode):  # reading from a pipe or a device might never end
        raise UserError(f"{path} is not a regular file")


def read_text(path: Path, most: int) -> str:
    """The text of a file of at most ``most`` bytes. It raises the errors of `read_json`."""
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


def json_digest(content: object) -> str:
    """sha256 of plain containers as JSON, in hexadecimal digits. The order of keys does not matter."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file's content, as hexadecimal digits.

    Raises:
        OSError: the file cannot be read.
        UserError: it is not a regular file, or it is a sparse file of gigabytes, which would take hours to read.
    """
    _check_regular(path)
    status = os.stat(path)
    if status.st_size > 2**30 and getattr(status, "st_blocks", status.st_size) * 512 < status.st_size / 10:
        raise UserError(f"{path} is damaged: of its {status.st_size:,} bytes hardly any were written (a sparse file)")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Write a file atomically.

    Yields:
        A scratch path in the same folder. It replaces ``path`` if the block succeeds, and is removed if it fails. The
        file gets the permissions of a newly created file, even if a library creates the scratch file with others.

    Raises:
        WriteError: the file cannot be written, for example because the disk is full or read-only.
    """
    with _scratch_beside(Path(path)) as scratch:
        mode = _create(scratch)
        yield scratch
        _finish(scratch, mode)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Write a folder of files atomically, as `atomic` does for one file.

    Yields:
        A scratch folder that replaces ``path`` if the block succeeds.

    Raises:
        WriteError: as in `atomic`.
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
    """The common part of `atomic` and `atomic_folder`: scratch name, replacement of ``path``, error messages."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}-{_host()}.part")
    try:
        _check_kept(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        yield scratch
        _check_kept(path)
        if scratch.is_dir():  # os.replace can only replace an empty folder
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
    """Write a text file atomically, in UTF-8. Half of a surrogate pair is written as its escape sequence.

    Raises:
        WriteError: as in `atomic`.
    """
    with atomic(path) as scratch:
        scratch.write_text(text, encoding="utf-8", errors="backslashreplace")


def check_writable(folder: Path) -> None:
    """Check that files can be written to a folder. If it does not exist yet, check the folder it would be created in.

    No file is left behind.

    Raises:
        WriteError: files cannot be written there.
    """
    folder = Path(folder)
    existing = folder.absolute()
    while not os.path.lexists(existing):
        existing = existing.parent
    scratch = existing / f".probe.{os.getpid()}-{_host()}.part"
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
    """Create a folder and protect it within the block: if somebody removes it, nothing more is written to it.

    Otherwise later files would create the folder again, without the earlier files.

    Raises:
        WriteError: the folder cannot be created; or, within the block, a file is written after the folder was removed.
    """
    folder = Path(folder).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)  # while it is open, no other folder can get its inode number
    except OSError as error:
        raise _failure(folder, reason(error), error.errno) from error
    _kept[folder] = os.fstat(descriptor)
    try:
        yield
    finally:
        del _kept[folder]
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove scratch files of `atomic` whose process on this machine is dead, or that are older than a day."""
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
    """The machine's name, shortened, with only characters that suit a file name."""
    return re.sub(r"[^\w-]", "-", platform.node())[:40]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # a process of another user
        return True
    return True


def _create(scratch: Path) -> int:
    """Create an empty file, and return the permissions that it got from the umask and the folder."""
    scratch.unlink(missing_ok=True)
    descriptor = os.open(scratch, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)


def _finish(file: Path, mode: int) -> None:
    """Set the permissions of a written file and flush it to the disk."""
    with open(file, "rb+") as stream:
        os.chmod(file, mode)  # safetensors creates files that only their owner can read
        os.fsync(stream.fileno())


def _remove(path: Path) -> None:
    """Remove a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Flush the entries of a folder to the disk, if the file system supports it."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _keeper(path: Path) -> Path | None:
    """The `kept` folder that a path is in, or None."""
    return next((folder for folder in _kept if path.absolute().is_relative_to(folder)), None)


def _check_kept(path: Path) -> None:
    """Raise a WriteError if the `kept` folder of a path was removed or replaced."""
    if (folder := _keeper(path)) is None:
        return
    try:
        same = os.path.samestat(os.stat(folder), _kept[folder])
    except (FileNotFoundError, NotADirectoryError):
        same = False
    if not same:
        raise WriteError(f"{folder} was removed or replaced while this process was writing to it: its files are lost")


def _write_error(error: Exception, path: Path, scratch: Path) -> WriteError | None:
    """The message for an exception in a block of `atomic`; None if it is not about writing this file."""
    if isinstance(error, UserError):
        return None
    for link in chain(error):
        if (refused := _system_error(link, scratch)) is None:
            continue
        where = place(refused)
        if where is None:  # the error is about an open file, maybe one that is being read
            ours = refused.errno in SPACE | {errno.EIO, errno.EROFS, errno.ESTALE}
        else:
            ours = Path(where).is_relative_to(scratch) or path.is_relative_to(where)
        if ours:
            return _failure(path, reason(refused), refused.errno)
    return None


def _system_error(error: BaseException, scratch: Path) -> OSError | None:
    """The system's error behind an exception; libraries may raise their own exceptions for it."""
    if isinstance(error, OSError):
        return error if error.errno is not None else None
    if number := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors
        return OSError(int(number[1]), os.strerror(int(number[1])))
    if isinstance(error, RuntimeError) and re.search(r"inline_container|iostream error", str(error)):
        try:  # torch.save does not say why it failed; writing more to the file does
            with open(scratch / "probe" if scratch.is_dir() else scratch, "ab") as file:
                file.write(bytes(2**16))
                file.flush()
                os.fsync(file.fileno())
        except OSError as refused:
            return refused
    return None


def _failure(path: Path, why: str, number: int | None) -> WriteError:
    """The error for a file that cannot be written, with advice if space ran out."""
    advice = ""
    if number in SPACE:
        keeper = _keeper(path)
        again = "give the same command again" + (f" with resume=true hydra.run.dir={keeper}" if keeper else "")
        advice = f"; {'raise this limit' if number == errno.EFBIG else 'free some space'} and {again}"
    error = WriteError(f"{path} cannot be written: {why}{advice}")
    error.strerror = why
    return error
