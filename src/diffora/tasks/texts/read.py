"""Rows of texts with labels, from files or from the hub, with checked texts and labels as text."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from diffora.errors import first_line
from diffora.tasks.account import Account, note_ignored
from diffora.tasks.messages import more
from diffora.tasks.sources.check_values import check_text, check_utf8
from diffora.tasks.sources.faults import READ_ERRORS
from diffora.tasks.sources.hub import with_features
from diffora.tasks.sources.part import Part
from diffora.tasks.sources.place import Place
from diffora.tasks.sources.tables import check_columns, with_numbers
from diffora.tasks.texts.columns import LISTS, Columns
from diffora.tasks.texts.formats import read_file, with_labels_as_text
from diffora.tasks.texts.several import from_flags

LONGEST = 100_000
"""Longer texts are cut here, in characters. No tokenizer keeps that many, and encoding all of them takes long."""
JOINT = " | "
"""What stands between the columns if more than two are joined into one text."""


def read_split(place: Place, split: str, columns: Columns, labelled: bool, problems: list[str]) -> Part | None:
    """The checked rows of a split; None, and messages in ``problems``, if something is wrong.

    The table has the columns `Columns.read_as` and, if the rows have labels, ``label``: text, or lists of text.

    Args:
        split: its name here: "train", "validation", or another name at the source.
        columns: what is read.
        labelled: whether every row must have a label. Otherwise no row needs one.
    """
    if not place.is_hub:
        files = place.files(split, problems)
        return read_part(files, columns, labelled, problems) if files else None
    found = place.hub_split(split, problems)
    if found is None:
        return None
    where, rows = found
    try:
        table = with_labels_as_text(with_features(rows), columns)
    except ValueError as error:
        problems.append(f"{where}: {error}")
        return None
    return part_of({where: table}, columns, labelled, Account(), problems)


def read_part(files: Sequence[Path], columns: Columns, labelled: bool, problems: list[str]) -> Part | None:
    """Read one split.

    Args:
        files: one file, or the shards of a split in their order.
        labelled: whether every row must have a label. Otherwise no row needs one.
        problems: grows by everything that is wrong.

    Returns:
        None if something is wrong.
    """
    before, account, tables = len(problems), Account(), {}
    for file in files:
        try:
            tables[str(file)] = read_file(file, columns, account.notes)
        except READ_ERRORS as error:
            problems.append(f"{file} cannot be read as {file.suffix}: {first_line(error)}")
    return part_of(tables, columns, labelled, account, problems) if len(problems) == before else None


def part_of(
    tables: Mapping[str, pa.Table], columns: Columns, labelled: bool, account: Account, problems: list[str]
) -> Part | None:
    """Check one split.

    Args:
        tables: its rows as `read_file` returns them, by the name that messages use.
        labelled: as in `read_part`.
        account: gets what became of the rows.
        problems: grows by everything that is wrong.

    Returns:
        None if something is wrong.
    """
    before, checked = len(problems), []
    for name, table in tables.items():
        if (found := _check(table, name, columns, labelled, account, problems)) is not None:
            checked.append(found)
            note_ignored(account, [n for n in table.column_names if n not in (*columns.texts, *columns.labels)])
    if len(problems) > before:
        return None
    where = ", ".join(tables)
    if len({"label" in table.column_names for table in checked}) > 1:
        problems.append(f"{where}: some of these files have labels and others have none.")
        return None
    whole = pa.concat_tables(checked)
    account.read = whole.num_rows
    if len(columns.texts) > 2:
        account.notes.append(f"columns {', '.join(columns.texts)} are joined into one text, with '{JOINT}' in between")
    return Part(where, with_numbers(whole), account)


# --- checks ---


def _check(
    table: pa.Table, file: str, columns: Columns, labelled: bool, account: Account, problems: list[str]
) -> pa.Table | None:
    """The columns of `Part.table`; None if ``problems`` grew."""
    before = len(problems)
    if table.num_rows == 0:
        problems.append(f"{file}: no rows.")
        return None
    present = any(name in table.column_names for name in columns.labels)
    wanted = columns.texts + (columns.labels if labelled or present else ())
    check_columns(table.column_names, wanted, file, problems, columns.keys)
    if len(problems) > before:
        return None
    texts = [check_text(table.column(name), file, name, problems) for name in columns.texts]
    labels = _labels(table, file, columns, labelled, account, problems) if present else None
    if len(problems) > before:
        return None
    texts = _shortened(_joined(texts, file, columns, account, problems), account)
    if len(problems) > before:
        return None
    found = dict(zip(columns.read_as, texts, strict=True))
    return pa.table(found | ({} if labels is None else {"label": labels}))


def _labels(
    table: pa.Table, file: str, columns: Columns, labelled: bool, account: Account, problems: list[str]
) -> pa.ChunkedArray | None:
    """The labels: text without white space around it, or lists of such texts. None if no row has one."""
    before, parts = len(problems), [table.column(name) for name in columns.labels]
    if not any(pa.types.is_list(part.type) for part in parts):
        parts = [check_utf8(part, file, name, problems) for name, part in zip(columns.labels, parts, strict=True)]
    if len(problems) > before:
        return None
    if columns.flags:
        if not labelled and all(pc.all(_is_missing(part)).as_py() for part in parts):
            return None
        return pa.chunked_array([from_flags(parts, columns.labels, file, problems)])
    labels, several = parts[0], columns.kind == "multilabel"
    if pa.types.is_list(labels.type):
        missing, empty = pc.is_null(labels), pc.equal(pc.list_value_length(labels), 0)
        labels = pa.chunked_array([pa.array([_tidy(names) for names in labels.to_pylist()], LISTS)])
    else:
        trimmed = pc.utf8_trim_whitespace(labels)
        account.change("white space around the label removed", pc.sum(pc.not_equal(trimmed, labels)).as_py() or 0)
        labels, empty, missing = trimmed, _is_missing(trimmed), pc.is_null(trimmed)
    n_empty = pc.sum(pc.fill_null(empty, True)).as_py()
    if n_empty == len(labels) and not labelled:
        return None
    if n_empty == len(labels):
        problems.append(f"{file}: column '{columns.label}' is empty in all {len(labels):,} rows.")
        return None
    missing = missing if several else empty
    if n_missing := pc.sum(missing).as_py():
        row = pc.index(missing, True).as_py() + 1
        why = "every row needs a label" if labelled else "either all rows have labels or none has one"
        why = f"{why}; an empty one means none of the classes" if several else why
        place = f"{file}, row {row} (data rows, counted from 1), column '{columns.label}'"
        problems.append(f"{place}: no label; {why}{more(n_missing)}.")
    return labels


def _is_missing(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Whether a column of text has no value, or white space only."""
    return pc.fill_null(pc.equal(pc.utf8_trim_whitespace(column), ""), True)


def _tidy(names: list[str | None] | None) -> list[str]:
    """Class names without white space around them, and without empty ones."""
    return [name.strip() for name in names or () if name and name.strip()]


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
