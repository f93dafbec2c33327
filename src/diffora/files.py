"""Reading files that may be damaged or hostile, and writing files that are complete or absent."""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from diffora.errors import UserError

MOST_JSON = 256 * 2**20
"""Bytes of the largest JSON file that is read."""
MOST_YAML = 2**20
"""Bytes of the largest YAML file that is read."""
MOST_DEPTH = 100
"""Levels to which JSON and YAML may be nested."""


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: the file cannot be read, is too large, is nested too deeply or is not JSON in UTF-8.
    """
    text = read_text(Path(path), MOST_JSON)
    try:
        content = json.loads(text)
    except RecursionError:
        raise UserError(f"{path} is nested too deeply: at most {MOST_DEPTH} levels are read") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    _check_depth(content, path)
    return content


def read_yaml(path: Path) -> Any:
    """The content of a YAML file that may come from somebody else: plain values, nothing is resolved or built.

    Interpolations (``${…}``) stay text. Tags and aliases are refused: a few lines of aliases can stand for gigabytes.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: the file cannot be read, is too large, is nested too deeply, has aliases or is not YAML in UTF-8.
    """
    return parse_yaml(read_text(Path(path), MOST_YAML), path)


def parse_yaml(text: str, path: Path) -> Any:
    """`read_yaml` for text that was read already; ``path`` is for messages."""
    depth = 0
    try:
        for event in yaml.parse(text, Loader=_Loader):
            if isinstance(event, yaml.AliasEvent):
                place = f"{path}, line {event.start_mark.line + 1}"
                raise UserError(f"{place}: YAML aliases (*{event.anchor}) are not read; write the value out")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MOST_DEPTH:
                raise UserError(f"{path} is nested too deeply: at most {MOST_DEPTH} levels are read")
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2026-13-45
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # in C where it is there
    """Reads 1e-3 as a number, as OmegaConf does; YAML 1.1 wants 1.0e-3."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
    "-+0123456789.",
)


def read_text(path: Path, most: int) -> str:
    """The text of a file of at most ``most`` bytes; it raises what `read_json` does."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading from a pipe might never end
            raise UserError(f"{path} is not a regular file")
        with open(path, "rb") as file:
            content = file.read(most + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    if len(content) > most:
        raise UserError(f"{path} is too large: at most {most // 2**20} MB are read")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8: {error}") from None


def _check_depth(content: Any, path: Path) -> None:
    level = [content]
    for _ in range(MOST_DEPTH):
        level = [
            value
            for node in level
            if isinstance(node, dict | list)
            for value in (node.values() if isinstance(node, dict) else node)
            if isinstance(value, dict | list)
        ]
        if not level:
            return
    raise UserError(f"{path} is nested too deeply: at most {MOST_DEPTH} levels are read")


def file_digest(path: Path) -> str:
    """sha256 of a file's content, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A scratch path beside ``path`` that takes its place when the block ends well and vanishes when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield scratch
        with open(scratch, "rb") as file:
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically; what UTF-8 does not have (a half of a surrogate pair) is written as its escape."""
    with atomic(path) as scratch:
        scratch.write_text(text, encoding="utf-8", errors="backslashreplace")
