"""Finds an adapter: in a folder, or on the Hugging Face hub."""

from pathlib import Path

from diffora.adapters.manifest import ADAPT, CONFIG, EXACT, MANIFEST, SELECTION, TRAINED, WEIGHTS, digest_of
from diffora.errors import UserError
from diffora.files import json_digest, read_json
from diffora.hub import hub_failure, is_hub_id, why_unreachable

READ = (CONFIG, WEIGHTS, EXACT, SELECTION, ADAPT, TRAINED)
"""Files of an adapter that are read, where it has them. Nothing else is downloaded."""


def place_problem(place: Path | str) -> str | None:
    """What is wrong with the place of an adapter, as far as it can be seen without the network; None if nothing is."""
    folder = Path(place).expanduser()
    if folder.is_dir():
        if any((folder / name).exists() for name in (ADAPT, CONFIG)):
            return None
        inside = f"; {folder / 'adapter'} is one" if (folder / "adapter").is_dir() else ""
        return f"{folder} is not an adapter: it has no {ADAPT} and no {CONFIG}{inside}"
    if folder.exists():
        return f"{folder} is not a folder"
    return None if is_hub_id(str(place)) else f"{place} is not a folder, and no hub id such as owner/name"


def local_copy(place: Path | str, revision: str | None = None) -> Path:
    """The folder of an adapter. An adapter on the hub is downloaded, or taken from the cache of an earlier download.

    Args:
        place: a folder, or a hub id such as ``owner/name``. A folder of that name has priority.
        revision: branch, tag or commit on the hub.

    Raises:
        UserError: there is no such adapter, or the hub cannot be used.
    """
    if problem := place_problem(place):
        raise UserError(problem)
    if (folder := Path(place).expanduser()).is_dir():
        if revision is not None:
            raise UserError(f"revision={revision} is for adapters on the hub, and {place} is a folder")
        return folder
    from huggingface_hub import snapshot_download

    unreachable = why_unreachable()
    try:
        # Without a connection, the client would try for half a minute.
        found = snapshot_download(
            str(place),
            revision=revision,
            allow_patterns=[*READ, MANIFEST],
            local_files_only=unreachable is not None,
        )
    except Exception as error:  # errors of connection, hub and disk have no common base class
        reason = f"{unreachable}, and it is not in the local cache" if unreachable else hub_failure(error, str(place))
        raise UserError(f"{place} is not a folder, and cannot be loaded from the hub: {reason}") from error
    if not any((Path(found) / name).is_file() for name in (ADAPT, CONFIG)):
        raise UserError(f"{place} on the hub is not an adapter: it has no {ADAPT} and no {CONFIG}")
    return Path(found)


def adapter_digest(place: str) -> str:
    """sha256 of the files of an adapter, in a folder or on the hub. The name of the base model does not count.

    Raises:
        UserError: there is no adapter.
    """
    folder = local_copy(place)
    files = [digest_of(folder / name) for name in READ if (folder / name).is_file()]
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    known = manifest if isinstance(manifest, dict) else {}  # `read_manifest` refuses anything else
    facts = {key: known.get(key) for key in ("modules", "shared", "heads", "form")}
    return json_digest([files, facts])
