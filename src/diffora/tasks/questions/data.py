"""Loads the rows of question answering from the hub, from parquet or jsonl files, or from SQuAD's own JSON format.

Rows are read here; `check` checks them one by one. All faults are reported together, before anything expensive starts.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from diffora.errors import UserError, first_line
from diffora.tasks.account import Account, Accounts
from diffora.tasks.questions.check import TEXTS, Reader, check
from diffora.tasks.sources.faults import READ_ERRORS
from diffora.tasks.sources.files import check_folder, find_file
from diffora.tasks.sources.hub import hub_splits
from diffora.tasks.sources.lines import BadLine, json_lines, unique_keys, utf8
from diffora.tasks.sources.tables import row_dicts

ROWS_AT_ONCE = 1000  # bounds memory
FORMATS = ".parquet, .jsonl or SQuAD's own .json"


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
        hub: the hub dataset to use if ``path`` is None.
        path: folder with the splits as files.
        files: for each split to read, the name of its file in ``path``; None looks for the usual names.
        unanswerable: whether a question may have no answer.
        labelled: whether all rows must have the column ``answers``.
        accounts: gets what became of the rows of each split.

    Returns:
        A table for each split with the columns of `check.SCHEMA`. The columns ``answers`` and ``starts`` (the character
        of the context where each answer starts) are left out if the rows have no answers.

    Raises:
        UserError: everything that is wrong, together.
    """
    accounts = {} if accounts is None else accounts
    accounts |= {split: Account() for split in files}
    problems: list[str] = []
    if path is None:
        splits = hub_splits(task, hub, None, list(files), f"<folder with {' and '.join(files)} as {FORMATS}>")
        readers = {split: (f"{hub}/{split}", _from_table(rows.data.table)) for split, rows in splits.items()}
    else:
        readers = _open_files(Path(path), files, unanswerable, problems, accounts)
    tables = {}
    for split, (where, (names, rows)) in readers.items():
        try:
            tables[split] = check(names, rows, where, problems, unanswerable, labelled, accounts[split])
        except READ_ERRORS as error:
            problems.append(f"{where} cannot be read: {first_line(error)}")
    if problems:
        raise UserError(problems)
    return tables


def _open_files(
    folder: Path, files: dict[str, str | None], unanswerable: bool, problems: list[str], accounts: Accounts
) -> dict[str, tuple[str, Reader]]:
    """For each split its file, as messages name it, and a reader; a file that cannot be opened is a problem."""
    check_folder(folder, f"{', '.join(files)} as {FORMATS}")
    readers = {}
    for split, name in files.items():
        file = find_file(folder, split, [name] if name else _names(split, unanswerable), problems)
        if file is None:
            continue
        try:
            readers[split] = str(file), _open(file, accounts[split].notes)
        except READ_ERRORS as error:
            problems.append(f"{file} cannot be read as {file.suffix}: {first_line(error)}")
    return readers


def _names(split: str, unanswerable: bool) -> list[str]:
    """Possible names of a split's file: those of the hub and those of the official site."""
    official = {"train": "train", "validation": "dev"}.get(split)
    version = "v2.0" if unanswerable else "v1.1"
    names = [f"{split}.parquet", f"{split}-00000-of-00001.parquet", f"{split}.jsonl", f"{split}.json"]
    if official:
        names += [name for name in (f"{official}.json", f"{official}-{version}.json") if name not in names]
    return names


# --- readers: each gives the names of the columns, and the rows as in the hub's columns ---


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
            yield from row_dicts(batch, before)
            before += batch.num_rows

    return table.column_names, rows()


def _peek(rows: Iterator[dict[str, Any]]) -> Reader:
    """A reader that takes the names of the columns from the first row."""
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
                raise ValueError(f"line {number} {row}")
            yield row


def _from_official(file: Path) -> Iterator[dict[str, Any]]:
    """Rows, one per question, from the official format, in which articles hold paragraphs and these hold questions."""
    try:
        content = json.loads(utf8(file), object_pairs_hook=unique_keys)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        raise ValueError("not SQuAD's format, which is an object with a list of articles as 'data'")
    for i, article in enumerate(content["data"], start=1):
        try:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    row = {"id": question["id"], "context": paragraph["context"], "question": question["question"]}
                    given = {key: question[key] for key in ("answers", "is_impossible") if key in question}
                    # a question without an answer may leave its answers out
                    yield row | ({"answers": []} if given.get("is_impossible") is True else {}) | given
        except KeyError as error:
            raise ValueError(f"article {i} does not follow SQuAD's format: it lacks {error}") from error
        except TypeError:
            raise ValueError(
                f"article {i} does not follow SQuAD's format: an object with paragraphs, each with context and qas"
            ) from None
