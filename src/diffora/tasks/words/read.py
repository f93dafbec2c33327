"""Rows of words and tags, checked one by one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pyarrow as pa

from diffora.tasks.account import Account, note_ignored
from diffora.tasks.labels import known_classes
from diffora.tasks.messages import some
from diffora.tasks.sources.faults import Faults, is_unicode
from diffora.tasks.sources.part import Part
from diffora.tasks.sources.records import Records
from diffora.tasks.sources.tables import check_columns

SCHEMA = pa.schema({"words": pa.list_(pa.string()), "tags": pa.list_(pa.string())})
ROWS_AT_ONCE = 1000  # bounds memory


@dataclass(kw_only=True)
class WordsPart(Part):
    """The rows of one split: the columns ``words`` and, if the rows have tags, ``tags``, both lists of texts.

    Attributes:
        numbers: the number of each row at its source, for messages.
        sources: for each row, the file that it is in, by its position in ``files``.
        files: the files, as messages name them, with what the numbers of their rows count.
    """

    numbers: list[int]
    sources: list[int]
    files: list[Records]

    def faults(self) -> list[Faults]:
        """New, empty faults for each file."""
        return [Faults(file.where, file.unit) for file in self.files]


def check_words(
    sources: Sequence[Records],
    columns: tuple[str, str],
    names: Sequence[str] | None,
    labelled: bool,
    account: Account,
    problems: list[str],
) -> WordsPart | None:
    """Check the rows of a split.

    Args:
        sources: its files.
        columns: names of the columns of words and of tags.
        names: the tags by their numbers, for files with numbers that do not name their tags themselves; None: there are
            no such files.
        labelled: whether all rows must have tags. Otherwise all rows have tags, or none has any.
        account: gets what became of the rows.
        problems: grows by everything that is wrong.

    Returns:
        None if something is wrong.
    """
    before = len(problems)
    batches: list[pa.RecordBatch] = []
    numbers: list[int] = []
    owners: list[int] = []
    has_tags = labelled or all(columns[1] in source.names for source in sources)
    for at, source in enumerate(sources):
        if not source.names:
            problems.append(f"{source.where}: no rows.")
            continue
        keys = dict(zip(columns, ("task.tokens_column", "task.tags_column"), strict=True))
        check_columns(list(source.names), columns if has_tags else columns[:1], source.where, problems, keys)
        if len(problems) > before:
            continue
        faults = Faults(source.where, source.unit)
        checker = _Checker(source, columns, _named(source, columns[1]) or names, has_tags, faults)
        waiting: list[dict[str, Any]] = []
        for number, row in source.rows:
            waiting.append(checker.checked(number, row))
            numbers.append(number)
            owners.append(at)
            if len(waiting) == ROWS_AT_ONCE:
                batches.append(pa.RecordBatch.from_pylist(waiting, schema=SCHEMA))
                waiting = []
        batches.append(pa.RecordBatch.from_pylist(waiting, schema=SCHEMA))
        problems += faults.messages()
    where = ", ".join(source.where for source in sources)
    if not numbers and len(problems) == before:
        problems.append(f"{where}: no rows.")
    if len(problems) > before:
        return None
    account.read = len(numbers)
    present = dict.fromkeys(name for source in sources for name in source.names)
    note_ignored(account, [name for name in present if name not in columns])
    table = pa.Table.from_batches(batches, SCHEMA)
    table = table if has_tags else table.select(["words"])
    return WordsPart(where, table, account, numbers=numbers, sources=owners, files=list(sources))


def _named(source: Records, column: str) -> list[str] | None:
    """The tags of a file by its own numbers; None if it does not name them, or names them 0, 1 and so on."""
    names = source.class_names(column)
    return None if names == [str(i) for i in range(len(names or ()))] else names


class _Checker:
    """Checks rows one after the other.

    Args:
        source: the file that they come from.
        columns: names of the columns of words and of tags.
        names: the tags by their numbers.
        has_tags: whether the rows have tags.
        faults: grows by what is wrong.
    """

    def __init__(
        self, source: Records, columns: tuple[str, str], names: Sequence[str] | None, has_tags: bool, faults: Faults
    ) -> None:
        self.word_lines, self.columns, self.names, self.has_tags = source.word_lines, columns, names, has_tags
        self.faults = faults

    def checked(self, number: int, row: dict[str, Any]) -> dict[str, Any]:
        """The row in the columns of `SCHEMA`; meaningless if ``faults`` grew."""
        found = self._list(number, row, self.columns[0])
        words = [self._word(number, at, word) for at, word in enumerate(found)]
        if not self.has_tags:
            if row.get(self.columns[1]) is not None:
                self.faults.add(number, self.columns[1], row[self.columns[1]], "are tags, but the first row has none")
            return {"words": words}
        tags = self._list(number, row, self.columns[1])
        if len(tags) != len(words):
            detail = f": there are {len(tags)} tags for {len(words)} words"
            self.faults.add(number, self.columns[1], tags, "does not have one tag for each word", detail)
        return {"words": words, "tags": [self._name(number, at, tag) for at, tag in enumerate(tags)]}

    def _word(self, number: int, at: int, word: Any) -> str:
        if not isinstance(word, str):
            self._fault(number, at, self.columns[0], word, "is not text")
        elif not is_unicode(word):
            self._fault(number, at, self.columns[0], ascii(word), "is not valid Unicode, or has a NUL character")
        else:
            return word
        return ""

    def _list(self, number: int, row: dict[str, Any], column: str) -> list[Any]:
        value = row.get(column)
        if isinstance(value, list):
            return value
        what = "is not a list" if value is not None else "in place of a list; a sentence without words is []"
        self.faults.add(number, column, value, what)
        return []

    def _name(self, number: int, at: int, tag: Any) -> str:
        """A tag as text."""
        column = self.columns[1]
        if isinstance(tag, str):
            if tag.strip() and is_unicode(tag):
                return tag.strip()
            self._fault(
                number,
                at,
                column,
                ascii(tag) if tag.strip() else tag,
                "is an empty tag" if not tag.strip() else "is not valid Unicode",
            )
        elif isinstance(tag, bool) or not isinstance(tag, int):
            self._fault(number, at, column, tag, "is not a tag: it must be text or a whole number")
        elif self.names is None:
            self._fault(
                number,
                at,
                column,
                tag,
                "is a number without a name: give the tags in their order, task.tags=[O,B-PER,…]",
            )
        elif not 0 <= tag < len(self.names):
            what = f"is not the number of a tag; they are 0 to {len(self.names) - 1}: {some(self.names)}"
            self._fault(number, at, column, tag, what)
        else:
            return self.names[tag].strip()
        return ""

    def _fault(self, number: int, at: int, column: str, value: Any, what: str) -> None:
        add_at(self.faults, self.word_lines, number, at, column, value, what)


def add_at(faults: Faults, word_lines: bool, number: int, at: int, column: str, value: Any, what: str) -> None:
    """Note a fault of one word: by its line, or by the row and the position in the list, counted from 1."""
    if word_lines:
        faults.add(number + at, column, value, what)
    else:
        faults.add(number, column, value, what, f" (word {at + 1} of the row)")


def tag_numbers(part: WordsPart, tags: Sequence[str], whose: str, column: str, problems: list[str]) -> pa.Table:
    """The table of a split with tag numbers. A tag that is not in ``tags`` is a problem.

    Args:
        whose: who has these tags, for messages.
        column: name of the column of tags, for messages.
    """
    known = {name: i for i, name in enumerate(tags)}
    near = cache(lambda name: known_classes(name, tags))  # slow, and a wrong tag may be on many words
    faults = part.faults()

    def rows() -> Iterator[list[int]]:
        for row, names in enumerate(part.table.column("tags").to_pylist()):
            for at, name in enumerate(names):
                if name not in known:
                    hint = f"; perhaps {near(name)} is meant" if near(name) else ""
                    file = part.sources[row]
                    what = f"is not a tag of {whose}: {some(tags)}{hint}"
                    add_at(faults[file], part.files[file].word_lines, part.numbers[row], at, column, name, what)
            yield [known.get(name, 0) for name in names]

    numbers = pa.array(rows(), pa.list_(pa.int64()))
    problems += [message for fault in faults for message in fault.messages()]
    return part.table.set_column(part.table.column_names.index("tags"), "tags", numbers)
