"""Finds a model: in a folder, in this package, or on the Hugging Face hub if it can be reached."""

from functools import cache
from pathlib import Path

from diffora.errors import UserError, first_line, without_secrets

PROBE_SECONDS = 5.0
"""How long to wait for an answer of the hub."""
EMBEDDED = Path(__file__).parent / "assets" / "tiny"


@cache
def why_unreachable() -> str | None:
    """Why the hub (or the mirror in HF_ENDPOINT) cannot be used; None if it answers within `PROBE_SECONDS`.

    It is asked once per process. The hub's own clients would retry for half a minute.
    """
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return "offline mode is on (HF_HUB_OFFLINE)"
    endpoint = huggingface_hub.constants.ENDPOINT
    try:
        huggingface_hub.get_session().head(endpoint, timeout=PROBE_SECONDS)
    except Exception as error:  # whatever the http library in use raises
        return without_secrets(f"{endpoint} does not answer ({first_line(error)})")
    return None


def resolve(path: str) -> tuple[str, bool]:
    """Resolve ``model.path``.

    Args:
        path: a folder, a hub id, ``embedded``, or ``embedded:<name>`` for one of the models in this package.

    Returns:
        (folder or hub id for transformers, whether it is a local folder).

    Raises:
        UserError: it looks like a folder but is not one, it has no config.json, or it cannot be a hub id.
    """
    if path == "embedded":
        return str(EMBEDDED), True
    if path.startswith("embedded:"):
        folder = EMBEDDED.parent / path.removeprefix("embedded:")
        if not (folder / "config.json").is_file():
            present = ", ".join(
                sorted(f"embedded:{file.parent.name}" for file in EMBEDDED.parent.glob("*/config.json"))
            )
            raise UserError(f"model.path={path} does not come with this project; these do: {present}")
        return str(folder), True
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"model.path={path} has no config.json: it is not a folder of a transformers model")
        return str(folder), True
    if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(f"model.path={path} is not a folder; give a folder of a transformers model or a hub id")
    if not _is_valid_id(path):
        raise UserError(f"model.path={path} is neither a folder nor a hub id such as owner/name")
    return path, False


def is_hub_id(name: str) -> bool:
    """Whether a name can be that of somebody's repository on the hub: ``owner/name``."""
    return _is_valid_id(name) and name.count("/") == 1


def _is_valid_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined, unused-ignore]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def hub_failure(error: Exception, name: str) -> str:
    """Why the hub did not do what it was asked, and what helps.

    Args:
        error: what a client of the hub raised.
        name: of the repository.
    """
    import huggingface_hub
    from huggingface_hub import errors

    endpoint = without_secrets(huggingface_hub.constants.ENDPOINT)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return f"{name} is gated: ask for access at {endpoint}/{name}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name} has no such revision"
    if status == 401 and not isinstance(error, errors.RepositoryNotFoundError):
        return f"{endpoint} does not know your token: log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        return f"{endpoint} has no {name}, or it is private and you are not logged in (`hf auth login`)"
    if status == 403:
        return (
            f"your token may not do this with {name}: it needs write access ({endpoint}/settings/tokens), and the "
            "owner must be you or an organisation of yours"
        )
    if status == 409:
        return f"{name} was changed by somebody else at the same moment: give the command again"
    if status is not None:
        return f"{endpoint} answers with an error (HTTP {status}): try again later"
    return f"{endpoint} cannot be reached ({without_secrets(first_line(error))})"
