"""Text files of rows, CSV and JSON lines, read strictly: what is not as the format says is refused, not guessed."""

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}


def utf8(file: Path) -> str:
    """The text of a file, without a byte-order mark.

    Raises:
        ValueError: it is not text in UTF-8; says in which line.
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
        raise ValueError(f"line {line} holds a NUL byte: it is no text file, or is damaged there")
    return text


# --- CSV ---


def read_csv(
    text: str,
    wanted: Sequence[str],
    is_record: Callable[[dict[str, str]], bool | None],
    notes: list[str],
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a CSV file (RFC 4180): commas, fields in double quotes where needed, quotes inside doubled.

    A quote that is forgotten makes one field of many rows. Such a field mostly does not end as the format says. Where
    it does, it holds lines that are rows themselves, and is refused for that; texts of several lines are not.

    Args:
        wanted: columns that must be there, to tell files with other separators.
        is_record: whether a line's fields, by column, look like those of a row; None where nothing can tell.
        notes: grows by what there is to say.

    Raises:
        ValueError: what is wrong, with row (the first data row is 1) and line.
    """
    lines = list(io.StringIO(text, newline=""))  # ends at \n, \r\n and \r, as the reader's lines do
    if not lines:
        raise ValueError("the file is empty, not even a header line")
    _check_separator(lines[0], wanted)
    csv.field_size_limit(max(csv.field_size_limit(), min(len(text), sys.maxsize)))
    header: list[str] = []
    rows: list[list[str]] = []
    spanning: list[tuple[int, int, int]] = []  # row, first line, line after the last
    ragged: list[tuple[int, int, int, int]] = []  # row, fields, first line, line after the last
    begin = blank = 0
    reader = csv.reader(lines, strict=True)
    try:
        for row in reader:
            end = reader.line_num
            if not row or (len(row) == 1 and len(header) != 1 and not row[0].strip()):
                blank += 1
            elif not header:
                header = row
            else:
                rows.append(row)
                if len(row) != len(header):
                    ragged.append((len(rows), len(row), begin, end))
                elif end - begin > 1:
                    spanning.append((len(rows), begin, end))
            begin = end
    except csv.Error as error:
        where, last = _place(len(rows) + 1, begin, reader.line_num, header, lines), reader.line_num
        if "end of data" in str(error):
            what = (
                f"a quote opens a field here that is never closed, over {last - begin:,} lines to the end of the file"
            )
        else:
            what = "behind a field's closing quote there is neither a comma nor the end of the line"
            if last - begin > 1:
                what = f"a quote opens a field here that goes on to line {last}; there, {what}"
        raise ValueError(f"{where}: {what}{_HINT}") from None
    if not header:
        raise ValueError("the file is empty, not even a header line")
    if ragged:
        number, n, begin, end = ragged[0]
        span = f", which goes from line {begin + 1} to line {end}," if end - begin > 1 else ""
        more = f" (and {len(ragged) - 1} more such row{'s' if len(ragged) > 2 else ''})" if len(ragged) > 1 else ""
        fields = f"{n} field{'s' if n > 1 else ''}"
        raise ValueError(
            f"row {number} (data rows, counted from 1){span} has {fields}, the header has {len(header)}{more}"
        )
    for number, begin, end in spanning:
        if (line := _swallowed(lines[begin:end], header, is_record)) is not None:
            raise ValueError(
                f"{_place(number, begin, end, header, lines)}: a quote opens a field here that goes on to line {end}, "
                f"but line {begin + 1 + line} by itself looks like a row{_HINT}. If all of that is one text, give the "
                "rows as .jsonl or .parquet"
            )
    if spanning:
        longest = max(spanning, key=lambda span: span[2] - span[1])
        notes.append(
            f"{len(rows):,} rows from {len(lines):,} lines: {len(spanning):,} with fields of several lines, of which "
            f"row {longest[0]:,} is the longest with {longest[2] - longest[1]:,} lines"
        )
    note_blank(notes, blank)
    return header, rows


_HINT = '; quotes inside a field are written twice, and the field is put in quotes: "say ""hi"""'


def _check_separator(line: str, wanted: Sequence[str]) -> None:
    if all(name in line.split(",") for name in wanted):
        return
    for separator, name in SEPARATORS.items():
        names = [field.strip().strip('"') for field in line.split(separator)]
        if len(names) > 1 and all(column in names for column in wanted):
            raise ValueError(f"its fields are separated by {name}; separate them by commas")


def _place(row: int, begin: int, end: int, header: Sequence[str], lines: Sequence[str]) -> str:
    """Row, line and, of a row of several lines, the column of the field that the first line does not end."""
    if not header:
        return f"line {begin + 1}, the header"
    fields = next(csv.reader([lines[begin]]), [])
    column = f", column '{header[len(fields) - 1]}'" if end - begin > 1 and 0 < len(fields) <= len(header) else ""
    return f"row {row} (data rows, counted from 1; line {begin + 1}){column}"


def _swallowed(
    lines: Sequence[str], header: Sequence[str], is_record: Callable[[dict[str, str]], bool | None]
) -> int | None:
    """The first of the lines of one row that looks like a row of its own.

    Where the quote opens any field but the last, the last line holds what follows the field, and is not looked at.
    Where it opens the last field, the first line looks like a row in any case. Where nothing but the number of fields
    can tell, at least three lines must be looked at and all look so.
    """
    *before, rest = next(csv.reader([lines[0]]))  # what stands before the quote is read as usual
    in_last = len(before) == len(header) - 1
    found = []
    for i, line in list(enumerate(lines))[1:] if in_last else list(enumerate(lines))[:-1]:
        if i == 0:
            fields = [*before, *rest.rstrip("\r\n").split(",")]
        else:
            fields = line.rstrip("\r\n").removesuffix('"').split(",")
        if len(fields) == len(header) > 1:
            looks = is_record(dict(zip(header, fields, strict=True)))
            if looks:
                return i
            if looks is None:
                found.append(i)
    return found[0] if len(found) == len(lines) - 1 >= 3 else None


# --- JSON lines ---


class BadLine(ValueError):
    """A line that is no JSON object.

    Args:
        reason: what is wrong, to be put behind "row …"; equal for equal faults.
        line: of which the beginning is shown.
    """

    def __init__(self, reason: str, line: bytes) -> None:
        self.reason, self.shown = reason, line.strip()[:60].decode(errors="replace")
        super().__init__(f"{reason}: {self.shown}")


def json_lines(lines: Iterable[bytes], notes: list[str] | None = None) -> Iterator[tuple[int, Any]]:
    """(line number from 1, object or `BadLine`) for each line that is not blank; ``notes`` gets how many are."""
    blank = 0
    for number, line in enumerate(lines, start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            blank += 1
            continue
        row: Any
        try:
            row = json.loads(line.decode(), object_pairs_hook=once)
        except (ValueError, RecursionError) as error:
            row = BadLine(_reason(error, line), line)
        if isinstance(row, dict | BadLine):
            yield number, row
        else:
            yield number, BadLine(_ARRAY if isinstance(row, list) else "is not a JSON object", line)
    if notes is not None:
        note_blank(notes, blank)


def note_blank(notes: list[str], lines: int) -> None:
    """Say how many lines are blank, if any are."""
    if lines:
        notes.append(f"{lines:,} blank line{'s' if lines > 1 else ''}")


_ARRAY = "is not a JSON object but an array; write one object in each line, without [ ] and commas around"


class _Twice(ValueError):
    pass


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For ``json.loads``: an object, of which no key may stand there twice.

    Raises:
        ValueError: one does.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(f"has the key '{next(name for name in names if names.count(name) > 1)}' twice")
    return found


def _reason(error: Exception, line: bytes) -> str:
    if isinstance(error, _Twice):
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
