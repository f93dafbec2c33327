"""CSV files (RFC 4180), read strictly: what does not follow the format is refused.

Fields are separated by commas, or by tabs in a .tsv file. A field that needs it stands in double quotes, and quotes
inside it are doubled.

A forgotten quote turns many rows into one field. Most such fields do not end as the format requires, so the reader
stops there. A field that ends correctly is refused if one of its lines looks like a row of its own; other texts of
several lines are accepted.
"""

import csv
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from diffora.tasks.messages import more
from diffora.tasks.sources.lines import note_blank

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_HINT = '; quotes inside a field are written twice, and the field is put in quotes: "say ""hi"""'

IsRecord = Callable[[dict[str, str]], bool | None]
"""Whether fields, by column, look like those of a row; None if this cannot be decided."""


class _Row(NamedTuple):
    """Where a row stands: its number (the first data row is 1), its first line, and the line after its last one.

    Lines count from 0 here, and from 1 in messages.
    """

    number: int
    begin: int
    end: int
    n_fields: int

    @property
    def n_lines(self) -> int:
        return self.end - self.begin


@dataclass
class _Csv:
    """A CSV file as far as it was read.

    Attributes:
        lines: of the file.
        separator: what stands between two fields.
        header: names of the columns; empty until they are read.
        rows: fields of each data row.
        spanning: rows of several lines that have as many fields as the header.
        ragged: rows that have more or fewer fields than the header.
        blank: number of blank lines.
    """

    lines: list[str]
    separator: str = ","
    header: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    spanning: list[_Row] = field(default_factory=list)
    ragged: list[_Row] = field(default_factory=list)
    blank: int = 0

    def place(self, row: _Row) -> str:
        """Row and line for a message; for a row of several lines also the column of the field that goes on."""
        if not self.header:
            return f"line {row.begin + 1}, the header"
        fields = next(csv.reader([self.lines[row.begin]], delimiter=self.separator), [])
        named = row.n_lines > 1 and 0 < len(fields) <= len(self.header)
        column = f", column '{self.header[len(fields) - 1]}'" if named else ""
        return f"row {row.number} (data rows, counted from 1; line {row.begin + 1}){column}"


def read_csv(
    text: str, wanted: Sequence[str], is_record: IsRecord, notes: list[str], separator: str = ","
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a CSV file.

    Args:
        text: the content of the file.
        wanted: columns that must be there; they reveal files with another separator.
        is_record: tells a line that is a row from a line that is part of a text.
        notes: grows by remarks about blank lines and texts of several lines.
        separator: what stands between two fields, a key of `SEPARATORS`.

    Raises:
        ValueError: what is wrong, with row (the first data row is 1) and line.
    """
    lines = list(io.StringIO(text, newline=""))  # splits at \n, \r\n and \r, as the csv reader does
    if not lines:
        raise ValueError("the file is empty, not even a header line")
    _check_separator(lines[0], wanted, separator)
    csv.field_size_limit(max(csv.field_size_limit(), min(len(text), sys.maxsize)))
    found = _parse(lines, separator)
    if not found.header:
        raise ValueError("the file is empty, not even a header line")
    if found.ragged:
        raise ValueError(_ragged(found))
    _refuse_swallowed_rows(found, is_record)
    if found.spanning:
        longest = max(found.spanning, key=lambda row: row.n_lines)
        notes.append(
            f"{len(found.rows):,} rows from {len(lines):,} lines: {len(found.spanning):,} of them have fields of "
            f"several lines; the longest is row {longest.number:,} with {longest.n_lines:,} lines"
        )
    note_blank(notes, found.blank)
    return found.header, found.rows


def _check_separator(line: str, wanted: Sequence[str], separator: str) -> None:
    if all(name in line.split(separator) for name in wanted):
        return
    for other, name in SEPARATORS.items():
        names = [field.strip().strip('"') for field in line.split(other)]
        alone = separator not in line  # one column whose name has separators, in a table of at least two
        if other != separator and len(names) > 1 and (alone or all(column in names for column in wanted)):
            raise ValueError(f"its fields are separated by {name}; separate them by {SEPARATORS[separator]}")


def _parse(lines: list[str], separator: str) -> _Csv:
    """Read all rows.

    Raises:
        ValueError: a quote is not closed, or something follows a closing quote.
    """
    found = _Csv(lines, separator)
    begin = 0
    reader = csv.reader(lines, strict=True, delimiter=separator)
    try:
        for fields in reader:
            end = reader.line_num
            if not fields or (len(fields) == 1 and len(found.header) != 1 and not fields[0].strip()):
                found.blank += 1
            elif not found.header:
                found.header = fields
            elif fields == found.header and len(fields) > 1:
                raise ValueError(
                    f"line {begin + 1} repeats the header, as where two files were joined: remove the line"
                )
            else:
                found.rows.append(fields)
                row = _Row(len(found.rows), begin, end, len(fields))
                if len(fields) != len(found.header):
                    found.ragged.append(row)
                elif row.n_lines > 1:
                    found.spanning.append(row)
            begin = end
    except csv.Error as error:
        last = reader.line_num
        where = found.place(_Row(len(found.rows) + 1, begin, last, 0))
        if "end of data" in str(error):
            what = (
                f"a quote opens a field here that is never closed, over {last - begin:,} lines to the end of the file"
            )
        else:
            between = {",": "a comma", "\t": "a tab"}[separator]
            what = f"after a field's closing quote there is neither {between} nor the end of the line"
            if last - begin > 1:
                what = f"a quote opens a field here that goes on to line {last}; there, {what}"
        raise ValueError(f"{where}: {what}{_HINT}") from None
    return found


def _ragged(found: _Csv) -> str:
    """The message for rows that have more or fewer fields than the header."""
    row = found.ragged[0]
    span = f", which goes from line {row.begin + 1} to line {row.end}," if row.n_lines > 1 else ""
    fields = f"{row.n_fields} field{'s' if row.n_fields > 1 else ''}"
    return (
        f"row {row.number} (data rows, counted from 1){span} has {fields}, the header has {len(found.header)}"
        f"{more(len(found.ragged))}"
    )


def _refuse_swallowed_rows(found: _Csv, is_record: IsRecord) -> None:
    """Raise a ValueError if a field of several lines seems to hold rows, because a quote was forgotten."""
    for row in found.spanning:
        if (line := _swallowed(found.lines[row.begin : row.end], found, is_record)) is not None:
            raise ValueError(
                f"{found.place(row)}: a quote opens a field here that goes on to line {row.end}, but line "
                f"{row.begin + 1 + line} by itself looks like a row{_HINT}. If all of that is one text, give the "
                "rows as .jsonl or .parquet"
            )


def _swallowed(lines: Sequence[str], file: _Csv, is_record: IsRecord) -> int | None:
    """The first line inside a row that looks like a separate row; None if there is none.

    If the quote opens any field but the last, the last line holds the fields that follow, so it is not examined. If the
    quote opens the last field, the first line always looks like a row, so it is not examined. If only the number of
    fields can tell, at least three lines must be examined and all of them must look like rows.
    """
    header, separator = file.header, file.separator
    *before, rest = next(csv.reader([lines[0]], delimiter=separator))  # the fields before the quote are read as usual
    in_last = len(before) == len(header) - 1
    found = []
    for i, line in list(enumerate(lines))[1:] if in_last else list(enumerate(lines))[:-1]:
        if i == 0:
            fields = [*before, *rest.rstrip("\r\n").split(separator)]
        else:
            fields = line.rstrip("\r\n").removesuffix('"').split(separator)
        if len(fields) == len(header) > 1:
            looks = is_record(dict(zip(header, fields, strict=True)))
            if looks:
                return i
            if looks is None:
                found.append(i)
    return found[0] if len(found) == len(lines) - 1 >= 3 else None
