"""Labels of rows that can have several classes, in three spellings: a list, a text with separators, 0/1 columns."""

import re
from collections.abc import Sequence
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc

from diffora.tasks.messages import some
from diffora.tasks.sources.check_values import report
from diffora.tasks.sources.part import Part
from diffora.tasks.texts.columns import LISTS

SEPARATORS = (";", "|", ",")
FLAGS = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}
"""What a 0/1 column may hold, in lower case."""


def from_flags(columns: Sequence[pa.ChunkedArray], names: Sequence[str], file: str, problems: list[str]) -> pa.Array:
    """For each row, the names of the columns that hold 1.

    Args:
        columns: as text.
        problems: grows by a message for each column with another value.
    """
    flags = []
    for name, column in zip(names, columns, strict=True):
        text = pc.utf8_lower(pc.utf8_trim_whitespace(column))
        known = pc.is_in(text, pa.array(FLAGS))
        report(problems, file, name, column, pc.invert(known), "is not 0 or 1, as a column of task.label_columns needs")
        flags.append([FLAGS.get(value, False) for value in text.to_pylist()])
    rows = zip(*flags, strict=True)
    return pa.array([[n for n, flag in zip(names, row, strict=True) if flag] for row in rows], LISTS)


def find_separator(part: Part, column: str, classes: Sequence[str], problems: list[str]) -> str | None:
    """What separates the classes in a column of text; None if no row has any separator.

    Args:
        column: name of the label column, for messages.
        classes: known classes, which decide between several separators; empty if none are known yet.
        problems: grows by a message if several separators are possible, or a label is a list written as text.
    """
    labels = part.table.column("label")
    if (written := written_list(labels.to_pylist())) is not None:
        problems.append(
            f"{part.where}: column '{column}' has lists written as text, such as {written}; give lists in .jsonl or "
            ".parquet, or classes with a separator and no brackets"
        )
        return None
    found = [sign for sign in SEPARATORS if pc.any(pc.match_substring(labels, sign)).as_py()]
    if len(found) > 1 and classes:
        values = [text for text in pc.unique(labels).to_pylist() if text not in classes]
        strange = {sign: sum(n not in classes for text in values for n in names_in(text, sign)) for sign in found}
        found = [min(found, key=lambda sign: strange[sign])]
    if len(found) > 1:
        signs = " and ".join(f"'{sign}'" for sign in found)
        problems.append(
            f"{part.where}: column '{column}' has {signs}; say which one separates the classes: "
            f"'task.label_separator=\"{found[0]}\"'"
        )
    return found[0] if found else None


def written_list(labels: Sequence[str]) -> str | None:
    """The first label that is a list written as text, as pandas writes lists in CSV; None if there is none."""
    return next((text for text in labels if re.fullmatch(r"\s*\[.*\]\s*", text)), None)


def separated(part: Part, separator: str | None) -> Part:
    """The part with its labels, which are text, as lists of class names; None: a text is one class."""
    labels = [names_in(text, separator) for text in part.table.column("label").to_pylist()]
    return with_labels(part, pa.array(labels, LISTS))


def names_in(text: str, separator: str | None) -> list[str]:
    """The class names in a text; None: the text is one name."""
    names = text.split(separator) if separator else [text]
    return [name.strip() for name in names if name.strip()]


def with_labels(part: Part, labels: pa.Array) -> Part:
    """The part with other labels."""
    table = part.table
    return replace(part, table=table.set_column(table.column_names.index("label"), "label", pa.chunked_array([labels])))


def class_lists(part: Part, classes: Sequence[str], whose: str, column: str, problems: list[str]) -> pa.Table:
    """The table of a split with sorted lists of class numbers (int64) as labels. A name that is no class is a problem.

    Args:
        whose: who has these classes, for messages.
        column: name of the label column, for messages.
    """
    numbers = {name: i for i, name in enumerate(classes)}
    labels = part.table.column("label").to_pylist()
    strange = [next((name for name in names if name not in numbers), None) for names in labels]
    if any(name is not None for name in strange):
        values = pa.chunked_array([pa.array(strange, pa.string())])
        what = f"is not a class of {whose}: {some(classes)}"
        report(problems, part.where, column, values, pc.is_valid(values), what)
        return part.table
    found = [sorted({numbers[name] for name in names}) for names in labels]
    return with_labels(part, pa.array(found, pa.list_(pa.int64()))).table


def note_separator(part: Part, column: str, separator: str | None) -> None:
    """Say how the labels were separated."""
    if separator is None:
        part.account.notes.append(f"column '{column}' has no {', '.join(SEPARATORS)}: each row has at most one class")
    else:
        part.account.notes.append(f"column '{column}': classes are separated at '{separator}'")
