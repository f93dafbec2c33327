"""Instruction, chat and plain-text rows in the forms they come in, read and checked row by row into one form.

====================================  ========================================================================
a row has                             and means
====================================  ========================================================================
``messages``                          turns ``{"role": …, "content": …}``
``conversations``                     turns ``{"from": …, "value": …}`` (ShareGPT); ``human`` and ``gpt`` speak
``prompt``, ``completion``            a user's and an assistant's text, or two lists of turns
``instruction``, ``input``, ``output``  the same with an optional input below the instruction (Alpaca)
``text``                              plain text, no turns
====================================  ========================================================================

The first of these that a row has is taken, so that further columns do no harm.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from diffora.errors import UserError
from diffora.tasks.sources import SUBSET_SEED, content_hash, first_line, joint_hash, more

Turn = dict[str, str]

SPEAKERS = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
FORMS = "messages, conversations, prompt and completion, instruction and output, or text"
SCHEMA = pa.schema(
    {
        "number": pa.int64(),  # of the row at its source, from 1
        "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),  # none for plain text
        "text": pa.string(),  # empty for a conversation
    }
)
ROWS_AT_ONCE = 1000
FILES = (".parquet", ".jsonl")


class Fault(ValueError):
    """What is wrong with one row: its column, the offending value and the reason."""

    def __init__(self, column: str, value: Any, reason: str) -> None:
        super().__init__(reason)
        self.column, self.value, self.reason = column, value, reason


def read(rows: Iterable[tuple[int, Any]], source: str, problems: list[str]) -> pa.Table:
    """Check rows and bring them into the form of `SCHEMA`. Rows of empty text are left out.

    Args:
        rows: pairs of row number (from 1) and row; a row may be a `Fault`.
        source: file or split, for messages.
        problems: grows by one message for each kind of fault, with the first row that has it.
    """
    faults: dict[tuple[str, str], list[Any]] = {}
    batches: list[pa.RecordBatch] = []
    waiting: list[dict[str, Any]] = []
    total = 0
    for number, row in rows:
        total += 1
        try:
            if isinstance(row, Fault):
                raise row
            found = conversation(row)
        except Fault as fault:
            faults.setdefault((fault.column, fault.reason), [number, fault.value, 0])[2] += 1
            continue
        if isinstance(found, list):
            waiting.append({"number": number, "messages": found, "text": ""})
        elif found:
            waiting.append({"number": number, "messages": [], "text": found})
        if len(waiting) == ROWS_AT_ONCE:
            batches.append(pa.RecordBatch.from_pylist(waiting, schema=SCHEMA))
            waiting = []
    for (column, reason), (number, value, count) in faults.items():
        where = f"{source}, row {number} (data rows, counted from 1)" + (f", column '{column}'" if column else "")
        problems.append(f"{where}: {_show(value)} {reason}{more(count)}.")
    if not faults and not batches and not waiting:
        problems.append(f"{source}: " + ("no rows." if total == 0 else f"none of the {total} rows has any text."))
    return pa.Table.from_batches([*batches, pa.RecordBatch.from_pylist(waiting, schema=SCHEMA)], schema=SCHEMA)


def read_file(file: Path, problems: list[str]) -> pa.Table:
    """`read` for a .parquet or .jsonl file."""
    try:
        return read(_lines(file) if file.suffix == ".jsonl" else _records(file), str(file), problems)
    except (pa.ArrowException, OSError) as error:
        problems.append(f"{file} cannot be read as {file.suffix}: {first_line(error)}")
        return SCHEMA.empty_table()


def _lines(file: Path) -> Iterator[tuple[int, Any]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                shown = line.strip()[:60].decode(errors="replace")
                # Without the place, which differs from line to line, equal faults are counted together.
                yield number, Fault("", shown, f"is not JSON ({first_line(error).split(':')[0]})")


def _records(file: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    with pyarrow.parquet.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(ROWS_AT_ONCE):
            for row in batch.to_pylist():
                number += 1
                yield number, row


def conversation(row: Any) -> list[Turn] | str:
    """The turns of a row, or its plain text.

    Raises:
        Fault: it has none of the known forms, or something in it is not as it should be.
    """
    if not isinstance(row, Mapping):
        raise Fault("", row, "is not an object with columns")
    row = {key: value for key, value in row.items() if value is not None}  # a column that only other rows have
    for column in ("messages", "conversations"):
        if column in row:
            return _turns(row[column], column)
    if "prompt" in row and "completion" in row:
        return [*_said(row["prompt"], "prompt", "user"), *_said(row["completion"], "completion", "assistant")]
    if "instruction" in row and "output" in row:
        asked = _text(row["instruction"], "instruction")
        if added := _text(row.get("input", ""), "input"):
            asked = f"{asked}\n\n{added}"
        return [_turn("user", asked), _turn("assistant", _text(row["output"], "output"))]
    if "text" in row:
        text = _text(row["text"], "text")
        return text if text.strip() else ""
    raise Fault("", sorted(row), f"are its columns; expected {FORMS}")


def _turns(value: Any, column: str) -> list[Turn]:
    if not isinstance(value, list | np.ndarray):
        raise Fault(column, value, "is not a list of turns")
    if not len(value):
        raise Fault(column, [], "has no turns")
    turns = []
    for turn in value:
        if not isinstance(turn, Mapping):
            raise Fault(column, turn, 'is not a turn such as {"role": "user", "content": "…"}')
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if role not in SPEAKERS:
            raise Fault(column, role, f"is not a role; known are {', '.join(SPEAKERS)}")
        turns.append(_turn(SPEAKERS[role], _text(content, column)))
    return turns


def _said(value: Any, column: str, role: str) -> list[Turn]:
    return _turns(value, column) if isinstance(value, list) else [_turn(role, _text(value, column))]


def _turn(role: str, content: str) -> Turn:
    return {"role": role, "content": content}


def _text(value: Any, column: str) -> str:
    if isinstance(value, list):
        raise Fault(
            column, value, "are the parts of a content; images, sound and the like are not supported: give text"
        )
    if not isinstance(value, str):
        raise Fault(column, value, "is not text")
    try:
        value.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell
        raise Fault(column, ascii(value), "is not valid Unicode") from None
    return value


def _show(value: Any) -> str:
    if isinstance(value, str):
        return repr(value[:60] + "…" if len(value) > 60 else value)
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text[:60] + ("…" if len(text) > 60 else "")


def cut_validation(table: pa.Table, rows: int) -> tuple[pa.Table, pa.Table]:
    """(training, validation) rows of a source that has no validation split: the same ones in every run.

    Raises:
        UserError: there are too few rows.
    """
    if table.num_rows < rows + 2:
        raise UserError(
            f"task.validation_rows={rows} cannot be cut from {table.num_rows} training rows: "
            f"it must be at most {max(0, table.num_rows - 2)}"
        )
    order = np.random.default_rng([SUBSET_SEED, 1]).permutation(table.num_rows)
    chosen, rest = np.sort(order[:rows]), np.sort(order[rows:])
    return table.take(pa.array(rest)), table.take(pa.array(chosen))


def rows_hash(table: pa.Table) -> str:
    """sha256 of what is said in a table of `SCHEMA`, wherever its rows stood at their source."""
    turns = pc.list_flatten(table.column("messages"))
    said = {name: pc.struct_field(turns, name) for name in ("role", "content")}
    turn_counts = pc.list_value_length(table.column("messages"))
    rows = pa.table({"turns": turn_counts, "text": table.column("text")})
    return joint_hash(map(content_hash, (rows, pa.table(said))))
