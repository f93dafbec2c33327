"""Whether the files of a complete run are still those that its settings name now."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffora import digests
from diffora.errors import UserError
from diffora.settings.sections import Settings
from diffora.tasks.base import Task

log = logging.getLogger(__name__)


def data_now(settings: Settings, task: Task) -> str | None:
    """The hash of the rows that some settings name now; None for rows of the hub, which would need the network.

    None with a warning if they cannot be read any more.
    """
    if getattr(settings.task, "path", None) is None:
        return None
    try:
        return task.load().data_hash
    except UserError as error:
        log.warning(f"the data cannot be compared with those of complete runs: {error}")
        return None


def files_now(settings: Settings, data_hash: str | None) -> dict[str, Any]:
    """Digests of the data, the backbone and the other files that some settings name now, for `check_unchanged`.

    Files that cannot be read any more are left out, with a warning.
    """
    now: dict[str, Any] = {"data": data_hash}
    try:
        now["backbone"] = digests.backbone(settings.model.path)
        now["inputs"] = settings.method.inputs
    except UserError as error:
        log.warning(f"the files of this setting cannot be compared with those of complete runs: {error}")
    return now


def check_unchanged(folder: Path, done: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compare a complete run with the files that its settings name now.

    Args:
        folder: of the run.
        done: its record.
        now: from `files_now`.

    Raises:
        UserError: they changed, so the results do not belong to them.
    """
    old = {"data": done.get("data_hash"), "backbone": done.get("backbone"), "inputs": done.get("inputs")}
    if changed := digests.changes(old, now):
        raise UserError(
            [f"{folder} is complete, but its results are not those of today's files; choose another folder:", *changed]
        )
