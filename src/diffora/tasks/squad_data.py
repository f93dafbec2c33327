"""Where the rows of question answering come from: the hub, parquet or jsonl files in its columns, SQuAD's own JSON.

Rows are checked here one by one, before anything expensive starts, and all faults are reported together.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from diffora.errors import UserError
from diffora.tasks.account import Account, Accounts, note_ignored
from diffora.tasks.lines import BadLine, json_lines, once, utf8
from diffora.tasks.sources import check_columns, check_folder, find_file, first_line, hub_splits, more, to_rows

ROWS_AT_ONCE = 1000  # bounds memory
SHIFTS = (0, -1, 1, -2, 2)  # characters by which answer_start may be off and is put right
FORMATS = ".parquet, .jsonl or SQuAD's own .json"
TEXTS = ("id", "context", "question")
KNOWN = ("title", "is_impossible", "plausible_answers")  # columns of SQuAD that nothing here needs
SCHEMA = pa.schema(
    {**dict.fromkeys(TEXTS, pa.string()), "answers": pa.list_(pa.string()), "starts": pa.list_(pa.int32())}
)

Reader = tuple[Sequence[str], Iterable[dict[str, Any]]]  # names of the columns, rows as in the hub's columns


def read(
    task: str,
    hub: str,
    path: str | None,
    files: dict[str, str | None],
    unanswerable: bool,
    labelled: bool = True,
    accounts: Accounts | None = None,
) -> dict[str, pa.Table]:
    """Read and check splits.

    Args:
        task: the task's name, for messages.
        hub: the hub dataset that is used where ``path`` is None.
        path: folder with the splits as files.
        files: the splits to read; the name of each one's file in ``path``, None to look for it.
        unanswerable: whether a question may have no answer.
        labelled: whether all rows must have the column ``answers``.
        accounts: gets what became of the rows of each split.

    Returns:
        A table for each split with the columns of `SCHEMA`; ``answers`` and ``starts``, the characters where they
        start in the context, only where the rows have answers.

    Raises:
        UserError: everything that is wrong, together.
    """
    accounts = {} if accounts is None else accounts
    accounts |= {split: Account() for split in files}
    problems: list[str] = []
    readers: dict[str, tuple[str, Reader]] = {}
    if path is None:
        splits = hub_splits(task, hub, None, list(files), f"<folder with {' and '.join(files)} as {FORMATS}>")
        for split, rows in splits.items():
            readers[split] = f"{hub}/{split}", _from_table(rows.data.table)
    else:
        folder = Path(path)
        check_folder(folder, f"{', '.join(files)} as {FORMATS}")
        for split, name in files.items():
            file = find_file(folder, split, [name] if name else _names(split, unanswerable), problems)
            if file is None:
                continue
            try:
                readers[split] = str(file), _open(file, accounts[split].notes)
            except (pa.ArrowException, OSError, ValueError) as error:
                problems.append(f"{file} cannot be read as {file.suffix}: {first_line(error)}")
    tables = {}
    for split, (where, (names, rows)) in readers.items():
        try:
            tables[split] = _check(names, rows, where, problems, unanswerable, labelled, accounts[split])
        except (pa.ArrowException, OSError, ValueError) as error:
            problems.append(f"{where} cannot be read: {first_line(error)}")
    if problems:
        raise UserError(problems)
    return tables


def _names(split: str, unanswerable: bool) -> list[str]:
    """What a split's file may be called: the hub's names and those of the official site."""
    official = {"train": "train", "validation": "dev"}.get(split)
    version = "v2.0" if unanswerable else "v1.1"
    names = [f"{split}.parquet", f"{split}-00000-of-00001.parquet", f"{split}.jsonl", f"{split}.json"]
    if official:
        names += [name for name in (f"{official}.json", f"{official}-{version}.json") if name not in names]
    return names


# --- readers ---


def _open(file: Path, notes: list[str]) -> Reader:
    if file.suffix == ".parquet":
        with pa.parquet.ParquetFile(file, page_checksum_verification=True) as parquet:
            return _from_table(parquet.read())
    if file.suffix == ".jsonl":
        return _peek(_from_lines(file, notes))
    if file.suffix == ".json":
        return _peek(_from_official(file))
    raise ValueError(f"files of question answering are {FORMATS}")


def _from_table(table: pa.Table) -> Reader:
    def rows() -> Iterator[dict[str, Any]]:
        before = 0
        for batch in table.to_batches(max_chunksize=ROWS_AT_ONCE):
            yield from to_rows(batch, before)
            before += batch.num_rows

    return table.column_names, rows()


def _peek(rows: Iterator[dict[str, Any]]) -> Reader:
    first = next(rows, None)
    if first is None:
        return ((*TEXTS, "answers"), iter(()))

    def whole() -> Iterator[dict[str, Any]]:
        yield first
        yield from rows

    return list(first), whole()


def _from_lines(file: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    with file.open("rb") as lines:
        for number, row in json_lines(lines, notes):
            if isinstance(row, BadLine):
                raise ValueError(f"row {number} (counted from 1) {row}")
            yield row


def _from_official(file: Path) -> Iterator[dict[str, Any]]:
    """The format of the official site: articles of paragraphs of questions; a row is a question."""
    try:
        content = json.loads(utf8(file), object_pairs_hook=once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        raise ValueError("not SQuAD's format, an object with a list of articles as 'data'")
    for i, article in enumerate(content["data"], start=1):
        try:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    row = {"id": question["id"], "context": paragraph["context"], "question": question["question"]}
                    yield row | {key: question[key] for key in ("answers", "is_impossible") if key in question}
        except KeyError as error:
            raise ValueError(f"article {i} is not as in SQuAD's format, it lacks {error}") from error
        except TypeError:
            raise ValueError(
                f"article {i} is not as in SQuAD's format, an object with paragraphs, of which each has context and qas"
            ) from None


# --- checks ---


class _Faults:
    """The first row and the number of the faults of each kind in one file."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.found: dict[tuple[str, str], list[Any]] = {}

    def add(self, row: int, column: str, value: Any, kind: str, detail: str = "") -> None:
        entry = self.found.setdefault((column, kind), [0, row, value, detail])
        entry[0] += 1

    def messages(self) -> Iterator[str]:
        for (column, kind), (count, row, value, detail) in self.found.items():
            shown = json.dumps(value, ensure_ascii=False, default=str)[:80].encode(errors="backslashreplace").decode()
            where = f"{self.file}, row {row} (data rows, counted from 1), column '{column}'"
            yield f"{where}: {shown} {kind}{detail}{more(count)}."


def _check(
    names: Sequence[str],
    rows: Iterable[dict[str, Any]],
    file: str,
    problems: list[str],
    unanswerable: bool,
    labelled: bool,
    account: Account,
) -> pa.Table:
    """The rows as a table of `SCHEMA`; meaningless when it added to ``problems``."""
    before = len(problems)
    has_answers = labelled or "answers" in names
    check_columns(names, (*TEXTS, "answers") if has_answers else TEXTS, file, problems)
    if len(problems) > before:
        return SCHEMA.empty_table()
    faults = _Faults(file)
    there: dict[str, None] = dict.fromkeys(names)
    seen: dict[str, int] = {}
    moved: list[int] = []
    without: list[int] = []
    batches: list[pa.RecordBatch] = []
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    number = 0
    for number, row in enumerate(rows, start=1):
        there |= dict.fromkeys(row)
        if not has_answers and row.get("answers") is not None:
            faults.add(number, "answers", row["answers"], "answers a question, while the first row has no answers")
        for name in TEXTS:
            columns[name].append(_text(row.get(name), number, name, faults))
        key = columns["id"][-1]
        if key and seen.setdefault(key, number) != number:
            faults.add(number, "id", key, "stands in an earlier row too", f" (row {seen[key]})")
        answers = _answers(row.get("answers"), number, faults) if has_answers else None
        if answers == ([], []):
            without.append(number)
        texts, starts = answers or ([], [])
        if texts and row.get("is_impossible"):
            faults.add(number, "answers", texts, "answers a question of which is_impossible says that it has no answer")
        if columns["context"][-1]:
            starts = _aligned(columns["context"][-1], texts, starts, number, faults, moved)
        columns["answers"].append(texts)
        columns["starts"].append(starts)
        if number % ROWS_AT_ONCE == 0:
            batches.append(pa.record_batch(columns, schema=SCHEMA))
            columns = {name: [] for name in SCHEMA.names}
    batches.append(pa.record_batch(columns, schema=SCHEMA))
    if number == 0:
        problems.append(f"{file}: no rows.")
    if not unanswerable and not labelled and len(without) == number:
        has_answers = False
    elif not unanswerable:
        for row_number in without:
            faults.add(row_number, "answers", [], "means a question without an answer, which task=squad_v2 takes")
    account.read = number
    if moved:
        account.change(
            f"answer_start is off by a character or two, put right, first in row {moved[0]}", len(set(moved))
        )
    note_ignored(account, [name for name in there if name not in (*TEXTS, "answers", *KNOWN)])
    problems += faults.messages()
    table = pa.Table.from_batches(batches, SCHEMA)
    return table if has_answers else table.select(TEXTS)


def _text(value: Any, row: int, name: str, faults: _Faults) -> str:
    if value is None:
        faults.add(row, name, value, "in place of a text")
    elif not isinstance(value, str):
        faults.add(row, name, value, "is not text")
    elif not value.strip():
        faults.add(row, name, value, "is empty")
    elif not _is_unicode(value):
        faults.add(row, name, ascii(value), "is not valid Unicode")
    else:
        return value
    return ""


def _is_unicode(text: str) -> bool:
    """Whether a text is without half a surrogate pair, which JSON can spell."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _answers(value: Any, row: int, faults: _Faults) -> tuple[list[str], list[int]] | None:
    """Texts and starts of a row's answers, given as a pair of lists or as a list of pairs; None for faulty ones."""
    if isinstance(value, list) and all(isinstance(pair, dict) for pair in value):
        value = {key: [pair.get(key) for pair in value] for key in ("text", "answer_start")}
    texts, starts = (value.get("text"), value.get("answer_start")) if isinstance(value, dict) else (None, None)
    if not isinstance(texts, list) or not isinstance(starts, list):
        faults.add(row, "answers", value, "is not {text: [...], answer_start: [...]}")
    elif len(texts) != len(starts):
        faults.add(row, "answers", value, "has", f" {len(texts)} texts and {len(starts)} starts")
    elif not all(isinstance(text, str) and text.strip() for text in texts):
        faults.add(row, "answers", texts, "holds an answer that is no text; no answer is an empty list")
    elif not all(isinstance(start, int) and not isinstance(start, bool) and start >= 0 for start in starts):
        faults.add(row, "answers", starts, "holds an answer_start that is not a whole number of at least 0")
    else:
        return texts, starts
    return None


def _aligned(
    context: str, texts: list[str], starts: list[int], row: int, faults: _Faults, moved: list[int]
) -> list[int]:
    """Where the answers truly stand in the context; an answer within `SHIFTS` of its start is put right."""
    found = []
    for text, start in zip(texts, starts, strict=True):
        places = (start + shift for shift in SHIFTS)
        place = next((at for at in places if at >= 0 and context.startswith(text, at)), None)
        if place is None:
            there, elsewhere = context[start : start + len(text)][:40], context.find(text)
            where = f"it stands at {elsewhere}" if elsewhere >= 0 else "it stands nowhere in the context"
            faults.add(row, "answers", text, "does not stand at", f" answer_start {start}, where {there!r} is; {where}")
        elif place != start:
            moved.append(row)
        found.append(start if place is None else place)
    return found
