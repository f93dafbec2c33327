"""Finding the files of a split in the folder ``task.path``."""

import re
from collections.abc import Sequence
from pathlib import Path

from diffora.errors import UserError

OTHER_VALIDATION = re.compile(r"val|valid|validate|validation|dev|development|eval|evaluation|holdout", re.IGNORECASE)
"""Names that other projects and hub data sets give to rows for validation."""
LIKE_VALIDATION = re.compile(rf"({OTHER_VALIDATION.pattern})[._-].*", re.IGNORECASE)
"""A file of such rows."""


def check_folder(folder: Path, content: str) -> None:
    """Raise a UserError if ``task.path`` is not a folder.

    Args:
        content: what the folder should hold, for the message.
    """
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise UserError(f"task.path={folder} {what}; give the folder that holds {content}.")


def has_validation(folder: Path, formats: Sequence[str]) -> bool:
    """Whether a folder has files of the split "validation".

    Args:
        formats: accepted file extensions, without the dot, for the message.

    Raises:
        UserError: a file has another usual name for validation rows, so it would not be read.
    """
    found = any(file.stem.split("-")[0] == "validation" for file in folder.iterdir())
    if not found and (others := sorted(f.name for f in folder.iterdir() if LIKE_VALIDATION.match(f.name))):
        raise UserError(
            f"{folder}: {', '.join(others)} is not read under this name; call it "
            f"{' or '.join(f'validation.{kind}' for kind in formats)}, or move it elsewhere to take validation rows "
            "from the training rows"
        )
    return found


def split_files(
    folder: Path, split: str, problems: list[str], formats: Sequence[str] = ("parquet", "jsonl", "csv")
) -> list[Path]:
    """The files of a split: a single file, or numbered parquet shards as on the hub.

    Args:
        problems: grows by a message if there is no file, if there are too many, or if a shard is missing.
        formats: accepted file extensions, without the dot.
    """
    shard = re.compile(rf"{re.escape(split)}-(\d{{5}})-of-(\d{{5}})\.parquet")
    shards = {entry.name: match for entry in folder.iterdir() if (match := shard.fullmatch(entry.name))}
    totals = sorted({int(match[2]) for match in shards.values()})
    if not totals:
        names = [f"{split}.{kind}" for kind in formats]
        names.insert(1, f"{split}-00000-of-00001.parquet")
        file = find_file(folder, split, names, problems)
        return [file] if file else []
    others = [name for name in (f"{split}.{kind}" for kind in formats) if (folder / name).is_file()]
    if len(totals) > 1 or others:
        several = ", ".join([*sorted(shards), *others])
        problems.append(f"{folder}: more than one file or set of shards for the split '{split}': {several}; keep one.")
        return []
    names = [f"{split}-{i:05}-of-{totals[0]:05}.parquet" for i in range(totals[0])]
    if missing := [name for name in names if name not in shards]:
        problems.append(f"{folder}: shards of the split '{split}' are missing: {', '.join(missing)}.")
    return [folder / name for name in names if name in shards]


def find_file(folder: Path, split: str, names: Sequence[str], problems: list[str]) -> Path | None:
    """The one file among ``names`` that exists in the folder.

    Returns:
        None, and a message in ``problems``, if there is no such file or more than one.
    """
    present = sorted(entry.name for entry in folder.iterdir())
    found = [name for name in names if name in present]
    shards = [name for name in present if re.fullmatch(rf"{re.escape(split)}-\d{{5}}-of-\d{{5}}\.parquet", name)]
    if found:
        found += [name for name in shards if name not in found]
    if len(found) == 1:
        return folder / found[0]
    if found:
        problems.append(f"{folder}: more than one file for the split '{split}': {', '.join(found)}; keep one.")
    else:
        some = ", ".join(present[:10]) + (", …" if len(present) > 10 else "") if present else "nothing"
        problems.append(f"{folder}: no file for the split '{split}'; looked for {', '.join(names)}; found {some}.")
    return None
