"""Rows of a context, several choices and the right one, checked one by one."""

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from diffora.tasks.account import Account, note_ignored
from diffora.tasks.sources.faults import Faults, is_unicode
from diffora.tasks.sources.part import Part
from diffora.tasks.sources.records import Records
from diffora.tasks.sources.tables import check_columns

SCHEMA = pa.schema({"context": pa.string(), "start": pa.string(), "choices": pa.list_(pa.string())})
UNLABELLED = (None, "", -1, "-1")
"""What stands in place of the labels of rows that have none."""
NEARLY = 0.8
"""From this share of rows on, a way to write labels may be meant although it does not fit all rows."""
FEW = 10
"""Among fewer rows, the first choice may never be right by chance."""


@dataclass(frozen=True)
class Columns:
    """Which columns of a file are read, and what labels mean.

    Attributes:
        context: the columns of the context; they are joined.
        start: the column whose text begins every choice; None for none.
        choices: one column of lists, or one column for each choice.
        in_list: whether the choices are in one column of lists.
        label: the column of the right choice.
        kind: how it is written: number, letter or text; None: found in the rows.
        first: the number of the first choice, if labels are numbers.
    """

    context: tuple[str, ...]
    start: str | None
    choices: tuple[str, ...]
    in_list: bool
    label: str
    kind: str | None
    first: int

    @property
    def inputs(self) -> tuple[str, ...]:
        """All columns but the label."""
        return (*self.context, *([self.start] if self.start else []), *self.choices)

    @property
    def keys(self) -> dict[str, str]:
        """The setting that names each column."""
        choices = "task.choices_column" if self.in_list else "task.choice_columns"
        keys = {**dict.fromkeys(self.choices, choices), self.label: "task.label_column"}
        keys |= {self.start: "task.start_column"} if self.start else {}
        return keys | dict.fromkeys(self.context, "task.context_columns")

    @property
    def shown(self) -> str:
        """The columns of the choices, for messages."""
        return ", ".join(self.choices)


def check_choices(
    sources: Sequence[Records], columns: Columns, labelled: bool, account: Account, problems: list[str]
) -> Part | None:
    """Check the rows of a split.

    Args:
        sources: its files.
        labelled: whether all rows must have labels. Otherwise all rows have labels, or none has any.
        account: gets what became of the rows.
        problems: grows by everything that is wrong.

    Returns:
        The columns of `SCHEMA` and, if the rows have labels, ``label`` (int64, the position of the right choice); None
        if something is wrong.
    """
    before = len(problems)
    has_labels = labelled or all(columns.label in source.names for source in sources)
    rows: list[dict[str, Any]] = []
    labels: list[Any] = []
    faults: list[Faults] = []
    owners: list[tuple[Faults, int]] = []
    for source in sources:
        if not source.names:
            problems.append(f"{source.where}: no rows.")
            continue
        wanted = (*columns.inputs, *([columns.label] if has_labels else []))
        present = list(source.names)
        if not columns.in_list:  # a row of JSON lines leaves out the choices that it does not have
            wanted = tuple(name for name in wanted if name in present or name not in columns.choices[2:])
        check_columns(present, wanted, source.where, problems, columns.keys)
        if len(problems) > before:
            continue
        faults.append(Faults(source.where, source.unit))
        for number, row in source.rows:
            rows.append(_checked(row, number, columns, faults[-1]))
            labels.append(row.get(columns.label))
            if not has_labels and labels[-1] not in UNLABELLED:
                faults[-1].add(number, columns.label, labels[-1], "is a label, but other rows have none")
            owners.append((faults[-1], number))
    where = ", ".join(source.where for source in sources)
    if not rows and len(problems) == before:
        problems.append(f"{where}: no rows.")
    if has_labels and not labelled and all(label in UNLABELLED for label in labels):
        has_labels = False
    problems += [message for fault in faults for message in fault.messages()]
    if len(problems) > before:
        return None
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    if has_labels:
        kind, places = _places(rows, labels, columns, owners)
        problems += [message for fault in faults for message in fault.messages()]
        table = table.append_column("label", pa.array(places, pa.int64()))
        account.notes.append(f"labels are read as {_WORDS[kind]}")
        if kind == "number" and columns.first == 0 and len(places) >= FEW and 0 not in places:
            account.notes.append(
                "no row has the first choice as the right one; if labels count from 1: task.first_label=1"
            )
    account.read = len(rows)
    _note(rows, sources, columns, account)
    return Part(where, table, account)


def _note(rows: Sequence[dict[str, Any]], sources: Sequence[Records], columns: Columns, account: Account) -> None:
    if twice := sum(len(set(row["choices"])) < len(row["choices"]) for row in rows):
        account.notes.append(f"{twice:,} rows have the same choice twice")
    if empty := sum(not row["context"].strip() and not row["start"].strip() for row in rows):
        account.notes.append(f"{empty:,} rows have no context")
    counts = sorted({len(row["choices"]) for row in rows})
    if len(counts) > 1:
        account.notes.append(f"rows have {', '.join(map(str, counts[:-1]))} or {counts[-1]} choices")
    present = dict.fromkeys(name for source in sources for name in source.names)
    note_ignored(account, [name for name in present if name not in (*columns.inputs, columns.label)])


def _checked(row: dict[str, Any], number: int, columns: Columns, faults: Faults) -> dict[str, Any]:
    """The row in the columns of `SCHEMA`; meaningless if ``faults`` grew."""

    def text(column: str) -> str:
        value = row.get(column)
        if isinstance(value, str) and is_unicode(value):
            return value
        what = (
            "in place of a text"
            if value is None
            else "is not text"
            if not isinstance(value, str)
            else "is not valid Unicode"
        )
        faults.add(number, column, value if what != "is not valid Unicode" else ascii(value), what)
        return ""

    found = {
        "context": " ".join(filter(None, (text(column).strip() for column in columns.context))),
        "start": text(columns.start).strip() if columns.start else "",
    }
    return found | {"choices": _choices(row, number, columns, faults)}


def _choices(row: dict[str, Any], number: int, columns: Columns, faults: Faults) -> list[str]:
    shown = columns.shown
    if columns.in_list:
        values = row.get(shown)
        if not isinstance(values, list):
            faults.add(
                number,
                shown,
                values,
                "is not a list of choices; choices in columns of their own are task.choice_columns=[…]",
            )
            return []
    else:
        values = [row.get(name) for name in columns.choices]
        while values and values[-1] is None:  # a row with fewer choices
            values.pop()
    found = []
    for at, value in enumerate(values):
        column = shown if columns.in_list else columns.choices[at]
        if not isinstance(value, str):
            what = "in place of a choice" if value is None else "is not text"
            faults.add(number, column, value, what, f" (choice {at + 1})")
        elif not is_unicode(value):
            faults.add(number, column, ascii(value), "is not valid Unicode", f" (choice {at + 1})")
        elif not value.strip():
            what = "is an empty choice; rows with fewer choices need .jsonl or .parquet, without it or with null"
            faults.add(number, column, value, what, f" (choice {at + 1})")
        else:
            found.append(value.strip())
    if len(values) < 2:
        faults.add(number, shown, values, "are too few choices: at least two are needed")
    return found


# --- labels ---


def _number(label: Any, choices: Sequence[str], first: int) -> int | None:
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    text = str(label).strip() if isinstance(label, int | str) and not isinstance(label, bool) else ""
    if not text.isdecimal():
        return None
    place = int(text) - first
    return place if 0 <= place < len(choices) else None


def _letter(label: Any, choices: Sequence[str], first: int) -> int | None:
    if not isinstance(label, str) or len(label.strip()) != 1:
        return None
    place = string.ascii_uppercase.find(label.strip().upper())
    return place if 0 <= place < len(choices) else None


def _text(label: Any, choices: Sequence[str], first: int) -> int | None:
    if not isinstance(label, str) or choices.count(label.strip()) != 1:
        return None
    return choices.index(label.strip())


_KINDS: dict[str, Callable[[Any, Sequence[str], int], int | None]] = {
    "number": _number,
    "letter": _letter,
    "text": _text,
}
_WORDS = {
    "number": "numbers of choices",
    "letter": "letters of choices, A for the first",
    "text": "texts of choices",
}


def _places(
    rows: Sequence[dict[str, Any]], labels: Sequence[Any], columns: Columns, owners: Sequence[tuple[Faults, int]]
) -> tuple[str, list[int]]:
    """How the labels are written, and the position of the right choice of each row, 0 where there is a fault."""
    kinds = [columns.kind] if columns.kind else list(_KINDS)
    found = {
        kind: [_KINDS[kind](label, row["choices"], columns.first) for label, row in zip(labels, rows, strict=True)]
        for kind in kinds
    }
    best = max(kinds, key=lambda kind: sum(place is not None for place in found[kind]))
    doubtful: dict[int, str] = {}  # rows in which another kind, which fits nearly all rows, means another choice
    for kind, places in found.items():
        if kind != best and sum(place is not None for place in places) > NEARLY * len(rows):
            doubtful |= {at: kind for at, place in enumerate(places) if place not in (None, found[best][at])}
    for at, (faults, number) in enumerate(owners):
        label, choices = labels[at], rows[at]["choices"]
        if found[best][at] is None:
            faults.add(number, columns.label, label, *_wrong(label, choices, best, columns))
        elif at in doubtful:
            what = f"may be the {best} of a choice or its {doubtful[at]}: say which with task.label_kind="
            faults.add(number, columns.label, label, what)
    return best, [place or 0 for place in found[best]]


def _wrong(label: Any, choices: Sequence[str], kind: str, columns: Columns) -> tuple[str, str]:
    """What is wrong with a label: words for all such rows, and words for this row."""
    if label is None or label == "":
        return "in place of a label", ""
    if kind == "text" and isinstance(label, str) and choices.count(label.strip()) > 1:
        return "is the text of more than one choice", ""
    if kind == "number":
        last = columns.first + len(choices) - 1
        hint = ""
        if columns.first == 0 and str(label).strip() == str(len(choices)):
            hint = "; if labels count from 1: task.first_label=1"
        return "is not the number of a choice", f": they are {columns.first} to {last}{hint}"
    if kind == "letter":
        return "is not the letter of a choice", f": they are A to {string.ascii_uppercase[len(choices) - 1]}"
    shown = "; ".join(choice[:40] for choice in choices)
    return "is not the text of a choice", f": {shown}"
