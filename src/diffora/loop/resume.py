"""Reads what an earlier attempt left in a run directory, so that a run can resume."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffora import digests
from diffora.core.selection import Selection
from diffora.errors import UserError
from diffora.files import file_digest, json_digest, read_json, write_text
from diffora.loop.checkpoint import check_content, continuing, newest_checkpoint

log = logging.getLogger(__name__)

SEARCH = "search.json"
"""The last file that a search writes: its seconds, what it was made with, digests of its files, and its own digest."""
SEARCH_FILES = ("selection.json", "selection.safetensors", "trajectory.json", "members.json")
"""The other files that a search may write."""


@dataclass
class Earlier:
    """The files of an earlier attempt that a run continues from.

    Attributes:
        checkpoints: for each stage, the newest undamaged checkpoint and its content.
        search: the selection of a finished search or score, and the seconds that it took.
        prefix: facts about the cached prefix of the finished search, as `Parts.prefix`.
    """

    checkpoints: dict[str, tuple[Path, dict[str, Any]]] = field(default_factory=dict)
    search: tuple[Selection, float] | None = None
    prefix: dict[str, Any] = field(default_factory=dict)

    @property
    def exists(self) -> bool:
        """Whether there is anything to continue from."""
        return bool(self.checkpoints or self.search)


def has_work(folder: Path) -> bool:
    """Whether a run directory holds anything that a run could resume from."""
    return any((folder / "checkpoints").glob("*.ckpt")) or (folder / SEARCH).is_file()


def earlier(folder: Path, made_with: Mapping[str, Any]) -> Earlier:
    """What an earlier attempt with the same settings, data and backbone left in a run directory.

    Args:
        made_with: of the present run, from `diffora.digests.made_with`.

    Raises:
        UserError: the earlier attempt used other settings, data or backbone, which the message lists; or its files
            cannot be used.
    """
    found = Earlier()
    search, content = _finished_search(folder)
    found.search = search
    found.prefix = content.get("prefix", {})
    origins = {folder / SEARCH: content["made_with"]} if content else {}
    for stage in ("finetune",) if search else ("search", "finetune"):
        if (newest := newest_checkpoint(folder / "checkpoints", stage)) is not None:
            with continuing(newest[0]):
                check_content(newest[1])
            found.checkpoints[stage] = newest
            origins[newest[0]] = newest[1]["made_with"]
    for file, origin in origins.items():
        if changed := digests.changes(origin, made_with):
            raise UserError(
                [
                    f"{file} was made with something else, and a run can only resume with the same. Undo the change, "
                    f"remove {folder}, or choose another folder with hydra.run.dir= (a sweep: hydra.sweep.dir=):",
                    *changed,
                ]
            )
    return found


def write_search(folder: Path, seconds: float, made_with: Mapping[str, Any], prefix: Mapping[str, Any]) -> None:
    """Record that a search or score is finished. Call it after all other files are written.

    Args:
        folder: the run directory.
        seconds: how long it took.
        made_with: from `diffora.digests.made_with`.
        prefix: facts about its cached prefix, as `Parts.prefix`.
    """
    files = {name: file_digest(folder / name) for name in SEARCH_FILES if (folder / name).is_file()}
    content = {"seconds": seconds, "files": files, "made_with": made_with, "prefix": prefix}
    write_text(folder / SEARCH, json.dumps(content | {"digest": json_digest(content)}) + "\n")


def _finished_search(folder: Path) -> tuple[tuple[Selection, float] | None, dict[str, Any]]:
    """((selection, seconds), the content of its file); (None, {}) if no search was finished."""
    file = folder / SEARCH
    try:
        content = read_json(file)
    except FileNotFoundError:
        return None, {}
    except UserError:
        content = None
    if not isinstance(content, dict) or content.pop("digest", None) != json_digest(content):
        log.warning("%s is damaged: the search continues from its checkpoint, or starts again", file)
        return None, {}
    seconds, files = content["seconds"], content["files"]
    if not all((folder / name).is_file() for name in ("selection.json", *files)):
        return None, {}
    for name, digest in files.items():
        if file_digest(folder / name) != digest:
            if name in ("trajectory.json", "members.json"):  # they are only for people to read
                log.warning("%s is damaged: writing it again from the search's last checkpoint", folder / name)
                return None, {}
            raise UserError(
                f"{folder / name} is not as the search wrote it: it is damaged or edited. Remove it, and it is written "
                "again from the search's last checkpoint; to use an edited one, start another run with "
                "method.selection=<a copy>"
            )
    return (Selection.load(folder / "selection.json"), seconds), content
