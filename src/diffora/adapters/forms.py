"""Writes the adapter of a run again in another form, from its files alone."""

import json
import shutil
from pathlib import Path
from typing import Any

from diffora.adapters.manifest import CONFIG, MANIFEST, SELECTION, read_manifest, write_manifest
from diffora.adapters.pairs import UNIFORM, StoredPairs, write_pairs
from diffora.errors import UserError
from diffora.files import atomic_folder, read_json


def read_pairs(folder: Path) -> tuple[dict[str, Any], StoredPairs | None]:
    """The manifest of an adapter that this package wrote, and its low-rank pairs; None if it has another format.

    Raises:
        UserError: there is no manifest, or files are damaged.
    """
    try:
        manifest = read_manifest(folder)
    except FileNotFoundError:
        raise UserError(f"{folder} has no {MANIFEST}: it is not an adapter of this package") from None
    return manifest, StoredPairs.read(folder, manifest) if "modules" in manifest else None


def rewrite(folder: Path, to: Path, form: str) -> dict[str, Any]:
    """Write an adapter again in the form ``uniform`` or ``compact``. Ranks, scales and sharing stay as they are.

    Adapters that are no low-rank pairs have only one format, so that they are copied.

    Args:
        folder: the adapter of a run.
        to: the new folder. It is written completely or not at all.
        form: ``uniform`` or ``compact``.

    Returns:
        The manifest of the new adapter.

    Raises:
        UserError: files are damaged, or the adapter has only one format and ``form`` is ``compact``.
    """
    manifest, pairs = read_pairs(folder)
    if pairs is None and form != UNIFORM:
        raise UserError(f"form={form}: {folder} has no low-rank pairs, so that there is only the form {UNIFORM}")
    with atomic_folder(to) as scratch:
        if pairs is None:
            for name in (*manifest["files"], MANIFEST):
                shutil.copyfile(folder / name, scratch / name)
            return manifest
        if SELECTION in manifest["files"]:
            shutil.copyfile(folder / SELECTION, scratch / SELECTION)
        config = read_json(folder / CONFIG)
        dropout = {name: rate for name, (_, _, rate) in pairs.modules.items()}
        facts = {key: value for key, value in manifest.items() if key != "files"}
        write_pairs(scratch, pairs.all(), pairs.groups, dropout, pairs.whole(), config, facts, form)
        return read_manifest(scratch)


NAMES = ("base_model_name_or_path", "base_model", "name_or_path", "_name_or_path")
"""Keys of the JSON files that name the base model."""


def name_base_model(folder: Path, base_model: str | None) -> None:
    """Give the files of an export another name of the base model, in place, and renew the digests of its manifest.

    Use it before an export is published: the name in its files may be a local folder.

    Args:
        folder: an adapter or a whole model.
        base_model: hub id of the base model; None leaves the name out.
    """
    for file in folder.glob("*.json"):
        content = read_json(file)
        if file.name == MANIFEST or not isinstance(content, dict):
            continue
        renamed = content | {key: base_model for key in NAMES if key in content}
        if isinstance(model := content.get("model"), dict) and "path" in model:  # how to adapt (diffora.json)
            renamed["model"] = model | {"path": base_model}
        if file.name == SELECTION and "model" in (made := content.get("config") or {}):
            renamed["config"] = made | {"model": base_model}
        if renamed != content:
            file.write_text(json.dumps(renamed, indent=1) + "\n", encoding="utf-8")
    if (folder / MANIFEST).is_file():
        manifest = read_json(folder / MANIFEST)
        files = manifest.pop("files")
        manifest.pop("sha256")
        write_manifest(folder, files, manifest)
