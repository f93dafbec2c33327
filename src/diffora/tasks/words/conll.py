"""Files in the format of CoNLL: a word and its tags on each line, and a blank line between sentences."""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffora.tasks.messages import more
from diffora.tasks.sources.lines import utf8
from diffora.tasks.sources.records import Records, Row

DOCUMENT = "-DOCSTART-"
"""The first field of a line that stands between documents."""


@dataclass(frozen=True)
class _Line:
    number: int
    text: str
    fields: tuple[str, ...]

    @property
    def is_document(self) -> bool:
        return re.split("[ \t]", self.text, maxsplit=1)[0] == DOCUMENT


def read_conll(file: Path, tokens: tuple[str, int | None], tags: tuple[str, int | None], notes: list[str]) -> Records:
    """The sentences of a file.

    Fields are separated by tabs if each line has one, otherwise by spaces. Lines that begin with -DOCSTART- are left
    out, and of CoNLL-U those whose first field is a range or a decimal number, such as 1-2 or 8.1: they are no words
    of their own. A line that begins with # before a sentence is a comment, unless it has as many fields as the other
    lines: then it is a word such as #tag. With # alone in the first field it is a word if other lines have its tag.

    Args:
        tokens, tags: for the words and for the tags, the name of the column and its number from 1. Without a number,
            words are in the first column and tags in the last one. A file of one column has no tags.
        notes: grows by what is left out.

    Raises:
        ValueError: lines have different numbers of fields, or there is no such column.
    """
    lines = list(_lines(utf8(file)))
    width, own = _width(lines), [line for line in lines if line.text]
    columns = _columns(tokens, tags, width)
    last = columns[-1][1]
    words = [line for line in own if not line.text.startswith("#") and not line.is_document]
    known = {line.fields[last] for line in words if len(line.fields) == width}
    conllu = columns[0][1] > 0 and all(re.fullmatch(r"\d+([-.]\d+)?", line.fields[0]) for line in words)
    sentences: list[tuple[int, list[tuple[str, ...]]]] = []
    comments = documents = parts = 0
    in_sentence = False
    wrong: list[_Line] = []
    for line in lines:
        starts = not in_sentence
        if not line.text:
            in_sentence = False
        elif line.is_document:
            documents, in_sentence = documents + 1, False
        elif starts and _is_comment(line, width, last, known):
            comments += 1
        elif conllu and not line.fields[0].isdigit():
            parts += 1
        elif len(line.fields) != width:
            wrong.append(line)
        else:
            if starts:
                sentences.append((line.number, []))
            sentences[-1][1].append(line.fields)
            in_sentence = True
    if wrong:
        raise ValueError(
            f"line {wrong[0].number} has {len(wrong[0].fields)} fields, other lines have {width}{more(len(wrong))}: "
            f"{wrong[0].text[:60]}"
        )
    notes += [f"{comments:,} lines of comments left out"] if comments else []
    notes += [f"{documents:,} lines {DOCUMENT} left out"] if documents else []
    notes += [f"{parts:,} lines of words in several parts or of empty words left out (CoNLL-U)"] if parts else []
    if width > len(columns):
        notes.append(f"columns of {file.name}: {', '.join(f'{name} {at + 1}' for name, at in columns)} of {width}")
    return Records(str(file), [name for name, _ in columns], _rows(sentences, columns), "line", word_lines=True)


def _lines(text: str) -> Iterator[_Line]:
    lines = re.split(r"\r\n|\n|\r", text)
    tabs = all("\t" in line for line in lines if line.strip() and not line.startswith(("#", DOCUMENT)))
    for number, line in enumerate(lines, start=1):
        line = line.strip(" \t")
        fields = line.split("\t") if tabs else re.split("[ \t]+", line)
        yield _Line(number, line, tuple(field.strip(" ") for field in fields))


def _width(lines: Sequence[_Line]) -> int:
    """How many fields a line has: those of the first line with a word that is no comment."""
    own = [line for line in lines if line.text and not line.is_document]
    first = next((line for line in own if not line.text.startswith("#")), own[0] if own else None)
    return len(first.fields) if first else 2


def _is_comment(line: _Line, width: int, last: int, known: Collection[str]) -> bool:
    """Whether a line before a sentence is a comment, and not a word such as #tag or #."""
    if not line.text.startswith("#") or len(line.fields) != width:
        return line.text.startswith("#")
    return line.fields[0] == "#" and line.fields[last] not in known


def _columns(tokens: tuple[str, int | None], tags: tuple[str, int | None], width: int) -> list[tuple[str, int]]:
    """(name, position from 0) of the columns that are read."""
    found = [(tokens[0], (tokens[1] or 1) - 1)]
    if tags[1] is not None or width > 1:
        found.append((tags[0], width - 1 if tags[1] is None else tags[1] - 1))
    for key, (_, at) in zip(("task.tokens_column", "task.tags_column"), found, strict=False):
        if at >= width:
            raise ValueError(f"{key}={at + 1}: its lines have {width} columns")
    if len(found) == 2 and found[0][1] == found[1][1]:
        raise ValueError(f"words and tags are both in column {found[0][1] + 1}")
    return found


def _rows(sentences: Sequence[tuple[int, list[tuple[str, ...]]]], columns: Sequence[tuple[str, int]]) -> Iterator[Row]:
    for number, words in sentences:
        yield number, {name: [fields[at] for fields in words] for name, at in columns}
