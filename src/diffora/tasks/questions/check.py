"""Checks the rows of question answering one by one and brings them into one form."""

from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa

from diffora.tasks.account import Account, note_ignored
from diffora.tasks.sources.faults import Faults
from diffora.tasks.sources.tables import check_columns

ROWS_AT_ONCE = 1000  # bounds memory
SHIFTS = (0, -1, 1, -2, 2)
"""Distances, in characters, within which a wrong ``answer_start`` is corrected; the first that fits is taken."""
TEXTS = ("id", "context", "question")
KNOWN = ("title", "is_impossible", "plausible_answers")
"""Columns of SQuAD that are not used."""
SCHEMA = pa.schema(
    {**dict.fromkeys(TEXTS, pa.string()), "answers": pa.list_(pa.string()), "starts": pa.list_(pa.int32())}
)

Reader = tuple[Sequence[str], Iterable[dict[str, Any]]]
"""Names of the columns, and rows with the hub's columns."""


def check(
    names: Sequence[str],
    rows: Iterable[dict[str, Any]],
    file: str,
    problems: list[str],
    unanswerable: bool,
    labelled: bool,
    account: Account,
) -> pa.Table:
    """The rows as a table of `SCHEMA`; meaningless if ``problems`` grew.

    Args:
        names: names of the columns.
        file: file or split, for messages.
        unanswerable: whether a question may have no answer.
        labelled: whether all rows must have the column ``answers``.
        account: gets what became of the rows.
    """
    before = len(problems)
    has_answers = labelled or "answers" in names
    check_columns(names, (*TEXTS, "answers") if has_answers else TEXTS, file, problems)
    if len(problems) > before:
        return SCHEMA.empty_table()
    checker = _Checker(names, file, has_answers)
    batches = []
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for row in rows:
        for name, value in checker.checked(row).items():
            columns[name].append(value)
        if checker.number % ROWS_AT_ONCE == 0:
            batches.append(pa.record_batch(columns, schema=SCHEMA))
            columns = {name: [] for name in SCHEMA.names}
    batches.append(pa.record_batch(columns, schema=SCHEMA))
    if checker.number == 0:
        problems.append(f"{file}: no rows.")
    if not unanswerable and not labelled and len(checker.without) == checker.number:
        has_answers = False
    elif not unanswerable:
        for number in checker.without:
            checker.faults.add(number, "answers", [], "means a question without an answer, which task=squad_v2 takes")
    checker.note(account)
    problems += checker.faults.messages()
    table = pa.Table.from_batches(batches, SCHEMA)
    return table if has_answers else table.select(TEXTS)


class _Checker:
    """Checks rows one after the other.

    Args:
        names: names of the columns.
        file: file or split, for messages.
        has_answers: whether the rows have answers.

    Attributes:
        number: of the last row, from 1.
        faults: what is wrong with the rows so far.
        without: numbers of the rows without an answer.
    """

    def __init__(self, names: Sequence[str], file: str, has_answers: bool) -> None:
        self.has_answers = has_answers
        self.number = 0
        self.faults = Faults(file)
        self.without: list[int] = []
        self._columns: dict[str, None] = dict.fromkeys(names)
        self._first_with: dict[str, int] = {}  # the row of each id
        self._moved: list[int] = []  # rows whose answer_start was corrected

    def checked(self, row: dict[str, Any]) -> dict[str, Any]:
        """The values of a row for the columns of `SCHEMA`."""
        self.number += 1
        self._columns |= dict.fromkeys(row)
        if not self.has_answers and row.get("answers") is not None:
            self._fault("answers", row["answers"], "answers a question, while the first row has no answers")
        values: dict[str, Any] = {name: self._text(row.get(name), name) for name in TEXTS}
        key = values["id"]
        if key and (first := self._first_with.setdefault(key, self.number)) != self.number:
            self._fault("id", key, "is the id of an earlier row too", f" (row {first})")
        answers = self._answers(row.get("answers")) if self.has_answers else None
        if answers == ([], []):
            self.without.append(self.number)
        texts, starts = answers or ([], [])
        if texts and row.get("is_impossible"):
            self._fault("answers", texts, "answers a question, but its is_impossible says that it has no answer")
        starts = self._aligned(values["context"], texts, starts) if values["context"] else [0] * len(texts)
        return values | {"answers": texts, "starts": starts}

    def note(self, account: Account) -> None:
        """Add to an account how many rows were read, how many were corrected, and which columns are not used."""
        account.read = self.number
        if self._moved:
            what = f"answer_start is off by a character or two and was corrected, first in row {self._moved[0]}"
            account.change(what, len(set(self._moved)))
        note_ignored(account, [name for name in self._columns if name not in (*TEXTS, "answers", *KNOWN)])

    def _fault(self, column: str, value: Any, kind: str, detail: str = "") -> None:
        self.faults.add(self.number, column, value, kind, detail)

    def _text(self, value: Any, name: str) -> str:
        if value is None:
            self._fault(name, value, "in place of a text")
        elif not isinstance(value, str):
            self._fault(name, value, "is not text")
        elif not value.strip():
            self._fault(name, value, "is empty")
        elif not _is_unicode(value):
            self._fault(name, ascii(value), "is not valid Unicode")
        else:
            return value
        return ""

    def _answers(self, value: Any) -> tuple[list[str], list[int]] | None:
        """Texts and starts of a row's answers, from a pair of lists or a list of pairs; None if they are faulty."""
        if isinstance(value, list) and all(isinstance(pair, dict) for pair in value):
            value = {key: [pair.get(key) for pair in value] for key in ("text", "answer_start")}
        texts, starts = (value.get("text"), value.get("answer_start")) if isinstance(value, dict) else (None, None)
        if not isinstance(texts, list) or not isinstance(starts, list):
            self._fault("answers", value, "is not {text: [...], answer_start: [...]}")
        elif len(texts) != len(starts):
            self._fault("answers", value, "has", f" {len(texts)} texts and {len(starts)} starts")
        elif not all(isinstance(text, str) and text.strip() for text in texts):
            self._fault("answers", texts, "holds an answer that is not text; write an empty list if there is no answer")
        elif not all(isinstance(start, int) and not isinstance(start, bool) and start >= 0 for start in starts):
            self._fault("answers", starts, "holds an answer_start that is not a whole number of at least 0")
        else:
            return texts, starts
        return None

    def _aligned(self, context: str, texts: list[str], starts: list[int]) -> list[int]:
        """Where the answers start in the context, 0 if they do not. A start wrong by one of `SHIFTS` is corrected."""
        found = []
        for text, start in zip(texts, starts, strict=True):
            places = (start + shift for shift in SHIFTS)
            place = next((at for at in places if at >= 0 and context.startswith(text, at)), None)
            if place is None:
                here, elsewhere = context[start : start + len(text)][:40], context.find(text)
                where = f"it is at {elsewhere}" if elsewhere >= 0 else "it is nowhere in the context"
                self._fault("answers", text, "is not at", f" answer_start {start}, where {here!r} is; {where}")
            elif place != start:
                self._moved.append(self.number)
            found.append(place or 0)
        return found


def _is_unicode(text: str) -> bool:
    """Whether a text is valid Unicode. JSON can spell half of a surrogate pair, which is not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
