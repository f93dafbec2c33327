"""Reading a .csv, .tsv, .jsonl or .parquet file of texts with labels. Values are checked in `read`."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from diffora.tasks.labels import class_names
from diffora.tasks.messages import more, some
from diffora.tasks.sources.check_values import TEXT_TYPES
from diffora.tasks.sources.csv_file import read_csv
from diffora.tasks.sources.lines import BadLine, json_lines, utf8
from diffora.tasks.sources.readers import NUMBER, read_parquet
from diffora.tasks.texts.columns import LISTS, Columns

FORMATS = ("csv", "tsv", "jsonl", "parquet")
EXACT = 2**53
"""Up to here, a float64 holds every whole number."""


def read_file(file: Path, columns: Columns, notes: list[str]) -> pa.Table:
    """All columns of a file; texts as text, labels as text or as lists of text.

    Args:
        notes: grows by remarks about the file.

    Raises:
        ValueError, ArrowException, OSError: the file cannot be read.
    """
    return _READERS[file.suffix](file, columns, notes)


def _read_csv(file: Path, columns: Columns, notes: list[str]) -> pa.Table:
    def is_record(row: dict[str, str]) -> bool | None:
        """Whether a line looks like a row; only a number as label can tell."""
        return bool(re.fullmatch(NUMBER, row.get(columns.label, "").strip())) if columns.kind == "regression" else None

    separator = "\t" if file.suffix == ".tsv" else ","
    header, rows = read_csv(utf8(file), columns.texts, is_record, notes, separator)
    values = zip(*rows, strict=True) if rows else [()] * len(header)
    return pa.Table.from_arrays([pa.array(column, pa.string()) for column in values], names=header)


def _read_jsonl(file: Path, columns: Columns, notes: list[str]) -> pa.Table:
    """The columns that are read. Other columns are there without their values, for messages."""
    names: dict[str, None] = {}
    texts: dict[str, list[str | None]] = {name: [] for name in columns.texts}
    labels: dict[str, list[Any]] = {name: [] for name in columns.labels}
    for line, row in json_lines(utf8(file).encode().splitlines(), notes):
        if isinstance(row, BadLine):
            raise ValueError(f"line {line} {row}")
        names |= dict.fromkeys(row)
        for name, found in texts.items():
            value = row.get(name)
            if not isinstance(value, str | None):
                raise ValueError(f"line {line}, column '{name}': {json.dumps(value)[:60]} is not text")
            found.append(_valid(value, line, name))
        for name, values in labels.items():
            values.append(_json_label(row.get(name), line, name, columns, values))
    for name, values in labels.items():
        if len(kinds := {kind for value in values if (kind := _kind(value)) is not None}) > 1:
            notes.append(f"column '{name}' mixes {' and '.join(sorted(kinds))}; 1 and \"1\" are the same class")
    read: dict[str, list[Any]] = {**texts, **{name: [_as_text(v) for v in values] for name, values in labels.items()}}
    empty = [None] * len(next(iter(texts.values())))
    types = {name: LISTS for name, values in labels.items() if any(isinstance(value, list) for value in values)}
    return pa.table({name: pa.array(read.get(name, empty), types.get(name, pa.string())) for name in names})


def _valid(text: str | None, line: int, name: str) -> str | None:
    """The text itself.

    Raises:
        ValueError: it has half of a surrogate pair, which UTF-8 cannot encode.
    """
    if text is not None and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"line {line}, column '{name}': {ascii(text)[:60]} is not valid Unicode")
    return text


def _json_label(value: object, line: int, name: str, columns: Columns, earlier: list[Any]) -> object:
    """The label itself; None for NaN, which pandas writes for a missing label.

    Raises:
        ValueError: it is no label, or a list after labels that are none, or the other way round.
    """
    where = f"line {line}, column '{name}': {json.dumps(value)[:60]}"
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, str):
        _valid(value, line, name)
    is_list = isinstance(value, list)
    lists = is_list and columns.kind == "multilabel" and not columns.flags
    if is_list and not lists:
        hint = "; task.kind=multilabel takes lists of classes" if columns.kind == "classification" else ""
        raise ValueError(f"{where} is not a label{hint}")
    if any(not isinstance(item, str | int) for item in (value if isinstance(value, list) else [])):
        raise ValueError(f"{where} is not a list of classes")
    if not isinstance(value, str | bool | int | float | list):
        raise ValueError(f"{where} is not a label")
    before = next((other for other in reversed(earlier) if other is not None), None)
    if before is not None and isinstance(before, list) != is_list:
        what = "a list, but text in earlier rows" if is_list else "not a list, but a list in earlier rows"
        raise ValueError(f"{where} is {what}")
    return value


def _kind(value: Any) -> str | None:
    if isinstance(value, list):
        return _kind(value[0]) if value else None
    if value is None:
        return None
    return "texts" if isinstance(value, str) else "true and false" if isinstance(value, bool) else "numbers"


def _as_text(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_text(item) for item in value]
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return json.dumps(value)


def _read_parquet(file: Path, columns: Columns, notes: list[str]) -> pa.Table:
    return with_labels_as_text(read_parquet(file), columns)


def with_labels_as_text(table: pa.Table, columns: Columns) -> pa.Table:
    """All columns of a table, with labels as text or as lists of text. Class names in the schema replace numbers.

    Raises:
        ValueError: a label column holds something else.
    """
    for name in columns.labels:
        if table.column_names.count(name) == 1:
            labels = _labels_as_text(table, name, columns)
            table = table.set_column(table.column_names.index(name), name, labels)
    return table


def _labels_as_text(table: pa.Table, name: str, columns: Columns) -> pa.ChunkedArray:
    labels = table.column(name)
    if pa.types.is_dictionary(labels.type):
        labels = labels.cast(labels.type.value_type)
    is_list = pa.types.is_list(labels.type) or pa.types.is_large_list(labels.type)
    kind = labels.type.value_type if is_list else labels.type
    names = None if columns.kind == "regression" else class_names(table.schema, name)
    if is_list and (columns.kind != "multilabel" or columns.flags):
        hint = "; task.kind=multilabel takes lists of classes" if columns.kind == "classification" else ""
        raise ValueError(f"column '{name}' holds {labels.type}{hint}")
    tests = (*TEXT_TYPES, pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_null)
    if not any(test(kind) for test in tests):
        raise ValueError(f"column '{name}' holds {labels.type}, expected text or numbers")
    if names is not None and pa.types.is_integer(kind):
        if not is_list:
            labels = pc.if_else(pc.equal(labels, -1), None, labels)  # so the hub's data sets mark a missing label
        used = pc.unique(pc.list_flatten(labels) if is_list else labels).drop_null().to_pylist()
        if strange := [number for number in used if not 0 <= number < len(names)]:
            raise ValueError(f"column '{name}' has the class number {strange[0]}, but names {some(names)}")
    if is_list:
        rows = labels.to_pylist()
        if holes := [number for number, row in enumerate(rows, start=1) if row and None in row]:
            raise ValueError(
                f"row {holes[0]} (data rows, counted from 1), column '{name}': the list of labels has a null in it"
                f"{more(len(holes))}"
            )
        named = ([_as_text(v if names is None else names[v]) for v in row] if row else row for row in rows)
        return pa.chunked_array([pa.array(named, LISTS)])
    if names is not None and pa.types.is_integer(kind):
        return pa.chunked_array([pa.array(names, pa.string()).take(labels.combine_chunks())])
    if pa.types.is_floating(kind):
        labels = labels.cast(pa.float64()) if pa.types.is_float16(kind) else labels  # arrow can do little with it
        labels = pc.if_else(pc.is_nan(labels), None, labels)  # pandas writes NaN for a missing label
        whole = pc.and_(pc.equal(labels, pc.floor(labels)), pc.less(pc.abs(labels), EXACT))
        if pc.all(whole).as_py() is not False:
            labels = labels.cast(pa.int64())  # and whole numbers as 1.0 if one of them was missing
    return labels.cast(pa.string())


_READERS: dict[str, Callable[[Path, Columns, list[str]], pa.Table]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
