"""Lines of text files: UTF-8 text and JSON lines, read strictly. What does not follow the format is refused."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def utf8(file: Path) -> str:
    """The text of a file, without a byte-order mark.

    Raises:
        ValueError: it is not text in UTF-8; the message names the line.
    """
    content = file.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("its text is UTF-16; save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = content.count(b"\n", 0, error.start) + 1, content[error.start]
        raise ValueError(
            f"line {line}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8 (it may be Latin-1 or Windows-1252)"
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"line {line} holds a NUL byte: the file is not a text file, or is damaged there")
    return text


class BadLine(ValueError):
    """A line that is not a JSON object.

    Args:
        reason: what is wrong, in words that follow "row …". Equal faults have equal reasons.
        line: the line, whose beginning the message shows.
    """

    def __init__(self, reason: str, line: bytes) -> None:
        self.reason, self.shown = reason, line.strip()[:60].decode(errors="replace")
        super().__init__(f"{reason}: {self.shown}")


def json_lines(lines: Iterable[bytes], notes: list[str] | None = None) -> Iterator[tuple[int, Any]]:
    """Parse each line that is not blank.

    Args:
        notes: gets the number of blank lines.

    Yields:
        (line number from 1, the object or a `BadLine`)
    """
    blank = 0
    for number, line in enumerate(lines, start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            blank += 1
            continue
        row: Any
        try:
            row = json.loads(line.decode(), object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            row = BadLine(_reason(error, line), line)
        if isinstance(row, dict | BadLine):
            yield number, row
        else:
            yield number, BadLine(_ARRAY if isinstance(row, list) else "is not a JSON object", line)
    if notes is not None:
        note_blank(notes, blank)


def note_blank(notes: list[str], lines: int) -> None:
    """Note how many lines are blank, if any are."""
    if lines:
        notes.append(f"{lines:,} blank line{'s' if lines > 1 else ''}")


_ARRAY = "is not a JSON object but an array; write one object in each line, without [ ] and commas around"


class _DuplicateKey(ValueError):
    """An object has the same key twice."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs; for ``json.loads(…, object_pairs_hook=unique_keys)``.

    Raises:
        ValueError: a key is there twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _DuplicateKey(f"has the key '{next(name for name in names if names.count(name) > 1)}' twice")
    return found


def _reason(error: Exception, line: bytes) -> str:
    if isinstance(error, _DuplicateKey):
        return str(error)
    if line.lstrip().startswith(b"["):
        return _ARRAY
    if isinstance(error, UnicodeDecodeError):
        return f"is not UTF-8 (byte 0x{line[error.start]:02x})"
    if isinstance(error, RecursionError):
        return "is nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        extra = error.msg == "Extra data"
        return f"is not JSON ({'more than one object in the line' if extra else error.msg})"
    return f"is not JSON ({error})"
