"""The run directory: what it may hold already, and the account of a run that is kept in it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from diffora import config
from diffora.errors import UserError
from diffora.files import write_text
from diffora.results.record import peaks, read_record, write_record

log = logging.getLogger(__name__)


MARKS = ("run.json", ".lock")  # what every run leaves, the second as soon as it begins
OTHERS = (".log", ".out", ".err", ".txt")  # what a shell or a scheduler writes beside a run


def check_place(folder: Path) -> None:
    """Refuse a folder with content that is no run's: nothing of it is to be overwritten, or mixed with a run.

    Raises:
        UserError: names what is there.
    """
    if not folder.is_dir() or any((folder / mark).exists() for mark in MARKS):
        return
    if strange := _strange(folder):
        raise UserError(
            f"hydra.run.dir={folder} is no run directory and not empty (it has {strange}): give a new folder"
        )


def check_sweep_place(folder: Path) -> None:
    """`check_place` for the folder of a sweep, which holds those of its runs.

    Raises:
        UserError: names what is there.
    """
    here, place = Path.cwd().resolve(), folder.resolve()
    if place == here or place in here.parents:
        raise UserError(f"hydra.sweep.dir={str(folder)!r} is the current folder, or above it: give a new folder")
    if not place.is_dir() or (place / "multirun.yaml").exists():
        return
    runs = any((inner / mark).exists() for inner in place.glob("*") for mark in (*MARKS, "multirun.yaml"))
    strange = None if runs else _strange(place)
    if strange and any(any(inner.glob("*")) for inner in place.glob("*") if inner.is_dir()):
        raise UserError(f"hydra.sweep.dir={folder} has no runs and is not empty (it has {strange}): give a new folder")


def _strange(folder: Path) -> str | None:
    names = (path.name for path in folder.iterdir())
    return next((name for name in sorted(names) if not name.startswith(".") and not name.endswith(OTHERS)), None)


def finished(cfg: DictConfig, folder: Path) -> dict[str, Any] | None:
    """The record of a run that ``resume=true`` finds complete; None where there is something left to do.

    Raises:
        UserError: the folder holds a run and ``resume`` is not asked for, or one of another configuration.
    """
    old = read_record(folder)
    if old is None or old["status"] == "dry_run":
        return None
    if not cfg.resume:
        if old["status"] == "completed" or any((folder / "checkpoints").glob("*.ckpt")):
            raise UserError(
                f"{folder} holds a run ({old['status']}) already: continue it with resume=true, or choose another "
                "hydra.run.dir"
            )
        return None
    if old["config_hash"] != config.config_hash(cfg):
        before = OmegaConf.load(folder / "config.yaml")
        assert isinstance(before, DictConfig)
        changed = config.differences(config.plain(before), config.plain(cfg))
        raise UserError(
            [
                f"{folder} was started with other settings, and to continue it takes the same; remove it, or choose "
                "another folder with hydra.run.dir=, or hydra.sweep.dir= of a sweep:",
                *changed,
            ]
        )
    if old["status"] != "completed":
        return None
    log.info(f"{folder} is complete already")
    return old


@contextmanager
def account(cfg: DictConfig, folder: Path, record: dict[str, Any]) -> Iterator[None]:
    """Keep the account of a run: its configuration, its log, and how it ended if it did not end well.

    Raises:
        UserError: another process is at work in the folder.
    """
    from diffora.training.stages import is_main

    if not is_main():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(f"{folder}: another process is at work there") from error
    write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    write_record(folder, record)
    handler = logging.FileHandler(folder / "run.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger().addHandler(handler)
    if logging.getLogger("diffora").level == logging.NOTSET:  # used as a library, without Hydra's logging
        logging.getLogger("diffora").setLevel(logging.INFO)
    try:
        yield
    except BaseException as error:
        record["status"] = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        record |= {"error": str(error) or type(error).__name__, "memory": peaks()}
        write_record(folder, record)
        raise
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
        lock.release()
