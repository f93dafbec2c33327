"""The ``manifest.json`` of an exported adapter: digests of its files, and facts that the other files cannot hold."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from diffora.errors import UserError
from diffora.files import file_digest, json_digest, read_json, write_text

MANIFEST = "manifest.json"
ADAPT, TRAINED = "diffora.json", "weights.safetensors"
"""How to adapt the model, and what was trained, for methods that no PEFT format holds."""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""PEFT's names of its files."""
SELECTION = "selection.json"
"""Which modules were selected, in the adapters of methods that select."""
EXACT = "exact.safetensors"
"""B of modules whose scale would round it."""
MOVABLE = ("base_model_name_or_path", "revision", "base_model")
"""Keys of JSON files that the digests leave out. They change when an adapter is moved or published."""
NAME = re.compile(r"[\w-]+(\.[\w-]+)+", re.ASCII)
"""Names of files beside the manifest."""


ENTRIES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (lambda v: isinstance(v, str), "the name of a class"),
    "layers": (lambda v: type(v) is int, "a whole number"),
    "arguments": (lambda v: isinstance(v, dict), "arguments by name"),
    "labels": (lambda v: isinstance(v, list) and all(isinstance(x, str) for x in v), "a list of class names"),
    "backbone": (lambda v: isinstance(v, dict) and isinstance(v.get("files", {}), dict), "digests by file"),
}
"""What the facts about the model must be, where there are any."""


def write_manifest(folder: Path, files: Iterable[str], content: Mapping[str, Any]) -> None:
    """Write the manifest of a folder. Call this after all other files are written.

    Args:
        folder: the adapter's.
        files: names of the files that `read_manifest` will check.
        content: further entries.
    """
    whole = {**content, "files": {name: digest_of(folder / name) for name in files}}
    write_text(folder / MANIFEST, json.dumps(whole | {"sha256": json_digest(whole)}, indent=1) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an adapter, after a check that all its files are there and unchanged.

    Raises:
        FileNotFoundError: there is no manifest.
        UserError: the manifest or one of its files is damaged, was changed, or is missing; it names all of them.
    """
    file = folder / MANIFEST
    content = read_json(file)
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not all(map(NAME.fullmatch, files)):
        raise UserError(f"{file} is not the manifest of an adapter: it has no digests of files beside it")
    if content.pop("sha256", None) != json_digest(content):
        raise UserError(f"{file} is damaged or was edited: it does not have the digest that was written into it")
    problems = [
        f"{file}: {key}={value!r:.100} must be {words}"
        for key, (fits, words) in ENTRIES.items()
        if (value := content.get(key)) is not None and not fits(value)
    ]
    for name, digest in files.items():
        try:
            found = digest_of(folder / name)
        except FileNotFoundError:
            problems.append(f"{folder / name} is missing, but {MANIFEST} lists it: copy the whole folder")
        except UserError as error:
            problems += error.problems
        except OSError as error:
            problems.append(f"{folder / name} cannot be read: {error.strerror or error}")
        else:
            if found != digest:
                problems.append(
                    f"{folder / name} is damaged or was changed after the export: its digest is not the one in "
                    f"{MANIFEST}. Copy the folder from the run again"
                )
    if problems:
        raise UserError(problems)
    return dict(content)


def digest_of(file: Path) -> str:
    """sha256 of a file of an export. For JSON: of its content, without the entries in `MOVABLE`."""
    if file.suffix != ".json":
        return file_digest(file)
    content = read_json(file)
    if isinstance(content, dict):
        content = {key: value for key, value in content.items() if key not in MOVABLE}
    return json_digest(content)
