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

    Only settings are compared here, with those in the record. Checkpoints know what they were made with themselves:
    `diffora.training.checkpoint.earlier`.

    Raises:
        UserError: the folder holds a run and ``resume`` is not asked for, or one of another configuration.
    """
    from diffora.training.checkpoint import has_work

    old = read_record(folder) or {}
    status = old.get("status")
    if not cfg.resume:
        if status == "completed" or has_work(folder):
            raise UserError(
                f"{folder} holds a run ({status or 'without a readable run.json'}) already: continue it with "
                "resume=true, or choose another hydra.run.dir"
            )
        return None
    if status == "dry_run" or "config_hash" not in old:
        return None
    if old["config_hash"] != config.config_hash(cfg):
        raise UserError(
            [
                f"{folder} was started with other settings, and to continue it takes the same; remove it, or choose "
                "another folder with hydra.run.dir=, or hydra.sweep.dir= of a sweep:",
                *(_changed_settings(cfg, folder) or ["its run.json is the record of another run than its config.yaml"]),
            ]
        )
    if status != "completed":
        return None
    if not any((folder / name).is_dir() for name in ("adapter", "model")):
        log.warning(f"{folder}: run.json says that the run is complete, but there is no adapter/ or model/: going on")
        return None
    log.info(f"{folder} is complete already")
    return old


def _changed_settings(cfg: DictConfig, folder: Path) -> list[str]:
    try:
        before = read_yaml(folder / "config.yaml")
    except FileNotFoundError:
        return ["its config.yaml, which would say which, is gone"]
    except UserError as error:
        return [str(error)]
    return config.differences(before if isinstance(before, dict) else {}, config.plain(cfg))


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
