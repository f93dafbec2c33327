"""The run directory: checks it before a run, and keeps the record in it during a run."""

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from diffora.errors import UserError, explained, reason
from diffora.files import kept, read_yaml, remove_leftovers, write_text
from diffora.records import ENDED, write_record
from diffora.run.record import check_as_left, missing_files, peaks, read_record, why_broken
from diffora.settings import identity

log = logging.getLogger(__name__)


MARKS = ("run.json", ".lock")  # every run leaves both; the lock file is there as soon as it begins
OTHERS = (".log", ".out", ".err", ".txt")  # a shell or a scheduler may write these beside a run


def check_place(folder: Path) -> None:
    """Refuse a folder with files that no run wrote, so that none is overwritten or mixed with a run's files.

    Raises:
        UserError: names the first such file.
    """
    _refuse_tilde("hydra.run.dir", folder)
    if not folder.is_dir() or any((folder / mark).exists() for mark in MARKS):
        return
    if strange := _strange(folder):
        raise UserError(
            f"hydra.run.dir={folder} is no run directory and not empty (it has {strange}): give a new folder"
        )


def check_sweep_place(folder: Path) -> None:
    """`check_place` for the folder of a sweep, which contains the folders of its runs.

    Raises:
        UserError: names the first such file.
    """
    _refuse_tilde("hydra.sweep.dir", folder)
    here, place = Path.cwd().resolve(), folder.resolve()
    if place == here or place in here.parents:
        raise UserError(f"hydra.sweep.dir={str(folder)!r} is the current folder, or above it: give a new folder")
    if not place.is_dir() or (place / "multirun.yaml").exists():
        return
    runs = any((inner / mark).exists() for inner in place.glob("*") for mark in (*MARKS, "multirun.yaml"))
    strange = None if runs else _strange(place)
    if strange and any(any(inner.glob("*")) for inner in place.glob("*") if inner.is_dir()):
        raise UserError(f"hydra.sweep.dir={folder} has no runs and is not empty (it has {strange}): give a new folder")


def _refuse_tilde(key: str, folder: Path) -> None:
    """Refuse a folder that is called ~. Hydra has made it in the current folder, and it is removed if it is empty."""
    if "~" in folder.parts:
        for place in (folder, *folder.parents)[: folder.parts[::-1].index("~") + 1]:
            with suppress(OSError):
                place.rmdir()
        raise UserError(f"{key}: Hydra does not know ~ as your home folder: write the path in full")


def _strange(folder: Path) -> str | None:
    """The first file or folder that no run, shell or scheduler makes; None if there is none."""
    names = (path.name for path in folder.iterdir())
    return next((name for name in sorted(names) if not name.startswith(".") and not name.endswith(OTHERS)), None)


def begun(folder: Path) -> bool:
    """Whether a folder has something of a run, to continue from."""
    from diffora.loop.resume import has_work

    return (folder / "run.json").exists() or has_work(folder)


def finished(cfg: DictConfig, folder: Path) -> dict[str, Any] | None:
    """The record of the folder's run if it is complete; None if there is still work to do.

    With ``search_only=true``, a run that has its selection is complete.

    Only the settings are compared here, with those in the record. `diffora.loop.resume.earlier` compares the settings,
    data and backbone of checkpoints.

    Raises:
        UserError: the folder has a run although ``resume`` is false, or a run with another configuration.
    """
    from diffora.loop.resume import has_work

    old = read_record(folder) or {}
    status = old.get("status")
    if broken := None if old else why_broken(folder):
        if not cfg.resume and has_work(folder):
            raise UserError(f"{broken}; it has checkpoints: continue with resume=true, or choose another hydra.run.dir")
        log.warning(f"{broken}; continuing without it")
    if not cfg.resume:
        if status in ENDED or has_work(folder):
            raise UserError(
                f"{folder} holds a run ({status or 'without a readable run.json'}) already: continue it with "
                "resume=true, or choose another hydra.run.dir"
            )
        return None
    if status == "dry_run" or "config_hash" not in old:
        return None
    if old["config_hash"] != identity.config_hash(cfg):
        raise UserError(
            [
                f"{folder} was started with other settings. Continue it with the same settings, remove it, or choose "
                "another folder with hydra.run.dir= (for a sweep hydra.sweep.dir=):",
                *(
                    _changed_settings(cfg, folder)
                    or ["its run.json is of an older version, or not of the same run as its config.yaml"]
                ),
            ]
        )
    if status != "completed" and not (status == "selected" and cfg.search_only):
        return None
    if lost := missing_files(folder, old):
        log.warning(f"{folder} is recorded as complete, but {', '.join(lost)} is missing, so the run is repeated")
        return None
    check_as_left(folder, old)
    log.info(f"{folder} is complete already")
    return old


def changed_versions(folder: Path, record: dict[str, Any]) -> list[str]:
    """Where the program and its packages differ from those of an earlier attempt, as ``torch: '2.12.0' -> '2.13.0'``.

    Args:
        record: of the present attempt.
    """
    old = read_record(folder) or {}
    before, now = ((each.get("versions") or {}) | {"commit": each.get("git_commit")} for each in (old, record))
    return identity.differences(before, now) if old else []


UNKNOWN = "a run whose settings are unknown cannot be continued: remove its folder, or choose another one"


def _changed_settings(cfg: DictConfig, folder: Path) -> list[str]:
    """The settings in which a configuration differs from the ``config.yaml`` of a folder.

    Raises:
        UserError: its ``config.yaml`` is missing or broken.
    """
    file = folder / "config.yaml"
    try:
        before = read_yaml(file)
    except FileNotFoundError:
        before = None
    except UserError as error:
        raise UserError(f"{error}; {UNKNOWN}") from None
    if not isinstance(before, dict):
        raise UserError(f"{file} is missing or holds no settings; {UNKNOWN}")
    return identity.differences(before, identity.plain(cfg))


def content(folder: Path) -> bytes | None:
    """The bytes of the folder's record; None without one."""
    with suppress(OSError):
        return (folder / "run.json").read_bytes()
    return None


@contextmanager
def account(cfg: DictConfig, folder: Path, record: dict[str, Any], before: bytes | None) -> Iterator[None]:
    """Keep a run's configuration, log and record in its folder; if the run fails, record why.

    If the machine fails (disk, memory), the block raises a `UserError` that explains it.

    Args:
        before: the `content` of the folder when the run looked what to do there.

    Raises:
        UserError: another process uses the folder or has used it since then, or the folder cannot be written to.
    """
    from diffora.loop.process import is_main

    if not is_main():
        yield
        return
    with kept(folder), _locked(folder):
        if content(folder) != before:
            raise UserError(f"{folder}: another process has written a run there meanwhile; give the command again")
        for place in [folder, *filter(Path.is_dir, folder.iterdir())]:
            remove_leftovers(place)
        write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
        write_record(folder, record)
        handler = _log_to(folder / "run.log")
        try:
            yield
        except BaseException as error:
            told = explained(error, ADVICE)
            if record["status"] not in ENDED:
                _record_failure(folder, record, told or error)
            if told is None or told is error:
                raise
            raise told from error
        finally:
            if handler is not None:
                logging.getLogger().removeHandler(handler)
                if logging.lastResort is not None:
                    logging.getLogger("diffora").removeHandler(logging.lastResort)
                with suppress(OSError):  # the disk has no space for its last lines
                    handler.close()


ADVICE = "try a smaller batch_size, rank or model, or a machine with more memory"


def _record_failure(folder: Path, record: dict[str, Any], error: BaseException) -> None:
    """Record why a run failed. If this fails as well, the message of the first failure matters more."""
    record["status"] = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
    try:
        record |= {"error": str(error) or type(error).__name__, "memory": peaks()}
        write_record(folder, record)
    except Exception as second:
        if str(second) != str(error):
            log.warning(f"the failure of the run could not be recorded: {second}")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock during the block. The lock of a process that died does not count.

    Raises:
        UserError: another process holds the lock.
    """
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"{folder}: another process is at work there") from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise UserError(f"{folder / '.lock'} cannot be written: {reason(error)}") from error
        log.warning(f"{folder}: this file system has no locks; make sure that no other process uses this folder")
    try:
        yield
    finally:
        with suppress(OSError):  # losing the lock at the end does no harm
            lock.release()


NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def _log_to(file: Path) -> logging.Handler | None:
    """Write all messages to a file as well. Returns the handler, or warns and returns None if it cannot be written."""
    if logging.getLogger("diffora").level == logging.NOTSET:  # as a library, without Hydra's logging
        logging.getLogger("diffora").setLevel(logging.INFO)
    try:
        handler = logging.FileHandler(file, encoding="utf-8")
    except OSError as error:
        log.warning(f"{file} cannot be written: {reason(error)}")
        return None
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    if not logging.getLogger("diffora").hasHandlers() and (screen := logging.lastResort) is not None:
        logging.getLogger("diffora").addHandler(screen)  # Python uses it only as long as there is no other handler
    logging.getLogger().addHandler(handler)
    return handler
