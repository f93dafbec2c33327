"""Errors of transformers, turned into one message that says what the user can do."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffora.errors import UserError, called, out_of_memory
from diffora.files import read_json
from diffora.hub import resolve, why_unreachable
from diffora.settings.sections import Model


def trusts_code(settings: Model) -> bool:
    """``model.trust_remote_code``. Runs of earlier versions do not have this setting."""
    return settings.trust_remote_code


@contextmanager
def loading(settings: Model, what: str = "model") -> Iterator[dict[str, Any]]:
    """Turn the many errors of transformers' loading functions into one message.

    Args:
        settings: the ``model`` section.
        what: what is loaded, for the message.

    Yields:
        The first arguments of ``from_pretrained``: where the files are, whether the network may be used, and whether
        code from the checkpoint may run.

    Raises:
        UserError: the loading failed.
    """
    path, local = resolve(settings.path)
    unreachable = None if local else why_unreachable()
    try:
        yield {
            "pretrained_model_name_or_path": path,
            "local_files_only": local or unreachable is not None,
            "trust_remote_code": trusts_code(settings),
        }
    except UserError:
        raise
    except Exception as error:
        raise UserError(_message(error, settings, what, unreachable)) from error


def _message(error: Exception, settings: Model, what: str, unreachable: str | None) -> str:
    """Why the loading failed, and what to do about it. A damaged JSON file raises its own error instead."""
    path, local = resolve(settings.path)
    place = f"model.path={settings.path}"
    if shortage := out_of_memory(error):
        return f"{place}: {shortage}; try model.dtype=bfloat16 or a smaller model"
    if "trust_remote_code" in str(error) and not trusts_code(settings):
        return (
            f"{place}: its {what} is Python code that comes with the checkpoint (auto_map). This code is not run. If "
            "you have read it and trust its authors, set model.trust_remote_code=true"
        )
    if lacks := re.search(
        r"configuration class <class '.*?(\w+)Config'> for this kind of AutoModel: (\w+)", str(error)
    ):
        return (
            f"{place}: transformers has no {lacks[2]} for a {lacks[1]} model, so there is no head of the kind that "
            "this task needs: use another backbone"
        )
    if local:
        for file in sorted(Path(path).glob("*.json")):
            read_json(file)
        return f"{place}: its {what} cannot be read by transformers: {one_line(error)}"
    return (
        f"cannot get {path} from the model hub: "
        + (f"{unreachable}, and it is not in the local cache" if unreachable else one_line(error))
        + "\n  Either give a folder that you have: model.path=<folder>"
        f"\n  or try what needs no network: {called('train')} experiment=quickstart"
    )


def one_line(error: Exception) -> str:
    """The message of a library's exception, on one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} …"


def first_three(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" (and {len(names) - 3} more)" if len(names) > 3 else "")
