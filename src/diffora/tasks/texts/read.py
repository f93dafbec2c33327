"""Rows of texts with labels from a .csv, .tsv, .jsonl or .parquet file, with checked texts and labels as text."""

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from diffora.tasks.account import Account, note_ignored
from diffora.tasks.labels import class_names
from diffora.tasks.messages import first_line, more, some
from diffora.tasks.sources.check_values import TEXT_TYPES, check_text
from diffora.tasks.sources.csv_file import read_csv
from diffora.tasks.sources.lines import BadLine, json_lines, utf8
from diffora.tasks.sources.readers import NUMBER, read_parquet

FORMATS = ("csv", "tsv", "jsonl", "parquet")
LONGEST = 100_000
"""Longer texts are cut here, in characters. No tokenizer keeps that many, and encoding all of them takes long."""
JOINT = " | "
"""What stands between the columns if more than two are joined into one text."""


@dataclass(frozen=True)
class Columns:
    """Which columns of a file are read.

    Attributes:
        texts: names of the text columns.
        label: name of the label column.
        numeric: whether labels are numbers (regression).
    """

    texts: tuple[str, ...]
    label: str
    numeric: bool

    @property
    def read_as(self) -> tuple[str, ...]:
        """Names of the text columns after reading: one or two, because a tokenizer reads at most two texts."""
        return ("text", "text2") if len(self.texts) == 2 else ("text",)


@dataclass(frozen=True)
class Part:
    """The rows of one split.

    Attributes:
        where: its files, for messages.
        table: the columns `Columns.read_as`, and ``label`` (string) if the rows have labels.
        account: what became of the rows.
    """

    where: str
    table: pa.Table
    account: Account = field(default_factory=Account)


def read_part(files: Sequence[Path], columns: Columns, labelled: bool, problems: list[str]) -> Part | None:
    """Read one split.

    Args:
        files: one file, or the shards of a split in their order.
        labelled: whether every row must have a label. Otherwise no row needs one.
        problems: grows by everything that is wrong.

    Returns:
        None if something is wrong.
    """
    before, account, tables = len(problems), Account(), []
    for file in files:
        try:
            table = _READERS[file.suffix](file, columns, account.notes)
        except (pa.ArrowException, OSError, ValueError) as error:
            problems.append(f"{file} cannot be read as {file.suffix}: {first_line(error)}")
            continue
        if (checked := _check(table, str(file), columns, labelled, account, problems)) is not None:
            tables.append(checked)
            note_ignored(account, [n for n in table.column_names if n not in (*columns.texts, columns.label)])
    if len(problems) > before:
        return None
    where = ", ".join(map(str, files))
    if len({"label" in table.column_names for table in tables}) > 1:
        problems.append(f"{where}: some of these files have labels and others have none.")
        return None
    whole = pa.concat_tables(tables)
    account.read = whole.num_rows
    if len(columns.texts) > 2:
        account.notes.append(f"columns {', '.join(columns.texts)} are joined into one text, with '{JOINT}' in between")
    return Part(where, whole, account)


# --- the formats ---


def _read_csv(file: Path, columns: Columns, notes: list[str]) -> pa.Table:
    def is_record(row: dict[str, str]) -> bool | None:
        """Whether a line looks like a row; only a number as label can tell."""
        return bool(re.fullmatch(NUMBER, row.get(columns.label, "").strip())) if columns.numeric else None

    separator = "\t" if file.suffix == ".tsv" else ","
    header, rows = read_csv(utf8(file), columns.texts, is_record, notes, separator)
    values = zip(*rows, strict=True) if rows else [()] * len(header)
    return pa.Table.from_arrays([pa.array(column, pa.string()) for column in values], names=header)


def _read_jsonl(file: Path, columns: Columns, notes: list[str]) -> pa.Table:
    """The columns that are read. Other columns are there without their values, for messages."""
    names: dict[str, None] = {}
    texts: dict[str, list[str | None]] = {name: [] for name in columns.texts}
    labels: list[str | None] = []
    for line, row in json_lines(utf8(file).encode().splitlines(), notes):
        if isinstance(row, BadLine):
            raise ValueError(f"line {line} {row}")
        names |= dict.fromkeys(row)
        for name, found in texts.items():
            value = row.get(name)
            if not isinstance(value, str | None):
                raise ValueError(f"line {line}, column '{name}': {json.dumps(value)[:60]} is not text")
            found.append(_valid(value, line, name))
        labels.append(_valid(_label_text(row.get(columns.label), line, columns.label), line, columns.label))
    read = {**texts, columns.label: labels}
    empty: list[str | None] = [None] * len(labels)
    return pa.table({name: pa.array(read.get(name, empty), pa.string()) for name in names})


def _valid(text: str | None, line: int, name: str) -> str | None:
    """The text itself.

    Raises:
        ValueError: it has half of a surrogate pair, which UTF-8 cannot encode.
    """
    if text is not None and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"line {line}, column '{name}': {ascii(text)[:60]} is not valid Unicode")
    return text


def _label_text(value: object, line: int, name: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    raise ValueError(f"line {line}, column '{name}': {json.dumps(value)[:60]} is not a label")


def _read_parquet(file: Path, columns: Columns, notes: list[str]) -> pa.Table:
    """All columns, with the labels as text. Class names in the schema replace class numbers."""
    table = read_parquet(file)
    if table.column_names.count(columns.label) != 1:
        return table
    labels = table.column(columns.label)
    if pa.types.is_dictionary(labels.type):
        labels = labels.cast(labels.type.value_type)
    names = None if columns.numeric else class_names(table.schema, columns.label)
    if names is not None and pa.types.is_integer(labels.type):
        known = pa.array(range(len(names)), labels.type)
        if strange := pc.unique(labels.filter(pc.invert(pc.is_in(labels, known)))).drop_null().to_pylist():
            raise ValueError(f"column '{columns.label}' has the class number {strange[0]}, but names {some(names)}")
        labels = pa.chunked_array([pa.array(names, pa.string()).take(labels.combine_chunks())])
    kinds = (*TEXT_TYPES, pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_null)
    if not any(test(labels.type) for test in kinds):
        raise ValueError(f"column '{columns.label}' holds {labels.type}, expected text or numbers")
    if pa.types.is_floating(labels.type) and pc.all(pc.equal(labels, pc.floor(labels))).as_py() is True:
        labels = labels.cast(pa.int64())  # pandas stores whole numbers as 1.0 if one of them was missing
    labels = labels.cast(pa.string())
    return table.set_column(table.column_names.index(columns.label), columns.label, labels)


_READERS = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


# --- checks ---


def _check(
    table: pa.Table, file: str, columns: Columns, labelled: bool, account: Account, problems: list[str]
) -> pa.Table | None:
    """The columns of `Part.table`; None if ``problems`` grew."""
    before = len(problems)
    if table.num_rows == 0:
        problems.append(f"{file}: no rows.")
        return None
    there = columns.label in table.column_names
    _check_names(table.column_names, columns, labelled or there, file, problems)
    if len(problems) > before:
        return None
    texts = [check_text(table.column(name), file, name, problems) for name in columns.texts]
    labels = pc.utf8_trim_whitespace(table.column(columns.label)) if there else None
    if labels is not None:
        missing = pc.fill_null(pc.equal(labels, ""), True)
        n_missing = pc.sum(missing).as_py()
        if n_missing and (labelled or n_missing < len(missing)):
            row = pc.index(missing, True).as_py() + 1
            why = "every row needs a label" if labelled else "either all rows have labels or none has one"
            place = f"{file}, row {row} (data rows, counted from 1), column '{columns.label}'"
            problems.append(f"{place}: no label; {why}{more(n_missing)}.")
        elif n_missing:
            labels = None
    if len(problems) > before:
        return None
    texts = _shortened(_joined(texts, file, columns, account, problems), account)
    if len(problems) > before:
        return None
    found = dict(zip(columns.read_as, texts, strict=True))
    return pa.table(found | ({} if labels is None else {"label": labels}))


def _check_names(there: list[str], columns: Columns, labelled: bool, file: str, problems: list[str]) -> None:
    """Append a problem for each column that is missing or there twice, with the nearest one that is there."""
    wanted = [(name, "task.text_columns") for name in columns.texts]
    wanted += [(columns.label, "task.label_column")] if labelled else []
    for name, key in wanted:
        if there.count(name) > 1:
            problems.append(f"{file}: {there.count(name)} columns are called '{name}'; keep one.")
        elif name not in there:
            by_lower = {column.lower(): column for column in reversed(there)}
            near = difflib.get_close_matches(name.lower(), by_lower, n=1)
            shown = by_lower[near[0]] if near else ""
            hint = f"; perhaps {key}={f'[{shown}]' if key == 'task.text_columns' else shown}" if near else ""
            problems.append(f"{file}: no column '{name}' ({key}); the file has {some(there)}{hint}.")


def _joined(
    texts: list[pa.ChunkedArray], file: str, columns: Columns, account: Account, problems: list[str]
) -> list[pa.ChunkedArray]:
    """The texts as one or two columns. A row whose texts are all empty is a problem."""
    empty = [pc.equal(pc.utf8_trim_whitespace(text), "") for text in texts]
    blank = empty[0]
    for other in empty[1:]:
        blank = pc.and_(blank, other)
    if n_blank := pc.sum(blank).as_py():
        row = pc.index(blank, True).as_py() + 1
        names = ", ".join(f"'{name}'" for name in columns.texts)
        place = f"{file}, row {row} (data rows, counted from 1), column{'s' if len(texts) > 1 else ''} {names}"
        problems.append(f"{place}: the text is empty; remove the row{more(n_blank)}.")
    elif len(texts) > 1:
        for name, column in zip(columns.texts, empty, strict=True):
            if n_empty := pc.sum(column).as_py():
                account.notes.append(f"column '{name}' is empty in {n_empty:,} rows")
    return texts if len(texts) <= 2 else [pc.binary_join_element_wise(*texts, JOINT)]


def _shortened(texts: list[pa.ChunkedArray], account: Account) -> list[pa.ChunkedArray]:
    """The texts, cut at `LONGEST` characters."""
    for text in texts:
        too_long = pc.sum(pc.greater(pc.utf8_length(text), LONGEST)).as_py() or 0
        account.change(f"longer than {LONGEST:,} characters, cut there", too_long)
    return [pc.utf8_slice_codeunits(text, 0, LONGEST) for text in texts]
