"""Where a model is: a folder, one of the embedded models, or the Hugging Face hub, if that can be reached."""

from functools import cache
from pathlib import Path

from diffora.errors import UserError

PROBE_SECONDS = 5.0
EMBEDDED = Path(__file__).parent / "assets" / "tiny"


@cache
def why_unreachable() -> str | None:
    """None if the hub (or the mirror in HF_ENDPOINT) answers within `PROBE_SECONDS`; otherwise why not.

    Asked once and quickly: the hub's own clients retry for half a minute.
    """
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return "offline mode is on (HF_HUB_OFFLINE)"
    endpoint = huggingface_hub.constants.ENDPOINT
    try:
        huggingface_hub.get_session().head(endpoint, timeout=PROBE_SECONDS)
    except Exception as error:  # whatever the http library in use raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"{endpoint} does not answer ({reason})"
    return None


def resolve(path: str) -> tuple[str, bool]:
    """(what to give to transformers, whether it is a local folder) for ``model.path``.

    Raises:
        UserError: it looks like a folder and is none, or has no config.json.
    """
    if path == "embedded":
        return str(EMBEDDED), True
    if path.startswith("embedded:"):
        folder = EMBEDDED.parent / path.removeprefix("embedded:")
        if not (folder / "config.json").is_file():
            there = ", ".join(sorted(f"embedded:{file.parent.name}" for file in EMBEDDED.parent.glob("*/config.json")))
            raise UserError(f"model.path={path} does not come with this project; these do: {there}")
        return str(folder), True
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"model.path={path} has no config.json: it is not a folder of a transformers model")
        return str(folder), True
    if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(f"model.path={path} is not a folder; give a folder of a transformers model or a hub id")
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(path)
    except HFValidationError:
        raise UserError(f"model.path={path} is neither a folder nor a hub id such as owner/name") from None
    return path, False
