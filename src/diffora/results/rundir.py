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
from diffora.files import read_yaml, write_text
from diffora.results.record import peaks, read_record, write_record

log = logging.getLogger(__name__)


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
        before = read_yaml(folder / "config.yaml")
        changed = config.differences(before if isinstance(before, dict) else {}, config.plain(cfg))
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
